"""What a command prints: progress bars, one short table, warnings."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import click
from tqdm import tqdm

from quant.errors import InputError

if TYPE_CHECKING:  # a warning needs no pandas
    import pandas as pd


class _Lines(tqdm):
    """Progress for a file: a line a minute, and none for what takes less."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None:  # else the empty text that clears a bar
            self.fp.write(f"{self}\n")
            self.fp.flush()


def progress(total: int, what: str, unit: str, *, quiet: bool, done: int = 0) -> tqdm:
    """A bar on standard error, or one line per minute where that is not a terminal; silent if `quiet`.

    If an earlier start has `done` some of it, that is printed, and the remaining time is that of the rest.
    """
    if done:
        say(f"resuming after {done:,} of {total:,} {unit}s", quiet=quiet)
    if quiet or sys.stderr.isatty():
        return tqdm(total=total, initial=done, desc=what, unit=f" {unit}", disable=quiet, leave=False)
    return _Lines(
        total=total, initial=done, desc=what, unit=f" {unit}", leave=False, delay=60, mininterval=60, miniters=1,
        bar_format="{desc}: {n_fmt} of {total_fmt}{unit}s after {elapsed}, {remaining} to go",
    )  # fmt: skip


def say(text: str, *, quiet: bool) -> None:
    """Text on standard output, unless `quiet`."""
    if not quiet:
        click.echo(text)


def warn(text: str) -> None:
    """A line on standard error that does not stop the work."""
    click.echo(f"qvw: warning: {text}", err=True)


@contextmanager
def resumable(kept: Callable[[], str]) -> Iterator[None]:
    """Let an interrupt tell `main` what is kept for the next start; `kept` gives "" where that is nothing."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        with suppress(InputError):  # damaged files: the next start tells what is wrong with them
            text = kept()
            if text:
                interrupt.add_note(text)
        raise


def as_text(frame: "pd.DataFrame") -> str:
    """A table for a terminal, figures with four digits."""
    return frame.to_string(index=False, float_format=lambda value: f"{value:.4g}")
