"""Checkpoints of a training: folders written whole or not at all, checked before they are loaded."""

import hashlib
import io
import json
import math
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_model, save_model
from torch import nn

from quant.errors import InputError, first_line, system_error

_KEPT = 2  # should the last one be damaged, the training resumes from the one before
_SHARED = ("model.safetensors", "tracker.safetensors", "optimizer.pt")  # beside them random_RANK.pt of each process


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    model: nn.Module,
    tracker: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    seconds: float,
) -> None:
    """Write the state after `step` steps to `folder`/step_NNNNNNNN; older ones but the last are removed.

    Weights and tracker as safetensors, the optimizer's state once, the state of random numbers once a process;
    `seconds` are those of the training so far. Where the disk is full the folder stays as it was.
    """
    final, temporary = folder / f"step_{step:08}", folder / f".step_{step:08}.tmp"
    main = accelerator.is_main_process
    try:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            save_model(model, str(temporary / "model.safetensors"))
            save_model(tracker, str(temporary / "tracker.safetensors"))
            _write(temporary / "optimizer.pt", optimizer.state_dict())
        accelerator.wait_for_everyone()
        _write(temporary / f"random_{accelerator.process_index}.pt", _random_state())
        accelerator.wait_for_everyone()
        if main:
            digests = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
            manifest: dict[str, Any] = {"step": step, "processes": accelerator.num_processes, "seconds": seconds}
            manifest["sha256"] = digests
            (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            for path in (*temporary.iterdir(), temporary):
                _fsync(path)
            shutil.rmtree(final, ignore_errors=True)
            temporary.replace(final)
            _fsync(folder)
            for old in _steps(folder)[:-_KEPT]:
                shutil.rmtree(folder / f"step_{old:08}")
    except Exception as error:
        if system_error(error) is None:
            raise
        raise InputError(
            f"The checkpoint of step {step} cannot be written to {folder}: {first_line(error)}. Free some space or "
            "Fix the permissions, then train again: it resumes from the checkpoint before."
        ) from error
    finally:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)


def last_step(folder: Path) -> int:
    """The step of the newest checkpoint in `folder`, 0 where there is none; InputError where it is damaged."""
    steps = _steps(folder)
    if not steps:
        return 0
    path = folder / f"step_{steps[-1]:08}"
    damage = _damage(path, steps[-1])
    if damage:
        earlier = f"from step {steps[-2]}" if len(steps) > 1 else "from the start"
        raise InputError(
            f"The checkpoint {path} is damaged or cut short: {damage}. "
            f"Delete this folder and train again: it resumes {earlier}."
        )
    return steps[-1]


def _damage(path: Path, step: int) -> str | None:
    """What is wrong with the checkpoint of a step: its manifest, or the bytes of a file; None where all is whole."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        digests = manifest["sha256"]
        processes = len(digests) - len(_SHARED)
        if manifest["step"] != step:
            return f"manifest.json is of step {manifest['step']}"
        if digests.keys() != {*_SHARED, *(f"random_{rank}.pt" for rank in range(processes))}:
            return "manifest.json does not name the files of a checkpoint"
        if manifest["processes"] != processes or not math.isfinite(manifest["seconds"]):
            return "manifest.json has a wrong entry, processes or seconds"
        return next((name for name, digest in digests.items() if _sha256(path / name) != digest), None)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"manifest.json or a file that it names ({type(error).__name__})"


def load_checkpoint_(
    folder: Path,
    step: int,
    *,
    model: nn.Module,
    tracker: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
) -> float:
    """Put the state after `step` steps into model, tracker, optimizer and random numbers; the seconds it took so far.

    The checkpoint is one that `last_step` found whole; no code is run from its files. Raises InputError where another
    number of processes wrote them, for each has random numbers and images of its own, or where they are of another
    network.
    """
    path = folder / f"step_{step:08}"
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    processes = manifest["processes"]
    if processes != accelerator.num_processes:
        raise InputError(
            f"{path} was written by {processes} processes, these are {accelerator.num_processes}: the training would "
            "not be the same. Resume with as many, or start from scratch."
        )
    try:
        load_model(model, path / "model.safetensors")
        load_model(tracker, path / "tracker.safetensors")
        optimizer.load_state_dict(torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True))
        state = torch.load(path / f"random_{accelerator.process_index}.pt", map_location="cpu", weights_only=True)
        random.setstate(state["python"])
        torch.set_rng_state(state["cpu"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda"])
    except Exception as error:  # files of another network, or made by hand, raise whatever a loader stumbles over
        reason = first_line(error).partition(". ")[0]  # torch then advises to run the code that a file may hold
        raise InputError(
            f"The checkpoint {path} cannot be loaded ({reason}): it is of another training, or was changed. "
            "Start from scratch."
        ) from error
    return float(manifest["seconds"])


def _random_state() -> dict[str, Any]:
    """What dropout and stochastic depth draw from; images are augmented by numbers of their own."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "cpu": torch.get_rng_state(), "cuda": cuda}


def _write(path: Path, state: object) -> None:
    """`torch.save` by way of memory: on a full disk its own writer raises an error that does not say so."""
    content = io.BytesIO()
    torch.save(state, content)
    path.write_bytes(content.getbuffer())


def _steps(folder: Path) -> list[int]:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step_(\d{8,})", name)))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
