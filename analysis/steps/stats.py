"""`qvw stats`: the statistics of every tensor, into a run folder, by one process or several that share the images."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import pandas as pd
from torch import Tensor

from analysis.data import ImageData, none_readable
from analysis.figures.panels import distribution_figure, figure_files, save_figure
from analysis.running_stats import RunningStats
from analysis.session.open_run import open_run
from analysis.session.opened import Opened, warn_of_skipped
from analysis.session.processes import Processes, work_together
from analysis.session.setup import Setup
from analysis.tensor_stats import (
    StatsTables,
    centres_of,
    measure_activations,
    measure_weights,
    start_activations,
    stats_tables,
    take_centres_,
)
from analysis.terminal.console import as_text, say
from analysis.variation import variation
from quant.errors import InputError
from quant.site import Site

IMAGES = 2000
FILES = ("stats.parquet", "channels.parquet", "histograms.parquet", "variation.json", *figure_files("distribution"))


def run_stats(setup: Setup) -> None:
    """Write stats, channels, histograms and variation of one model; weights only where no images are known.

    Several processes measure every `world`-th batch each; the one of rank 0 writes, prints, and tells what is wrong.
    """
    work_together(setup, _run_stats)


def _run_stats(setup: Setup, processes: Processes) -> None:
    opened, data = processes.together(lambda: _opened(setup))
    run, main = opened.run, processes.rank == 0
    done = not setup.overwrite and run.is_done("stats", opened.inputs(data))
    if not processes.gather(done)[0]:
        step: AbstractContextManager[None] = nullcontext()
        if main:
            step = opened.step("stats", data, FILES, {"processes": processes.world}, renew=True)
        _measure_and_write(opened, data, processes, step)
    if main:
        stats = run.read_table("stats")
        say(_summary(stats), quiet=setup.quiet)
        for module, reason in opened.trace.unobserved.items():
            say(f"The attention of {module} is not observed: {reason}.", quiet=setup.quiet)
        if data is None:
            say("Weights alone: --data adds inputs, outputs and attention.", quiet=setup.quiet)
        say(f"{len(stats)} tensors in {run.path / 'stats.parquet'}, figure distribution.png", quiet=setup.quiet)


def _measure_and_write(
    opened: Opened, data: ImageData | None, processes: Processes, step: AbstractContextManager[None]
) -> None:
    """Take the step; where measuring fails no file was written, and run.json tells of an earlier one as before."""
    before = opened.run.record
    with ExitStack() as afterwards, ExitStack() as during:
        processes.together(lambda: during.enter_context(step))
        if processes.rank == 0:
            afterwards.callback(opened.put_back, "stats", before)  # runs after the step has noted how it ended
        tables = _measured(opened, data, processes)
        afterwards.pop_all()  # all is measured: from here on the files are new, and so is what run.json tells
        if processes.rank == 0:
            _write(opened, tables)


def _opened(setup: Setup) -> tuple[Opened, ImageData | None]:
    """The model with its sites, and the images."""
    opened = open_run(setup, needs_data=False)
    data = None if opened.setup.data is None else opened.step_images("stats", "train", at_most=IMAGES)
    if not any(info.site.tensor == "input" and not info.excluded for info in opened.sites):
        raise InputError("no convolution or linear is left to describe; see --include and --exclude.")
    return opened, data


def _measured(opened: Opened, data: ImageData | None, processes: Processes) -> StatsTables:
    """The tables of all sites; those of activations are complete in the process of rank 0 alone."""
    sites = [info for info in opened.sites if not info.excluded]
    weights = processes.together(lambda: measure_weights(opened.model, sites) if processes.rank == 0 else {})
    activations: dict[Site, RunningStats] = {}
    if data is not None:
        activations = start_activations(sites)
        batches = _share(opened, data, processes, activations)
        try:
            measure_activations(opened.model, opened.trace, sites, batches, activations)
        except InputError as error:
            processes.fail(error)
        activations = _merged(activations, processes)
    return stats_tables(sites, weights | activations, opened.trace, name=opened.name, with_activations=data is not None)


def _share(
    opened: Opened, data: ImageData, processes: Processes, running: Mapping[Site, RunningStats]
) -> Iterator[tuple[Tensor, Sequence[str]]]:
    """This process's batches with the paths of their images.

    After each one the processes agree that all is well, so that an error in one ends all at the same batch. The first
    batch of all is measured before any other, and gives the centres of all histograms.
    """
    world, rank = processes.world, processes.rank
    rounds = -(-data.images // (opened.setup.batch_size * world))
    read, waiting = 0, world > 1

    def first_of_all() -> None:
        processes.agree(None)
        centres = processes.gather(centres_of(running))[0]
        if rank > 0:
            take_centres_(running, centres)

    if waiting and rank > 0:
        first_of_all()
    for images, _, paths in opened.share(data, "statistics", rank=rank, world=world):
        if len(paths):
            yield images, paths
        read += len(paths)
        rounds -= 1
        if waiting and rank == 0:
            first_of_all()
        waiting = False
        processes.agree(None)
    if rounds:  # the last round has fewer batches than processes
        processes.agree(None)
    for skipped in processes.gather(data.skipped):
        data.skipped.extend(path for path in skipped if path not in data.skipped)
    if not sum(processes.gather(read)):
        processes.fail(none_readable(data))
    if rank == 0:
        warn_of_skipped(data)


def _merged(measured: dict[Site, RunningStats], processes: Processes) -> dict[Site, RunningStats]:
    """What all processes have measured; one site at a time, which keeps the memory small."""
    if processes.world == 1:
        return measured
    merged = {}
    for site, own in measured.items():
        merged[site], *others = processes.gather(own)
        for stats in others:
            merged[site].merge(stats)
    return merged


def _write(opened: Opened, tables: StatsTables) -> None:
    run = opened.run
    run.write_table("channels", tables.channels)
    run.write_table("histograms", tables.histograms)
    run.write_json("variation", variation(tables.stats))
    run.write_table("stats", tables.stats)
    save_figure(distribution_figure(tables.stats, opened.name), run.path / "distribution")


def _summary(stats: pd.DataFrame) -> str:
    shown = stats[~stats["kind"].isin(("norm", "block"))].nlargest(8, "excess_kurtosis")
    columns = ["module", "tensor", "kind", "std", "excess_kurtosis", "outlier_fraction", "channel_range_ratio"]
    return "Heaviest tails, norms and blocks left out:\n" + as_text(shown[columns])
