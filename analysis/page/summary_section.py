"""The summary of a report: the figures that decide, of each run, and the networks that were evaluated."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.page.cells import DASH, Cell, Table, finite, measured, number, text
from analysis.page.content import RunContent, Training, belongs
from analysis.page.sensitivity_section import MOST_SENSITIVE
from analysis.planning.accounting import FLOAT_BITS
from analysis.planning.significance import WORDS, only_compared, reading
from analysis.plots import TENSOR_CLASSES
from analysis.statistics.names import shorten_site
from analysis.statistics.variation_tests import differences
from analysis.variation import variation

KINDS = {  # of verify.parquet, in the order of the table
    "float": "floating point",
    "planned": "planned bits, without training",
    "other": "bits of another plan, without training",  # than plan.json as it is now
    "uniform": "uniform bits, without training",
}
COSTS = ("weight_bits", "activation_bits", "size_bytes", "bitops")  # of a row: by them it is known to be of a plan


def deciding(contents: Sequence[RunContent]) -> Table:
    """A row a figure, a column a run: how much its modules vary, what quantizing them costs, its plan, its accuracy.

    Sensitivities are at the lowest bit-width that all runs measured; what no run has, has no row.
    """
    bits = _lowest_common(contents)
    found = [_variation(c) | _sensitivity(c, bits) | _plan(c) | _accuracy(c) for c in contents]
    labels = [label for label in found[0] if any(each[label] != DASH for each in found)]
    rows = tuple((text(label), *(Cell(text=each[label], number=True) for each in found)) for label in labels)
    columns = ("figure", *(content.name for content in contents))
    return Table(caption="The figures that decide", columns=columns, rows=rows, mixed=True)


def readings(contents: Sequence[RunContent]) -> tuple[str, ...]:
    """Whether the modules of one run vary more than another's, and whether each plan is worth more than uniform bits.

    A sentence for weights and for inputs of each pair of runs, and one for each plan that was verified.
    """
    runs = [(c.name, c.stats) for c in contents if c.stats is not None]
    vary = tuple(differences(runs)["reading"]) if len(runs) > 1 else ()
    return (*vary, *filter(None, map(_plan_beside_uniform, contents)))


def evaluated(content: RunContent) -> Table | None:
    """A row for each network that was evaluated, float first and trained ones last; None where none was.

    Of the other plans of a verification uniform bits alone; the rest are left to its section.
    """
    rows = evaluations(content)
    if not rows:
        return None
    columns = (
        "network", "top-1 (%)", "loss (nats)", "weight bits", "activation bits", "size (MiB)", "GBitOps", "images",
        "scales", "BatchNorm",
    )  # fmt: skip
    labels = [network_label(row["plan"], content.trainings) for row in rows]
    cells = tuple(
        (
            text(
                label
                if labels.count(label) == 1
                else f"{label}, {row['weight_bits']:.1f} and {row['activation_bits']:.1f} bits on average"
            ),
            measured(row["top1"], row["top1_se"], scale=100, digits=1),
            measured(row["loss"], row["loss_se"], digits=3),
            number(row["weight_bits"], "{:.2f}"),
            number(row["activation_bits"], "{:.2f}"),
            number(row["size_bytes"] / 2**20, "{:.3f}"),
            number(row["bitops"] / 1e9, "{:.3f}"),
            number(row["images"], "{:,.0f}"),
            text(row["estimator"]),
            text(row["batchnorm"].replace("_", "-")),
        )
        for label, row in zip(labels, rows, strict=True)
    )
    return Table(caption=f"{content.name}: evaluated networks", columns=columns, rows=cells)


def evaluations(content: RunContent) -> list[dict[str, Any]]:
    """Rows of verify.parquet: those of `KINDS` in their order, then trained models; no other baselines.

    A row `planned` that has not the costs of plan.json as it is now is one of the kind `other`.
    """
    if content.verify is None:
        return []
    rank = {kind: place for place, kind in enumerate(KINDS)}
    rows = [row for row in content.verify.astype({"plan": str}).to_dict("records") if not only_compared(row["plan"])]
    if content.plan is not None:
        totals = content.plan.totals
        costs = (
            totals.weight_bits or FLOAT_BITS,
            totals.activation_bits or FLOAT_BITS,
            totals.size_bytes,
            totals.bitops,
        )
        for row in rows:
            if row["plan"] == "planned" and tuple(row[cost] for cost in COSTS) != costs:
                row["plan"] = "other"
    return sorted(rows, key=lambda row: rank.get(row["plan"].partition("-")[0], len(rank)))


def network_label(plan: str, trainings: Iterable[Training]) -> str:
    """What the page calls a row of verify.parquet."""
    if plan in KINDS:
        return KINDS[plan]
    kind, _, detail = plan.partition("-")
    if kind in KINDS:
        return f"{KINDS[kind]} ({detail})"
    if not (plan.startswith("qat") or plan in {training.name for training in trainings}):
        return f"bits of {plan}, without training"
    floating = {training.name: training.plan is None for training in trainings}.get(plan, plan == "qat-float")
    return f"{plan}: " + ("trained in floating point" if floating else "trained with QAT")


def _plan_beside_uniform(content: RunContent) -> str:
    """What the plan is worth beside uniform bits within its budgets, before training; empty where not verified."""
    table = content.verification if belongs(content, content.verification) else None
    uniform = None if table is None else table[table["plan"] == "uniform"]
    if table is None or uniform is None or uniform.empty:
        return ""
    planned, other = table.iloc[0], uniform.iloc[0]
    told = [
        f"by {what} {WORDS[found]} uniform bits ({figures})"
        for what, found, figures in (
            ("top-1", reading(other["planned_ahead"], other["planned_ahead_se"]),
             f"{100 * planned['top1']:.1f} % and {100 * other['top1']:.1f} %"),
            ("KL", reading(other.get("kl_excess", np.nan), other.get("kl_excess_se", np.nan)),
             f"{planned['measured_kl']:.3g} and {other['measured_kl']:.3g} nats"),
        )
        if found
    ]  # fmt: skip
    return f"Without training the plan of {content.name} is {', '.join(told)} within the same budgets." if told else ""


def _variation(content: RunContent) -> dict[str, str]:
    figures = {"weight": {}, "input": {}} if content.stats is None else variation(content.stats)
    weight, inputs = figures["weight"], figures["input"]
    largest = finite(inputs.get("outlier_fraction_max"))
    return {
        "weights: difference between modules (cv, 95 % interval)": _interval(weight),
        "inputs: difference between modules (cv, 95 % interval)": _interval(inputs),
        "inputs: excess kurtosis, typical module": _text(inputs.get("excess_kurtosis_median"), "{:.2f}"),
        "inputs: widest over median channel, typical module": _text(inputs.get("channel_range_ratio_median"), "{:.2f}"),
        "inputs: outliers, worst module (%)": _text(None if largest is None else 100 * largest, "{:.2g}"),
    }


def _sensitivity(content: RunContent, bits: int | None) -> dict[str, str]:
    at = "the lowest bits" if bits is None else f"{bits} bit"
    sites = pd.DataFrame({"module": [], "tensor": [], "divergence": []})
    if content.sensitivity is not None:
        lowest = content.sensitivity["bit_width"].min() if bits is None else bits
        sites = content.sensitivity[content.sensitivity["bit_width"] == lowest]
    ranked = sites.sort_values("divergence", ascending=False, kind="stable")
    total = sites["divergence"].sum()
    first = "" if ranked.empty else shorten_site(ranked["module"].iloc[0], ranked["tensor"].iloc[0])
    if first and ranked["tensor"].iloc[0] == "input":
        first += " (input)"
    return {
        "sites measured": f"{len(sites)}" if len(sites) else DASH,
        **{
            f"KL of the typical {sort} tensor at {at} (nats)": _text(
                sites.loc[sites["tensor"].isin(tensors), "divergence"].median(), "{:.2g}"
            )
            for sort, tensors in TENSOR_CLASSES.items()
        },
        f"most sensitive site at {at}": first or DASH,
        f"share of all KL in the {MOST_SENSITIVE} most sensitive (%)": _text(
            100 * ranked["divergence"].head(MOST_SENSITIVE).sum() / total if total > 0 else None, "{:.0f}"
        ),
    }


def _plan(content: RunContent) -> dict[str, str]:
    totals = None if content.plan is None else content.plan.totals
    bits = () if totals is None else (totals.weight_bits, totals.activation_bits)
    return {
        "plan: mean bits of weights, activations": ", ".join(_text(each, "{:.2f}") for each in bits) or DASH,
        "plan: size (MiB)": _text(
            None if totals is None or totals.size_bytes is None else totals.size_bytes / 2**20, "{:.3f}"
        ),
    }


def _accuracy(content: RunContent) -> dict[str, str]:
    """Of several evaluations of one sort the last."""
    rows = {row["plan"]: row for row in evaluations(content)}
    found = {
        label: measured(row.get("top1"), row.get("top1_se"), scale=100, digits=1).text
        for label, row in (
            ("top-1 in floating point (%)", rows.get("float", {})),
            ("top-1 of the plan, without training (%)", rows.get("planned", {})),
            ("top-1 of the training qat (%)", rows.get("qat", {})),
        )
    }
    ahead = DASH
    if content.verification is not None and belongs(content, content.verification):
        uniform = content.verification[content.verification["plan"] == "uniform"]
        for row in uniform.to_dict("records"):
            ahead = measured(row["planned_ahead"], row["planned_ahead_se"], scale=100, digits=1).text
            ahead = f"+{ahead}" if row["planned_ahead"] > 0 else ahead
    return found | {"plan ahead of uniform bits, without training (points)": ahead}


def _lowest_common(contents: Sequence[RunContent]) -> int | None:
    """The lowest bit-width at which every run that has a sweep of single sites was measured; None without one."""
    measured_at = [set(c.sensitivity["bit_width"]) for c in contents if c.sensitivity is not None]
    return min(set.intersection(*measured_at), default=None) if measured_at else None


def _interval(figures: Mapping[str, Any]) -> str:
    """The coefficient of variation with its interval."""
    cv, low, high = (_text(figures.get(name), "{:.2f}") for name in ("cv", "cv_low", "cv_high"))
    return cv if DASH in (cv, low, high) else f"{cv} ({low} to {high})"


def _text(value: Any, style: str) -> str:
    return number(value, style).text
