"""The tables of a report: run content in, cells as text with the value that they are sorted by out."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from analysis import comparison
from analysis.report_cells import DASH, Cell, Table, finite, measured, number, plain, text
from analysis.report_content import RunContent, Training, oscillating_shares
from analysis.variation import variation
from analysis.variation_frames import Measured
from analysis.variation_tests import differences
from quant.bit_plan import BitPlan

KINDS = {  # of verify.parquet, in the order of the summary
    "float": "floating point",
    "planned": "planned bits, without training",
    "uniform": "uniform bits, without training",
    "greedy": "greedy bits, without training",
    "additive": "planned without interactions, without training",
    "reverse": "worst-first bits, without training",
    "random": "random bits, without training",
}


def summary(content: RunContent) -> Table | None:
    """A row for each network that was evaluated, float first and trained ones last; None where none was."""
    if content.verify is None:
        return None
    columns = (
        "network", "top-1 (%)", "loss (nats)", "weight bits", "activation bits", "size (MiB)", "GBitOps", "images",
    )  # fmt: skip
    rows = [
        (
            text(network_label(row["plan"], content.trainings)),
            measured(row["top1"], row["top1_se"], scale=100, digits=1),
            measured(row["loss"], row["loss_se"], digits=3),
            number(row["weight_bits"], "{:.2f}"),
            number(row["activation_bits"], "{:.2f}"),
            number(row["size_bytes"] / 2**20, "{:.3f}"),
            number(row["bitops"] / 1e9, "{:.3f}"),
            number(row["images"], "{:,.0f}"),
        )
        for row in _evaluated(content)
    ]
    return Table(caption=f"{content.name}: evaluated networks", columns=columns, rows=tuple(rows))


def side_by_side(contents: Sequence[RunContent]) -> Table | None:
    """A row a network, a column a run: top-1 with size and bits; several evaluations of one sort share a cell."""
    cells: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for kind in KINDS:  # so that the rows keep this order whatever the first run lacks
        cells[KINDS[kind]] = {}
    for content in contents:
        for row in _evaluated(content):
            label = network_label(row["plan"], content.trainings)
            cells.setdefault(label, {}).setdefault(content.name, []).append(row)
    rows = []
    for label, runs in cells.items():
        if runs:
            rows.append((text(label), *(_evaluations(runs.get(content.name, [])) for content in contents)))
    if not rows:
        return None
    columns = ("network", *(content.name for content in contents))
    return Table(caption="Top-1 of each network, a column a run", columns=columns, rows=tuple(rows))


def network_label(plan: str, trainings: Iterable[Training]) -> str:
    """What the page calls a row of verify.parquet."""
    if plan in KINDS:
        return KINDS[plan]
    floating = {training.name: training.plan is None for training in trainings}.get(plan, plan == "qat-float")
    return f"{plan}: " + ("trained in floating point" if floating else "trained with QAT")


def variation_table(contents: Sequence[RunContent]) -> Table | None:
    """A row a measure of how a network's modules differ, a column a run; from two runs on with a reading."""
    tables = [Measured(name=c.name, stats=c.stats) for c in contents if c.stats is not None]
    runs = [comparison.Compared(each, variation(each.stats)) for each in tables]
    if not runs:
        return None
    names = tuple(each.name for each in tables)
    rows = []
    for row in comparison.compare(runs).to_dict("records"):
        what = "weights" if row["tensor"] == "weight" else "input activations"
        label = comparison.MEASURES[str(row["measure"])].format(tensor=what).rstrip(",")
        values = tuple(number(row[name], "{:.4g}") for name in names)
        rows.append((text(label), *values, *([text(row["reading"])] if len(runs) > 1 else [])))
    columns = ("measure", *names, *(["reading"] if len(runs) > 1 else []))
    return Table(caption="How much the modules of a network differ", columns=columns, rows=tuple(rows))


def differences_table(contents: Sequence[RunContent]) -> Table | None:
    """A row for weights and one for inputs of each pair of runs: whether the modules of one vary more."""
    runs = [(c.name, c.stats) for c in contents if c.stats is not None]
    if len(runs) < 2:
        return None
    rows = []
    for row in differences(runs).to_dict("records"):
        low, high = (number(row[f"cv_difference_{end}"], "{:.3g}").text for end in ("low", "high"))
        rows.append(
            (text("weights" if row["tensor"] == "weight" else "inputs"), text(f"{row['run_a']} - {row['run_b']}"),
             number(row["cv_difference"], "{:.3g}"), text(f"{low} to {high}"), number(row["p_value"], "{:.2g}"),
             text(row["reading"]))
        )  # fmt: skip
    columns = ("tensor", "runs", "difference of cv", "95 % interval", "Brown-Forsythe p", "reading")
    return Table(caption="Do the modules of one network vary more?", columns=columns, rows=tuple(rows))


def certificate(content: RunContent) -> Table | None:
    """What the plan costs against its budget, and what its solver proved."""
    plan = content.plan
    if plan is None:
        return None
    units = (
        ("mean weight bits", "weight_bits", 1, "{:.4f}"), ("mean activation bits", "activation_bits", 1, "{:.4f}"),
        ("size (MiB)", "size_bytes", 2**20, "{:.4f}"), ("GBitOps", "bitops", 1e9, "{:.4f}"),
        ("activations (MiB)", "activation_bytes", 2**20, "{:.4f}"), ("latency (ms)", "latency_ms", 1, "{:.4f}"),
    )  # fmt: skip
    totals, budget = asdict(plan.totals), asdict(plan.budget)
    rows = [
        (text(label), number(_ratio(totals[name], unit), style), number(_ratio(budget[name], unit), "{:g}"))
        for label, name, unit, style in units
        if totals[name] is not None or name in ("weight_bits", "activation_bits")
    ]
    solver = plan.solver
    for label, value in (
        ("sum of measured loss increases (nats)", plan.predicted_delta_loss),
        ("lower bound of the objective", solver.lower_bound),
        ("gap", solver.gap),
    ):
        rows.append((text(label), number(value, "{:.4g}"), number(None, "")))
    words = {"objective": plain(solver.objective), "solver, status": f"{solver.name}, {solver.status}"}
    for label, word in (words | {"layout": plan.layout}).items():
        rows.append((text(label), Cell(text=word, number=True), number(None, "")))
    caption = f"{content.name}: certificate of the plan"
    return Table(caption=caption, columns=("", "plan", "budget"), rows=tuple(rows))


def planned_sites(content: RunContent) -> Table | None:
    """One row per planned site."""
    if content.plan is None:
        return None
    rows = [
        (
            number(order, "{:.0f}"), text(s.module), text(s.tensor), number(s.bit_width, "{:.0f}"),
            text(s.granularity), text("signed" if s.signed else "unsigned"), text("yes" if s.offset else "no"),
        )
        for order, s in enumerate(content.plan.sites, start=1)
    ]  # fmt: skip
    columns = ("order", "module", "tensor", "bits", "granularity", "range", "offset")
    return Table(caption=f"{content.name}: {len(rows)} planned sites", columns=columns, rows=tuple(rows))


def trained(content: RunContent) -> Table | None:
    """First and last figures of each training on the validation images."""
    if not content.trainings:
        return None
    columns = (
        "training", "status", "weight bits", "activation bits", "steps", "loss at the start", "loss at the end",
        "top-1 at the start (%)", "top-1 at the end (%)", "best top-1 (%)", "oscillating (%)", "oscillating, EMA (%)",
    )  # fmt: skip
    rows = [_trained_row(training) for training in content.trainings]
    return Table(caption=f"{content.name}: trainings, on validation images", columns=columns, rows=tuple(rows))


def gradient_norms(content: RunContent) -> Table | None:
    """Norms of the gradient of each term of the loss, where they were last measured in each training."""
    found: dict[str, dict[str, float]] = {}
    for training in content.trainings:
        norms = training.history.filter(regex="^grad_").dropna(how="all")
        if len(norms):
            found[training.name] = norms.iloc[-1].dropna().to_dict()
    if not found:
        return None
    names = list(dict.fromkeys(name for norms in found.values() for name in norms))
    rows = [(text(name), *(number(norms.get(term), "{:.3g}") for term in names)) for name, norms in found.items()]
    columns = ("training", *(term.removeprefix("grad_") for term in names))
    caption = f"{content.name}: gradient norm of each term, last measured"
    return Table(caption=caption, columns=columns, rows=tuple(rows))


def configuration(content: RunContent) -> Table | None:
    """The settings of each training, a row a setting."""
    configs = {training.name: training.config for training in content.trainings if training.config}
    if not configs:
        return None
    keys = list(dict.fromkeys(key for config in configs.values() for key in config))
    rows = [(text(key), *(text(plain(config.get(key))) for config in configs.values())) for key in keys]
    caption = f"{content.name}: configuration of each training"
    return Table(caption=caption, columns=("setting", *configs), rows=tuple(rows))


def provenance(content: RunContent) -> tuple[Table, ...]:
    """How each step of a run was made, with which versions, and of which model and images; none without run.json."""
    record, made = content.record, []
    if record.model is not None:
        facts = {**asdict(record.model), **{f"images: {key}": value for key, value in record.data.items()}}
        lines = tuple((text(key), text(plain(value))) for key, value in facts.items())
        made.append(Table(caption=f"{content.name}: model and images", columns=("", "value"), rows=lines))
    if record.steps:
        columns = ("step", "command", "status", "seed", "device", "git commit", "started (UTC)", "seconds")
        steps = tuple(
            (
                text(name), text(step.command), text(step.status), number(step.seed, "{:.0f}"), text(step.device),
                text(plain(step.git_commit)), text(step.started), number(step.seconds, "{:.1f}"),
            )
            for name, step in record.steps.items()
        )  # fmt: skip
        made.append(Table(caption=f"{content.name}: commands", columns=columns, rows=steps))
        packages = dict.fromkeys(package for step in record.steps.values() for package in step.versions)
        versions = tuple(
            (text(package), *(text(plain(step.versions.get(package))) for step in record.steps.values()))
            for package in packages
        )
        caption = f"{content.name}: versions at each step"
        made.append(Table(caption=caption, columns=("package", *record.steps), rows=versions))
    return tuple(made)


def _evaluated(content: RunContent) -> list[dict[str, Any]]:
    """Rows of verify.parquet: the sorts of `KINDS` in their order, then trained models."""
    if content.verify is None:
        return []
    rank = {kind: place for place, kind in enumerate(KINDS)}
    rows = content.verify.astype({"plan": str}).to_dict("records")
    return sorted(rows, key=lambda row: rank.get(row["plan"], len(rank)))


def _evaluations(rows: Sequence[dict[str, Any]]) -> Cell:
    if not rows:
        return Cell(text=DASH, number=True)
    lines = [
        f"{measured(row['top1'], row['top1_se'], scale=100, digits=1).text} %\n"
        f"w {row['weight_bits']:.2f}, a {row['activation_bits']:.2f} bit; "
        f"{row['size_bytes'] / 2**20:.3g} MiB; {row['bitops'] / 1e9:.3g} GBitOps"
        for row in rows
    ]
    return Cell(text="\n".join(lines), key=finite(rows[0]["top1"]), number=True)


def _trained_row(training: Training) -> tuple[Cell, ...]:
    history = training.history.sort_values("step", kind="stable")
    validated = history[history["split"] == "val"]
    loss, top1 = validated["loss"].dropna(), 100 * validated["top1"].dropna()
    last = {} if training.oscillation is None else oscillating_shares(training.oscillation).iloc[-1].to_dict()
    return (
        text(training.name),
        text("finished" if training.finished else "not finished"),
        *(number(bits, "{:.2f}") for bits in _mean_bits(training.plan)),
        number(history["step"].max(), "{:,.0f}"),
        *(number(value, "{:.3f}") for value in _ends(loss)),
        *(number(value, "{:.1f}") for value in _ends(top1)),
        number(top1.max() if len(top1) else None, "{:.1f}"),
        *(number(_ratio(last.get(name), 0.01), "{:.2f}") for name in ("oscillating", "oscillating_ema")),
    )


def _mean_bits(plan: BitPlan | None) -> tuple[float | None, float | None]:
    return (32.0, 32.0) if plan is None else (plan.totals.weight_bits, plan.totals.activation_bits)


def _ends(values: pd.Series) -> tuple[float | None, float | None]:
    return (float(values.iloc[0]), float(values.iloc[-1])) if len(values) else (None, None)


def _ratio(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit
