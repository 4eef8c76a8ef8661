"""Terms that are added to the training loss: oscillation-aware bins, dampening, kurtosis, and their ramp.

A weight comes in the canonical form (outer, groups, inner) of `quant.functional.to_groups`, with `scale` and `offset`
(groups,), `offset` None where there is none. No gradient reaches scale or offset. Losses are sums over the weights of a
tensor, not means (they differ by a factor of 1e4 to 1e5), unless the function says otherwise.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quant.functional import dequantize, quant_range, quantize

UNIFORM_KURTOSIS = 1.8
"""Raw kurtosis of a uniform distribution, the one that a uniform quantizer harms least; a Gaussian has 3."""


class BinLoss(NamedTuple):
    """The two parts of the oscillation-aware term: squared distance to the grid, and variance inside the bins."""

    distance: Tensor
    variance: Tensor


def oscillation_bin_loss(weight: Tensor, scale: Tensor, offset: Tensor | None, bit_width: int, signed: bool) -> BinLoss:
    """Oscillation-aware bin regularisation (OBR) of one tensor: its distance and its variance part, each a sum.

        distance = sum over weights (w - w_q)^2
        variance = sum over groups and bins of (1 / |bin|) sum over the bin (w - mean of the bin)^2

    w is the latent weight clipped to the range of the codes and w_q its grid value, a constant. A bin holds the weights
    of one group that share an integer code; a bin of one weight gives 0. The gradient is 0 at and beyond the clip.
    Huang et al., TMLR 2024, arXiv:2307.00331.
    """
    residual, codes = _residual(weight, scale, offset, bit_width, signed)
    low, high = quant_range(bit_width, signed)
    groups, levels = weight.shape[1], high - low + 1
    # Bins by integer code: comparing w_q / s with n in floating point loses whole bins.
    first_bin = torch.arange(groups, device=weight.device, dtype=torch.int32)[:, None] * levels - low
    bins = (codes.int() + first_bin).flatten()
    bins.clamp_(0, groups * levels - 1)  # NaN has no code: the loss shall be NaN, for the loop to stop on, not an error
    with torch.no_grad():
        # Within a bin w_q is constant, so the residuals have the bin's variance, and are small: less is rounded away.
        # float64: a sum of float32 values added one by one is off by 2e-4.
        count = torch.bincount(bins, minlength=groups * levels).clamp(min=1)
        mean = torch.bincount(bins, residual.flatten().double(), minlength=groups * levels) / count
        mean_of_bin = mean.to(weight.dtype).index_select(0, bins)  # ten times as fast as mean[bins]
        share = count.to(weight.dtype).reciprocal().index_select(0, bins)
    # The mean is a constant here, and the gradient is exact all the same: the deviations of a bin sum to 0, so what
    # would flow through its mean cancels and 2 (w - mean) / |bin| remains.
    deviation = residual.flatten() - mean_of_bin
    return BinLoss(residual.square().sum(), (deviation.square() * share).sum())


def dampening_loss(weight: Tensor, scale: Tensor, offset: Tensor | None, bit_width: int, signed: bool) -> Tensor:
    """Oscillation dampening of one tensor: sum over weights of (w_q - clip(w, s Q_N, s Q_P))^2, w_q a constant.

    The gradient is 0 at and beyond the clip. Nagel et al., ICML 2022, arXiv:2203.11086.
    """
    return _residual(weight, scale, offset, bit_width, signed)[0].square().sum()


def kurtosis_loss(weights: Sequence[Tensor]) -> Tensor:
    """Mean over the tensors of (kurtosis - 1.8)^2, with raw kurtosis: the mean fourth power of (w - mean) / std.

    Weights in any shape, one tensor a layer. A constant tensor counts as kurtosis 0 and gets no gradient. KURE: Chmiel
    et al., NeurIPS 2020, arXiv:2002.07686. Raises ValueError where there is no tensor.
    """
    if not weights:
        raise ValueError("`weights` is empty: the kurtosis term needs at least one weight tensor.")
    return torch.stack([(_kurtosis(weight) - UNIFORM_KURTOSIS).square() for weight in weights]).mean()


def cosine_ramp(progress: float, start: float = 0.25) -> float:
    """Factor of a term at a share `progress` of the training: 0 up to `start`, then by half a cosine to 1 at 1.

    >>> [round(cosine_ramp(progress), 3) for progress in (0, 0.25, 0.5, 0.625, 1)]
    [0.0, 0.0, 0.25, 0.5, 1.0]
    """
    if progress <= start:
        return 0.0
    if progress >= 1:
        return 1.0
    return 0.5 * (1 - math.cos(math.pi * (progress - start) / (1 - start)))


def _residual(
    weight: Tensor, scale: Tensor, offset: Tensor | None, bit_width: int, signed: bool
) -> tuple[Tensor, Tensor]:
    """clip(w) - w_q, differentiable in the weight alone, and the integer codes; both in the weight's shape.

    A weight at or beyond the clip lies on the grid point at its end: the residual is 0 there, and so is its gradient.
    That is decided by comparison, as in `quant.functional.fake_quantize`, and not by clamp's own gradient.
    """
    with torch.no_grad():
        codes = quantize(weight, scale, offset, bit_width, signed)
        on_grid = dequantize(codes, scale, offset)
        v = (weight if offset is None else weight - offset[:, None]) / scale[:, None]
        low, high = quant_range(bit_width, signed)
        inside = (v > low) & (v < high)
    return (weight - on_grid) * inside, codes


def _kurtosis(weight: Tensor) -> Tensor:
    """Raw kurtosis of all values, dividing by their number; 0 where they are all the same."""
    squares = (weight - weight.mean()).square()
    variance = squares.mean()
    return (squares / torch.where(variance > 0, variance, 1.0)).square().mean()
