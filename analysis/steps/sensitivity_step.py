"""`qvw sensitivity`: the sweep, into a run folder, resumable at every row, by one process or several that share it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from analysis.cost import cost_table
from analysis.figures.panels import figure_files, save_figure
from analysis.figures.sensitivity_panels import STEMS, sensitivity_figures
from analysis.runs import Run
from analysis.sensitivity import (
    IMAGE_COLUMNS,
    ROW_KEY,
    SENSITIVITY_COLUMNS,
    SweepConfig,
    images_table,
    row_key,
    sensitivity_table,
    sweep_keys,
)
from analysis.session.loaded_run import LoadedRun
from analysis.session.open_run import open_run
from analysis.session.processes import Processes, work_together
from analysis.session.session import Session
from analysis.session.setup import Setup
from analysis.steps.proxy_step import PROXY_FILES, run_proxies
from analysis.storage.files import RowLog, write_bytes
from analysis.storage.stored_file import STORED
from analysis.sweeps.sweep import CACHE_MIB
from analysis.sweeps.sweep_rows import informative_first, is_out_of_memory, measured_rows, within
from analysis.sweeps.sweep_summary import sensitivity_summary
from analysis.terminal.console import resumable
from quant.choices import ALLOWED_BIT_WIDTHS
from quant.errors import InputError
from quant.network import Network
from quant.site import SiteInfo
from quant.sites import check_plain_weights, select_sites

IMAGES = 256
LOG = "sensitivity.partial"
FILES = (
    "sensitivity.parquet", "sensitivity_images.parquet", "cost.parquet", STORED, *PROXY_FILES,
    *(file for stem in STEMS for file in figure_files(stem)),
)  # fmt: skip


def run_sensitivity(
    setup: Setup, config: SweepConfig, *, tensors: Sequence[str], proxies: bool = False, cache_mib: int = CACHE_MIB
) -> None:
    """Sweep the sites that hold `tensors`; finished rows are kept one by one and never measured twice.

    Several processes share the sites, each with a log of its own rows; the one of rank 0 writes the tables. `proxies`
    computes the scores of `analysis.proxies` too, and how they rank the sites beside the sweep.
    """
    wrong = [bits for bits in config.bit_widths if bits not in ALLOWED_BIT_WIDTHS]
    if wrong:
        raise InputError(f"--bits {wrong[0]} is not offered; choose from {', '.join(map(str, ALLOWED_BIT_WIDTHS))}.")

    def work(setup: Setup, processes: Processes) -> None:
        _run_sensitivity(setup, config, processes, tensors=tensors, proxies=proxies, cache_mib=cache_mib)

    work_together(setup, work)


def _run_sensitivity(
    setup: Setup, config: SweepConfig, processes: Processes, *, tensors: Sequence[str], proxies: bool, cache_mib: int
) -> None:
    opened, sites, session = processes.together(lambda: _opened(setup, config, tensors))
    told: list[str] = []

    def score(batches: Sequence[Any]) -> None:
        told.append(run_proxies(session, sites, batches, config))

    rows, count = measure_sensitivity_in(
        session, sites, config, processes, cache_mib=cache_mib, options={"tensors": list(tensors), "proxies": proxies},
        after=score if proxies else None,
    )  # fmt: skip
    if processes.rank == 0:
        path = opened.run.path
        session.say(sensitivity_summary(opened.run.read_table("sensitivity"), rows))
        for text in told:
            session.say(text)
        figures = ", ".join(f"{stem}.png" for stem in (*STEMS, "proxies") if (path / f"{stem}.png").exists())
        session.say(f"{count} rows in {path / 'sensitivity.parquet'}, figures {figures}")


def _opened(setup: Setup, config: SweepConfig, tensors: Sequence[str]) -> tuple[LoadedRun, list[SiteInfo], Session]:
    """The model, the sites to sweep, and the images."""
    opened = open_run(setup, needs_data=True)
    data = opened.step_images("sensitivity", "train", at_most=IMAGES)
    sites = select_sites(opened.sites, tensors)
    if not sites:
        check_plain_weights(opened.model, opened.sites)
        raise InputError(f"no site of {opened.name} holds {', '.join(tensors)}; see --tensors, --include, --exclude.")
    keys_of(opened.network, sites, config)  # none is an error, told before the images are read
    return opened, sites, opened.session(data)


def keys_of(net: Network, sites: Sequence[SiteInfo], config: SweepConfig) -> list[dict[str, Any]]:
    """The rows that the sweep is to have; InputError where there are none."""
    keys = sweep_keys(net.model, sites, config, blocks=net.blocks)
    if not keys:
        raise InputError("every group holds all the sites: nothing would be quantized. Choose other `groups`.")
    return keys


def measure_sensitivity_in(
    session: Session,
    sites: Sequence[SiteInfo],
    config: SweepConfig,
    processes: Processes,
    *,
    batches: Sequence[Any] = (),
    cache_mib: int = CACHE_MIB,
    time_limit: float | None = None,
    options: Mapping[str, Any] | None = None,
    after: Callable[[Sequence[Any]], None] | None = None,
) -> tuple[list[dict[str, Any]], int]:
    """Measure the rows that the run folder lacks, write the tables; the rows of this sweep, and how many are there.

    The batches are read when they are needed, where they are not given. `after` is called with them within the step.
    With `time_limit` (seconds) the rows of the fewest bits come first, and rows may be missing.
    """
    main = processes.rank == 0
    keys: Sequence[Mapping[str, Any]] = keys_of(session.network, sites, config)
    if time_limit is not None:
        keys = informative_first(keys)
    noted = {**asdict(config), **(options or {}), "processes": processes.world}
    step: AbstractContextManager[None] = nullcontext()
    if main:
        logs = {_log(session, rank).path for rank in range(processes.world)} | set(_logs(session))
        step = session.step("sensitivity", (*FILES, *sorted(path.name for path in logs)), noted)
    with ExitStack() as during:
        processes.together(lambda: during.enter_context(step))
        rows = {row_key(row): row for row in processes.by_first(lambda: _finished(session))}
        missing = [key for key in keys if row_key(key) not in rows]
        there = len(keys) - len(missing)
        if main and there:
            session.say(f"{there:,} of {len(keys):,} rows are there already")
        todo = _share(missing, processes)
        during.enter_context(resumable(lambda: _kept(session, keys) if main else ""))
        if not batches and (after is not None or any(processes.gather(bool(todo)))):
            batches = processes.together(lambda: _batches(session))
        measure = partial(_measured, session, sites, batches, todo, processes, cache_mib, time_limit)
        for measured in processes.gather(measure()):
            rows |= {row_key(row): row for row in measured}
        if main:
            _write(session, list(rows.values()))
            if after is not None:
                after(batches)
    return [rows[row_key(key)] for key in keys if row_key(key) in rows], len(rows)


def kept_rows(session: Session, keys: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """The rows of a sweep of which nothing is missing in the run folder; None where something is."""
    if session.overwrite or not session.run.is_done("sensitivity", session.inputs):
        return None
    rows = {row_key(row): row for row in _finished(session)}
    return [rows[row_key(key)] for key in keys] if all(row_key(key) in rows for key in keys) else None


def _kept(session: Session, keys: Sequence[Mapping[str, Any]]) -> str:
    """How many of the rows are on the disk, in words."""
    kept = {row_key(row) for row in _finished(session)}
    done = sum(row_key(key) in kept for key in keys)
    return f"{done:,} of {len(keys):,} rows" if done else ""


def _batches(session: Session) -> list[Any]:
    """All batches on the device, where they stay for the whole sweep."""
    source, found = session.source, []
    assert source is not None
    try:
        with session.bar(source.samples, f"{source.unit}s", source.unit) as bar:
            for batch, names in source.read(0, 1):
                if len(names):
                    found.append(batch)
                    bar.update(len(names))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(f"{source.samples} images do not fit into the memory of {session.device}; "
                         "give fewer by --images.") from error  # fmt: skip
    if not found:
        raise InputError(source.nothing)
    source.at_end()
    return found


def _share(keys: Sequence[Mapping[str, Any]], processes: Processes) -> list[Mapping[str, Any]]:
    """The keys of every `world`-th site or group: all rows of one are entered at the same place of the network."""
    names = list(dict.fromkeys((key["module"], key["tensor"], key["group"]) for key in keys))
    own = set(names[processes.rank :: processes.world])
    return [key for key in keys if (key["module"], key["tensor"], key["group"]) in own]


def _measured(
    session: Session,
    sites: Sequence[SiteInfo],
    batches: Sequence[Any],
    todo: Sequence[Mapping[str, Any]],
    processes: Processes,
    cache_mib: int,
    time_limit: float | None,
) -> list[dict]:
    """The rows of this process, each on the disk as soon as it is measured; an error in one process ends all.

    The others measure their own rows first: no row is lost that was begun.
    """
    rows: list[dict] = []
    log = _log(session, processes.rank)

    def measure() -> None:
        if not todo:
            return
        with session.bar(len(todo), "sensitivity", "row") as bar:
            measuring = measured_rows(
                session.network, sites, batches, todo, task=session.task, cache_mib=cache_mib, tell=session.say
            )
            for row in within(measuring, time_limit):
                log.append([row])
                rows.append(row)
                bar.update()

    processes.together(measure)
    return rows


def _log(session: Session, rank: int) -> RowLog:
    """The rows of one process that are not in the table yet."""
    return RowLog(session.run.path / (f"{LOG}.{rank}.jsonl" if rank else f"{LOG}.jsonl"))


def _logs(session: Session) -> list[Path]:
    """The logs of a sweep that was stopped, of all the processes that it had."""
    return sorted(session.run.path.glob(f"{LOG}*.jsonl"))


def _finished(session: Session) -> list[dict[str, Any]]:
    """Rows of the table and of a sweep that was stopped; a row in both is the same measurement."""
    run, source = session.run, session.source
    assert source is not None
    rows = written_rows(run)
    for path in _logs(session):
        logged = RowLog(path).read(damaged=True)
        whole = [row for row in logged if _is_row(row, source.samples)]
        if len(whole) < len(logged):
            session.warn(f"{len(logged) - len(whole)} rows of {path} are damaged and are measured again.")
        rows += whole
    return rows


def written_rows(run: Run) -> list[dict[str, Any]]:
    """The rows of sensitivity.parquet with the values of their samples."""
    if not (run.path / "sensitivity.parquet").exists():
        return []
    written = run.read_table("sensitivity", SENSITIVITY_COLUMNS).to_dict("records")
    if not (run.path / "sensitivity_images.parquet").exists():
        return written
    images = run.read_table("sensitivity_images", (*ROW_KEY, *IMAGE_COLUMNS)).to_dict("records")
    by_key = {row_key(row): {name: _floats(row[name]) for name in IMAGE_COLUMNS} for row in images}
    return [row | by_key.get(row_key(row), {}) for row in written]


def _floats(values: Any) -> list[float]:
    """The values of a cell; a column of NaN alone comes back from Parquet as None."""
    return np.asarray(values, dtype=np.float64).tolist()


def _is_row(row: Any, images: int | None) -> bool:
    """Whether a row of a log is what a sweep of so many images writes."""
    if not isinstance(row, dict) or not set(SENSITIVITY_COLUMNS) <= set(row):
        return False
    figures = SENSITIVITY_COLUMNS[SENSITIVITY_COLUMNS.index("images") : -1]  # the last is the note
    numbers = [row[name] for name in ("bit_width", "order", *figures)]
    values = [row.get(name) for name in IMAGE_COLUMNS]
    lists = all(isinstance(value, list) and len(value) == row["images"] for value in values)
    return (
        lists
        and (images is None or row["images"] <= images)
        and all(isinstance(x, int | float) for x in [*numbers, *(x for value in values for x in value or [])])
    )


def _write(session: Session, rows: Sequence[Mapping[str, Any]]) -> None:
    """The tables and figures of all rows; the logs have done their work."""
    write_rows(session, rows)
    for path in _logs(session):
        RowLog(path).remove()


def write_rows(session: Session, rows: Sequence[Mapping[str, Any]]) -> None:
    """The tables and figures of rows, measured or estimated."""
    run = session.run
    run.write_table("cost", cost_table(session.sites, session.network.trace.unplanned))
    write_bytes(run.path / STORED, session.network.stored.to_json().encode())
    run.write_table("sensitivity_images", images_table(rows))
    table = sensitivity_table(rows)
    run.write_table("sensitivity", table)
    for stem, figure in sensitivity_figures(table, session.network.name):
        save_figure(figure, run.path / stem)
