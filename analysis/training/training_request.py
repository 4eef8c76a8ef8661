"""What `qvw train` is asked for, checked before a model is loaded."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from analysis.inputs.model_options import TEACHER_OPTIONS
from analysis.inputs.model_source import ModelSource
from analysis.planning.uniform import parse_uniform
from quant.choices import Layout
from quant.config import QATConfig
from quant.errors import InputError


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What is trained: at most one of `plan_file`, `uniform` and `floating`; by default the run's own plan."""

    plan_file: Path | None = None
    uniform: str | None = None
    floating: bool = False
    layout: Layout = "paper"  # of uniform bits
    name: str | None = None  # the results go to RUN/qat, or to RUN/qat-NAME
    config: QATConfig = field(default_factory=QATConfig)
    teacher: str | None = None  # as MODEL; the floating-point model itself where None
    teacher_weights: Path | None = None
    teacher_pretrained: bool = False
    teacher_kwargs: dict[str, Any] | None = None
    teacher_weights_entry: str | None = None
    teacher_mean: tuple[float, ...] | None = None
    teacher_std: tuple[float, ...] | None = None
    teacher_input_size: tuple[int, int, int] | None = None
    soft_labels: Path | None = None  # a teacher's stored answers, in place of one that runs beside
    val_images: int | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "TrainRequest":
        """The options of a command line, checked."""
        request = TypeAdapter(cls).validate_python(dict(options))
        given = (request.plan_file, request.uniform, request.floating or None)
        if sum(choice is not None for choice in given) > 1:
            raise InputError("give at most one of --plan FILE, --uniform wXaY and --float.")
        if request.uniform is not None:
            parse_uniform(request.uniform, "--uniform")
        if request.name is not None and not re.fullmatch(r"[A-Za-z0-9_.+-]{1,64}", request.name):
            raise InputError(f"--name {request.name!r} is no name of a folder; use letters, digits, - and _.")
        needless = [name for name, value in asdict(request).items() if name.startswith("teacher_") and value]
        if request.teacher is None and needless:
            raise InputError(f"--{needless[0].replace('_', '-')} needs --teacher MODEL.")
        if request.teacher is not None and not request.config.kd_weight:
            raise InputError("--teacher was given, but kd_weight is 0: nothing is distilled. Leave out one of them.")
        if request.soft_labels is not None:
            if request.teacher is not None:
                raise InputError("--soft-labels FILE holds a teacher's answers already. Leave out --teacher.")
            if not request.config.kd_weight:
                raise InputError("--soft-labels was given, but kd_weight is 0: nothing is distilled. Leave out one.")
        return request

    @property
    def teacher_source(self) -> ModelSource | None:
        """Where the teacher comes from; None where the floating-point model itself is distilled."""
        if self.teacher is None:
            return None
        return ModelSource(
            model=self.teacher, pretrained=self.teacher_pretrained, kwargs=self.teacher_kwargs or {},
            weights=None if self.teacher_weights is None else str(self.teacher_weights),
            weights_entry=self.teacher_weights_entry, seed=0,
            options=TEACHER_OPTIONS,
        )  # fmt: skip

    @property
    def folder(self) -> str:
        """The name of the results' folder inside the run folder, and of the step."""
        return "qat" if self.name is None else f"qat-{self.name}"
