"""`qvw stats`: the statistics of every tensor, into a run folder, by one process or several that share the images.

A pass that was stopped resumes after the last batch that was saved (`analysis.steps.unfinished_stats`).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pandas as pd

from analysis.figures.panels import distribution_figure, figure_files, save_figure
from analysis.results import Stats
from analysis.running_stats import RunningStats
from analysis.runs import Run
from analysis.session.loaded_run import LoadedRun
from analysis.session.open_run import open_run
from analysis.session.processes import Processes, work_together
from analysis.session.session import Session, Source
from analysis.session.setup import Setup
from analysis.statistics.stats_file import Passed
from analysis.steps.unfinished_stats import StatsInWork, begin, kept_files
from analysis.tensor_stats import (
    StatsTables,
    centres_of,
    measure_activations,
    measure_weights,
    start_activations,
    stats_tables,
    take_centres_,
)
from analysis.terminal.console import as_text
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
    opened, session = processes.together(lambda: _opened(setup))
    measure_stats_in(session, processes)
    if processes.rank == 0:
        stats = opened.run.read_table("stats")
        session.say(_summary(stats))
        for module, reason in opened.trace.unobserved.items():
            session.say(f"The attention of {module} is not observed: {reason}.")
        if session.source is None:
            session.say("Weights alone: --data adds inputs, outputs and attention.")
        session.say(f"{len(stats)} tensors in {opened.run.path / 'stats.parquet'}, figure distribution.png")


def measure_stats_in(session: Session, processes: Processes) -> None:
    """Measure and write the tables, unless the run folder has them already.

    What is measured is kept for the next start. Where `overwrite` meets finished results these stay valid until all
    is measured: the step is taken then, and nothing is kept before.
    """
    run, main = session.run, processes.rank == 0
    if processes.by_first(lambda: not session.overwrite and run.is_done("stats", session.inputs)):
        if main:
            run.remove(kept_files(run, 0))  # a kill between the record and the removal leaves them
        return
    step, kept = run.record.steps.get("stats"), kept_files(run, processes.world)
    late = processes.by_first(lambda: session.overwrite and step is not None and run.is_done("stats", step.inputs))
    with ExitStack() as during:

        def start() -> None:
            if main:
                options = {"processes": processes.world}
                during.enter_context(session.step("stats", FILES, options, temporary=kept))

        work = None
        if late:
            processes.by_first(lambda: run.remove(kept))
        else:
            processes.together(start)
        if session.source is not None:
            work = begin(session, start_activations(_described(session)), processes, keep=not late)
            during.enter_context(work.saved_at_the_end())
        tables = _measured(session, work, processes)
        if late:
            processes.together(start)
        if work is not None:
            work.keep = True
            work.save()  # the tables replace one another: a kill among them costs no image
        if main:
            _write(session, tables)


def _opened(setup: Setup) -> tuple[LoadedRun, Session]:
    """The model with its sites, and the images."""
    opened = open_run(setup, needs_data=False)
    data = None if opened.setup.data is None else opened.step_images("stats", "train", at_most=IMAGES)
    if not any(info.site.tensor == "input" and not info.excluded for info in opened.sites):
        raise InputError("no convolution or linear is left to describe; see --include and --exclude.")
    return opened, opened.session(data)


def _described(session: Session) -> list[SiteInfo]:
    """The sites that the tables tell of."""
    return [info for info in session.sites if not info.excluded]


def _measured(session: Session, work: StatsInWork | None, processes: Processes) -> StatsTables:
    """The tables of all sites; those of activations are complete in the process of rank 0 alone."""
    net, sites = session.network, _described(session)
    weights = processes.together(lambda: measure_weights(net.model, sites) if processes.rank == 0 else {})
    activations: dict[Site, RunningStats] = {}
    if session.source is not None and work is not None:
        batches = _share(session, session.source, work, processes)
        try:
            measure_activations(net, sites, batches, work.running, session.task.forward)
        except InputError as error:
            processes.fail(error)
        activations = _merged(work.running, processes)
    return stats_tables(net, sites, weights | activations, with_activations=session.source is not None)


def _share(
    session: Session, source: Source, work: StatsInWork, processes: Processes
) -> Iterator[tuple[Any, Sequence[str]]]:
    """The batches that this process has not measured yet, with the names of their samples; `work` hears of each.

    After each one the processes agree that all is well, so that an error in one ends all at the same batch. The first
    batch of all is measured before any other, and gives the centres of all histograms.
    """
    world, rank, passed = processes.world, processes.rank, work.passed
    left = len(range(rank, source.batches, world)) - passed.batches
    rounds = max(processes.gather(left))
    source.skipped.extend(passed.skipped)
    waiting = world > 1 and not passed.batches  # all begin, or all continue with the centres that they have

    def first_of_all() -> None:
        processes.agree(None)
        centres = processes.gather(centres_of(work.running))[0]
        if rank > 0:
            take_centres_(work.running, centres)

    if waiting and rank > 0:
        first_of_all()
    there = work.done(passed)
    with session.bar(source.samples, "statistics", source.unit, done=there) as bar:
        for batch, names in source.read(rank + passed.batches * world, world):
            if len(names):
                yield batch, names
            passed = Passed(
                batches=passed.batches + 1, images=passed.images + len(names), skipped=tuple(source.skipped)
            )
            if waiting and rank == 0:
                first_of_all()
            waiting = False
            work.note(passed)
            processes.agree(None)
            now = work.done(passed)  # the other processes do as much
            bar.update(now - there)
            there = now
    for _ in range(rounds - left):  # the last round has fewer batches than processes
        processes.agree(None)
    for skipped in processes.gather(source.skipped):
        source.skipped.extend(path for path in skipped if path not in source.skipped)
    if not sum(processes.gather(passed.images)):
        processes.fail(InputError(source.nothing))
    if rank == 0:
        source.at_end()


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


def read_stats(run: Run, name: str) -> Stats:
    """The statistics that a run folder holds, as `measure_stats` returns them."""
    table, channels, histograms = (run.read_table(sort) for sort in ("stats", "channels", "histograms"))
    table["shape"] = [list(shape) for shape in table["shape"]]
    return Stats(name=name, table=table, channels=channels, histograms=histograms)


def _write(session: Session, tables: StatsTables) -> None:
    run = session.run
    run.write_table("channels", tables.channels)
    run.write_table("histograms", tables.histograms)
    run.write_json("variation", variation(tables.stats))
    run.write_table("stats", tables.stats)
    save_figure(distribution_figure(tables.stats, session.network.name), run.path / "distribution")


def _summary(stats: pd.DataFrame) -> str:
    shown = stats[~stats["kind"].isin(("norm", "block"))].nlargest(8, "excess_kurtosis")
    columns = ["module", "tensor", "kind", "std", "excess_kurtosis", "outlier_fraction", "channel_range_ratio"]
    return "Heaviest tails, norms and blocks left out:\n" + as_text(shown[columns])
