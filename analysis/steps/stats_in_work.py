"""The statistics that `qvw stats` measures: kept in the run folder from time to time, taken up by the next start."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from analysis.data import ImageData
from analysis.running_stats import RunningStats
from analysis.runs import Run
from analysis.session.opened import Opened
from analysis.session.processes import Processes
from analysis.session.setup import Setup
from analysis.statistics.kept_stats import NotTakenUpError, Passed, load_stats, save_stats
from analysis.storage.own_rows import json_sha256
from analysis.terminal.console import resumable, warn
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
        self, path: Path, identity: Mapping[str, Any], running: dict[Site, RunningStats], *, keep: bool = True
    ) -> None:
        self.path, self.identity, self.running, self.keep = path, identity, running, keep
        self.passed = self._saved = Passed()
        self._noted = self.passed, running
        self._next = time.monotonic() + SECONDS
        self._told = False

    def take_up(self, batches: int, names: Sequence[str]) -> None:
        """Go on where the file stopped. Raises NotTakenUpError where it is not of so many batches of these images."""
        passed, running = load_stats(self.path, self.identity, self.running)
        unknown = set(passed.skipped).difference(names)
        if not 0 < passed.batches <= batches or passed.images < 0 or unknown:
            raise NotTakenUpError("is damaged (it tells of other images)")
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
            if not self._told:
                reason = first_line(error.__cause__ or error)
                warn(f"{self.path} cannot be written ({reason}): the statistics go on, an interrupt would lose them.")
            self._told = True
        end = time.monotonic()
        self._next = end + max(SECONDS, (end - start) / SHARE)

    @contextmanager
    def saved_at_the_end(self, setup: Setup, images: int, processes: int) -> Iterator[None]:
        """Whatever ends the work before its time, save what there is; an interrupt tells `main` how much."""

        def kept() -> str:
            count = min(self._saved.batches * setup.batch_size * processes, images)
            return f"{count:,} of {images:,} images" if count else ""

        with resumable(kept):
            try:
                yield
            except BaseException:
                self.save()
                raise


def begin(
    opened: Opened, data: ImageData, running: dict[Site, RunningStats], processes: Processes, *, keep: bool
) -> StatsInWork:
    """The work as an earlier start left it; where that cannot be used in one process, all begin with `running`."""
    rank, world, size = processes.rank, processes.world, opened.setup.batch_size
    sites = [[*site, stats.groups] for site, stats in running.items()]
    identity = opened.identity(data) | {"processes": world, "process": rank}
    identity["sites_sha256"] = json_sha256({"sites": sites})
    path = opened.run.path / _file(rank)
    work, problem = StatsInWork(path, identity, running, keep=keep), ""
    if path.exists():
        try:
            work.take_up(len(range(rank * size, data.images, world * size)), data.dataset.names)
        except NotTakenUpError as error:
            problem = f"{path} {error}: the statistics start anew."
    first = next(filter(None, processes.gather(problem)), None)
    passed = processes.gather(work.passed.batches)
    if all(passed):
        return work
    if any(passed) and first is None:
        first = "a process was stopped before it had kept anything: the statistics start anew."
    if first is not None and rank == 0:
        warn(first)
    return StatsInWork(path, identity, running, keep=keep)
