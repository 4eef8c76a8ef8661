"""Where a model comes from, and what of it can be checked before anything large is imported."""

import re
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.inputs.model_options import MODEL_OPTIONS, OptionNames
from analysis.inputs.timm_names import is_unknown, near_names
from quant.errors import InputError, first_line

_LARGEST_HEADER = 100_000_000  # bytes, of safetensors
_OTHER_FILES = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself: fetch it with `git lfs pull`"),
    (b"<", "a web page: the download failed. Fetch the file itself"),
    (b"\x89HDF", "an HDF5 file, as Keras writes: convert it to a state_dict of torch"),
    (b"\x1f\x8b", "compressed by gzip: unpack it"),
)
"""What a file that is none of weights begins with, and what it is."""
_DEFINED = re.compile(r"^(?:async )?(?:def|class) ([A-Za-z]\w*)", re.MULTILINE)
_DYNAMIC = re.compile(r"import \*|\b(?:exec|eval|globals|locals|vars|setattr|__getattr__|__import__)\b")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a model comes from, as the user typed it."""

    model: str  # a timm name, or path/to/file.py:factory
    pretrained: bool = False
    weights: str | None = None  # a state dict or a checkpoint, as torch or safetensors write it
    weights_entry: str | None = None  # which state dict of the checkpoint
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
    """Raise InputError where a file of weights is not there, or of another sort by what it begins with."""
    if not path.is_file():
        raise InputError(f"There is no weights file {path}. Check `{options.weights}`.")
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}.") from error
    if not start.strip():
        raise InputError(f"{path} is empty. Copy it again.")
    what = next((what for sign, what in _OTHER_FILES if start.lstrip().startswith(sign)), None)
    if what is None and start[257:262] == b"ustar":
        what = "a tar archive: unpack it"
    if what is None and start.startswith(b"PK") and _is_torchscript(path):
        what = "a TorchScript program: save model.state_dict() of the module that it was made from"
    if what is None and not (start.startswith((b"PK", b"\x80")) or is_safetensors(path)):
        what = "no file of torch or safetensors"
    if what is not None:
        raise InputError(f"{path} cannot be read as weights: it is {what}.")


def is_safetensors(path: Path) -> bool:
    """Whether the file begins as safetensors do: the length of a header of JSON, and that."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < _LARGEST_HEADER


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as file:
            return any(name.endswith("/constants.pkl") for name in file.namelist())
    except zipfile.BadZipFile:
        return False  # cut short: told when it is read
