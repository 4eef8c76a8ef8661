"""The names of timm's models, read from its source files: importing timm, which imports torch, takes seconds."""

import difflib
import importlib.util
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

_REGISTERED = re.compile(r"^@register_model\s*\ndef (\w+)\(", re.MULTILINE)


def model_names(pattern: str | None = None) -> list[str]:
    """The timm names that match `pattern`, where * and ? are wildcards; without them it matches as a substring.

    >>> model_names("resnet1?t")
    ['resnet10t', 'resnet14t']
    """
    if pattern and not set("*?[") & set(pattern):
        pattern = f"*{pattern}*"
    return [name for name in _names() if not pattern or fnmatchcase(name, pattern)]


def near_names(name: str) -> list[str]:
    """The timm names most like a misspelt one, three at most: those that begin with it, else the most similar."""
    begin = sorted((known for known in _names() if known.startswith(name)), key=len)
    return begin[:3] or difflib.get_close_matches(name, _names(), n=3)


def is_unknown(architecture: str) -> bool:
    """Whether timm surely has no such model: neither under this name nor, deprecated, anywhere in its files."""
    quoted = (f"'{architecture}'", f'"{architecture}"')
    return architecture not in _names() and not any(name in text for text in _sources().values() for name in quoted)


@cache
def _names() -> list[str]:
    """All names in natural order, in which resnet18 comes before resnet101; the same as `timm.list_models()`."""
    found = {name for text in _sources().values() for name in _REGISTERED.findall(text)}
    if not found:  # installed without its source files
        import timm

        return timm.list_models()
    return sorted(found, key=_natural_key)


@cache
def _sources() -> Mapping[str, str]:
    """The text of each file of timm that may define models."""
    spec = importlib.util.find_spec("timm")  # finds it without importing it
    folder = Path(spec.origin or "").parent / "models" if spec is not None else Path()
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))}


def _natural_key(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name.lower())]
