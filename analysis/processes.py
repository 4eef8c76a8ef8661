"""Several processes that work on one step: they gather values, and an error in one ends all with one message."""

import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

from quant.errors import InputError

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


def leave_after_the_first(state: PartialState) -> NoReturn:
    """End with exit code 2 when rank 0 has ended: `torchrun` stops all at the first end, and rank 0 has to speak."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with suppress(RuntimeError):  # the connection is closed
        state.wait_for_everyone()
    raise SystemExit(2)
