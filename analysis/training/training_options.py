"""The configuration of a training, from a YAML file and `--set key=value`."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from analysis.storage.yaml_text import UNREADABLE, YamlText, parsed, read_yaml
from quant.config import QATConfig
from quant.errors import InputError, first_line


def read_config(path: Path | None, settings: Sequence[str]) -> QATConfig:
    """The configuration in a YAML file of `key: value` lines, changed by settings `key=value`; defaults elsewhere.

    Raises InputError for unknown keys, with the nearest, and for values that cannot be.
    """
    file = None if path is None else read_yaml(path)
    values = {} if file is None else _settings_in(file)
    sources = {} if file is None else {str(key): file.place(key) for key in values}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise InputError(f"--set {setting!r} is not understood; write key=value, such as learning_rate=0.001.")
        try:
            values[key.strip()] = parsed(text)
            sources[key.strip()] = "--set"
        except UNREADABLE as error:
            raise InputError(f"--set {setting[:80]!r}: the value is not readable: {first_line(error)}.") from error
    return checked_config(values, sources)


def checked_config(values: Mapping[str, Any], sources: Mapping[str, str]) -> QATConfig:
    """The configuration with these values; InputError for unknown keys and impossible values.

    `sources` says of each key where its value comes from, which the message names.
    """
    names = [field.name for field in fields(QATConfig)]
    for key in values:
        if key not in names:
            initials = [name for name in names if "".join(word[0] for word in name.split("_")) == str(key)]
            near = (initials or difflib.get_close_matches(str(key), names, n=1, cutoff=0.0))[0]  # lr: learning_rate
            raise InputError(
                f"{sources[str(key)]}: {str(key)!r} is no setting of a training; the nearest is {near}. All: "
                f"{', '.join(names)}."
            )
        if isinstance(values[key], bool) and not isinstance(getattr(QATConfig(), str(key)), bool):
            raise InputError(f"{sources[str(key)]}: {key}={str(values[key]).lower()}: a number or a name is expected.")
    try:
        return TypeAdapter(QATConfig).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        wrong = first["msg"].removeprefix("Input ")
        came = _short(first["input"])
        source = sources.get(str(first["loc"][0]) if first["loc"] else "", "--set")
        raise InputError(f"{source}: {where}={came}: {wrong}. Give another value.") from error


def _short(value: object) -> str:
    """A value in a message; Python refuses to write integers of more than 4,300 digits."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number of more than 20 digits"
    return str(value)[:40] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def _settings_in(file: YamlText) -> dict[str, Any]:
    if file.value is None:
        return {}
    if not isinstance(file.value, dict):
        raise InputError(f"{file.path} holds a {type(file.value).__name__}, expected lines `key: value`.")
    return dict(file.value)
