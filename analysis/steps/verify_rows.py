"""Rows of verify.parquet: what a network costs and how it scores, kept, replaced and shown."""

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import count
from typing import Any

import pandas as pd
from torch import Tensor

from analysis.cost import cost_table
from analysis.planning import accounting
from analysis.planning.significance import only_compared
from analysis.scoring import Scores, jackknife_error, label_doubts
from analysis.session.loaded_run import LoadedRun
from analysis.storage.columns import VERIFY_COLUMNS
from analysis.task import mean_and_error
from analysis.terminal.console import as_text, say, warn
from quant.batchnorm import batchnorms
from quant.bit_plan import PlannedSite


def verify_row(
    kind: str,
    opened: LoadedRun,
    sites: Sequence[PlannedSite],
    per_image: Scores,
    *,
    estimator: str,
    batchnorm: str = "stored",
    divergence: Tensor | None = None,
    metric: Sequence[float] = (),
) -> dict[str, Any]:
    """A row of verify.parquet: what the quantization of `sites` costs, and the mean scores of the images.

    `divergence` (images,) is from the float network, `metric` is what `jackknife` returns. Each figure is NaN where it
    was not measured, loss and score without labels, top-1 of another task than classification. `estimator` set the
    scales: one of `ESTIMATORS`, `learned` or, in floating point, `none`. `batchnorm` is `stored` or `re-estimate`.
    """
    treated = {"stored": "stored", "re-estimate": "re_estimated"}[batchnorm] if batchnorms(opened.model) else "none"
    loss, loss_se = mean_and_error(per_image.loss)
    score, score_se = mean_and_error(per_image.score)
    change, change_se = (math.nan, math.nan) if divergence is None else mean_and_error(divergence)
    classes = opened.task.name == "classification"
    totals = accounting.totals(sites, cost_table(opened.sites, opened.trace.unplanned), opened.stored)
    floating = float(accounting.FLOAT_BITS)
    if kind == "float" and opened.classes is not None and loss == loss:
        doubts = label_doubts(loss, score, len(per_image.loss), opened.classes)
        if doubts:
            warn(doubts)
    return {
        "plan": kind,
        "weight_bits": floating if totals.weight_bits is None else totals.weight_bits,
        "activation_bits": floating if totals.activation_bits is None else totals.activation_bits,
        "size_bytes": totals.size_bytes,
        "bitops": totals.bitops,
        "loss": loss,
        "loss_se": loss_se,
        "score": score,
        "score_se": score_se,
        "divergence": change,
        "divergence_se": change_se,
        "metric": metric[0] if metric else math.nan,
        "metric_se": jackknife_error(metric) if metric else math.nan,
        "top1": score if classes else math.nan,
        "top1_se": score_se if classes else math.nan,
        "images": len(per_image.loss),
        "estimator": estimator,
        "batchnorm": treated,
    }


def verify_rows(opened: LoadedRun) -> list[dict[str, Any]]:
    """The rows that verify.parquet holds; none where there is none."""
    if not (opened.run.path / "verify.parquet").exists():
        return []
    return opened.run.read_table("verify", VERIFY_COLUMNS).to_dict("records")


_COSTS = ("weight_bits", "activation_bits", "size_bytes", "bitops")


def keep_row(opened: LoadedRun, row: Mapping[str, Any], detail: str = "") -> str:
    """Add a row to verify.parquet, in place of one of the same plan, cost and treatment; says what it is then.

    No two rows have one name: of a second one of other costs or another treatment, such as three random plans, the name
    gets what differs, `planned-minmax`, the `detail`, `uniform-w2a2`, or a number. `planned` is always the plan that
    was measured last.
    """
    plain = row["plan"]
    with opened.run.taking_turns():
        rows = verify_rows(opened)
        names = {old["plan"] for old in rows}
        of_plan = [old for old in rows if old["plan"] == plain or str(old["plan"]).startswith(f"{plain}-")]
        before = next((old for old in of_plan if _key(old) == _key(row)), None)
        if before is not None:
            rows[rows.index(before)] = {**row, "plan": before["plan"]}
        elif plain not in names:
            rows.append(dict(row))
        elif plain == "planned" and not any(_costs(old) == _costs(row) for old in of_plan):
            for old in of_plan:
                old["plan"] = _free(f"earlier-{old['plan']}", names)
                names.add(old["plan"])
            rows.append(dict(row))
        else:
            same = [old for old in of_plan if _costs(old) == _costs(row)]
            differs = [row[name] for name in ("estimator", "batchnorm") if same and same[0][name] != row[name]]
            rows.append({**row, "plan": _free("-".join((plain, *(differs or [detail] * bool(detail)))), names)})
        opened.run.write_table("verify", pd.DataFrame(rows, columns=list(VERIFY_COLUMNS)))
    if before is None:
        return "new"
    figures = ("loss", "score", "divergence", "metric", "images")
    if all(before[name] == row[name] or before[name] != before[name] for name in figures):
        return "the same to the last digit as the row that was there"
    if before["top1"] == before["top1"]:
        was = f"top-1 {100 * before['top1']:.2f} %, loss {before['loss']:.4g}"
    else:
        was = f"loss {before['loss']:.4g}, score {before['score']:.4g}, divergence {before['divergence']:.4g}"
    return f"measured again, in place of {was} on {before['images']:,} images"


def _costs(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in _COSTS)


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (*_costs(row), row["estimator"], row["batchnorm"])


def _free(name: str, taken: Collection[str]) -> str:
    """The name, with a number where it is taken."""
    numbered = (f"{name}-{k}" for k in count(2))
    return name if name not in taken else next(other for other in numbered if other not in taken)


def drop_rows(opened: LoadedRun, kind: str) -> None:
    """Remove the rows of what is about to be made again from verify.parquet."""
    with opened.run.taking_turns():
        rows = verify_rows(opened)
        kept = [row for row in rows if row["plan"] != kind]
        if len(kept) < len(rows):
            opened.run.write_table("verify", pd.DataFrame(kept, columns=list(VERIFY_COLUMNS)))


def show_rows(opened: LoadedRun, what: str) -> None:
    """Print verify.parquet in the units of a reader: MiB, GBitOps, percent; `what` says which row is new.

    Without the plans that a verification only compares with: it has shown them.
    """
    rows = opened.run.read_table("verify")
    rows = rows[[not only_compared(name) for name in rows["plan"]]]
    shown = rows[["plan", "weight_bits", "activation_bits"]].assign(
        size_mib=rows["size_bytes"] / 2**20,
        gbitops=rows["bitops"] / 1e9,
        loss=rows["loss"],
        loss_se=rows["loss_se"],
        top1_percent=100 * rows["top1"],
        top1_se=100 * rows["top1_se"],
        **({} if rows["top1"].notna().any() else _of_other_tasks(rows)),
        images=rows["images"],
        estimator=rows["estimator"],
        batchnorm=rows["batchnorm"],
    )
    say(as_text(shown.dropna(axis=1, how="all")), quiet=opened.setup.quiet)
    say(f"{what}, in {opened.run.path / 'verify.parquet'}", quiet=opened.setup.quiet)


def _of_other_tasks(rows: pd.DataFrame) -> dict[str, pd.Series]:
    names = ("score", "score_se", "divergence", "divergence_se", "metric", "metric_se")
    return {name: rows[name] for name in names}
