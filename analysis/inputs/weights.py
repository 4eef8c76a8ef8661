"""A file of weights: read without running code from it, checked tensor by tensor, loaded; and the hash of weights."""

import difflib
import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from analysis.inputs.model_source import check_weights_file
from analysis.inputs.option_names import OptionNames
from quant.errors import InputError, first_line


def load_weights_(model: nn.Module, path: Path, options: OptionNames) -> None:
    """Fill the model from the file; every tensor must fit and be finite."""
    given, own = _read_weights(path, options), model.state_dict()
    # Checkpoints older than torch 0.4.1 lack this counter, which eval mode never reads.
    missing = [n for n in own if n not in given and not n.endswith("num_batches_tracked")]
    unexpected = [name for name in given if name not in own]
    for name, expected in own.items():
        if name in missing:
            raise InputError(
                f"{path} does not fit {type(model).__name__}: {name!r} is missing ({len(missing)} missing, "
                f"{len(unexpected)} unexpected{_nearest(name, unexpected)}). Is it another model's file?"
            )
        if name in given:
            _check_tensor(name, given[name], expected, path, options)
    if unexpected:
        raise InputError(
            f"{path} does not fit {type(model).__name__}: {unexpected[0]!r} is not in the model ({len(unexpected)} "
            f"unexpected{_nearest(unexpected[0], own)}). Is it another model's file?"
        )
    model.load_state_dict(given, strict=False)


def _check_tensor(name: str, value: object, expected: Tensor, path: Path, options: OptionNames) -> None:
    """Raise InputError unless the value is a finite tensor of the expected shape and sort of number."""
    if not isinstance(value, Tensor):
        raise InputError(f"{path}: {name!r} is a {type(value).__name__}, not a tensor. Save the model's state_dict.")
    if value.shape != expected.shape:
        raise InputError(
            f"{path}: {name!r} has shape {tuple(value.shape)}, the model expects {tuple(expected.shape)}. "
            f"Check the model's name and `{options.kwargs}`."
        )
    if value.is_floating_point() != expected.is_floating_point():
        raise InputError(f"{path}: {name!r} is {value.dtype}, the model expects {expected.dtype}.")
    wrong = int((~torch.isfinite(value.to(expected.dtype))).sum())
    if wrong:
        raise InputError(f"{path}: {name!r} holds {wrong} NaN or infinite values. The file cannot be used.")


def _read_weights(path: Path, options: OptionNames) -> Mapping[str, object]:
    """The tensors of a weights file by name; a dictionary below `state_dict` or `model` is unwrapped."""
    check_weights_file(path, options)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model"):
            if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
                loaded = loaded[key]
        if isinstance(loaded, Mapping):
            return loaded
        raise InputError(f"{path} holds a {type(loaded).__name__}, not a state_dict.")
    except InputError:
        raise
    except Exception as error:  # damaged files raise whatever their reader stumbles over
        raise InputError(
            f"{path} cannot be read ({first_line(error)}): cut short, or not a {path.suffix} file. Copy it again."
        ) from error


def _nearest(name: str, names: Mapping[str, object] | list[str]) -> str:
    """A remark on the name most like this one, where there is one."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; the nearest is {near[0]!r}" if near else ""


def weights_sha256(model: nn.Module) -> str:
    """Hexadecimal SHA-256 over the names, dtypes, shapes and bytes of the state dict, in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):  # a module's extra state may be any object
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(tensor_bytes(value))
    return digest.hexdigest()


def tensor_bytes(x: Tensor) -> memoryview:
    """The bytes of a tensor's values in order, wherever it is."""
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
