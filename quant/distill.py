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
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "`student_logits` and `teacher_logits` must both be (batch, classes), "
            f"got {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}."
        )
    if not temperature > 0:
        raise ValueError(f"`temperature` must be > 0, got {temperature:g}.")
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student = F.log_softmax(student_logits.to(dtype) / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.detach().to(dtype) / temperature, dim=1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
