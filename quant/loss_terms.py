"""The terms of the training loss by name, weighted once, here; and the gradient of each alone."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.config import QATConfig
from quant.distill import distillation_loss, soft_cross_entropy
from quant.functional import to_groups
from quant.quantizer import LSQQuantizer
from quant.regularizers import cosine_ramp, dampening_loss, kurtosis_loss, oscillation_bin_loss
from quant.site import Site

TERMS = ("task", "kd", "soft", "obr_distance", "obr_variance", "dampening", "kurtosis")
"""Every term that a training can have: columns of history.parquet, each with the norm of its gradient, `grad_TERM`."""
LOW_BITS = 4
"""Sites above it oscillate too little to matter, and bin regularization harms them at 8 bits."""

Weights = dict[Site, tuple[Tensor, LSQQuantizer]]
"""Latent weight, with gradient, and quantizer of each weight site."""


def low_bit(weights: Weights) -> Weights:
    """The sites of at most `LOW_BITS`: those that oscillate."""
    return {site: part for site, part in weights.items() if part[1].scheme.bit_width <= LOW_BITS}


def image_terms(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None,
    config: QATConfig,
    soft_labels: Tensor | None = None,
) -> dict[str, Tensor]:
    """The weighted terms of a batch of images: cross-entropy with the labels, and distillation from a teacher.

    Logits: (batch, classes) float32. A teacher that runs beside the student gives logits, for the term `kd`; one that
    was asked before gives `soft_labels`, its probabilities, for `soft`. The two differ by the teacher's entropy, hence
    two names; kd_weight is the weight of either.
    """
    terms = {}
    if config.task_weight:
        terms["task"] = config.task_weight * F.cross_entropy(logits, labels)
    if config.kd_weight and teacher_logits is not None:
        terms["kd"] = config.kd_weight * distillation_loss(logits, teacher_logits, temperature=config.kd_temperature)
    if config.kd_weight and soft_labels is not None:
        terms["soft"] = config.kd_weight * soft_cross_entropy(logits, soft_labels, temperature=config.kd_temperature)
    return terms


def weight_terms(weights: Weights, config: QATConfig, progress: float) -> dict[str, Tensor]:
    """The weighted terms of the weights at a share `progress` of the training; 0 while their ramp is."""
    return regularization_terms(
        weights, obr=config.obr_weight, dampening=config.dampening_weight, kurtosis=config.kurtosis_weight,
        progress=progress, ramp_start=config.ramp_start,
    )  # fmt: skip


def regularization_terms(
    weights: Weights, *, obr: float, dampening: float, kurtosis: float, progress: float, ramp_start: float
) -> dict[str, Tensor]:
    """The terms by name, each multiplied by its weight; those of weight 0 are left out, and ramped ones may be 0."""
    ramp, sites = cosine_ramp(progress, ramp_start), low_bit(weights)
    grids = [
        (to_groups(w, q.axis, q.groups), q.scale, q.offset, q.scheme.bit_width, q.scheme.signed)
        for w, q in sites.values()
        if ramp
    ]
    terms: dict[str, Tensor] = {}
    nothing = next((w.new_zeros(()) for w, _ in sites.values()), None)
    if obr and nothing is not None:
        parts = [torch.stack(oscillation_bin_loss(*grid)) for grid in grids]
        whole = obr * ramp * torch.stack(parts).sum(dim=0) if parts else nothing.repeat(2)
        terms["obr_distance"], terms["obr_variance"] = whole.unbind()
    if dampening and nothing is not None:
        losses = [dampening_loss(*grid) for grid in grids]
        terms["dampening"] = dampening * ramp * torch.stack(losses).sum() if losses else nothing
    if kurtosis and weights:
        terms["kurtosis"] = kurtosis * kurtosis_loss([w for w, _ in weights.values()])
    return terms


def gradient_norms(
    terms: dict[str, Tensor], parameters: list[nn.Parameter], mean: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """The norm of each term's own gradient over the parameters, as `grad_TERM`; `mean` averages over the processes."""
    norms = {}
    for name, term in terms.items():
        norms[f"grad_{name}"] = 0.0
        if term.requires_grad:
            gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
            squares = [mean(gradient).square().sum() for gradient in gradients if gradient is not None]
            norms[f"grad_{name}"] = torch.stack(squares).sum().sqrt().item()
    return norms
