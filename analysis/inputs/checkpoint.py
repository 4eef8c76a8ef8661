"""A checkpoint as training scripts save it: which of its entries is the model's state dict, under which prefix."""

import argparse
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from analysis.inputs.model_options import OptionNames
from analysis.inputs.model_source import is_safetensors
from quant.errors import InputError, first_line

_DEPTH = 2  # of parts in parts
_COUNTERS = re.compile(r"(^|\.)(total_ops|total_params|n_averaged)$")  # of thop, and of torch's AveragedModel
_NO_CODE: list[Any] = [
    argparse.Namespace, np.dtype, *{type(np.dtype(kind)) for kind in "?bhilqBHILQefd"},
    *((np.dtype(float).type(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((PurePosixPath, f"pathlib.{where}PosixPath") for where in ("", "_local.")),
    *((PureWindowsPath, f"pathlib.{where}WindowsPath") for where in ("", "_local.")),
    *((dict, f"{where}.AttributeDict") for where in ("lightning.fabric.utilities.data",
      "lightning_fabric.utilities.data", "pytorch_lightning.utilities.parsing")),
    (__import__("_codecs").encode, "_codecs.encode"),
]  # fmt: skip
"""Classes beside a state dict that bring no code: settings, figures and paths of the training."""


@dataclass(frozen=True, kw_only=True)
class StateDict:
    """The tensors of a model by name, and where in the file they were."""

    tensors: dict[str, Any]
    entry: str  # such as `state_dict`; empty where the file holds the tensors themselves
    prefix: str = ""  # what was taken off all names
    compiled: bool = False  # whether `_orig_mod.` of torch.compile was taken out of names
    others: tuple[str, ...] = ()  # names without the prefix, which are left out

    def __str__(self) -> str:
        """Where the weights were found, in words; empty where there was nothing to choose."""
        parts = [f"entry {self.entry!r}"] if self.entry else []
        parts += [f"without the prefix {self.prefix!r}"] if self.prefix else []
        parts += ["without torch.compile's '_orig_mod.'"] if self.compiled else []
        parts += [f"{len(self.others)} other tensors are left out, such as {self.others[0]!r}"] if self.others else []
        return ", ".join(parts)


def read_checkpoint(path: Path, own: Mapping[str, Tensor], entry: str | None, options: OptionNames) -> StateDict:
    """The state dict in the file that fits a model with the state `own`; no code of the file is run.

    The file is a state dict, or has some among its entries, of which `entry` names one (`ema.module` where it is
    nested). Of several that fit, such as the weights and their moving average, one must be named. A prefix that the
    names have in front of the model's (`module.`, `_orig_mod.`, ...) is taken off. Raises InputError for a file that
    cannot be read or needs code; where nothing fits, the entry that comes nearest is returned.
    """
    loaded = load_file(path) if is_safetensors(path) else _unpickled(path)
    if not isinstance(loaded, Mapping):
        raise InputError(f"{path} holds a {type(loaded).__name__}, not a state_dict. Save model.state_dict().")
    found = {name: _stripped(tensors, own, name) for name, tensors in _state_dicts(loaded)}
    if not found:
        raise InputError(f"{path} holds no tensors ({_some(loaded)}). Save model.state_dict().")
    if entry is not None:
        if entry not in found:
            raise InputError(f"{path} has no state dict {entry!r}; it has {_some(found)}. Check `{options.entry}`.")
        return found[entry]
    fitting = [state for state in found.values() if _fits(state.tensors, own)]
    if len(fitting) > 1 and not all(_same(fitting[0].tensors, other.tensors) for other in fitting[1:]):
        names = ", ".join(state.entry or "the file itself" for state in fitting)
        raise InputError(
            f"{path} holds several sets of weights that fit: {names}. Choose one: `{options.entry} {fitting[0].entry}`."
        )
    return fitting[0] if fitting else max(found.values(), key=lambda state: _shared(state.tensors, own))


def _unpickled(path: Path) -> Any:
    """What torch reads of the file without running code."""
    try:
        with torch.serialization.safe_globals(_NO_CODE):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise whatever their reader stumbles over
        needed = re.search(r"(?:GLOBAL|global|class|type) [`']?([A-Za-z_][\w.]*\.[\w.]+)", str(error))
        if needed and ("Unsupported" in str(error) or "weights_only" in str(error)) and "code" not in needed[1]:
            raise InputError(
                f"{path} cannot be read without running code: it holds objects of {needed[1].rstrip('.')}. Where it "
                "was made, save the weights alone: torch.save(model.state_dict(), FILE)."
            ) from error
        raise InputError(f"{path} cannot be read ({first_line(error)}): it is cut short or damaged. Copy it again."
                         ) from error  # fmt: skip


def _state_dicts(content: Mapping[Any, Any], where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each part of the file that maps names to tensors, with its place; parts of parts too."""
    named = {name: value for name, value in content.items() if isinstance(name, str)}
    parts = {name: value for name, value in named.items() if isinstance(value, Mapping)}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if tensors:  # what is none stays to be complained of, unless it is plainly beside the weights
        yield where, tensors if parts else named
    for name, value in parts.items() if where.count(".") < _DEPTH else ():
        yield from _state_dicts(value, f"{where}.{name}" if where else name)


def _stripped(tensors: dict[str, Any], own: Mapping[str, Tensor], entry: str) -> StateDict:
    """The tensors under the model's names: without counters of tools, and without what stands before all names."""
    compiled = any("_orig_mod." in name for name in tensors) and not any("_orig_mod." in name for name in own)
    named = {
        name.replace("_orig_mod.", "") if compiled else name: value
        for name, value in tensors.items()
        if name in own or not _COUNTERS.search(name)
    }
    best, prefix = named, ""
    for candidate in _prefixes(named, own):
        under = {name.removeprefix(candidate): value for name, value in named.items() if name.startswith(candidate)}
        if _shared(under, own) > _shared(best, own):
            best, prefix = under, candidate
    others = tuple(name for name in named if prefix and not name.startswith(prefix))
    return StateDict(tensors=best, entry=entry, prefix=prefix, compiled=compiled, others=others)


def _prefixes(named: Mapping[str, Any], own: Mapping[str, Tensor]) -> list[str]:
    """What stands before the model's first name, wherever a name of the file ends in it."""
    first = next(iter(own), "")
    return [name.removesuffix(first) for name in named if name.endswith(f".{first}")]


def _fits(tensors: Mapping[str, Any], own: Mapping[str, Tensor]) -> bool:
    """Whether every tensor of the model is there in its shape (of tied ones one, counters of batches aside)."""
    given = {own[name].data_ptr() for name in own if _has(tensors, name, own)}
    return all(value.data_ptr() in given or name.endswith("num_batches_tracked") for name, value in own.items())


def _shared(tensors: Mapping[str, Any], own: Mapping[str, Tensor]) -> int:
    return sum(_has(tensors, name, own) for name in own)


def _has(tensors: Mapping[str, Any], name: str, own: Mapping[str, Tensor]) -> bool:
    value = tensors.get(name)
    return isinstance(value, Tensor) and value.shape == own[name].shape


def _same(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return all(name in second and torch.equal(value, second[name]) for name, value in first.items())


def _some(names: Mapping[Any, Any]) -> str:
    """The first of the names."""
    listed = [str(name) or "the file itself" for name in names]
    return ", ".join(listed[:6]) + (", ..." if len(listed) > 6 else "")
