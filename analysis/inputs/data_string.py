"""What a data string says, and what of it can be checked before anything large is imported."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from quant.errors import InputError, first_line

TIMM_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")
LARGEST_PIXEL = 4
"""Far above 1, up to which pixels are, and far below the means of pixels up to 255."""


def check_data(
    spec: str, *, split: str | None = None, data_root: str | Path | None = None, class_map: str | Path | None = None
) -> None:
    """Raise InputError for what is wrong with a data string by its text and paths; no image is read.

    That is: another kind of data, a folder or file that is not there, a split that the folder lacks, a list without
    file names, a class map that cannot be read.
    """
    kind, _, place = spec.partition(":")
    if kind == "folder":
        folder_splits(Path(place), split)
    elif kind == "csv":
        csv_table(Path(place))
    elif spec.startswith(TIMM_PREFIXES):
        if data_root is None and spec.startswith(("torch/", "wds/")):
            raise InputError(f"{spec} needs `--data-root DIR`, the folder where the data set lies.")
    elif spec != "digits":
        raise InputError(
            f"`--data` {spec!r} is unknown. It is digits, folder:PATH, csv:FILE, or a timm data set, which starts with "
            f"{', '.join(TIMM_PREFIXES)}."
        )
    if class_map is not None:
        read_class_map(Path(class_map))


def folder_splits(path: Path, split: str | None) -> list[str]:
    """Which of train/ and val/ a folder of images has; none where it is one split.

    InputError where it is not there, or has the other split only.
    """
    if not path.is_dir():
        raise InputError(f"There is no folder {path}. Check `--data folder:PATH`.")
    splits = [name for name in ("train", "val") if (path / name).is_dir()]
    if splits and split is not None and split not in splits:
        raise InputError(
            f"{path} has {splits[0]}/ but no {split}/. Add it, use `--split {splits[0]}` where the "
            f"command has that option, or let `--data folder:{path / splits[0]}` be divided in two."
        )
    return splits


def csv_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The header and the rows of a list of images; InputError where it lacks the column `file` or a file's name."""
    header, *rows = _csv_rows(path) or [[]]
    if "file" not in header:
        raise InputError(
            f"{path} has the columns {', '.join(header) or 'none'}; expected `file` and `class_index` or `label`."
        )
    table = [dict(zip(header, row, strict=False)) for row in rows if row]
    short = next((i for i, row in enumerate(table) if not row.get("file")), None)
    if short is not None:
        raise InputError(f"{path}: row {short + 2} names no file. Fill it in or remove the row.")
    return header, table


def read_class_map(path: Path) -> dict[str, int]:
    """Class name -> index, from lines `class` (numbered from 0) or `class,index`."""
    if path.suffix not in (".txt", ".csv"):
        raise InputError(f"The class map {path} must be a .txt or .csv file of lines `class` or `class,index`.")
    rows = [row for row in _csv_rows(path) if row]
    try:
        pairs = [(row[0].strip(), int(row[1]) if len(rows[0]) == 2 else i) for i, row in enumerate(rows)]
    except (ValueError, IndexError) as error:
        raise InputError(
            f"The class map {path} must have lines `class` or `class,index` throughout: {error}."
        ) from error
    if not pairs or len(dict(pairs)) < len(pairs) or min(index for _, index in pairs) < 0:
        raise InputError(f"The class map {path} is empty, names a class twice or has an index below 0.")
    return dict(pairs)


def per_channel(option: str, values: Sequence[float], channels: int | None) -> tuple[float, ...]:
    """Values of `--mean` or `--std`, one for each channel; a single one serves them all.

    `channels` is None where they are not known yet. InputError for other numbers of them, numbers that are not finite,
    deviations that are not above 0, and values of pixels from 0 to 255.
    """
    numbers = tuple(float(value) for value in values) * ((channels or 1) if len(values) == 1 else 1)
    wrong = not all(map(math.isfinite, numbers)) or (option == "std" and min(numbers) <= 0)
    if wrong or (channels is not None and len(numbers) != channels):
        above = " above 0" if option == "std" else ""
        count = "each channel" if channels is None else f"each of {channels} channels"
        raise InputError(
            f"The images' {option} is {numbers}, expected one number{above} for {count}. "
            f"Give `--{option}`, one number{'' if channels is None else f' or {channels}'}."
        )
    if max(map(abs, numbers)) > LARGEST_PIXEL:
        raise InputError(
            f"The images' {option} is {numbers}, which is of pixels from 0 to 255; here they are from 0 to 1. Divide "
            f"it by 255: --{option} {','.join(f'{number / 255:.4g}' for number in numbers)}."
        )
    return numbers


def _csv_rows(path: Path) -> list[list[str]]:
    """The rows of a CSV file in UTF-8."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a CSV file: {first_line(error)}. Check the path.") from error
