"""The configuration of a training, from a YAML file and `--set key=value`."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from quant.config import QATConfig
from quant.errors import InputError, first_line

_UNREADABLE = (yaml.YAMLError, ValueError, KeyError, RecursionError, OverflowError)  # what PyYAML's constructors raise


def read_config(path: Path | None, settings: Sequence[str]) -> QATConfig:
    """The configuration in a YAML file of `key: value` lines, changed by settings `key=value`; defaults elsewhere.

    Raises InputError for unknown keys, with the nearest, and for values that cannot be.
    """
    values = {} if path is None else _read_yaml(path)
    source = "--set" if path is None else str(path)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise InputError(f"--set {setting!r} is not understood; write key=value, such as learning_rate=0.001.")
        try:
            values[key.strip()] = yaml.safe_load(text)
        except _UNREADABLE as error:
            raise InputError(f"--set {setting!r}: the value is not readable: {first_line(error)}.") from error
    return checked_config(values, source)


def checked_config(values: Mapping[str, Any], source: str) -> QATConfig:
    """The configuration with these values; InputError, which names `source`, for unknown keys and impossible values."""
    names = [field.name for field in fields(QATConfig)]
    for key in values:
        if key not in names:
            initials = [name for name in names if "".join(word[0] for word in name.split("_")) == str(key)]
            near = (initials or difflib.get_close_matches(str(key), names, n=1, cutoff=0.0))[0]  # lr: learning_rate
            raise InputError(
                f"{source}: {str(key)!r} is no setting of a training; the nearest is {near}. All: {', '.join(names)}."
            )
    try:
        return TypeAdapter(QATConfig).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        wrong = first["msg"].removeprefix("Input ")
        value = first["input"]
        came = str(value)[:40] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
        raise InputError(f"{where}={came}: {wrong}. Change it by --set {where}=VALUE.") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, *_UNREADABLE) as error:
        raise InputError(f"The configuration {path} cannot be read: {first_line(error)}.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"The configuration {path} holds a {type(values).__name__}, expected lines `key: value`.")
    return values
