"""Tables of a page: cells as text, with the number that they are sorted by."""

import json
import math
from dataclasses import dataclass
from typing import Any

DASH = "\N{EN DASH}"  # what was not measured


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A table's cell: what is shown, and the number by which it is sorted; None sorts by the text."""

    text: str
    key: float | None = None  # in the unit of what is shown
    error: float | None = None  # standard error of the key, in its unit
    number: bool = False  # aligned right, and last in every order where it has no key


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the page; the first cell of a row is its header."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    mixed: bool = False  # each row has a unit of its own: there is no order to sort them by


def text(value: Any) -> Cell:
    """A cell of words."""
    return Cell(text=str(value))


def plain(value: Any) -> str:
    """A setting as text: words as they are, the rest as JSON; a dash for none."""
    if value is None:
        return DASH
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def finite(value: Any) -> float | None:
    """The value as a finite number; None for what was not measured."""
    return float(value) if value is not None and math.isfinite(value) else None


def number(value: Any, style: str) -> Cell:
    """A figure in a style of str.format, such as `{:.2f}`; a dash for what was not measured."""
    key = finite(value)
    return Cell(text=DASH if key is None else style.format(key), key=key, number=True)


def measured(value: Any, error: Any, *, digits: int, scale: float = 1) -> Cell:
    """A figure, `scale` times the value, with its standard error where there is one."""
    key, spread = (None if each is None else scale * each for each in (finite(value), finite(error)))
    if key is None:
        return Cell(text=DASH, number=True)
    shown = f"{key:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")
    return Cell(text=shown, key=key, error=spread, number=True)
