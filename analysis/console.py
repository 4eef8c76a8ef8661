"""What a command prints: progress bars, one short table, warnings."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import click
import pandas as pd
from tqdm import tqdm

from quant.errors import InputError


def progress(total: int, what: str, unit: str, *, quiet: bool) -> tqdm:
    """A bar on standard error; silent if `quiet` and where standard error is no terminal."""
    return tqdm(total=total, desc=what, unit=f" {unit}", disable=True if quiet else None, leave=False)


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


def as_text(frame: pd.DataFrame) -> str:
    """A table for a terminal, figures with four digits."""
    return frame.to_string(index=False, float_format=lambda value: f"{value:.4g}")
