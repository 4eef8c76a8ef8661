"""`qvw sensitivity`: the sweep, into a run folder, resumable at every row, by one process or several that share it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from analysis.cost import cost_table
from analysis.data import ImageData
from analysis.figures.panels import figure_files, save_figure
from analysis.figures.sensitivity_panels import STEMS, sensitivity_figures
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
from analysis.session.open_run import open_run
from analysis.session.opened import Opened
from analysis.session.processes import Processes, work_together
from analysis.session.setup import Setup
from analysis.steps.proxies import PROXY_FILES, run_proxies
from analysis.storage.files import RowLog
from analysis.sweeps.rows import is_out_of_memory, measured_rows
from analysis.sweeps.summary import sensitivity_summary
from analysis.sweeps.sweep import CACHE_MIB
from analysis.terminal.console import progress, resumable, say, warn
from quant.choices import ALLOWED_BIT_WIDTHS
from quant.errors import InputError
from quant.site import SiteInfo
from quant.sites import check_plain_weights, select_sites

IMAGES = 256
LOG = "sensitivity.partial"
FILES = (
    "sensitivity.parquet", "sensitivity_images.parquet", "cost.parquet", *PROXY_FILES,
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


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What is to be swept."""

    opened: Opened
    data: ImageData
    sites: list[SiteInfo]
    keys: list[dict]


def _run_sensitivity(
    setup: Setup, config: SweepConfig, processes: Processes, *, tensors: Sequence[str], proxies: bool, cache_mib: int
) -> None:
    work = processes.together(lambda: _open(setup, config, tensors))
    opened, main = work.opened, processes.rank == 0
    options = asdict(config) | {"tensors": list(tensors), "proxies": proxies, "processes": processes.world}
    step: AbstractContextManager[None] = nullcontext()
    if main:
        logs = {_log(opened, rank).path for rank in range(processes.world)} | set(_logs(opened))
        step = opened.step("sensitivity", work.data, (*FILES, *sorted(path.name for path in logs)), options)
    with ExitStack() as during:
        processes.together(lambda: during.enter_context(step))
        finished = processes.by_first(lambda: _finished(opened, work.data))
        rows = {row_key(row): row for row in finished}
        missing = [key for key in work.keys if row_key(key) not in rows]
        there = len(work.keys) - len(missing)
        if main and there:
            say(f"{there:,} of {len(work.keys):,} rows are there already", quiet=setup.quiet)
        todo = _share(missing, processes)
        during.enter_context(resumable(lambda: _kept(work) if main else ""))
        batches: list[tuple[Tensor, Tensor]] = []
        if proxies or any(processes.gather(bool(todo))):
            batches = processes.together(lambda: _images(work))
        for measured in processes.gather(_measured(work, batches, todo, processes, cache_mib)):
            rows |= {row_key(row): row for row in measured}
        if main:
            _write(work, list(rows.values()))
            told = run_proxies(opened, work.sites, batches, config) if proxies else ""
    if main:
        measured_now = {row_key(key) for key in work.keys}
        chosen = [row for key, row in rows.items() if key in measured_now]
        say(sensitivity_summary(opened.run.read_table("sensitivity"), chosen), quiet=setup.quiet)
        if proxies:
            say(told, quiet=setup.quiet)
        figures = ", ".join(f"{stem}.png" for stem in (*STEMS, "proxies") if (opened.run.path / f"{stem}.png").exists())
        say(f"{len(rows)} rows in {opened.run.path / 'sensitivity.parquet'}, figures {figures}", quiet=setup.quiet)


def _kept(work: _Work) -> str:
    """How many of the rows are on the disk, in words."""
    kept = {row_key(row) for row in _finished(work.opened, work.data)}
    done = sum(row_key(key) in kept for key in work.keys)
    return f"{done:,} of {len(work.keys):,} rows" if done else ""


def _open(setup: Setup, config: SweepConfig, tensors: Sequence[str]) -> _Work:
    """The model, the images, and the rows that the table is to have."""
    opened = open_run(setup, needs_data=True)
    data = opened.step_images("sensitivity", "train", at_most=IMAGES)
    sites = select_sites(opened.sites, tensors)
    if not sites:
        check_plain_weights(opened.model, opened.sites)
        raise InputError(f"no site of {opened.name} holds {', '.join(tensors)}; see --tensors, --include, --exclude.")
    keys = sweep_keys(opened.model, sites, config, blocks=opened.network.blocks)
    if not keys:
        raise InputError(
            "every group holds all the sites: nothing would be quantized. Choose other --groups or --tensors."
        )
    return _Work(opened=opened, data=data, sites=sites, keys=keys)


def _images(work: _Work) -> list[tuple[Tensor, Tensor]]:
    """All images on the device, where they stay for the whole sweep."""
    try:
        return list(work.opened.stream(work.data, "images"))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(f"{work.data.images} images do not fit into the memory of {work.opened.setup.device}; "
                         "give fewer by --images.") from error  # fmt: skip


def _share(keys: Sequence[dict], processes: Processes) -> list[dict]:
    """The keys of every `world`-th site or group: all rows of one are entered at the same place of the network."""
    names = list(dict.fromkeys((key["module"], key["tensor"], key["group"]) for key in keys))
    own = set(names[processes.rank :: processes.world])
    return [key for key in keys if (key["module"], key["tensor"], key["group"]) in own]


def _measured(
    work: _Work, batches: Sequence[tuple[Tensor, Tensor]], todo: Sequence[dict], processes: Processes, cache_mib: int
) -> list[dict]:
    """The rows of this process, each on the disk as soon as it is measured; an error in one process ends all.

    The others measure their own rows first: no row is lost that was begun.
    """
    opened, rows = work.opened, []
    log = _log(opened, processes.rank)

    def measure() -> None:
        if not todo:
            return
        with progress(len(todo), "sensitivity", "row", quiet=opened.setup.quiet) as bar:
            for row in measured_rows(
                opened.network, work.sites, batches, todo, task=opened.task, cache_mib=cache_mib,
                tell=lambda text: say(text, quiet=opened.setup.quiet),
            ):  # fmt: skip
                log.append([row])
                rows.append(row)
                bar.update()

    processes.together(measure)
    return rows


def _log(opened: Opened, rank: int) -> RowLog:
    """The rows of one process that are not in the table yet."""
    return RowLog(opened.run.path / (f"{LOG}.{rank}.jsonl" if rank else f"{LOG}.jsonl"))


def _logs(opened: Opened) -> list[Path]:
    """The logs of a sweep that was stopped, of all the processes that it had."""
    return sorted(opened.run.path.glob(f"{LOG}*.jsonl"))


def _finished(opened: Opened, data: ImageData) -> list[dict]:
    """Rows of the table and of a sweep that was stopped; a row in both is the same measurement."""
    table = opened.run.path / "sensitivity.parquet"
    written = opened.run.read_table("sensitivity", SENSITIVITY_COLUMNS).to_dict("records") if table.exists() else []
    if (opened.run.path / "sensitivity_images.parquet").exists():
        images = opened.run.read_table("sensitivity_images", (*ROW_KEY, *IMAGE_COLUMNS)).to_dict("records")
        by_key = {row_key(row): {name: row[name] for name in IMAGE_COLUMNS} for row in images}
        written = [row | by_key.get(row_key(row), {}) for row in written]
    rows = [*written]
    for path in _logs(opened):
        logged = RowLog(path).read(damaged=True)
        whole = [row for row in logged if _is_row(row, data.images)]
        if len(whole) < len(logged):
            warn(f"{len(logged) - len(whole)} rows of {path} are damaged and are measured again.")
        rows += whole
    return rows


def _is_row(row: Any, images: int) -> bool:
    """Whether a row of a log is what a sweep of so many images writes."""
    if not isinstance(row, dict) or not set(SENSITIVITY_COLUMNS) <= set(row):
        return False
    numbers = [row[name] for name in ("bit_width", "order", "images", "divergence", "divergence_se", "loss")]
    values = [row.get(name) for name in IMAGE_COLUMNS]
    lists = all(isinstance(value, list) and len(value) == row["images"] for value in values)
    return (
        lists
        and row["images"] <= images
        and all(isinstance(x, int | float) for x in [*numbers, *(x for value in values for x in value or [])])
    )


def _write(work: _Work, rows: Sequence[dict]) -> None:
    """The tables and figures of all rows; the logs have done their work."""
    opened, run = work.opened, work.opened.run
    run.write_table("cost", cost_table(opened.sites, opened.trace.unplanned))
    run.write_table("sensitivity_images", images_table(rows))
    table = sensitivity_table(rows)
    run.write_table("sensitivity", table)
    for stem, figure in sensitivity_figures(table, opened.name):
        save_figure(figure, run.path / stem)
    for path in _logs(opened):
        RowLog(path).remove()
