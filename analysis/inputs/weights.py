"""A file of weights: read without running code from it, checked tensor by tensor, loaded; and the hash of weights."""

import difflib
import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from analysis.inputs.checkpoint import read_checkpoint
from analysis.inputs.model_options import OptionNames
from analysis.inputs.model_source import check_weights_file
from quant.errors import InputError, first_line


def load_weights_(model: nn.Module, path: Path, options: OptionNames, entry: str | None = None) -> str:
    """Fill the model from the file; every tensor must fit and be finite. Says where in the file they were.

    `entry` names one of several state dicts in a checkpoint (`read_checkpoint`). Numbers of less precision are taken
    into the model's. Of tied tensors one is enough.
    """
    check_weights_file(path, options)
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    try:
        found = read_checkpoint(path, own, entry, options)
    except SafetensorError as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}): it is cut short or damaged. Copy it again."
                         ) from error  # fmt: skip
    given = found.tensors
    tied = {own[name].data_ptr() for name in given if name in own and own[name].numel()}
    # Checkpoints older than torch 0.4.1 lack the counter of batches, which eval mode never reads.
    missing = [
        name for name, value in own.items()
        if name not in given and value.data_ptr() not in tied and not name.endswith("num_batches_tracked")
    ]  # fmt: skip
    unexpected = [name for name in given if name not in own]
    fit = sum(name in given and getattr(given[name], "shape", None) == own[name].shape for name in own)
    where = f"{path}{f' ({found})' if str(found) else ''} does not fit {type(model).__name__}: {fit} of {len(own)} fit"
    if missing:
        raise InputError(
            f"{where}; {missing[0]!r} is missing ({len(missing)} missing, {len(unexpected)} unexpected"
            f"{_nearest(missing[0], unexpected)}). Is it another model's file?"
        )
    for name, value in given.items():
        if name in own:
            _check_tensor(name, value, own[name], path, options)
    if unexpected:
        raise InputError(
            f"{where}; {unexpected[0]!r} is not in the model ({len(unexpected)} "
            f"unexpected{_nearest(unexpected[0], own)}). Is it another model's file?"
        )
    _check_tied(given, own, path)
    model.load_state_dict(given, strict=False)
    kinds = sorted({str(x.dtype) for n, x in given.items() if x.is_floating_point() and x.dtype != own[n].dtype})
    read_as = f"{', '.join(kinds)} read as float32".replace("torch.", "") if kinds else ""
    return ", ".join(filter(None, (str(found), read_as)))


def _check_tied(given: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path) -> None:
    """Raise InputError where tensors that the model ties have other values in the file."""
    first: dict[int, str] = {}
    for name in given:
        other = first.setdefault(own[name].data_ptr(), name) if own[name].numel() else name
        if own[other].shape == own[name].shape and not torch.equal(given[other], given[name]):
            raise InputError(f"{path}: {other!r} and {name!r} are one tensor in the model, and differ in the file.")


def _check_tensor(name: str, value: object, expected: Tensor, path: Path, options: OptionNames) -> None:
    """Raise InputError unless the value is a finite tensor of the expected shape and sort of number."""
    if not isinstance(value, Tensor):
        raise InputError(f"{path}: {name!r} is a {type(value).__name__}, not a tensor. Save the model's state_dict.")
    if value.shape != expected.shape:
        raise InputError(
            f"{path}: {name!r} has shape {tuple(value.shape)}, the model expects {tuple(expected.shape)}. "
            f"{_other_head(value, expected)}Check the model's name and `{options.kwargs}`."
        )
    if value.is_floating_point() != expected.is_floating_point():
        raise InputError(f"{path}: {name!r} is {value.dtype}, the model expects {expected.dtype}.")
    wrong = int((~torch.isfinite(value.to(expected.dtype))).sum())
    if wrong:
        raise InputError(f"{path}: {name!r} holds {wrong} NaN or infinite values. The file cannot be used.")


def _other_head(value: Tensor, expected: Tensor) -> str:
    """A remark where only the number of outputs differs."""
    if value.ndim in (1, 2) and value.shape[1:] == expected.shape[1:]:
        return f"Has the file a head of {len(value)} classes? "
    return ""


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
