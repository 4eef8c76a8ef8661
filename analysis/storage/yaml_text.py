"""A YAML file of settings: its values, and the line of each of them for messages."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quant.errors import InputError, first_line

UNREADABLE = (yaml.YAMLError, ValueError, KeyError, RecursionError, OverflowError)
"""What PyYAML's constructors raise, and `parsed`."""
LARGEST_FILE = 2**18
"""Bytes; settings take some kilobytes, and PyYAML seconds for each hundred of them."""
MOST_VALUES = 20_000
"""Values with every alias written out: a few lines of aliases of aliases can stand for more than the memory holds."""


@dataclass(frozen=True)
class YamlText:
    """The value of a YAML file, and of each key in it, by its path from the root, the line."""

    path: Path
    value: Any
    lines: Mapping[tuple[str, ...], int]

    def place(self, *keys: object) -> str:
        """`FILE, line N` of these keys from the root, of the nearest one above where the file has not all of them."""
        for end in range(len(keys), 0, -1):
            line = self.lines.get(tuple(map(str, keys[:end])))
            if line is not None:
                return f"{self.path}, line {line}"
        return str(self.path)


def read_text(path: Path) -> str:
    """The text of a file of settings, in UTF-8; ValueError where it is larger than such a file can be, OSError."""
    with path.open("rb") as file:
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise ValueError(f"it is larger than {LARGEST_FILE // 2**10} KiB, which no file of settings is")
    return content.decode("utf-8")


def read_yaml(path: Path, text: str | None = None) -> YamlText:
    """The file at `path`, or `text` that was made of it; InputError with the line where it is not YAML."""
    try:
        value, lines = _parsed(read_text(path) if text is None else text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f", line {mark.line + 1}"
        raise InputError(f"{path}{where} cannot be read as YAML: {error.problem or error.context}.") from error
    except (OSError, *UNREADABLE) as error:
        raise InputError(f"{path} cannot be read as YAML: {first_line(error)}.") from error
    return YamlText(path, value, lines)


def parsed(text: str) -> Any:
    """The value of a text in YAML; one of `UNREADABLE` where it is none."""
    return _parsed(text)[0]


def _parsed(text: str) -> tuple[Any, dict[tuple[str, ...], int]]:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        if _size(node, {}) > MOST_VALUES:
            raise ValueError(f"it stands for more than {MOST_VALUES:,} values, every alias (*name) written out")
        lines = dict(_lines(node, ()))  # before the values: they merge `<<` into the nodes
        return loader.construct_document(node), lines
    finally:
        loader.dispose()


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many values a node stands for, every alias in it written out; each node is looked at once."""
    if id(node) not in sizes:
        sizes[id(node)] = MOST_VALUES + 1  # what an alias inside of what it stands for finds: it has no end
        below: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            below = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            below = node.value
        sizes[id(node)] = 1 + sum(_size(part, sizes) for part in below)
    return sizes[id(node)]


def _lines(node: yaml.Node, above: tuple[str, ...]) -> list[tuple[tuple[str, ...], int]]:
    """Paths of keys and items below a node, with their lines, from 1 on."""
    found = []
    if isinstance(node, yaml.MappingNode):
        below = [(str(key.value), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        below = [(str(i), item, item) for i, item in enumerate(node.value)]
    else:
        below = []
    times = Counter(name for name, _, _ in below)
    for name, key, _ in below:
        if times[name] > 1 and name != "<<":
            raise ValueError(f"line {key.start_mark.line + 1} has {name!r}, which is there {times[name]} times")
    for name, key, value in below:
        found.append(((*above, name), key.start_mark.line + 1))
        found += _lines(value, (*above, name))
    return found
