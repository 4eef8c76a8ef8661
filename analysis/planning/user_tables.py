"""Tables that a user hands to the planner as CSV files: their columns, and a check of the header without pandas."""

import csv
from collections.abc import Sequence
from pathlib import Path

from quant.errors import InputError, first_line

LATENCY_COLUMNS = ("module", "tensor", "bit_width", "milliseconds")
SCORE_COLUMNS = ("module", "tensor", "bit_width", "score")


def check_csv(path: Path, columns: Sequence[str]) -> None:
    """Raise InputError where a file cannot be read, or its first line lacks one of `columns`."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header = next(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error, StopIteration) as error:  # the last: an empty file
        raise InputError(f"{path} cannot be read: {first_line(error)}. Expected a CSV file with a header.") from error
    missing = [column for column in columns if column not in header]
    if missing:
        raise InputError(f"{path} has no column {missing[0]!r}; expected {', '.join(columns)}.")
