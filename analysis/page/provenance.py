"""The tables of a report about how its figures came about: model and images, commands and seeds, sweeps, versions."""

from dataclasses import asdict

import pandas as pd

from analysis.page.cells import Table, number, plain, text
from analysis.page.content import RunContent
from analysis.sweeps.groups import EVERYTHING

_COMMIT = 12  # letters that tell commits apart
_SWEEP = ("protocol", "over", "tensors", "estimator", "batchnorm", "images")
_TREATED = {"none": "no BatchNorm", "stored": "as stored", "re_estimated": "re-estimated"}


def provenance(content: RunContent) -> tuple[Table, ...]:
    """How each step of a run was made, with which versions, and of which model and images; none without run.json."""
    record, made = content.record, []
    if record.model is not None:
        facts = {**asdict(record.model), **{f"images: {key}": value for key, value in record.data.items()}}
        lines = tuple((text(key), text(plain(value))) for key, value in facts.items() if value is not None)
        made.append(Table(caption=f"{content.name}: model and images", columns=("setting", "value"), rows=lines))
    if record.steps:
        columns = ("step", "command", "status", "seed", "device", "git commit", "started (UTC)", "seconds")
        steps = tuple(
            (
                text(name), text("; ".join([*step.earlier, step.command])), text(step.status),
                number(step.seed, "{:.0f}"), text(step.device),
                text(_short(step.git_commit)), text(step.started.removesuffix("+00:00")),
                number(step.seconds, "{:.1f}"),
            )
            for name, step in record.steps.items()
        )  # fmt: skip
        made.append(Table(caption=f"{content.name}: commands of each step", columns=columns, rows=steps))
    if content.sweep is not None:
        made.append(_sweeps(content.name, content.sweep))
    if record.steps:
        packages = dict.fromkeys(package for step in record.steps.values() for package in step.versions)
        versions = tuple(
            (text(package), *(text(plain(step.versions.get(package))) for step in record.steps.values()))
            for package in packages
        )
        caption = f"{content.name}: versions at each step"
        made.append(Table(caption=caption, columns=("package", *record.steps), rows=versions))
    return tuple(made)


def _sweeps(name: str, sweep: pd.DataFrame) -> Table:
    """What sensitivity.parquet holds, of however many commands: a row for each way in which sites were quantized."""
    rows = sweep.assign(
        over=sweep["group"].where(sweep["group"] == EVERYTHING, sweep["group"].str.partition(":")[0]),
        tensors=sweep["tensor"].where(sweep["group"] != "", ""),
    )
    cells = []
    for key, found in rows.groupby(list(_SWEEP), sort=False):
        protocol, over, tensors, estimator, batchnorm, images = key
        alone = protocol == "single"
        what = {"": "each site", EVERYTHING: "everything"}.get(over, f"each group, by {over}")
        classes = tensors or "+".join(dict.fromkeys(found["tensor"].str.partition(".")[0]))
        cells.append(
            (
                text(f"{what} quantized" if alone else f"{what} left out of all else quantized"),
                text(classes),
                text(", ".join(map(str, sorted(found["bit_width"].unique())))),
                text(estimator),
                text(_TREATED[batchnorm]),
                number(images, "{:,.0f}"),
                number(len(found), "{:,.0f}"),
            )
        )
    columns = ("sweep", "tensors", "bits", "range estimator", "BatchNorm", "images", "rows")
    return Table(caption=f"{name}: sweeps in sensitivity.parquet", columns=columns, rows=tuple(cells))


def _short(commit: str | None) -> str:
    """A commit as people write it; whether the checkout had changes stays."""
    if commit is None:
        return plain(None)
    return commit[:_COMMIT] + ("-dirty" if commit.endswith("-dirty") else "")
