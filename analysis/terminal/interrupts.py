"""SIGINT and SIGTERM as KeyboardInterrupt, at a place where Python does not drop it."""

import os
import signal
import threading
import time
from contextlib import suppress
from functools import cache
from typing import Any

AFTER_A_FORK = 0.05  # seconds in which callbacks of other modules may still run


def catch_interrupts() -> None:
    """Let both signals raise KeyboardInterrupt; nothing happens outside the main thread, which alone may say so.

    Whatever is raised while a process forks (a DataLoader starts its workers so) is printed and dropped by Python, and
    the work would continue: a signal of that moment is sent once more when the fork is over.
    """
    with suppress(ValueError):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _forks().interrupt)


@cache
def _forks() -> "_Forks":
    """The one watch over the forks of this process: what is registered for them stays."""
    watch = _Forks()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=watch.begin, after_in_parent=watch.end, after_in_child=watch.end)
    return watch


class _Forks:
    """Whether the process forks at this moment."""

    def __init__(self) -> None:
        self._forking = False
        self._settled = 0.0  # by time.monotonic()

    def begin(self) -> None:
        self._forking = True

    def end(self) -> None:
        self._forking, self._settled = False, time.monotonic() + AFTER_A_FORK

    def interrupt(self, number: int, _frame: Any) -> None:
        """The handler of both signals."""
        if not self._forking and time.monotonic() >= self._settled:
            raise KeyboardInterrupt
        again = threading.Timer(2 * AFTER_A_FORK, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()
