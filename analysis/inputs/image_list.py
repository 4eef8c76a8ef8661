"""A CSV list of images: its columns, the files, and their labels. Nothing is decoded."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from analysis.inputs.class_names import ordered_classes
from analysis.inputs.split_names import chosen_splits, kind_of_split
from quant.errors import InputError, first_line

_USED = ("file", "class_index", "label", "split")
_UNLABELLED = ("", "-1", "-1.0", "nan", "NaN")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_WHOLE = re.compile(r"(\d{1,9})(?:\.0*)?")


@dataclass(frozen=True, kw_only=True)
class ImageList:
    """The images of one split: files relative to the list's folder, labels (-1: unlabelled), names of the classes.

    `numbered` says that labels are those of the file itself, not made from names.
    """

    names: list[str]
    labels: list[int]
    classes: dict[int, str] | None
    numbered: bool
    one_split: bool
    remarks: tuple[str, ...] = ()


@dataclass
class _Table:
    """The cells of the columns that count, by row; `lines` are the rows' numbers in the file."""

    path: Path
    lines: list[int] = field(default_factory=list)
    columns: dict[str, list[str]] = field(default_factory=dict)

    def wrong(self, row: int, text: str) -> InputError:
        return InputError(f"{self.path}, row {self.lines[row]}: {text}")


def list_csv(path: Path, split: str | None, order: str | None, *, by_name: bool = False) -> ImageList:
    """The images of a list with the columns `file`, `class_index` or `label`, and `split` where it has several.

    Commas, semicolons or tabs separate cells; the header may have capitals and spaces. A label is a whole number (`3`,
    `3.0`), then an index, or a name; names are numbered in the `order` of `ordered_classes`, or with `by_name` left to
    a class map, which may name numbers too. Empty cells, NaN and -1 are images without a label. Raises InputError with
    the row's number for cells that are neither, for numbers among names, and for a split that is not known. `split`
    None takes all of them.
    """
    table = _read(path)
    files = [_path(path.parent, name) for name in table.columns["file"]]
    labels, classes, numbered = _labels(table, order, by_name=by_name)
    remarks = []
    chosen, one_split = list(range(len(files))), "split" not in table.columns
    if not one_split:
        chosen, unused = _of_split(table, split)
        if unused:
            remarks.append(f"{path}: rows of the split {', '.join(unused)} are not used.")
    missing = sum(labels[i] < 0 for i in chosen)
    if 0 < missing < len(chosen):
        remarks.append(f"{path}: {missing} of {len(chosen)} images have no label, so loss and accuracy are NaN.")
    return ImageList(
        names=[files[i] for i in chosen], labels=[labels[i] for i in chosen], classes=classes, numbered=numbered,
        one_split=one_split, remarks=tuple(remarks),
    )  # fmt: skip


def _read(path: Path) -> _Table:
    """The table of a CSV file, every row with as many cells as the header."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        source = io.StringIO(text, newline="")
        reader = csv.reader(source, delimiter=_delimiter(text), skipinitialspace=True, strict=True)
        rows = [
            (reader.line_num, [cell.strip() for cell in row]) for row in reader if any(cell.strip() for cell in row)
        ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a CSV file: {first_line(error)}. Check the path.") from error
    header = [name.lower() for name in rows[0][1]] if rows else []
    if "file" not in header:
        raise InputError(
            f"{path} has the columns {', '.join(header) or 'none'}; expected `file` and `class_index` or `label`."
        )
    double = [name for name in _USED if header.count(name) > 1]
    if double:
        raise InputError(f"{path} has the column {double[0]} more than once. Remove one.")
    table = _Table(path)
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise InputError(
                f"{path}, row {line}: it has {len(row)} cells, the header {len(header)}. Quote names with commas."
            )
        table.lines.append(line)
        for name, cell in zip(header, row, strict=True):
            if name in _USED:
                table.columns.setdefault(name, []).append(cell)
    for name in _USED:
        if name in header:
            table.columns.setdefault(name, [])
    for i, name in enumerate(table.columns["file"]):
        if not name:
            raise table.wrong(i, "it names no file. Fill it in or remove the row.")
    return table


def _delimiter(text: str) -> str:
    """What separates the cells: that by which the header has a column `file`."""
    header = next((line for line in text.splitlines() if line.strip()), "")
    for sign in ",;\t":
        if "file" in [name.strip().strip('"').strip().lower() for name in header.split(sign)]:
            return sign
    return ","


def _path(root: Path, name: str) -> str:
    """The file's name, with the slashes of this system where it was written with those of Windows."""
    if "\\" in name and not (root / name).exists():
        return name.replace("\\", "/")
    return name


def _labels(table: _Table, order: str | None, *, by_name: bool) -> tuple[list[int], dict[int, str] | None, bool]:
    """Labels, -1 where there is none, the names of the classes, and whether the labels are those of the file."""
    columns = table.columns
    preferred = ("label", "class_index") if by_name else ("class_index", "label")
    column = next((name for name in preferred if name in columns), None)
    if column is None:
        return [-1] * len(table.lines), None, True
    cells = columns[column]
    labelled = [i for i, cell in enumerate(cells) if cell not in _UNLABELLED]
    if column == "label" and (by_name or (labelled and not any(_NUMBER.fullmatch(cells[i]) for i in labelled))):
        return (*_from_names(cells, labelled, None if by_name else order, table, by_name=by_name), False)
    labels = [-1] * len(cells)
    for i in labelled:
        whole = _WHOLE.fullmatch(cells[i])
        if whole is None:
            among = ", a number in other rows" if column == "label" and not _NUMBER.fullmatch(cells[i]) else ""
            raise table.wrong(
                i, f"{column} of {columns['file'][i]!r} is {cells[i]!r}{among}; expected a whole number from 0."
            )
        labels[i] = int(whole[1])
    return labels, _names_of(labels, table) if column == "class_index" else None, True


def _from_names(
    cells: Sequence[str], labelled: Sequence[int], order: str | None, table: _Table, *, by_name: bool
) -> tuple[list[int], dict[int, str]]:
    """Labels numbered by the names of classes; those of a class map are numbered plainly until it says otherwise."""
    names = {cells[i] for i in labelled}
    classes = ordered_classes(names, "plain" if by_name else order, str(table.path))
    index = {name: label for label, name in enumerate(classes)}
    return [index.get(cell, -1) for cell in cells], dict(enumerate(classes))


def _names_of(labels: Sequence[int], table: _Table) -> dict[int, str] | None:
    """The name of each index where the list has both."""
    known: dict[int, str] = {}
    for i, (label, name) in enumerate(zip(labels, table.columns.get("label", [""] * len(labels)), strict=True)):
        if label >= 0 and name and known.setdefault(label, name) != name:
            raise table.wrong(i, f"class_index {label} is {name!r}, and {known[label]!r} in another row.")
    return known or None


def _of_split(table: _Table, split: str | None) -> tuple[list[int], list[str]]:
    """The rows of a split, and the names of splits that are neither train nor val."""
    cells = table.columns["split"]
    for i, cell in enumerate(cells):
        if kind_of_split(cell) is None:
            raise table.wrong(
                i, f"split is {cell!r}; expected train or val (test, valid, ... are read too). "
                "Rename them, or remove the column."
            )  # fmt: skip
    names = set(cells)
    splits = chosen_splits(names, f"the column split of {table.path}") if names else {}
    if names and split is not None and split not in splits:
        raise InputError(
            f"{table.path} has no rows of the split {split!r}, but of {', '.join(sorted(names))}. Add them, use "
            f"`--split {next(iter(splits))}` where the command has that option, or remove the column."
        )
    chosen = [i for i, cell in enumerate(cells) if split is None or cell == splits.get(split)]
    return chosen, sorted(names - set(splits.values()))
