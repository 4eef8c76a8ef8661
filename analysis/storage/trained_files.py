"""The files of trained models, folders of `qvw train` and packed files of `qvw export`, told by their names and heads.

Nothing here reads a tensor, so that a wrong path is reported before torch is imported.
"""

import json
import struct
from pathlib import Path
from typing import Any

from quant.errors import InputError, first_line

PACKED_FORMAT = "qvw-packed-model"
"""The key of a packed file's metadata."""
TRAINED = "model.safetensors"
_LARGEST_HEADER = 100_000_000  # bytes, as the safetensors library allows


def trained_folder(run: Path, name: str | None) -> Path:
    """RUN/qat, or RUN/qat-NAME; InputError where there is none."""
    folder = run / ("qat" if name is None else f"qat-{name}")
    if not folder.is_dir():
        others = sorted(path.name.removeprefix("qat-") for path in run.glob("qat-*") if path.is_dir())
        hint = f"It has {', '.join(others)}: give --name" if others else "Train it first, `qvw train`"
        raise InputError(f"{run} has no trained model {folder.name}. {hint}.")
    return folder


def packable_folder(run: Path, name: str | None) -> Path:
    """The same; InputError also where the training has not finished, or was one in floating point."""
    folder = trained_folder(run, name)
    trained_weights(folder)
    if not (folder / "plan.json").exists():
        raise InputError(f"{folder} was trained in floating point: there is nothing to pack. Choose another --name.")
    return folder


def trained_weights(path: Path) -> Path:
    """The weights in a folder of `qvw train`, of which `path` may be the weights themselves.

    InputError where the training has not finished, or the folder is another one.
    """
    folder = path.parent if path.name == TRAINED else path
    weights = folder / TRAINED
    if weights.is_file():
        return weights
    if (folder / "checkpoints").is_dir():
        raise InputError(f"the training in {folder} has not finished. Run the same `qvw train` again to resume it.")
    raise InputError(
        f"{folder} has no model.safetensors: name a folder that `qvw train` has finished, such as RUN/qat, or a "
        "file of `qvw export`."
    )


def is_trained_folder(path: Path) -> bool:
    """Whether `path` stands for a folder of `qvw train`, or weights in it, and not for a packed file."""
    return not path.is_file() or (path.name == TRAINED and not is_packed(path))


def check_checkpoint(path: Path) -> None:
    """Raise InputError where `path` is neither a finished training nor, by its head, a packed file."""
    if is_trained_folder(path):
        trained_weights(path)
    else:
        check_packed(path)


def check_packed(path: Path) -> None:
    """Raise InputError where a file is not, by its head, one of `qvw export`."""
    try:
        packed = PACKED_FORMAT in _metadata(path)
    except (OSError, ValueError, RecursionError, struct.error) as error:
        raise InputError(
            f"--checkpoint {path} cannot be read ({first_line(error)}): not a packed model, or cut short. Name a file "
            "of `qvw export`, or a folder of `qvw train`."
        ) from error
    if not packed:
        raise InputError(
            f"--checkpoint {path} is not a packed model. Name a file of `qvw export`, or a folder of `qvw train`; "
            "measure plain weights with MODEL --weights FILE --float."
        )


def is_packed(path: Path) -> bool:
    """Whether the file says that `qvw export` has written it."""
    try:
        return PACKED_FORMAT in _metadata(path)
    except (OSError, ValueError, RecursionError, struct.error):
        return False


def check_export_target(out: Path) -> None:
    """Raise InputError for a file that a packed model must not replace."""
    if out.suffix != ".safetensors":
        raise InputError(f"--out {out} is not the name of a packed model: end it with .safetensors.")
    if out.exists() and not is_packed(out):
        raise InputError(f"--out {out} exists and is not a packed model: it is not replaced. Choose another name.")


def _metadata(path: Path) -> dict[str, Any]:
    """The metadata in the head of a safetensors file."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        if size > _LARGEST_HEADER:
            raise ValueError("its head is not that of a safetensors file")
        content = json.loads(file.read(size).decode("utf-8"))
    metadata = content.get("__metadata__") if isinstance(content, dict) else None
    return metadata if isinstance(metadata, dict) else {}
