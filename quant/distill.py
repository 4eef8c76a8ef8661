"""Distillation: the student's logits are drawn towards the teacher's."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quant.errors import InputError

_KEYS = ("logits", "out")  # of transformers' outputs, and of torchvision's segmentation networks


def distillation_loss(student: Any, teacher: Any, *, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) of the logits divided by the temperature T, in nats, mean over samples and positions.

    Both are logits (samples, classes) or (samples, classes, positions ...), as of a segmentation; or a dictionary or
    `ModelOutput` that has them under `logits` or `out`. The factor T^2 keeps the size of the gradient, which is
    T (p_S - p_T) for each sample, comparable over temperatures. No gradient reaches the teacher. Half-precision logits
    are computed in float32. Hinton et al., 2015, arXiv:1503.02531. Raises InputError for logits of different shapes,
    and for T <= 0.

    >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 0.0]])
    >>> round(distillation_loss(student, teacher).item(), 3)
    0.502
    """
    student_logits, teacher_logits = _logits(student, "student"), _logits(teacher, "teacher")
    log_student = _log_probabilities(student_logits, teacher_logits, ("student", "teacher"), temperature)
    log_teacher = F.log_softmax(teacher_logits.detach().to(log_student.dtype) / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1).mean()


def soft_cross_entropy(student_logits: Tensor, teacher_probabilities: Tensor, *, temperature: float = 1.0) -> Tensor:
    """-T^2 sum_c p_T log p_S, p_S the softmax of the student's logits over T, in nats, mean over the batch.

    Logits and probabilities: (batch, classes); the crops of one image are rows of their own, so that the mean is that
    over images and crops, -1/(NM) sum_i sum_j p_T(x_ij) . log p_S(x_ij). It never falls below the teacher's entropy;
    its gradient is that of `distillation_loss`. Half-precision logits are computed in float32. Shen and Xing, ECCV
    2022, arXiv:2112.01528. Raises InputError for other shapes, and for T <= 0.
    """
    names = ("student_logits", "teacher_probabilities")
    student = _log_probabilities(student_logits, teacher_probabilities, names, temperature)
    return -(temperature**2) * (teacher_probabilities.detach().to(student.dtype) * student).sum(dim=1).mean()


def _logits(output: Any, name: str) -> Tensor:
    """The logits of what a network returned."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        found = next((output[key] for key in _KEYS if isinstance(output.get(key), Tensor)), None)
        if found is not None:
            return found
    raise InputError(
        f"`{name}` is a {type(output).__name__}; expected logits (samples, classes, ...), or a dictionary that has "
        f"them under {' or '.join(map(repr, _KEYS))}."
    )


def _log_probabilities(logits: Tensor, teacher: Tensor, names: tuple[str, str], temperature: float) -> Tensor:
    """Of the student at the temperature, in float32 at least; InputError where the teacher's shape, or T, cannot be."""
    if logits.ndim < 2 or logits.shape != teacher.shape:
        raise InputError(
            f"`{names[0]}` and `{names[1]}` must have one shape, (samples, classes, ...), "
            f"got {tuple(logits.shape)} and {tuple(teacher.shape)}."
        )
    if not temperature > 0:
        raise InputError(f"`temperature` must be > 0, got {temperature:g}.")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.log_softmax(logits.to(dtype) / temperature, dim=1)
