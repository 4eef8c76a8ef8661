"""The order of class names, from which labels follow: plain, natural, or as a file says."""

import csv
import io
import json
import re
from collections.abc import Collection
from pathlib import Path

from quant.errors import InputError, first_line

ORDERS = ("plain", "natural")


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sorts as timm does: numbers by their value and without regard to case; ties by the name itself."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def ordered_classes(names: Collection[str], order: str | None, where: str) -> list[str]:
    """Class names by rising label; `where` names the data in messages.

    `plain` sorts as `sorted` and so torchvision's ImageFolder do: capitals first, 10 before 2. `natural` is timm's. No
    order (None) is an InputError where the two differ: a network's head follows the order that it was trained with.
    """
    plain, natural = sorted(names), sorted(names, key=natural_key)
    if order is None and plain != natural:
        first = next(i for i, pair in enumerate(zip(plain, natural, strict=True)) if pair[0] != pair[1])
        some = slice(max(0, first - 1), first + 3)
        raise InputError(
            f"the classes of {where} have two orders, and labels depend on it: plain ({_numbered(plain, some)}), as "
            f"torchvision's ImageFolder numbers them, or natural ({_numbered(natural, some)}), as timm does. Give the "
            "one that the network was trained with: `--class-order plain`, `--class-order natural` or a FILE with a "
            "class per line."
        )
    return natural if order == "natural" else plain


def _numbered(names: list[str], some: slice) -> str:
    return ", ".join(f"{i} {name}" for i, name in list(enumerate(names))[some])


def read_class_map(path: Path) -> dict[str, int]:
    """Class name -> index: lines `class` (numbered from 0) or `class,index`, or JSON as `class_to_idx` or a list."""
    if path.suffix not in (".txt", ".csv", ".json"):
        raise InputError(
            f"The class map {path} must be a .txt or .csv file of lines `class` or `class,index`, or .json."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            return _from_json(json.loads(text), path)
        rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as a class map: {first_line(error)}. Check the path.") from error
    wrong = next((row for row in rows if len(row) != len(rows[0])), None)
    try:
        if wrong is not None or len(rows and rows[0]) > 2:
            raise ValueError(f"{(wrong or rows[0])!r} has {len(wrong or rows[0])} values")
        pairs = [(row[0].strip(), int(row[1]) if len(row) == 2 else i) for i, row in enumerate(rows)]
    except ValueError as error:
        raise InputError(
            f"The class map {path} must have lines `class` or `class,index` throughout: {error}."
        ) from error
    return _checked(pairs, path)


def _from_json(content: object, path: Path) -> dict[str, int]:
    """The map in a JSON list of names, or in an object name -> index."""
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return _checked([(name, i) for i, name in enumerate(content)], path)
    if isinstance(content, dict) and all(type(index) is int for index in content.values()):
        return _checked(list(content.items()), path)
    raise InputError(f"The class map {path} must be a JSON list of class names, or an object of name: index.")


def _checked(pairs: list[tuple[str, int]], path: Path) -> dict[str, int]:
    indices = [index for _, index in pairs]
    if not pairs or len(dict(pairs)) < len(pairs) or min(indices) < 0:
        raise InputError(f"The class map {path} is empty, names a class twice or has an index below 0.")
    return dict(pairs)
