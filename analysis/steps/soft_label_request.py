"""What `qvw soft-labels` is asked for, checked before a model is loaded."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from quant.choices import Compression
from quant.errors import InputError
from quant.soft_label_format import START, start_of

TOP_K = 5
LARGEST_RATIO = 1000
"""Width over height of a crop, and height over width."""
LEAST_TEMPERATURE = 1e-6


@dataclass(frozen=True, kw_only=True)
class SoftLabelRequest:
    """Which crops, and what is kept of the answers to them."""

    out: Path
    crops: int  # of each image
    scale: tuple[float, float]  # share of the image's area
    ratio: tuple[float, float]  # width over height
    flip: float  # probability
    compression: Compression
    top_k: int | None  # `TOP_K`, or all of fewer classes
    temperature: float
    crop_seed: int

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "SoftLabelRequest":
        """The options of a command line, checked."""
        request = TypeAdapter(cls).validate_python(dict(options))
        (low, high), (narrow, wide) = request.scale, request.ratio
        # `not (within)`: NaN is neither within a range nor beyond it, and the ranges of click let it through.
        if not 0 < low <= high <= 1:
            raise InputError(f"--scale {low:g},{high:g}: expected two numbers above 0 at most 1, the smaller first.")
        if not 1 / LARGEST_RATIO <= narrow <= wide <= LARGEST_RATIO:
            raise InputError(
                f"--ratio {narrow:g},{wide:g}: expected two numbers from {1 / LARGEST_RATIO:g} to {LARGEST_RATIO:g}, "
                "the smaller first."
            )
        if not 0 <= request.flip <= 1:
            raise InputError(f"--flip {request.flip:g}: expected a probability, from 0 to 1.")
        if not LEAST_TEMPERATURE <= request.temperature < math.inf:
            raise InputError(
                f"--temperature {request.temperature:g}: expected a finite number of at least {LEAST_TEMPERATURE:g}."
            )
        if request.out.is_dir():
            raise InputError(f"--out {request.out} is a folder. Name a file, such as {request.out / 'labels.soft'}.")
        return request


def check_soft_label_target(out: Path) -> None:
    """Raise InputError for a file that soft labels must not replace."""
    if out.exists() and not start_of(out).startswith(START):
        raise InputError(f"{out} exists and is not a file of soft labels. Choose another --out.")
