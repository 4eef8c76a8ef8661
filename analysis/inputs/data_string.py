"""What a data string says, and what of it can be checked before anything large is imported."""

import math
from collections.abc import Sequence
from pathlib import Path

from analysis.inputs.class_names import ORDERS, read_class_map
from analysis.inputs.image_folder import folder_classes, folder_splits
from analysis.inputs.image_list import list_csv
from quant.errors import InputError

TIMM_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")
LARGEST_PIXEL = 4
"""Far above 1, up to which pixels are, and far below the means of pixels up to 255."""


def check_data(
    spec: str,
    *,
    split: str | None = None,
    data_root: str | Path | None = None,
    class_map: str | Path | None = None,
    class_order: str | None = None,
) -> None:
    """Raise InputError for what is wrong with a data string by its text and paths; no image is read.

    That is: another kind of data, a folder or file that is not there, a split that the folder lacks, classes of two
    orders, a list with cells that cannot be read, a class map that cannot.
    """
    kind, _, place = spec.partition(":")
    names, order = class_names_from(class_map, class_order)
    if order is not None and kind not in ("folder", "csv"):
        raise InputError(f"`--class-order` concerns folder: and csv:, {spec} brings its own order. Leave it out.")
    if kind == "folder":
        splits = folder_splits(Path(place), split)
        folder_classes(Path(place), splits, order if names is None else "plain")
    elif kind == "csv":
        list_csv(Path(place), split, order, by_name=names is not None)
    elif spec.startswith(TIMM_PREFIXES):
        if data_root is None and spec.startswith(("torch/", "wds/")):
            raise InputError(f"{spec} needs `--data-root DIR`, the folder where the data set lies.")
    elif spec != "digits":
        raise InputError(
            f"`--data` {spec!r} is unknown. It is digits, folder:PATH, csv:FILE, or a timm data set, which starts with "
            f"{', '.join(TIMM_PREFIXES)}."
        )


def class_names_from(
    class_map: str | Path | None, class_order: str | Path | None
) -> tuple[dict[str, int] | None, str | None]:
    """The index of each class where a file gives it, as class map or order, and else the order's name if any."""
    if class_order in ORDERS or class_order is None:
        return None if class_map is None else read_class_map(Path(class_map)), class_order
    if class_map is not None:
        raise InputError("`--class-map` and a file of `--class-order` both number the classes. Give one of them.")
    return read_class_map(Path(class_order)), None


def per_channel(option: str, values: Sequence[float], channels: int | None) -> tuple[float, ...]:
    """Values of `--mean` or `--std`, one for each channel; a single one serves them all.

    `channels` is None where they are not known yet. InputError for other numbers of them, numbers that are not finite,
    deviations that are not above 0, and values of pixels from 0 to 255.
    """
    numbers = tuple(float(value) for value in values) * ((channels or 1) if len(values) == 1 else 1)
    wrong = not all(map(math.isfinite, numbers)) or (option == "std" and min(numbers) <= 0)
    if wrong or (channels is not None and len(numbers) != channels):
        above = " above 0" if option == "std" else ""
        count = "each channel" if channels is None else f"each of {channels} channels"
        raise InputError(
            f"The images' {option} is {numbers}, expected one number{above} for {count}. "
            f"Give `--{option}`, one number{'' if channels is None else f' or {channels}'}."
        )
    if max(map(abs, numbers)) > LARGEST_PIXEL:
        raise InputError(
            f"The images' {option} is {numbers}, which is of pixels from 0 to 255; here they are from 0 to 1. Divide "
            f"it by 255: --{option} {','.join(f'{number / 255:.4g}' for number in numbers)}."
        )
    return numbers
