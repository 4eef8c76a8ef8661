"""`qvw eval`: accuracy of the floating-point model, of a plan or uniform bits without training, of a trained model."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from analysis.cost import cost_table
from analysis.planning import accounting
from analysis.planning.verdicts import ONLY_COMPARED
from analysis.session.open_run import open_run
from analysis.session.opened import Opened
from analysis.session.setup import Setup
from analysis.steps.eval_request import EvalRequest
from analysis.steps.export import load_checkpoint_
from analysis.storage.columns import VERIFY_COLUMNS
from analysis.sweeps.evaluation import logits_of, mean_and_error, scores
from analysis.terminal.console import as_text, say, warn
from analysis.training.calibration import Calibrated, calibrated, read_plan, warn_of_fewer
from quant.batchnorm import batchnorm_reestimated, batchnorms
from quant.bit_plan import PlannedSite
from quant.prepare import quantized


def run_eval(setup: Setup, request: EvalRequest) -> None:
    """Evaluate what is asked for, and keep the result as a row of verify.parquet."""
    opened = open_run(setup, needs_data=True)
    plan = request.uniform if request.plan_file is None else read_plan(request.plan_file, opened)
    sites: Sequence[PlannedSite] = ()
    if request.checkpoint is not None:
        sites = load_checkpoint_(opened, request.checkpoint)
    data = opened.step_images("eval", "val")
    options = {name: None if value is None else str(value) for name, value in asdict(request).items()}
    text = plan if plan is None or isinstance(plan, str) else plan.to_json()
    options["plan_sha256"] = None if text is None else hashlib.sha256(text.encode()).hexdigest()
    if setup.overwrite and not opened.run.is_done("eval", opened.inputs(data)) and _rows(opened):
        warn(f"--overwrite removes {len(_rows(opened))} rows of verify.parquet, measured on other images.")
        files: Sequence[str] = ("verify.parquet",)
    else:
        files = ()
    with opened.step("eval", data, files, options):
        running: Any = nullcontext()
        if plan is not None:
            made = calibrated(
                opened, plan, layout=request.layout, calibration_images=request.calibration_images,
                estimator=request.estimator,
            )  # fmt: skip
            warn_of_fewer(made, request.calibration_images, "--calibration-images")
            sites = made.plan.sites
            running = running_quantized(opened, made, request.batchnorm)
        with running:
            logits, labels = logits_of(opened.model, opened.stream(data, "evaluation"))
        kind = _kind(request, opened.run.path)
        how = request.estimator if plan is not None else "learned" if sites else "none"
        batchnorm = "stored" if plan is None else request.batchnorm
        row = verify_row(kind, opened, sites, logits, labels, estimator=how, batchnorm=batchnorm)
        what = keep_row(opened, row)
    show_rows(opened, f"{kind} is {what}")


def _kind(request: EvalRequest, run: Path) -> str:
    """What verify.parquet calls it; a trained model has the name of its folder, with its path if of another run."""
    if request.checkpoint is not None:
        folder = request.checkpoint.resolve()
        folder = folder.parent if folder.name == "model.safetensors" else folder
        return folder.name if folder.parent == run.resolve() else str(folder)
    return "float" if request.floating else "uniform" if request.plan_file is None else "planned"


@contextmanager
def running_quantized(opened: Opened, made: Calibrated, batchnorm: str) -> Iterator[None]:
    """A context in which the model runs with these quantizers."""
    anew = batchnorm == "re-estimate" and bool(batchnorms(opened.model))
    with (
        quantized(opened.model, opened.trace, opened.by_site, made.quantizers),
        batchnorm_reestimated(opened.model, made.images) if anew else nullcontext(),
    ):
        yield


def verify_row(
    kind: str,
    opened: Opened,
    sites: Sequence[PlannedSite],
    logits: Tensor,
    labels: Tensor,
    *,
    estimator: str,
    batchnorm: str = "stored",
) -> dict[str, Any]:
    """A row of verify.parquet: what the quantization of `sites` costs, and the figures of the logits.

    `estimator` set the scales: one of `ESTIMATORS`, `learned` or, in floating point, `none`. `batchnorm` is `stored` or
    `re-estimate`.
    """
    treated = {"stored": "stored", "re-estimate": "re_estimated"}[batchnorm] if batchnorms(opened.model) else "none"
    per_image = scores(logits, labels)
    loss, loss_se = mean_and_error(per_image.loss)
    top1, top1_se = mean_and_error(per_image.hit)
    totals = accounting.totals(sites, cost_table(opened.sites), opened.record.parameters)
    floating = float(accounting.FLOAT_BITS)
    return {
        "plan": kind,
        "weight_bits": floating if totals.weight_bits is None else totals.weight_bits,
        "activation_bits": floating if totals.activation_bits is None else totals.activation_bits,
        "size_bytes": totals.size_bytes,
        "bitops": totals.bitops,
        "loss": loss,
        "loss_se": loss_se,
        "top1": top1,
        "top1_se": top1_se,
        "images": len(labels),
        "estimator": estimator,
        "batchnorm": treated,
    }


def keep_row(opened: Opened, row: Mapping[str, Any]) -> str:
    """Add a row to verify.parquet, in place of one of the same plan, cost and treatment; says what it is then."""
    same = ("plan", "weight_bits", "activation_bits", "size_bytes", "bitops", "estimator", "batchnorm")
    with opened.run.taking_turns():
        rows = _rows(opened)
        place = next((i for i, old in enumerate(rows) if all(old[name] == row[name] for name in same)), len(rows))
        before = rows[place] if place < len(rows) else None
        rows[place : place + 1] = [dict(row)]
        opened.run.write_table("verify", pd.DataFrame(rows, columns=list(VERIFY_COLUMNS)))
    if before is None:
        return "new"
    if all(before[name] == row[name] for name in ("loss", "top1", "images")):
        return "the same to the last digit as the row that was there"
    return (
        f"measured anew, in place of top-1 {100 * before['top1']:.2f} %, loss {before['loss']:.4g} on "
        f"{before['images']:,} images"
    )


def _rows(opened: Opened) -> list[dict[str, Any]]:
    if not (opened.run.path / "verify.parquet").exists():
        return []
    return opened.run.read_table("verify", VERIFY_COLUMNS).to_dict("records")


def drop_rows(opened: Opened, kind: str) -> None:
    """Remove the rows of what is about to be made anew from verify.parquet."""
    with opened.run.taking_turns():
        rows = _rows(opened)
        kept = [row for row in rows if row["plan"] != kind]
        if len(kept) < len(rows):
            opened.run.write_table("verify", pd.DataFrame(kept, columns=list(VERIFY_COLUMNS)))


def show_rows(opened: Opened, what: str) -> None:
    """Print verify.parquet in the units of a reader: MiB, GBitOps, percent; `what` says which row is new.

    Without the plans that a verification only compares with: it has shown them.
    """
    rows = opened.run.read_table("verify")
    rows = rows[~rows["plan"].isin(ONLY_COMPARED)]
    shown = rows[["plan", "weight_bits", "activation_bits"]].assign(
        size_mib=rows["size_bytes"] / 2**20,
        gbitops=rows["bitops"] / 1e9,
        loss=rows["loss"],
        loss_se=rows["loss_se"],
        top1_percent=100 * rows["top1"],
        top1_se=100 * rows["top1_se"],
        images=rows["images"],
        estimator=rows["estimator"],
        batchnorm=rows["batchnorm"],
    )
    say(as_text(shown), quiet=opened.setup.quiet)
    say(f"{what}, in {opened.run.path / 'verify.parquet'}", quiet=opened.setup.quiet)
