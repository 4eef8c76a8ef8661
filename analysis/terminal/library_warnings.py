"""Warnings while a command runs: those of this project as lines of the command, those of libraries not at all."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TextIO

OWN = ("analysis", "quant")


@contextmanager
def own_warnings_alone() -> Iterator[None]:
    """Show what `quant` and `analysis` warn of as `qvw: warning: ...`, and drop warnings of other packages.

    Those speak to programmers, such as torch's remark that a loader has more processes than the machine has cores.
    Nothing is changed where warnings were asked for, by `python -W` or PYTHONWARNINGS, or made into errors.
    """
    if sys.warnoptions or any(action == "error" for action, *_ in warnings.filters):
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = _show
        yield


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print the warning if a file of this project raised it, whatever place it is attributed to."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "warnings":
        frame = frame.f_back
    if frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in OWN:
        from analysis.terminal.console import warn  # here: help pages need no progress bars
        from analysis.terminal.option_words import as_options

        warn(as_options(str(message)))
