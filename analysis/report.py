"""Run folders -> one self-contained HTML page: its sections, and what is said where a table is missing."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PackageLoader, StrictUndefined

from analysis.page import bits, definitions, figures
from analysis.page import plan_section as report_plan
from analysis.page import sensitivity_section as report_sensitivity
from analysis.page import summary_section as report_summary
from analysis.page import training_section as report_training
from analysis.page import variation_section as report_variation
from analysis.page.cells import Table
from analysis.page.content import RunContent, read_runs
from analysis.page.definitions import Definitions
from analysis.page.downloads import Download, plan_download, table_download
from analysis.page.figures import Picture
from analysis.page.provenance import provenance
from analysis.storage.run_record import versions

T = TypeVar("T")
LONG = 12  # rows; a table of more can be filtered
PROGRAM = "quantization-variation-workbench"


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a section shows of one run, or of all together (`title` empty)."""

    title: str = ""
    lead: tuple[str, ...] = ()  # sentences to read first
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    folded: tuple[Table, ...] = ()  # opened on demand
    downloads: tuple[Download, ...] = ()  # besides the tables
    missing: tuple[str, ...] = ()  # sentences on what was not made, and the command that makes it


@dataclass(frozen=True, kw_only=True)
class Section:
    """One section of the page: parts for all runs together above a grid with a part a run."""

    id: str
    title: str
    definitions: Definitions
    together: Part = field(default_factory=Part)
    parts: tuple[Part, ...] = ()


def page_environment(*folders: Path) -> Environment:
    """Where templates of pages are found: in `folders`, then among those of the report, whose style any may include."""
    return Environment(
        loader=ChoiceLoader([FileSystemLoader(folders), PackageLoader("analysis.page")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def report_html(runs: Sequence[Path], variation: Sequence[Picture] | None = None) -> str:
    """The page of one or more run folders; the same folders give the same page. InputError as `read_runs`.

    `variation` are the pictures of how the runs vary, where they are drawn already.
    """
    contents = read_runs(runs)
    step = "report" if variation is None else "compare"
    return page_html(
        " and ".join(content.name for content in contents), sections(contents, variation),
        described=[_described(content) for content in contents if content.record.model is not None],
        command=f"{shlex.join(['qvw', step, *map(str, runs)])} --out DIR",
    )  # fmt: skip


def page_html(title: str, shown: Sequence[Section], *, command: str, described: Sequence[str] = ()) -> str:
    """The whole page of some sections; `command` is what made it, `described` a line for each network."""
    template = page_environment().get_template("report.html.jinja")
    return template.render(
        title=title, sections=shown, csv_of=table_download, long=LONG, described=described, command=command,
        program=f"{PROGRAM} {versions().get(PROGRAM, '')}".rstrip(), has_steps=shown[-1].id == "steps",
    )  # fmt: skip


def _described(content: RunContent) -> str:
    """Model, weights and images of a run in a line: a page of untrained weights must not look like a finding."""
    model, data = content.record.model, content.record.data.get("data")
    assert model is not None
    if model.weights is not None:
        weights = f"weights of {Path(model.weights).name}"
    elif model.pretrained:
        weights = "timm's pretrained weights"
    elif model.factory is not None:
        weights = "weights as its function gives them"
    else:
        weights = "UNTRAINED weights: its figures say nothing of a trained one"
    return f"{content.name}: {model.name}, {weights}; {f'images of {data}' if data else 'no images'}"


def sections(contents: Sequence[RunContent], variation: Sequence[Picture] | None = None) -> tuple[Section, ...]:
    """All sections, in the order of the page; `variation` as in `report_html`."""
    return (
        Section(
            id="summary", title="Summary", definitions=definitions.SUMMARY,
            together=Part(lead=report_summary.readings(contents), tables=(report_summary.deciding(contents),)),
            parts=tuple(map(_summary, contents)),
        ),
        Section(
            id="variation", title="Variation", definitions=definitions.VARIATION,
            together=Part(
                pictures=tuple(figures.variation(contents) if variation is None else variation),
                tables=_some(report_variation.differences_table(contents)),
                folded=_some(report_variation.variation_table(contents)),
            ),
            parts=tuple(map(_variation, contents)),
        ),
        Section(
            id="sensitivity", title="Sensitivity", definitions=definitions.SENSITIVITY,
            parts=tuple(map(_sensitivity, contents)),
        ),
        Section(id="plan", title="Plan", definitions=definitions.PLAN, parts=tuple(map(_plan, contents))),
        *_where_made("front", "Pareto front", report_plan.FRONT, tuple(map(_front, contents))),
        *_where_made("verification", "Verification", report_plan.VERIFICATION, tuple(map(_verification, contents))),
        Section(
            id="training", title="Training", definitions=definitions.TRAINING, parts=tuple(map(_training, contents)),
        ),
        Section(id="steps", title="How it was made", definitions=definitions.STEPS, parts=tuple(map(_steps, contents))),
    )  # fmt: skip


def _summary(content: RunContent) -> Part:
    missing = list(_left_out(content, "verify"))
    found = {row["plan"] for row in report_summary.evaluations(content)}
    if "float" not in found:
        missing.append(f"The network in floating point was not evaluated yet: {_command(content, 'eval', '--float')}.")
    if "planned" not in found and content.plan is not None:
        command = _command(content, "eval", "--plan", content.folder / "plan.json")
        missing.append(f"The plan was not evaluated yet: {command}.")
    for training in content.trainings:
        if training.finished and training.name not in found:
            command = _command(content, "eval", "--checkpoint", content.folder / training.name)
            missing.append(f"The training {training.name} was not evaluated yet: {command}.")
    rows = report_summary.evaluations(content)
    return Part(
        title=content.name,
        missing=tuple(missing),
        lead=("Rows of different numbers of images are not of the same images.",)
        if len({row["images"] for row in rows}) > 1
        else (),
        tables=(
            *_some(report_summary.evaluated(content)),
            *_some(report_sensitivity.most_sensitive(content)),
            *_some(bits.bits_by_kind(content)),
        ),
    )


def _variation(content: RunContent) -> Part:
    if content.stats is None:
        command = _command(content, "stats", "MODEL", "--data", "DATA")
        return _lacking(content, "No tensor was measured", command, "stats")
    missing = list(_left_out(content, "channels", "histograms"))
    for name, table, what in (
        ("channels", content.channels, "heads and channels"), ("histograms", content.histograms, "densities")
    ):  # fmt: skip
        if table is None and name not in content.left_out:
            command = _command(content, "stats", "--overwrite")
            missing.append(f"The figures of {what} leave out this run, which has no {name}.parquet: {command}.")
    return Part(title=content.name, pictures=_some(figures.distribution(content)), missing=tuple(missing))


def _sensitivity(content: RunContent) -> Part:
    if content.sweep is None:
        return _lacking(content, "No sensitivity was measured", _command(content, "sensitivity"), "sensitivity")
    return Part(
        title=content.name,
        missing=_left_out(content, "proxies", "proxy_correlation"),
        pictures=tuple(figures.sensitivity(content)),
        tables=_some(report_sensitivity.proxy_ranks(content)),
        folded=_some(report_sensitivity.all_sites(content)),
    )


def _plan(content: RunContent) -> Part:
    if content.plan is None:
        command = _command(content, "plan", "--weight-bits", 3, "--activation-bits", 4)
        return _lacking(content, "No bits were planned", command)
    return Part(
        title=content.name,
        lead=_left_out(content, "plan"),
        pictures=_some(figures.plan(content)),
        tables=_some(bits.certificate(content)),
        folded=_some(bits.planned_sites(content)),
        downloads=(plan_download(content.plan, content.name),),
    )


def _front(content: RunContent) -> Part | None:
    if content.front is None and not _left_out(content, "pareto"):
        return None
    return Part(
        title=content.name,
        missing=(
            *_left_out(content, "pareto", "pareto_uniform"),
            *report_plan.other_plan(content, content.front, "Pareto front", "--pareto"),
        ),
        lead=report_plan.front_sentences(content),
        pictures=_some(figures.front(content)),
        folded=report_plan.front_tables(content),
    )


def _verification(content: RunContent) -> Part | None:
    if content.verification is None and not _left_out(content, "verification"):
        return None
    return Part(
        title=content.name,
        missing=(
            *_left_out(content, "verification"),
            *report_plan.other_plan(content, content.verification, "verification", "--verify"),
        ),
        lead=report_plan.verification_sentences(content),
        pictures=_some(figures.verification(content)),
        tables=_some(report_plan.verification_table(content)),
    )


def _where_made(name: str, title: str, meanings: Definitions, parts: Sequence[Part | None]) -> tuple[Section, ...]:
    """A section of the runs that have it; none where no run has."""
    made = tuple(part for part in parts if part is not None)
    return (Section(id=name, title=title, definitions=meanings, parts=made),) if made else ()


def _training(content: RunContent) -> Part:
    left_out = [table for table in content.left_out if "/" in table]  # of a training's folder
    if not content.trainings:
        uniform = ("--uniform", "w3a4") if content.plan is None else ()  # its own plan
        return _lacking(content, "No network was trained", _command(content, "train", *uniform), *left_out)
    return Part(
        title=content.name,
        missing=(*_left_out(content, *left_out), *report_training.of_other_plans(content)),
        pictures=tuple(figures.trainings(content)),
        tables=(*_some(report_training.trained(content)), *_some(report_training.gradient_norms(content))),
        folded=_some(report_training.configuration(content)),
    )


def _steps(content: RunContent) -> Part:
    made = provenance(content)
    if not made:
        text = f"{content.folder} has no run.json that says how its tables were made; every `qvw` step writes one."
        return Part(title=content.name, missing=(text,))
    return Part(title=content.name, tables=made)


def _command(content: RunContent, step: str, *arguments: object) -> str:
    """The command that makes what is missing, between backticks."""
    words = ["qvw", step, "--run", str(content.folder), *map(str, arguments)]
    return f"`{shlex.join(words)}` does it"


def _left_out(content: RunContent, *tables: str) -> tuple[str, ...]:
    """What is said of those of these tables that another version wrote."""
    return tuple(content.left_out[table] for table in tables if table in content.left_out)


def _lacking(content: RunContent, what: str, command: str, *tables: str) -> Part:
    """A part that says what makes what it lacks; `tables` are those that would be shown."""
    return Part(title=content.name, missing=_left_out(content, *tables) or (f"{what} yet: {command}.",))


def _some(thing: T | None) -> tuple[T, ...]:
    return () if thing is None else (thing,)
