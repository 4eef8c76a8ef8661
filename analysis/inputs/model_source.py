"""Where a model comes from, and what of it can be checked before anything large is imported."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.inputs.option_names import MODEL_OPTIONS, OptionNames
from analysis.inputs.timm_names import is_unknown, near_names
from quant.errors import InputError

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_DEFINED = re.compile(r"^(?:async )?(?:def|class) ([A-Za-z]\w*)", re.MULTILINE)
_DYNAMIC = re.compile(r"import \*|\b(?:exec|eval|globals|locals|vars|setattr|__getattr__|__import__)\b")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a model comes from, as the user typed it."""

    model: str  # a timm name, or path/to/file.py:factory
    pretrained: bool = False
    weights: str | None = None  # a .safetensors, .pt, .pth or .bin file
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # arguments of the constructor, from JSON
    seed: int = 0  # an untrained model's weights depend on it
    options: OptionNames = MODEL_OPTIONS

    @property
    def untrained(self) -> bool:
        """Whether the weights are drawn at random: a timm name without weights; a factory may bring its own."""
        return self.factory is None and not self.pretrained and self.weights is None

    @property
    def factory(self) -> tuple[Path, str] | None:
        """The file and the function of a user's factory; None for a timm name."""
        return factory_of(self.model)


def factory_of(text: str) -> tuple[Path, str] | None:
    """The file and the function of `path/to/file.py:function`; None for a text that names no such file.

    >>> factory_of("nets/small.py:build")
    (PosixPath('nets/small.py'), 'build')
    """
    file, _, function = text.rpartition(":")
    if file.endswith(".py"):
        return Path(file), function
    return (Path(text), "") if text.endswith(".py") else None


def check_source(source: ModelSource) -> None:
    """Raise InputError for what is wrong with a source by its text, files and names alone; nothing is executed.

    That is: options that exclude each other, a file that is not there, a function that the file does not define, a
    name that timm does not have.
    """
    options = source.options
    if source.pretrained and source.weights is not None:
        raise InputError(f"`{options.pretrained}` and `{options.weights}` were both given. Choose one of them.")
    if source.factory is not None:
        if source.pretrained:
            raise InputError(
                f"`{options.pretrained}` needs a timm name, got {source.model}. Use `{options.weights} "
                "FILE.safetensors`."
            )
        check_factory(*source.factory, f"the model {source.model!r}")
    elif ":" not in source.model and is_unknown(source.model.partition(".")[0]):
        raise unknown_name(source.model)
    if source.weights is not None:
        check_weights_file(Path(source.weights), options)


def check_factory(path: Path, function: str, what: str) -> None:
    """Raise InputError where the file is not there, or surely does not define the function; `what` names both."""
    if not path.is_file():
        raise InputError(f"There is no file {path} (from {what}). Check the path.")
    text = path.read_text(encoding="utf-8", errors="replace")
    if not (function and re.search(rf"\b{re.escape(function)}\b", text)) and not _DYNAMIC.search(text):
        raise no_function(path, function, [name for name in _DEFINED.findall(text)])


def no_function(path: Path, function: str, names: Collection[str]) -> InputError:
    """The error for a file without the function; `names` are those that it has."""
    return InputError(f"{path} has no function {function!r}. It has: {', '.join(names) or 'none'}.")


def unknown_name(model: str) -> InputError:
    """The error for a name that timm does not have."""
    near = near_names(model.partition(".")[0])
    hint = f"The nearest: {', '.join(near)}" if near else "`qvw models` lists them"
    return InputError(f"timm has no model {model!r}. {hint}. A model of your own is written path/to/file.py:factory.")


def check_weights_file(path: Path, options: OptionNames) -> None:
    """Raise InputError where a file of weights is not there, or of another sort by its name."""
    if not path.is_file():
        raise InputError(f"There is no weights file {path}. Check `{options.weights}`.")
    if path.suffix not in WEIGHT_SUFFIXES:
        raise InputError(f"{path} has the suffix {path.suffix!r}. Weights are .safetensors, .pt, .pth or .bin.")
