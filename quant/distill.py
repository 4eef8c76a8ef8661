"""Distillation: the student's logits are drawn towards the teacher's."""

import torch
from torch import Tensor
from torch.nn import functional as F


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of the logits divided by the temperature T, in nats, mean over the batch.

    Both logits: (batch, classes). The factor T^2 keeps the size of the gradient, which is T (p_S - p_T) for each image,
    comparable over temperatures. No gradient reaches the teacher. Half-precision logits are computed in float32.
    Hinton et al., 2015, arXiv:1503.02531. Raises ValueError for logits of different shapes, and for T <= 0.
    """
    student = _log_probabilities(student_logits, teacher_logits, "teacher_logits", temperature)
    teacher = F.log_softmax(teacher_logits.detach().to(student.dtype) / temperature, dim=1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def soft_cross_entropy(student_logits: Tensor, teacher_probabilities: Tensor, *, temperature: float = 1.0) -> Tensor:
    """-T^2 sum_c p_T log p_S, p_S the softmax of the student's logits over T, in nats, mean over the batch.

    Logits and probabilities: (batch, classes); the crops of one image are rows of their own, so that the mean is that
    over images and crops, -1/(NM) sum_i sum_j p_T(x_ij) . log p_S(x_ij). It never falls below the teacher's entropy;
    its gradient is that of `distillation_loss`. Half-precision logits are computed in float32. Shen and Xing, ECCV
    2022, arXiv:2112.01528. Raises ValueError for other shapes, and for T <= 0.
    """
    student = _log_probabilities(student_logits, teacher_probabilities, "teacher_probabilities", temperature)
    return -(temperature**2) * (teacher_probabilities.detach().to(student.dtype) * student).sum(dim=1).mean()


def _log_probabilities(student_logits: Tensor, teacher: Tensor, name: str, temperature: float) -> Tensor:
    """Of the student at the temperature, in float32 at least; ValueError where the teacher's shape, or T, cannot be."""
    if student_logits.ndim != 2 or student_logits.shape != teacher.shape:
        raise ValueError(
            f"`student_logits` and `{name}` must both be (batch, classes), "
            f"got {tuple(student_logits.shape)} and {tuple(teacher.shape)}."
        )
    if not temperature > 0:
        raise ValueError(f"`temperature` must be > 0, got {temperature:g}.")
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    return F.log_softmax(student_logits.to(dtype) / temperature, dim=1)
