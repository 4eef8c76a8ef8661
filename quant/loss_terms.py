"""The terms of the training loss by name, weighted once, here; and the gradient of each alone."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.config import QATConfig
from quant.distill import distillation_loss
from quant.functional import to_groups
from quant.quantizer import LSQQuantizer
from quant.regularizers import cosine_ramp, dampening_loss, kurtosis_loss, oscillation_bin_loss
from quant.site import Site

TERMS = ("task", "kd", "obr_distance", "obr_variance", "dampening", "kurtosis")
"""Every term that a training can have: columns of history.parquet, each with the norm of its gradient, `grad_TERM`."""
LOW_BITS = 4
"""Sites above it oscillate too little to matter, and bin regularization harms them at 8 bit."""

Weights = dict[Site, tuple[Tensor, LSQQuantizer]]
"""Latent weight, with gradient, and quantizer of each weight site."""


def low_bit(weights: Weights) -> Weights:
    """The sites of at most `LOW_BITS`: those that oscillate."""
    return {site: part for site, part in weights.items() if part[1].scheme.bit_width <= LOW_BITS}


def image_terms(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None, config: QATConfig) -> dict[str, Tensor]:
    """The weighted terms of a batch of images: cross-entropy with the labels, and distillation from a teacher.

    Logits: (batch, classes) float32.
    """
    terms = {}
    if config.task_weight:
        terms["task"] = config.task_weight * F.cross_entropy(logits, labels)
    if config.kd_weight and teacher_logits is not None:
        terms["kd"] = config.kd_weight * distillation_loss(logits, teacher_logits, temperature=config.kd_temperature)
    return terms


def weight_terms(weights: Weights, config: QATConfig, progress: float) -> dict[str, Tensor]:
    """The weighted terms of the weights at a share `progress` of the training; 0 while their ramp is."""
    ramp = cosine_ramp(progress, config.ramp_start)
    grids = [
        (to_groups(w, q.axis, q.groups), q.scale, q.offset, q.scheme.bit_width, q.scheme.signed)
        for w, q in low_bit(weights).values()
    ]
    terms: dict[str, Tensor] = {}
    if config.obr_weight and grids:
        nothing = grids[0][0].new_zeros(())
        parts = [oscillation_bin_loss(*grid) for grid in grids] if ramp else []
        factor = config.obr_weight * ramp
        terms["obr_distance"] = sum((factor * part.distance for part in parts), nothing)
        terms["obr_variance"] = sum((factor * part.variance for part in parts), nothing)
    if config.dampening_weight and grids:
        losses = [dampening_loss(*grid) for grid in grids] if ramp else []
        terms["dampening"] = sum((config.dampening_weight * ramp * x for x in losses), grids[0][0].new_zeros(()))
    if config.kurtosis_weight and weights:
        terms["kurtosis"] = config.kurtosis_weight * kurtosis_loss([w for w, _ in weights.values()])
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
