"""The network that is distilled: loaded, checked, and given images prepared as it was trained."""

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analysis.data import input_channels, resolve_input
from analysis.inputs.data_string import per_channel
from analysis.inputs.listing import InputConfig
from analysis.inputs.weights import weights_sha256
from analysis.models import load_model
from analysis.session.loaded_run import LoadedRun
from analysis.terminal.console import say, warn
from analysis.training.training_request import TrainRequest
from quant.errors import InputError, first_line

_TOLD = ("mean", "std", "input_size")


class PreparedTeacher(nn.Module):
    """A teacher that takes images prepared for its student, (batch, channels, height, width) float32.

    Pixels are brought to its own mean and deviation by an affine map of each channel, and to its own size by bicubic
    interpolation with antialiasing.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, teacher: nn.Module, student: InputConfig, own: InputConfig) -> None:
        super().__init__()
        self.teacher, self.size = teacher, own.input_size[1:]
        before, after = (
            [torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (config.mean, config.std)]
            for config in (student, own)
        )
        self.register_buffer("scale", (before[1] / after[1]).float(), persistent=False)
        self.register_buffer("shift", ((before[0] - after[0]) / after[1]).float(), persistent=False)

    def forward(self, images: Tensor) -> Any:
        """The teacher's answer."""
        images = images * self.scale + self.shift
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, size=self.size, mode="bicubic", antialias=True, align_corners=False)
        return self.teacher(images)


def load_teacher(opened: LoadedRun, request: TrainRequest) -> tuple[nn.Module | None, dict[str, Any]]:
    """The network whose logits are distilled, and what of it fixes the result; checked on one image.

    Without a teacher of its own the float student is asked. A teacher gets images as its own configuration (timm's
    `pretrained_cfg`) or the request says; where neither does, those of the student.
    """
    if not request.config.kd_weight or request.soft_labels is not None:
        return None, {"teacher_sha256": None}
    source, student = request.teacher_source, opened.input_config
    if source is None:
        teacher, name, own = copy.deepcopy(opened.model), opened.name, student
    else:
        quiet = opened.setup.quiet
        teacher, name = load_model(source, lambda text: say(f"teacher: {text}", quiet=quiet)), source.model
        if source.untrained:
            warn(f"the teacher {name} has untrained weights: give --teacher-pretrained or --teacher-weights FILE.")
        own = _preparation(teacher, opened, request)
    fixed: dict[str, Any] = {"teacher_sha256": weights_sha256(teacher)}
    if own != student:
        fixed |= {f"teacher_{key}": getattr(own, key) for key in _TOLD}
        teacher = PreparedTeacher(teacher, student, own)
        words = ", ".join(f"{key} {','.join(map('{:g}'.format, getattr(own, key)))}" for key in _TOLD)
        say(f"the teacher {name} gets its own preprocessing: {words}", quiet=opened.setup.quiet)
    teacher = teacher.to(opened.setup.device).requires_grad_(False).eval()
    _check_answer(teacher, name, opened, own)
    return teacher, fixed


def _preparation(teacher: nn.Module, opened: LoadedRun, request: TrainRequest) -> InputConfig:
    """How the teacher's images are prepared: as asked for, else as it says itself, else as the student's."""
    student, data = opened.input_config, opened.setup.data
    told = getattr(teacher, "pretrained_cfg", None)
    told = told if isinstance(told, dict) and told.get("mean") and told.get("std") else {}
    channels = input_channels(teacher) or student.input_size[0]
    size = request.teacher_input_size
    if size is None and request.teacher_source is not None and request.teacher_source.factory is None and told:
        assert data is not None
        size = resolve_input(teacher, data, mean=student.mean, std=student.std).input_size
    if size is None:
        size = student.input_size
    if channels != student.input_size[0] or size[0] != channels:
        raise InputError(
            f"the teacher takes images of {channels} channels, {opened.name} those of {student.input_size[0]}. Choose "
            "another --teacher, or build it with --teacher-kwargs."
        )
    values = {
        "mean": request.teacher_mean or told.get("mean") or student.mean,
        "std": request.teacher_std or told.get("std") or student.std,
    }
    if data == "digits" and not (request.teacher_mean or request.teacher_std):
        values = {"mean": student.mean, "std": student.std}  # which bring their own, whatever the network
    mean, std = (per_channel(f"teacher-{key}", value, channels) for key, value in values.items())
    return replace(student, input_size=size, mean=mean, std=std)


def _check_answer(teacher: nn.Module, name: str, opened: LoadedRun, own: InputConfig) -> None:
    """Raise InputError unless the teacher answers an image with as many finite logits as the student."""
    image = opened.probe_image()
    with torch.no_grad():
        expected = opened.model(image)
        try:
            answer = teacher(image)
        except Exception as error:  # whatever the forward of a network of other images raises
            raise InputError(
                f"the teacher {name} does not take images of size {own.input_size}: {first_line(error)}. Give "
                "--teacher-input-size, choose another --teacher, or build it with --teacher-kwargs."
            ) from error
    if not isinstance(answer, Tensor) or answer.shape != expected.shape:
        came = f"{answer.shape[-1]} classes" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
        raise InputError(
            f"the teacher {name} answers with {came}, {opened.name} has {expected.shape[-1]} classes. "
            "Choose another --teacher, or train without one: --set kd_weight=0."
        )
    if not torch.isfinite(answer).all():
        raise InputError(f"the teacher {name} answers with NaN or Inf. Look for other weights of it.")
