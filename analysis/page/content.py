"""What a report reads: the tables and records of a run folder, and of each training in it."""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
from pyarrow import ArrowException

from analysis.cost import COST_COLUMNS
from analysis.planning.edited import recounted_beside
from analysis.planning.frontier import ON_REQUEST, PARETO_COLUMNS, UNIFORM_COLUMNS
from analysis.proxies import PROXY_COLUMNS
from analysis.runs import Run, nothing_to_report, reportable_run, run_names
from analysis.sensitivity import SENSITIVITY_COLUMNS, preferred_rows
from analysis.statistics.comparison import COLUMNS
from analysis.statistics.variation_frames import CHANNEL_COLUMNS, HISTOGRAM_COLUMNS
from analysis.storage.columns import BINS_COLUMNS, OSCILLATION_COLUMNS, VERIFICATION_COLUMNS, VERIFY_COLUMNS
from analysis.storage.run_record import RunRecord
from analysis.storage.stored_file import STORED, read_stored
from analysis.sweeps.proxy_correlation import CORRELATION_COLUMNS
from analysis.tensor_stats import STATS_COLUMNS
from analysis.terminal.option_words import as_options
from analysis.training.oscillation_frames import shares
from quant.bit_plan import BitPlan
from quant.errors import InputError

# What the page reads of tables that have grown since: an earlier version's is shown as far as it goes.
READ_OF_HISTORY = ("step", "split", "loss", "top1")
NEW_IN_VERIFICATION = (
    "predicted_kl_pairs", "kl_excess", "kl_excess_se", "heldout_kl", "heldout_kl_se", "prediction_ratio",
    "prediction_ratio_se",
)  # fmt: skip
NO_TERMS = {"step", "epoch", "images", "lr", "split", "loss", "top1", "seconds"}  # history's columns besides the terms


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training of a run: `history` has a row per logged step and validation, `oscillation` per step and tensor."""

    name: str  # of its folder: qat, qat-uniform, qat-float, ...
    finished: bool
    history: pd.DataFrame
    oscillation: pd.DataFrame | None
    bins: pd.DataFrame | None  # per kept step, tensor and place in a bin
    config: dict[str, Any]
    plan: BitPlan | None  # None for a training in floating point


@dataclass(frozen=True, kw_only=True)
class RunContent:
    """One run folder in memory; None stands for a table that was not made yet."""

    name: str  # by which the page tells runs apart
    folder: Path
    record: RunRecord
    stats: pd.DataFrame | None
    channels: pd.DataFrame | None
    histograms: pd.DataFrame | None
    sweep: pd.DataFrame | None  # all rows of sensitivity.parquet: every protocol, group and treatment
    sensitivity: pd.DataFrame | None  # of single sites, one row per (module, tensor, bit_width)
    proxies: tuple[pd.DataFrame, pd.DataFrame] | None  # the scores, and how each ranks the sites
    verify: pd.DataFrame | None
    plan: BitPlan | None
    front: pd.DataFrame | None  # of `qvw plan --pareto`
    uniform: pd.DataFrame | None  # one bit-width everywhere, to set beside the front
    verification: pd.DataFrame | None  # of `qvw plan --verify`, the plan itself first
    trainings: tuple[Training, ...]
    left_out: Mapping[str, str]  # table of another version -> what it lacks and what makes it again, in a sentence


def read_runs(folders: Sequence[Path]) -> list[RunContent]:
    """The content of each run folder, in the order given, under names that tell them apart.

    Raises InputError for no folder, one given twice, one that is none or holds nothing to report, and damaged files.
    """
    if not folders:
        raise InputError("no run folder was given; name at least one.")
    return [read_run(folder, name) for folder, name in zip(folders, run_names(folders, reserved=COLUMNS), strict=True)]


def read_run(folder: Path, name: str) -> RunContent:
    """What a run folder holds; InputError where that is nothing, or a file of it is damaged.

    A table of another version, which lacks a column that the page reads, is left out and named in `left_out`.
    """
    run, left_out = reportable_run(folder), dict[str, str]()

    def table(name: str, columns: Sequence[str]) -> pd.DataFrame | None:
        return _table(run, name, columns, left_out)

    sweep = table("sensitivity", SENSITIVITY_COLUMNS)
    single = None if sweep is None else preferred_rows(sweep)
    proxies, correlation = table("proxies", PROXY_COLUMNS), table("proxy_correlation", CORRELATION_COLUMNS)
    content = RunContent(
        name=name,
        folder=folder,
        record=run.record,
        stats=table("stats", STATS_COLUMNS),
        channels=table("channels", CHANNEL_COLUMNS),
        histograms=table("histograms", HISTOGRAM_COLUMNS),
        sweep=sweep,
        sensitivity=None if single is None or single.empty else single,
        proxies=None if proxies is None or correlation is None or sweep is None else (proxies, correlation),
        verify=table("verify", VERIFY_COLUMNS),
        plan=_plan(run, left_out),
        front=table("pareto", [name for name in PARETO_COLUMNS if name not in ON_REQUEST]),
        uniform=table("pareto_uniform", UNIFORM_COLUMNS),
        verification=table("verification", [c for c in VERIFICATION_COLUMNS if c not in NEW_IN_VERIFICATION]),
        trainings=_trainings(folder, left_out),
        left_out=left_out,
    )
    found = (content.stats, content.sweep, content.verify, content.plan, content.trainings or None)
    if all(part is None for part in found):
        raise nothing_to_report(folder, " ".join(left_out.values()))
    return content


def belongs(content: RunContent, table: pd.DataFrame | None) -> bool:
    """Whether a table was made with the plan that the run folder now holds; also False where nothing tells."""
    if content.plan is None or table is None or "plan_sha256" not in table:
        return False
    return bool(table["plan_sha256"].iloc[0] == content.plan.sha256)


def terms(trainings: Sequence[Training]) -> list[str]:
    """The terms of the loss that were logged, in the order of the tables; those never measured are left out."""
    found: dict[str, None] = {}
    for history in (training.history.select_dtypes("number") for training in trainings):
        names = (name for name in history if name not in NO_TERMS and not name.startswith("grad_"))
        found.update(dict.fromkeys(name for name in names if history[name].notna().any()))
    return list(found)


def history_frame(trainings: Sequence[Training]) -> pd.DataFrame:
    """The histories of several trainings one after the other, `training` being the name; steps in order."""
    return pd.concat(
        [t.history.assign(training=t.name).sort_values("step", kind="stable") for t in trainings], ignore_index=True
    )


def oscillation_frame(trainings: Sequence[Training]) -> pd.DataFrame:
    """Shares of oscillating weights over steps: training, step, oscillating, oscillating_ema.

    Over all weights that were tracked, so that a large tensor counts more; empty where nothing was tracked.
    """
    frames = []
    for training in trainings:
        if training.oscillation is None:
            continue
        shares = oscillating_shares(training.oscillation)
        frames.append(shares.assign(training=training.name))
    columns = ["training", "step", "oscillating", "oscillating_ema"]
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


def oscillating_shares(oscillation: pd.DataFrame) -> pd.DataFrame:
    """The shares over all tracked weights, a row a step, from rows of oscillation.parquet (shares per tensor)."""
    return shares(oscillation, ["step"]).drop(columns="weights")


def _trainings(folder: Path, left_out: MutableMapping[str, str]) -> tuple[Training, ...]:
    """The trainings of a run, `qat` first, then by name; a folder without history has nothing to show yet."""
    found = []
    for path in sorted(p for p in folder.glob("qat*") if p.name == "qat" or p.name.startswith("qat-")):
        run = Run(path)
        own: dict[str, str] = {}
        history = _table(run, "history", READ_OF_HISTORY, own)
        oscillation, bins = _table(run, "oscillation", OSCILLATION_COLUMNS, own), _table(run, "bins", BINS_COLUMNS, own)
        left_out.update({f"{path.name}/{name}": told for name, told in own.items()})
        if history is None:
            continue
        config = run.read_json("config") if (path / "config.json").exists() else {}
        if not isinstance(config, dict):
            raise InputError(
                f"{path / 'config.json'} is no table of settings. Train again with `qvw train --overwrite`."
            )
        found.append(
            Training(
                name=path.name,
                finished=(path / "model.safetensors").exists(),
                history=history,
                oscillation=oscillation,
                bins=bins,
                config=config,
                plan=_plan(Run(path), {}),
            )
        )
    return tuple(found)


def _table(run: Run, name: str, columns: Sequence[str], left_out: MutableMapping[str, str]) -> pd.DataFrame | None:
    """A table of the run; None where it was not made, has no row, or lacks a column, which `left_out` then says."""
    if not (run.path / f"{name}.parquet").exists():
        return None
    try:
        table = run.read_table(name, columns)
    except InputError as error:
        if not _lacks_a_column(run.path / f"{name}.parquet", columns):
            raise  # damaged
        left_out[name] = f"Left out: {as_options(str(error))}"
        return None
    return None if table.empty else table


def _lacks_a_column(path: Path, columns: Sequence[str]) -> bool:
    """Whether the file is a whole table that has not all of these columns."""
    try:
        return not set(columns) <= set(pq.read_schema(path).names)
    except (OSError, ArrowException):
        return False


def _plan(run: Run, left_out: dict[str, str]) -> BitPlan | None:
    """The run's plan; one that was edited with the totals that its sites have, which the page says."""
    path = run.path / "plan.json"
    if not path.exists():
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the plan {path} cannot be read: {error}. Make it again with `qvw plan`.") from error
    plan = BitPlan.from_json(text, source=str(path))
    if not plan.sites:
        return None
    cost = _table(run, "cost", COST_COLUMNS, {}) if (run.path / STORED).exists() else None
    if cost is None:
        return plan
    return recounted_beside(plan, cost, read_stored(run.path, 0), path, partial(left_out.__setitem__, "plan"))
