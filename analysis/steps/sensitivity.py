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


def _run_sensitivity(
    setup: Setup, config: SweepConfig, processes: Processes, *, tensors: Sequence[str], proxies: bool, cache_mib: int
) -> None:
    opened, sites, session = processes.together(lambda: _opened(setup, config, tensors))
    options = {"tensors": list(tensors), "proxies": proxies}
    with ExitStack() as during:
        swept = during.enter_context(sweep_in(
            session, sites, config, processes, lambda: _images(opened, session), cache_mib=cache_mib, options=options,
            needs_batches=proxies,
        ))  # fmt: skip
        told = run_proxies(session, sites, swept.batches, config) if proxies and processes.rank == 0 else ""
    if processes.rank == 0:
        path = opened.run.path
        session.say(sensitivity_summary(opened.run.read_table("sensitivity"), swept.rows))
        if proxies:
            session.say(told)
        figures = ", ".join(f"{stem}.png" for stem in (*STEMS, "proxies") if (path / f"{stem}.png").exists())
        session.say(f"{swept.total} rows in {path / 'sensitivity.parquet'}, figures {figures}")


def _opened(setup: Setup, config: SweepConfig, tensors: Sequence[str]) -> tuple[Opened, list[SiteInfo], Session]:
    """The model, the sites to sweep, and the images."""
    opened = open_run(setup, needs_data=True)
    data = opened.step_images("sensitivity", "train", at_most=IMAGES)
    sites = select_sites(opened.sites, tensors)
    if not sites:
        check_plain_weights(opened.model, opened.sites)
        raise InputError(f"no site of {opened.name} holds {', '.join(tensors)}; see --tensors, --include, --exclude.")
    checked_keys(opened.network, sites, config)
    return opened, sites, opened.session(data)


def _images(opened: Opened, session: Session) -> list[Any]:
    """All images on the device, where they stay for the whole sweep."""
    assert session.source is not None
    try:
        return list(opened.stream(opened.step_images("sensitivity", "train", at_most=IMAGES), "images"))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(f"{session.source.samples} images do not fit into the memory of {opened.setup.device}; "
                         "give fewer by --images.") from error  # fmt: skip
