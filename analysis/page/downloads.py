"""What a page hands over as files: its tables as CSV and the plans, each inside the page as an address of its own."""

import base64
import csv
import io
import re
from dataclasses import dataclass

from analysis.page.cells import DASH, Cell, Table
from quant.bit_plan import BitPlan

ERROR = "standard error of "  # before the name of the column that it is of


@dataclass(frozen=True, kw_only=True)
class Download:
    """A file inside the page."""

    file: str  # the name under which a browser keeps it
    words: str  # of the link
    address: str  # data:...


def csv_text(table: Table) -> str:
    """The table as CSV: numbers with ten digits, in the unit that the page shows, errors in columns of their own.

    What was not measured is empty.
    """
    errors = [any(row[i].error is not None for row in table.rows) for i in range(len(table.columns))]
    lines: list[list[str]] = [[]]
    for name, has_error in zip(table.columns, errors, strict=True):
        lines[0] += [name, ERROR + name] if has_error else [name]
    for row in table.rows:
        lines.append([])
        for cell, has_error in zip(row, errors, strict=True):
            lines[-1] += [_value(cell), "" if cell.error is None else f"{cell.error:.10g}"][: 1 + has_error]
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows(lines)
    return written.getvalue()


def table_download(table: Table) -> Download:
    """A table as CSV."""
    file = f"{_stem(table.caption)}.csv"
    return Download(file=file, words="CSV", address=_address("text/csv;charset=utf-8", csv_text(table)))


def plan_download(plan: BitPlan, name: str) -> Download:
    """A plan as the file that `qvw train --plan` takes; `name` is that of its run."""
    file = f"{_stem(name)}-plan.json"
    return Download(file=file, words="plan.json", address=_address("application/json", plan.to_json()))


def _value(cell: Cell) -> str:
    if cell.key is not None:
        return f"{cell.key:.10g}"
    return "" if cell.text == DASH else cell.text


def _stem(words: str) -> str:
    """Words as the name of a file that every system takes."""
    return re.sub(r"[^\w.-]+", "-", words).strip("-.")


def _address(kind: str, content: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content.encode(errors='replace')).decode()}"
