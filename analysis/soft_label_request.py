"""What `qvw soft-labels` is asked for, checked before a model is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from quant.choices import Compression
from quant.errors import InputError

TOP_K = 5


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
        for name, (low, high), most in (("scale", request.scale, 1.0), ("ratio", request.ratio, float("inf"))):
            if not 0 < low <= high <= most:
                limit = " at most 1" if most == 1 else ""
                raise InputError(f"--{name} {low:g},{high:g}: expected two numbers above 0{limit}, the smaller first.")
        if request.out.is_dir():
            raise InputError(f"--out {request.out} is a folder. Name a file, such as {request.out / 'labels.soft'}.")
        return request
