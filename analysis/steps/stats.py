"""`qvw stats`: the statistics of every tensor, into a run folder, by one process or several that share the images.

A pass that was stopped goes on after the last batch that was saved (`analysis.steps.stats_in_work`).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import pandas as pd
from torch import Tensor

from analysis.data import ImageData, none_readable, shared_batches
from analysis.figures.panels import distribution_figure, figure_files, save_figure
from analysis.running_stats import RunningStats
from analysis.session.open_run import open_run
from analysis.session.opened import Opened, warn_of_skipped
from analysis.session.processes import Processes, work_together
from analysis.session.setup import Setup
from analysis.statistics.kept_stats import Passed
from analysis.steps.stats_in_work import StatsInWork, begin, kept_files
from analysis.tensor_stats import (
    StatsTables,
    centres_of,
    measure_activations,
    measure_weights,
    start_activations,
    stats_tables,
    take_centres_,
)
from analysis.terminal.console import as_text, progress, say
from analysis.variation import variation
from quant.errors import InputError
from quant.site import Site, SiteInfo

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
    if processes.by_first(lambda: not setup.overwrite and run.is_done("stats", opened.inputs(data))):
        if main:
            run.remove(kept_files(run, 0))  # a kill between the record and the removal leaves them
    else:
        _measure_and_write(opened, data, processes)
    if main:
        stats = run.read_table("stats")
        say(_summary(stats), quiet=setup.quiet)
        for module, reason in opened.trace.unobserved.items():
            say(f"The attention of {module} is not observed: {reason}.", quiet=setup.quiet)
        if data is None:
            say("Weights alone: --data adds inputs, outputs and attention.", quiet=setup.quiet)
        say(f"{len(stats)} tensors in {run.path / 'stats.parquet'}, figure distribution.png", quiet=setup.quiet)


def _measure_and_write(opened: Opened, data: ImageData | None, processes: Processes) -> None:
    """Take the step, measure, write.

    What is measured is kept for the next start. Where `--overwrite` meets finished results these stay valid until all
    is measured: the step is taken then, and nothing is kept before.
    """
    run, main = opened.run, processes.rank == 0
    step, kept = run.record.steps.get("stats"), kept_files(run, processes.world)
    late = processes.by_first(lambda: opened.setup.overwrite and step is not None and run.is_done("stats", step.inputs))
    with ExitStack() as during:

        def start() -> None:
            if main:
                options = {"processes": processes.world}
                during.enter_context(opened.step("stats", data, FILES, options, temporary=kept))

        work = None
        if late:
            processes.by_first(lambda: run.remove(kept))
        else:
            processes.together(start)
        if data is not None:
            work = begin(opened, data, start_activations(_described(opened)), processes, keep=not late)
            during.enter_context(work.saved_at_the_end(opened.setup, data.images, processes.world))
        tables = _measured(opened, data, work, processes)
        if late:
            processes.together(start)
        if work is not None:
            work.keep = True
            work.save()  # the tables replace one another: a kill among them costs no image
        if main:
            _write(opened, tables)


def _opened(setup: Setup) -> tuple[Opened, ImageData | None]:
    """The model with its sites, and the images."""
    opened = open_run(setup, needs_data=False)
    data = None if opened.setup.data is None else opened.step_images("stats", "train", at_most=IMAGES)
    if not any(info.site.tensor == "input" and not info.excluded for info in opened.sites):
        raise InputError("no convolution or linear is left to describe; see --include and --exclude.")
    return opened, data


def _described(opened: Opened) -> list[SiteInfo]:
    """The sites that the tables tell of."""
    return [info for info in opened.sites if not info.excluded]


def _measured(opened: Opened, data: ImageData | None, work: StatsInWork | None, processes: Processes) -> StatsTables:
    """The tables of all sites; those of activations are complete in the process of rank 0 alone."""
    sites = _described(opened)
    weights = processes.together(lambda: measure_weights(opened.model, sites) if processes.rank == 0 else {})
    activations: dict[Site, RunningStats] = {}
    if data is not None and work is not None:
        batches = _share(opened, data, work, processes)
        try:
            measure_activations(opened.network, sites, batches, work.running)
        except InputError as error:
            processes.fail(error)
        activations = _merged(work.running, processes)
    return stats_tables(opened.network, sites, weights | activations, with_activations=data is not None)


def _share(
    opened: Opened, data: ImageData, work: StatsInWork, processes: Processes
) -> Iterator[tuple[Tensor, Sequence[str]]]:
    """The batches that this process has not measured yet, with the paths of their images; `work` hears of each.

    After each one the processes agree that all is well, so that an error in one ends all at the same batch. The first
    batch of all is measured before any other, and gives the centres of all histograms.
    """
    world, rank, setup = processes.world, processes.rank, opened.setup
    size, passed = setup.batch_size, work.passed
    left = len(range(rank * size, data.images, world * size)) - passed.batches
    rounds = max(processes.gather(left))
    data.skipped.extend(passed.skipped)
    waiting = world > 1 and not passed.batches  # all begin, or all go on with the centres that they have

    def first_of_all() -> None:
        processes.agree(None)
        centres = processes.gather(centres_of(work.running))[0]
        if rank > 0:
            take_centres_(work.running, centres)

    if waiting and rank > 0:
        first_of_all()
    there = min(passed.batches * size * world, data.images)
    with progress(data.images, "statistics", "image", quiet=setup.quiet, done=there) as bar:
        for images, _, paths in shared_batches(
            data, batch_size=size, num_workers=setup.num_workers, first=rank + passed.batches * world, every=world
        ):
            if len(paths):
                yield images.to(setup.device), paths
            passed = Passed(batches=passed.batches + 1, images=passed.images + len(paths), skipped=tuple(data.skipped))
            if waiting and rank == 0:
                first_of_all()
            waiting = False
            work.note(passed)
            processes.agree(None)
            bar.update(min(size * world, data.images - bar.n))  # the other processes do as much
    for _ in range(rounds - left):  # the last round has fewer batches than processes
        processes.agree(None)
    for skipped in processes.gather(data.skipped):
        data.skipped.extend(path for path in skipped if path not in data.skipped)
    if not sum(processes.gather(passed.images)):
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
