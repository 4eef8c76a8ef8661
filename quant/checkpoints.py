"""Checkpoints of a training: folders written whole or not at all, checked before they are loaded."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from quant.errors import InputError

_KEPT = 2  # should the last one be damaged, the training goes on from the one before


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Write the state after `step` steps to `folder`/step_NNNNNNNN; older ones but the last are removed."""
    final, temporary = folder / f"step_{step:08}", folder / f".step_{step:08}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        manifest = {"step": step, "sha256": {path.name: _sha256(path) for path in sorted(temporary.iterdir())}}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _fsync(path)
        shutil.rmtree(final, ignore_errors=True)
        temporary.replace(final)
        _fsync(folder)
        for old in _steps(folder)[:-_KEPT]:
            shutil.rmtree(folder / f"step_{old:08}")


def last_step(folder: Path) -> int:
    """The step of the newest checkpoint in `folder`, 0 where there is none; InputError where it is damaged."""
    steps = _steps(folder)
    if not steps:
        return 0
    path = folder / f"step_{steps[-1]:08}"
    try:
        manifest: Any = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        damaged = [name for name, digest in manifest["sha256"].items() if _sha256(path / name) != digest]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        damaged = [f"manifest.json or a file that it names ({type(error).__name__})"]
    if damaged:
        earlier = f"from step {steps[-2]}" if len(steps) > 1 else "from the start"
        raise InputError(
            f"The checkpoint {path} is damaged or cut short: {damaged[0]}. "
            f"Delete this folder and run the command again: the training goes on {earlier}."
        )
    return steps[-1]


def load_checkpoint(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Put the state of `step` into what `accelerator` has prepared; no code is run from the files."""
    accelerator.load_state(str(folder / f"step_{step:08}"))


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
