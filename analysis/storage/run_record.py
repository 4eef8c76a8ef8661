"""What run.json holds: model, images, and of each step how it was run, with which versions, and how it ended."""

import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "numpy",
    "pandas",
    "scipy",
    "quantization-variation-workbench",
)


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """The model that a run folder's results belong to."""

    typed: str  # as the user typed it
    name: str  # what the tables call it
    weights_sha256: str  # of the state dict: analysis.inputs.weights.weights_sha256
    parameters: Annotated[int, Field(ge=0, le=2**53)]
    factory: str | None = None  # file:function with its absolute path; None for a timm name
    kwargs: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    weights: str | None = None  # the file's path
    weights_entry: str | None = None  # which state dict of a checkpoint
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """How one step was run, and how it ended."""

    command: str
    options: dict[str, Any]
    inputs: dict[str, Any]  # all that fixes the result
    files: list[str]  # while it runs all that it may write, afterwards what it left, relative to the run folder
    seed: int
    versions: dict[str, str]
    device: str
    git_commit: str | None  # of the project's checkout, `-dirty` where it has changes
    status: Literal["running", "done", "interrupted", "failed"]
    started: str  # ISO 8601, UTC
    finished: str | None = None
    seconds: float | None = None  # of the last start, where a step was resumed
    earlier: list[str] = field(default_factory=list)  # commands before `command` that added to the same results


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What run.json holds."""

    format: Literal["qvw-run"] = "qvw-run"
    version: Literal[1] = 1
    model: ModelRecord | None = None
    data: dict[str, Any] = field(default_factory=dict)  # the options that name the images, as last given
    steps: dict[str, StepRecord] = field(default_factory=dict)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result may depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):  # a checkout that was not installed
            found[package] = version(package)
    return found


def typed_command() -> str:
    """The command of the terminal, `qvw ...`; of another program, such as a notebook, that it called the library."""
    program = Path(sys.argv[0])
    if program.stem == "qvw" or program.parts[-2:] == ("analysis", "__main__.py"):
        return shlex.join(["qvw", *sys.argv[1:]])
    return f"called from {program.name or 'Python'}"


def git_commit() -> str | None:
    """The commit of the project's checkout; None where its files are not in git, as in site-packages."""
    here = Path(__file__)
    try:
        _git(here.parent, "ls-files", "--error-unmatch", here.name)
        return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()
