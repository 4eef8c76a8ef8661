"""A YAML file of settings: its values, and the line of each of them for messages."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quant.errors import InputError, first_line

UNREADABLE = (yaml.YAMLError, ValueError, KeyError, RecursionError, OverflowError)
"""What PyYAML's constructors raise."""


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


def read_yaml(path: Path, text: str | None = None) -> YamlText:
    """The file at `path`, or `text` that was made of it; InputError with the line where it is not YAML."""
    try:
        text = path.read_text(encoding="utf-8") if text is None else text
        value, lines = yaml.safe_load(text), dict(_lines(yaml.compose(text, Loader=yaml.SafeLoader), ()))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f", line {mark.line + 1}"
        raise InputError(f"{path}{where} cannot be read as YAML: {error.problem or error.context}.") from error
    except (OSError, *UNREADABLE) as error:
        raise InputError(f"{path} cannot be read as YAML: {first_line(error)}.") from error
    return YamlText(path, value, lines)


def _lines(node: yaml.Node | None, above: tuple[str, ...]) -> list[tuple[tuple[str, ...], int]]:
    """Paths of keys and items below a node, with their lines, from 1 on."""
    found = []
    if isinstance(node, yaml.MappingNode):
        below = [(str(key.value), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        below = [(str(i), item, item) for i, item in enumerate(node.value)]
    else:
        below = []
    names = [name for name, _, _ in below]
    for name, key, _ in below:
        if names.count(name) > 1 and name != "<<":
            raise ValueError(f"line {key.start_mark.line + 1} has {name!r}, which is there {names.count(name)} times")
    for name, key, value in below:
        found.append(((*above, name), key.start_mark.line + 1))
        found += _lines(value, (*above, name))
    return found
