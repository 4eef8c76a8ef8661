"""`qvw plan-diff`: two bit plans site by site, and what both cost."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.cost import COST_COLUMNS
from analysis.planning import accounting
from analysis.planning.edited import recounted_beside
from analysis.runs import Run
from analysis.storage.files import write_bytes
from analysis.storage.plan_file import PLAN_FILE, read_plan_file
from analysis.storage.stored_file import STORED, read_stored
from analysis.terminal.console import as_text, say, warn
from quant.bit_plan import BitPlan, PlannedSite
from quant.site import Site

DIFF_COLUMNS = ("module", "tensor", "bits_a", "bits_b", "change", "bytes_a", "bytes_b", "bytes_change", "note")
_TOTALS = {  # row of the table: field of PlanTotals, and what one unit of it is in the file
    "mean weight bits": ("weight_bits", 1),
    "mean activation bits": ("activation_bits", 1),
    "size (bytes)": ("size_bytes", 1),
    "activations of an image (bytes)": ("activation_bytes", 1),
    "GBitOps": ("bitops", 1e9),
    "latency (ms)": ("latency_ms", 1),
}
_SHOWN = 40  # differing sites in the terminal; the file has all


def run_plan_diff(a: Path, b: Path, *, csv: Path | None = None, quiet: bool = False) -> None:
    """Print what two plans cost and the sites in which they differ; write every site to `csv`.

    `a` and `b` are plan files or run folders. Bytes of sites are there where both are run folders with cost.parquet.
    """
    plan_a, plan_b = _read(a), _read(b)
    for line in _different_models(plan_a, plan_b):
        warn(line)
    table = plan_diff(plan_a, plan_b, _cost(a), _cost(b))
    if csv is not None:
        write_bytes(csv, table.to_csv(index=False).encode())
    say(totals_diff(plan_a, plan_b).to_string(index=False, float_format=_figure, na_rep="-"), quiet=quiet)
    differs = table[(table["change"] != 0) | (table["note"] != "")]
    count = f"{len(table) - len(differs)} of {len(table)} sites are the same"
    if differs.empty:
        say(f"\n{count}.", quiet=quiet)
    else:
        shown = differs.head(_SHOWN).replace({"note": ""}, pd.NA).dropna(axis="columns", how="all").astype(object)
        say(f"\n{count}; these are not:\n{as_text(shown.where(shown.notna(), '-'))}", quiet=quiet)
    if len(differs) > _SHOWN:
        say(f"... and {len(differs) - _SHOWN} more; --csv FILE writes all.", quiet=quiet)
    if csv is not None:
        say(f"\nall sites in {csv}", quiet=quiet)


def plan_diff(
    a: BitPlan, b: BitPlan, cost_a: pd.DataFrame | None = None, cost_b: pd.DataFrame | None = None
) -> pd.DataFrame:
    """One row per site of either plan, in network order; columns DIFF_COLUMNS.

    bits_a and bits_b are NA in the plan that leaves the site in floating point, and so is `change` (B less A). Bytes
    are those that the site adds to the stored model (codes, scales and offsets); a site outside a plan counts its
    floating-point weight. They are NA without both frames of cost.parquet. `note` tells what else differs.
    """
    sites_a, sites_b = ({planned.site: planned for planned in plan.sites} for plan in (a, b))
    order, rows = _network_order(list(sites_a), list(sites_b)), []
    for site in order:
        one, two = sites_a.get(site), sites_b.get(site)
        rows.append({"module": site.module, "tensor": site.tensor, "bits_a": one and one.bit_width,
                     "bits_b": two and two.bit_width, "note": _note(one, two)})  # fmt: skip
    table = pd.DataFrame(rows, columns=[column for column in DIFF_COLUMNS if "change" not in column])
    if cost_a is not None and cost_b is not None:
        for column, sites, cost in (("bytes_a", sites_a, cost_a), ("bytes_b", sites_b, cost_b)):
            table[column] = pd.array(_bytes(order, sites, cost), dtype="Int64")
    for name in ("bits", "bytes"):
        table = table.astype({f"{name}_a": "Int64", f"{name}_b": "Int64"})
        table["change" if name == "bits" else "bytes_change"] = table[f"{name}_b"] - table[f"{name}_a"]
    return table[list(DIFF_COLUMNS)]


def totals_diff(a: BitPlan, b: BitPlan) -> pd.DataFrame:
    """What both plans cost, as their files say: total, A, B, change; NaN where one of them lacks the figure."""
    figures: dict[str, tuple[float | None, float | None]] = {"planned sites": (len(a.sites), len(b.sites))}
    both = asdict(a.totals), asdict(b.totals)
    for name, (field, unit) in _TOTALS.items():
        first, second = (None if totals[field] is None else totals[field] / unit for totals in both)
        figures[name] = first, second
    figures["predicted loss change"] = a.predicted_delta_loss, b.predicted_delta_loss
    known = [(name, *pair) for name, pair in figures.items() if pair != (None, None)]
    table = pd.DataFrame(known, columns=["total", "A", "B"]).astype({"A": float, "B": float})
    return table.assign(change=table["B"] - table["A"])


def _network_order(a: list[Site], b: list[Site]) -> list[Site]:
    """The sites of both, each list in its own order; a site of `b` alone follows the one that it follows there."""
    merged = list(a)
    known = set(a)
    after = 0
    for site in b:
        if site in known:
            after = merged.index(site) + 1
        else:
            merged.insert(after, site)
            after += 1
    return merged


def _note(a: PlannedSite | None, b: PlannedSite | None) -> str:
    if a is None or b is None:
        return "only in B" if a is None else "only in A"
    names = ("granularity", "signed", "offset")
    return ", ".join(
        f"{name}: {_words(getattr(a, name))} to {_words(getattr(b, name))}"
        for name in names
        if getattr(a, name) != getattr(b, name)
    )


def _figure(value: float) -> str:
    return f"{value:.0f}" if abs(value) < 1e16 and value == round(value) else f"{value:.4g}"


def _words(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _bytes(order: list[Site], planned: Mapping[Site, PlannedSite], cost: pd.DataFrame) -> list[int | None]:
    """Bytes of each site in the stored model; None for one that the network lacks."""
    rows = accounting.cost_rows(cost)
    found: list[int | None] = []
    for site in order:
        if site not in rows:
            found.append(None)
        elif site in planned:
            found.append(accounting.site_bytes(planned[site], rows[site]))
        else:
            found.append(accounting.FLOAT_BYTES * accounting.elements(site, rows[site]) if site.is_weight else 0)
    return found


def _read(path: Path) -> BitPlan:
    """The plan; that of a run folder with the totals that its sites have there, should it have been edited."""
    plan, cost = read_plan_file(path), _cost(path)
    if cost is None or not (path / STORED).exists():
        return plan
    return recounted_beside(plan, cost, read_stored(path, 0), path / PLAN_FILE, warn)


def _cost(path: Path) -> pd.DataFrame | None:
    if not (path / "cost.parquet").is_file():
        return None
    return Run(path).read_table("cost", COST_COLUMNS)


def _different_models(a: BitPlan, b: BitPlan) -> list[str]:
    if (a.model.name, a.model.kwargs) != (b.model.name, b.model.kwargs):
        return [f"A is a plan of {a.model.name}, B of {b.model.name}: sites of the same name may differ."]
    if a.model.weights_sha256 != b.model.weights_sha256:
        return [f"A and B are plans of other weights of {a.model.name}: their predicted losses do not compare."]
    return []
