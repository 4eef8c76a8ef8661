"""Several processes that work on one step: they gather values, and an error in one ends all with one message."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from analysis.session.setup import Setup
from quant.errors import InputError

GRACE_SECONDS = 20
"""How long a process that cannot continue waits for another to report the cause."""
T = TypeVar("T")


class TogetherError(InputError):
    """An InputError of one process, raised in all of them."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes that share a step: this one alone, or those that `torchrun` has started."""

    rank: int = 0
    world: int = 1

    def gather(self, value: T) -> list[T]:
        """The values of all processes by rank; every process must call it."""
        return gather_object([value]) if self.world > 1 else [value]

    def together(self, work: Callable[[], T]) -> T:
        """What `work` returns here; where it raises InputError in one process, all raise that of the lowest rank."""
        try:
            result = work()
        except InputError as error:
            self.fail(error)
        self.agree(None)
        return result

    def by_first(self, work: Callable[[], T]) -> T:
        """What `work` returns in the process of rank 0, which alone does it; its InputError is raised in all."""
        found: list[Any] = self.gather(self.together(lambda: work() if self.rank == 0 else None))
        return found[0]

    def fail(self, error: InputError) -> NoReturn:
        """Raise the error in all processes; the others call `agree` or `fail` at this point too."""
        if isinstance(error, TogetherError) or self.world == 1:
            raise error
        self.agree(str(error))
        raise AssertionError("an error was told, and nobody raised it")

    def agree(self, problem: str | None) -> None:
        """Raise TogetherError where a process has a problem."""
        first = next((one for one in self.gather(problem) if one is not None), None)
        if first is not None:
            raise TogetherError(first)


def work_together(setup: Setup, work: Callable[[Setup, Processes], None]) -> None:
    """Do a step in this process, or in all that `torchrun` has started, of which that of rank 0 alone speaks.

    `work` gets the options with this process's own device. An InputError that is raised by all (`Processes.fail`) is
    told at once; one that a single process meets is told after `GRACE_SECONDS`, and so is any other error.
    """
    # No public name of accelerate asks whether its state is made, or drops it; these two are the same in 1.0 and 1.15.
    new = not PartialState._shared_state
    # A process that has done its share waits for the others, longer than the ten to thirty minutes of the backends.
    state = PartialState(cpu=setup.device == "cpu", timeout=timedelta(days=7))
    processes = Processes(rank=state.process_index, world=state.num_processes)
    if processes.world > 1:
        setup = replace(setup, device=str(state.device))  # each process its own
    elif new:
        PartialState._reset_state()  # a later training in this process may use another device
    if processes.rank == 0:
        try:
            work(setup, processes)
        except RuntimeError as error:
            if processes.world > 1 and _is_lost_connection(error):
                _wait_to_be_ended()  # the process that ended tells why
            raise
        return
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            work(replace(setup, quiet=True), processes)
    except TogetherError:
        _leave_after_the_first(state)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception:
        _wait_to_be_ended()  # mostly rank 0 meets the same error, and tells it
        raise


def _is_lost_connection(error: BaseException) -> bool:
    """Whether an exchange failed because another process has ended; gloo raises a plain RuntimeError."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error) or "onnection" in str(error)


def _wait_to_be_ended() -> None:
    """Sleep until `torchrun`, which stops all processes when one has ended, stops this one, some seconds at most."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(GRACE_SECONDS)


def _leave_after_the_first(state: PartialState) -> NoReturn:
    """End with exit code 2 when rank 0 has ended: `torchrun` stops all at the first end, and rank 0 has to speak."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with suppress(RuntimeError):  # the connection is closed
        state.wait_for_everyone()
    raise SystemExit(2)
