"""One page from live results, without a run folder: statistics, sensitivities, plans and evaluations."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from analysis.page import definitions
from analysis.page.cells import Table, measured, number, text
from analysis.page.content import RunContent
from analysis.report import Part, Section, page_html, sections
from analysis.results import ParetoFront, Sensitivity, Stats
from analysis.sensitivity import preferred_rows
from analysis.storage.files import write_bytes
from analysis.storage.run_record import RunRecord
from quant.bit_plan import BitPlan
from quant.errors import InputError

T = TypeVar("T")
_EVALUATION: definitions.Definitions = (
    ("divergence", "How far the outputs are from those of the float network, mean over samples; for classifiers the KL "
                   "of the softmax in nats."),
    ("difference", "The entry minus the first quantized one, paired over samples, ± one standard error."),
    ("metric", "A figure over the whole set, such as mIoU, ± its jackknife error."),
)  # fmt: skip


def write_report(
    path: str | os.PathLike[str],
    *,
    stats: Stats | Mapping[str, Stats] | None = None,
    sensitivity: Sensitivity | Mapping[str, Sensitivity] | None = None,
    plan: BitPlan | Mapping[str, BitPlan] | None = None,
    evaluation: pd.DataFrame | Mapping[str, pd.DataFrame] | None = None,
    front: ParetoFront | Mapping[str, ParetoFront] | None = None,
    title: str | None = None,
) -> Path:
    """Write one self-contained HTML page of what is given; returns its path.

    `path` is the page, or a folder that gets index.html. Each result is what the function of its kind returns
    (`measure_stats`, `measure_sensitivity` or `estimate_sensitivity`, `plan_bits`, `evaluate`, `pareto_front`), or
    several of them by the name of their network, which then stand side by side. The page needs no network; tables can
    be sorted and downloaded as CSV.

    Raises InputError where nothing is given, for results of another kind, and where the page cannot be written.

    >>> import tempfile, torch
    >>> from analysis.measure import measure_stats
    >>> stats = measure_stats(torch.nn.Conv2d(3, 4, 3), [torch.randn(2, 3, 8, 8)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_report(folder, stats=stats).name
    'index.html'
    """
    kinds: dict[str, tuple[Any, type]] = {
        "stats": (stats, Stats), "sensitivity": (sensitivity, Sensitivity), "plan": (plan, BitPlan),
        "evaluation": (evaluation, pd.DataFrame), "front": (front, ParetoFront),
    }  # fmt: skip
    given: dict[str, dict[str, Any]] = {
        name: _named(name, value, kind) for name, (value, kind) in kinds.items() if value is not None
    }
    if not given:
        raise InputError("nothing was given to report: pass `stats`, `sensitivity`, `plan`, `evaluation` or `front`.")
    names = list(dict.fromkeys(name for results in given.values() for name in results))
    if len(names) > 1 and "" in names:  # a single result without a name belongs to the only other name
        others = [name for name in names if name]
        if len(others) > 1:
            raise InputError("`plan` and `evaluation` need the names of their networks where there are several.")
        given = {kind: {name or others[0]: each for name, each in results.items()} for kind, results in given.items()}
        names = others
    contents = [_content(name or "network", {kind: results.get(name) for kind, results in given.items()})
                for name in names]  # fmt: skip
    shown = [_without_commands(section) for section in sections(contents) if section.id != "steps"]
    evaluations = tuple(_evaluated(name, frame) for name, frame in given.get("evaluation", {}).items())
    if evaluations:
        made = Section(id="evaluation", title="Evaluation", definitions=_EVALUATION, parts=evaluations)
        shown.insert(1, made)
    page = page_html(
        title or " and ".join(content.name for content in contents), [each for each in shown if _holds(each)],
        command="analysis.write_report",
    )  # fmt: skip
    target = Path(path)
    target = target if target.suffix.lower() in (".html", ".htm") else target / "index.html"
    write_bytes(target, page.encode(errors="replace"))
    return target


def _named(name: str, value: Any, kind: type[T]) -> dict[str, T]:
    """Results by the name of their network; "" where a plan or an evaluation does not say."""
    if isinstance(value, kind):
        return {getattr(value, "name", ""): value}
    if isinstance(value, Mapping) and value and all(isinstance(each, kind) for each in value.values()):
        return {str(key): each for key, each in value.items()}
    raise InputError(f"`{name}` is a {type(value).__name__}; expected {kind.__name__}, or several by name.")


def _content(name: str, results: Mapping[str, Any]) -> RunContent:
    """What the sections of the page read, in memory."""
    stats, sensitivity, front = (results.get(kind) for kind in ("stats", "sensitivity", "front"))
    single = None if sensitivity is None else preferred_rows(sensitivity.table)
    return RunContent(
        name=name, folder=Path(name), record=RunRecord(), proxies=None, verify=None, verification=None, trainings=(),
        stats=None if stats is None else stats.table,
        channels=None if stats is None or stats.channels.empty else stats.channels,
        histograms=None if stats is None or stats.histograms.empty else stats.histograms,
        sweep=None if sensitivity is None else sensitivity.table,
        sensitivity=None if single is None or single.empty else single,
        plan=results.get("plan"), left_out={},
        front=None if front is None else front.table, uniform=None if front is None else front.uniform,
    )  # fmt: skip


def _evaluated(name: str, frame: pd.DataFrame) -> Part:
    columns = ("plan", "weight bits", "activation bits", "bytes", "loss", "score", "divergence", "difference", "metric")
    rows = tuple(
        (
            text(row["plan"]), number(row["weight_bits"], "{:.2f}"), number(row["activation_bits"], "{:.2f}"),
            number(row["size_bytes"], "{:,.0f}"), measured(row["loss"], row["loss_se"], digits=4),
            measured(row["score"], row["score_se"], digits=4),
            measured(row["divergence"], row["divergence_se"], digits=5),
            measured(row["divergence_difference"], row["divergence_difference_se"], digits=5),
            measured(row["metric"], row["metric_se"], digits=4),
        )
        for row in frame.to_dict("records")
    )  # fmt: skip
    return Part(title=name, tables=(Table(caption="Entries on the same samples", columns=columns, rows=rows),))


def _without_commands(section: Section) -> Section:
    """The section without sentences on the commands that would make what is missing."""
    parts = tuple(replace(part, missing=()) for part in section.parts)
    return replace(section, together=replace(section.together, missing=()), parts=tuple(p for p in parts if _shows(p)))


def _shows(part: Part) -> bool:
    return bool(part.lead or part.pictures or part.tables or part.folded or part.downloads)


def _holds(section: Section) -> bool:
    return _shows(section.together) or bool(section.parts)
