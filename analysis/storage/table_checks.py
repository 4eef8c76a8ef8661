"""The check of a table that is read back: types, ranges, missing values, repeated rows, and laws between columns.

Parquet keeps a column's type, but a person may have edited the file with pandas, and a NaN or a repeated row would
come out as a plan. An Arrow schema knows types and nulls alone; pandera knows ranges and keys too, but would be one
more dependency, whose messages name neither the site nor the next step.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.api.types import infer_dtype, is_bool_dtype, is_complex_dtype, is_numeric_dtype

from quant.errors import InputError

COUNTABLE = 2**53  # up to here float64, in which HiGHS and pandas reckon, knows every whole number
LARGEST = 1e100  # of a figure: sums and squares of such are finite still
_ROUNDING = 1e-9  # by which a share or a correlation may lie beyond its end
_LISTS = {"texts": "text", "wholes": "whole", "numbers": "number"}
_WORDS = {"text": "text", "whole": "a whole number", "number": "a number", "flag": "True or False"}
_SHOWN = 60  # characters of a wrong value


@dataclass(frozen=True, kw_only=True)
class Column:
    """What one column may hold: values of a sort (`texts`, `wholes`, `numbers` are lists of them) within bounds.

    `missing` says where a value may lack: nowhere, in all rows together (what these images cannot tell), or anywhere;
    for lists it speaks of their values, and the lists themselves are always there. `optional` is a column that tables
    of earlier versions have not.
    """

    sort: Literal["text", "whole", "number", "flag", "texts", "wholes", "numbers"]
    least: float = -LARGEST
    most: float = LARGEST
    allowed: tuple[Any, ...] = ()
    missing: Literal["never", "together", "anywhere"] = "never"
    optional: bool = False

    @property
    def expected(self) -> str:
        """What a message says that the column should hold."""
        if self.allowed:
            words = f"one of {', '.join(str(value) or 'empty text' for value in self.allowed)}"
        else:
            words = _WORDS[_LISTS.get(self.sort, self.sort)] + self._bounds
        if self.sort in _LISTS:
            words = f"a list, each value {words}"
        return words + {"never": "", "together": ", or none in any row", "anywhere": ", or none"}[self.missing]

    @property
    def _bounds(self) -> str:
        least = f" from {self.least:g}" if self.least > -LARGEST else ""
        return least + (f" to {self.most:g}" if self.most < LARGEST else "")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A law between columns: `broken` is True for each row of a table, columns checked, that breaks it.

    `column` is the one whose value is shown; `needs` are all that `broken` reads.
    """

    column: str
    needs: tuple[str, ...]
    expected: str
    broken: Callable[[pd.DataFrame], pd.Series]


@dataclass(frozen=True, kw_only=True)
class Table:
    """What a table holds: its columns, those that together name a row, laws between them; `filled`: a row at least."""

    columns: Mapping[str, Column]
    key: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    filled: bool = False

    @property
    def required(self) -> tuple[str, ...]:
        """The columns that every version of the table has."""
        return tuple(name for name, column in self.columns.items() if not column.optional)


def checked(frame: pd.DataFrame, table: Table, required: Collection[str], *, source: str, remedy: str) -> pd.DataFrame:
    """`frame` with its columns in one type each: int64, float64, bool (object where some are missing), text, lists.

    Columns that `table` does not know stay as they are. InputError, which begins with `source` and ends with `remedy`,
    for a column of `required` that is not there, and for the first value that `table` does not allow: with its row
    (counted from 0, as pandas does), the site, what came and what was expected.
    """
    if not frame.columns.is_unique:
        doubled = frame.columns[frame.columns.duplicated()][0]
        raise InputError(f"{source} has two columns {str(doubled)!r}. {remedy}")
    missing = [name for name in required if name not in frame]
    if missing:
        raise InputError(f"{source} lacks the column {missing[0]!r}: it is of another version or program. {remedy}")
    if table.filled and frame.empty:
        raise InputError(f"{source} has no row. {remedy}")
    frame = frame.reset_index(drop=True)  # rows are distinguished by their place
    cast = {}
    for name, column in table.columns.items():
        if name in frame:
            wrong = _misfits(frame[name], column)
            if wrong.any():
                raise InputError(f"{source}, {_shown(frame, name, wrong)}, expected {column.expected}. {remedy}")
            cast[name] = _cast(frame[name], column)
    frame = frame.assign(**cast)
    if table.key and set(table.key) <= set(frame):
        repeated = frame.duplicated(list(table.key)).to_numpy()
        if repeated.any():
            row = int(repeated.argmax())
            same = (frame[list(table.key)] == frame[list(table.key)].iloc[row]).all(axis=1)
            raise InputError(
                f"{source}, {_row(frame, row)} repeats row {int(same.to_numpy().argmax())}: both have the same "
                f"{', '.join(table.key)}. {remedy}"
            )
    for rule in table.rules:
        if set(rule.needs) <= set(frame):
            broken = rule.broken(frame).to_numpy(dtype=bool)
            if broken.any():
                raise InputError(f"{source}, {_shown(frame, rule.column, broken)}, expected {rule.expected}. {remedy}")
    return frame


def _misfits(values: pd.Series, column: Column) -> NDArray[np.bool_]:
    """True for each value that the column may not hold."""
    missing = values.isna().to_numpy(dtype=bool)
    if column.sort in _LISTS:
        fits = np.array([isinstance(value, (list, np.ndarray)) for value in values], dtype=bool)
        wrong = ~fits
        wrong[fits] = _lists_misfit(values[fits].to_list(), column)
        return wrong
    allowed = column.missing == "anywhere" or (column.missing == "together" and bool(missing.all()))
    wrong = np.zeros(len(values), dtype=bool) if allowed else missing.copy()
    wrong[~missing] = _values_misfit(values[~missing], column.sort, column)
    return wrong


def _values_misfit(values: pd.Series, sort: str, column: Column) -> NDArray[np.bool_]:
    """True for each of these values, none of them missing, that is of another sort, out of bounds, or not allowed."""
    if sort == "text":
        wrong = _of_other_type(values, "string", str)
    elif sort == "flag":
        wrong = _of_other_type(values, "boolean", (bool, np.bool_))
    elif is_bool_dtype(values.dtype) or is_complex_dtype(values.dtype) or not is_numeric_dtype(values.dtype):
        wrong = np.ones(len(values), dtype=bool)
    else:
        numbers = values.to_numpy(dtype=np.float64)
        slack = _ROUNDING if sort == "number" else 0.0
        wrong = ~((numbers >= column.least - slack) & (numbers <= column.most + slack))
        if sort == "whole":
            wrong |= np.floor(numbers) != numbers
    if column.allowed:
        wrong[~wrong] = ~values[~wrong].isin(column.allowed).to_numpy(dtype=bool)
    return wrong


def _of_other_type(values: pd.Series, inferred: str, types: type | tuple[type, ...]) -> NDArray[np.bool_]:
    if infer_dtype(values, skipna=False) in (inferred, "empty"):
        return np.zeros(len(values), dtype=bool)
    return np.array([not isinstance(value, types) for value in values], dtype=bool)


def _lists_misfit(lists: Sequence[Any], column: Column) -> NDArray[np.bool_]:
    """True for each list that holds a value it may not; the values of all are looked at together."""
    arrays = [np.asarray(each, dtype=None if isinstance(each, np.ndarray) else object) for each in lists]
    wrong = np.array([array.ndim != 1 for array in arrays], dtype=bool)
    at = np.repeat(np.arange(len(arrays)), [0 if bad else len(a) for a, bad in zip(arrays, wrong, strict=True)])
    if not len(at):
        return wrong
    values = pd.Series(np.concatenate([a for a, bad in zip(arrays, wrong, strict=True) if not bad])).infer_objects()
    missing = values.isna().to_numpy(dtype=bool)
    misfits = np.zeros(len(values), dtype=bool) if column.missing == "anywhere" else missing.copy()
    misfits[~missing] = _values_misfit(values[~missing], _LISTS[column.sort], column)
    wrong[at[misfits]] = True
    return wrong


def _cast(values: pd.Series, column: Column) -> pd.Series:
    """Checked values in the type of their sort, whatever the file's: int8 would overflow, pandas.NA is no bool."""
    missing = values.isna().to_numpy(dtype=bool)
    if column.sort == "whole":
        return values.astype(np.int64)
    if column.sort == "number":
        numbers = np.full(len(values), math.nan)
        numbers[~missing] = values[~missing].to_numpy(dtype=np.float64)
        return pd.Series(numbers, index=values.index)
    if values.dtype in (pd.Series([""]).dtype, object, bool) or column.sort in _LISTS:
        return values
    if column.sort == "flag":
        flags = [None if lacks else bool(value) for value, lacks in zip(values, missing, strict=True)]
        return pd.Series(flags, index=values.index, dtype=object if missing.any() else bool)
    texts = [None if lacks else str(value) for value, lacks in zip(values, missing, strict=True)]
    return pd.Series(texts, index=values.index, dtype=object if missing.any() else pd.Series([""]).dtype)


def _shown(frame: pd.DataFrame, name: str, wrong: NDArray[np.bool_]) -> str:
    """The first wrong value, where it stands, and how many more there are."""
    row, more = int(wrong.argmax()), int(wrong.sum()) - 1
    value = frame[name].iloc[row]
    lacks = not isinstance(value, (list, tuple, np.ndarray)) and bool(pd.isna(value))
    shown = repr(value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value)
    came = "missing" if lacks else shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    return f"{_row(frame, row)}: {name} is {came}" + (f" (and {more} more rows are wrong)" if more else "")


def _row(frame: pd.DataFrame, row: int) -> str:
    """`row 3 (conv1:weight)`, of a group its name, or the number alone where the table names neither there."""
    names = [frame[name].iloc[row] if name in frame else "" for name in ("module", "tensor", "group")]
    module, tensor, group = (name if isinstance(name, str) else "" for name in names)
    who = f"{module}:{tensor}" if module and tensor else group
    return f"row {row}" + (f" ({who})" if who else "")
