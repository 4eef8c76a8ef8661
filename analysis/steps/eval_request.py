"""What `qvw eval` is asked for, checked before a model is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from analysis.planning.uniform import parse_uniform
from quant.choices import Estimator, Layout
from quant.errors import InputError


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """What is evaluated: exactly one of `plan_file`, `uniform`, `floating` and `checkpoint` is set."""

    plan_file: Path | None = None
    uniform: str | None = None
    floating: bool = False
    checkpoint: Path | None = None  # a folder that `qvw train` wrote, or a file of `qvw export`
    layout: Layout = "paper"
    calibration_images: int = 256
    estimator: Estimator = "mse"
    batchnorm: Literal["stored", "re-estimate"] = "re-estimate"

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "EvalRequest":
        """The options of a command line, checked."""
        request = TypeAdapter(cls).validate_python(dict(options))
        chosen = (request.plan_file, request.uniform, request.checkpoint, request.floating or None)
        if sum(choice is not None for choice in chosen) != 1:
            raise InputError(
                "give one of --plan FILE, --uniform wXaY, --checkpoint PATH and --float, to say what is evaluated."
            )
        if request.uniform is not None:
            parse_uniform(request.uniform, "--uniform")
        return request
