"""The statistics that `qvw stats` measures: kept in the run folder from time to time, resumed by the next start."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from analysis.running_stats import RunningStats
from analysis.runs import Run
from analysis.session.processes import Processes
from analysis.session.session import Session
from analysis.statistics.stats_file import Passed, UnusableStatsError, load_stats, save_stats
from analysis.storage.keyed_log import json_sha256
from analysis.terminal.console import resumable
from quant.errors import InputError, first_line
from quant.site import Site

KEPT = "stats.partial"
SECONDS = 60.0
"""Between two saves: the work that a kill may cost."""
SHARE = 0.02
"""Of the time, at most, for saving: the pause after a save is no shorter than the save's own time over this."""


def kept_files(run: Run, processes: int) -> list[str]:
    """The files in which that many processes keep statistics, and those that killed ones have left, by name."""
    patterns = (f"{KEPT}*.safetensors", f".{KEPT}*.safetensors")  # with a dot before it: not yet in its place
    left = (path.name for pattern in patterns for path in run.path.glob(pattern))
    return sorted({*left, *(_file(rank) for rank in range(processes))})


def _file(rank: int) -> str:
    return f"{KEPT}.{rank}.safetensors" if rank else f"{KEPT}.safetensors"


class StatsInWork:
    """What one process has measured of its share of the batches: `running`, and how far earlier starts came: `passed`.

    Processes save by clocks of their own: each file stands alone, whatever batch the others have come to.
    """

    def __init__(
        self,
        path: Path,
        session: Session,
        running: dict[Site, RunningStats],
        processes: Processes,
        *,
        keep: bool = True,
    ) -> None:
        assert session.source is not None
        self.path, self.running, self.keep, self._source, self._warn = path, running, keep, session.source, session.warn
        self._processes = processes
        sites = json_sha256({"sites": [[*site, stats.groups] for site, stats in running.items()]})
        self.identity = {
            **session.identity, "processes": processes.world, "process": processes.rank, "sites_sha256": sites
        }  # fmt: skip
        self.passed = self._saved = Passed()
        self._noted = self.passed, running
        self._next = time.monotonic() + SECONDS
        self._shown = False

    def done(self, passed: Passed) -> int:
        """How many samples all processes have measured, where they have come as far as this one."""
        source, world = self._source, self._processes.world
        if source.samples is None or source.batch_size is None:
            return passed.images
        return min(passed.batches * world * source.batch_size, source.samples)

    def take_up(self) -> None:
        """Go on where the file stopped. Raises UnusableStatsError where it is not of these batches."""
        passed, running = load_stats(self.path, self.identity, self.running)
        unknown = set(passed.skipped).difference(self._source.names)
        batches = len(range(self._processes.rank, self._source.batches, self._processes.world))
        if not 0 < passed.batches <= batches or passed.images < 0 or unknown:
            raise UnusableStatsError("is damaged (it tells of other images)")
        self.passed = self._saved = passed
        self.running = running
        self._noted = passed, {site: stats.copy() for site, stats in running.items()}

    def note(self, passed: Passed) -> None:
        """A batch has gone through all sites: this is what an interrupt saves, and time to save comes now and then."""
        self._noted = passed, {site: stats.copy() for site, stats in self.running.items()}
        if time.monotonic() >= self._next:
            self.save()

    def save(self) -> None:
        """Write what was last noted. A full disk costs no statistics: a warning tells of it, once."""
        passed, running = self._noted
        if not self.keep or passed.batches == self._saved.batches:
            return
        start = time.monotonic()
        try:
            save_stats(self.path, self.identity, passed, running)
            self._saved = passed
        except InputError as error:
            if not self._shown:
                reason = first_line(error.__cause__ or error)
                self._warn(
                    f"{self.path} cannot be written ({reason}): an interrupt would lose what is measured from here."
                )
            self._shown = True
        end = time.monotonic()
        self._next = end + max(SECONDS, (end - start) / SHARE)

    @contextmanager
    def saved_at_the_end(self) -> Iterator[None]:
        """Whatever ends the work before its time, save what there is; an interrupt tells `main` how much."""

        def kept() -> str:
            count, source = self.done(self._saved), self._source
            of = "" if source.samples is None else f" of {source.samples:,}"
            return f"{count:,}{of} {source.unit}s" if count else ""

        with resumable(kept):
            try:
                yield
            except BaseException:
                self.save()
                raise


def begin(session: Session, running: dict[Site, RunningStats], processes: Processes, *, keep: bool) -> StatsInWork:
    """The work as an earlier start left it; where that cannot be used in one process, all begin with `running`."""
    path = session.run.path / _file(processes.rank)
    work, problem = StatsInWork(path, session, running, processes, keep=keep), ""
    if path.exists():
        try:
            work.take_up()
        except UnusableStatsError as error:
            problem = f"{path} {error}: the statistics start from scratch."
    first = next(filter(None, processes.gather(problem)), None)
    passed = processes.gather(work.passed.batches)
    if all(passed):
        return work
    if any(passed) and first is None:
        first = "a process was stopped before it had kept anything: the statistics start from scratch."
    if first is not None and processes.rank == 0:
        session.warn(first)
    return StatsInWork(path, session, running, processes, keep=keep)
