"""Terms that are added to the training loss: oscillation-aware bins, dampening, kurtosis, and their ramp.

A weight comes in the canonical form (outer, groups, inner) of `quant.functional.to_groups`, with `scale` and `offset`
(groups,), `offset` None where there is none. No gradient reaches scale or offset. Half-precision weights are computed
in float32, as the quantizers do.

Losses are sums over the weights of a tensor, not means, unless the function says otherwise: the pull on one weight is
then the same in tensors of every size. The two differ by a factor of 1e4 to 1e5.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quant.functional import blocks, in_rows, in_single, in_steps, quant_range, to_codes_

UNIFORM_KURTOSIS = 1.8
"""Raw kurtosis of a uniform distribution, the one that a uniform quantizer harms least; a Gaussian has 3."""

_NUMBERED = 2**15
"""Bins that int16 can number."""


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
    return BinLoss(*_BinLoss.apply(*in_single(weight, scale, offset), bit_width, signed))


def dampening_loss(weight: Tensor, scale: Tensor, offset: Tensor | None, bit_width: int, signed: bool) -> Tensor:
    """Oscillation dampening of one tensor: sum over weights of (w_q - clip(w, s Q_N, s Q_P))^2, w_q a constant.

    The gradient is 0 at and beyond the clip. Nagel et al., ICML 2022, arXiv:2203.11086.
    """
    return _Distance.apply(*in_single(weight, scale, offset), bit_width, signed)


def kurtosis_loss(weights: Sequence[Tensor]) -> Tensor:
    """Mean over the tensors of (kurtosis - 1.8)^2, with raw kurtosis: the mean fourth power of (w - mean) / std.

    Weights in any shape, one tensor a layer. A constant tensor counts as kurtosis 0 and gets no gradient. KURE: Chmiel
    et al., NeurIPS 2020, arXiv:2002.07686. Raises ValueError where there is no tensor.
    """
    if not weights:
        raise ValueError("`weights` is empty: the kurtosis term needs at least one weight tensor.")
    return torch.stack([(_Kurtosis.apply(w) - UNIFORM_KURTOSIS).square() for w in in_single(*weights)]).mean()


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


class _Distance(torch.autograd.Function):
    """The value and gradient of `dampening_loss`, block by block: large temporaries would cost more than the term."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, offset: Tensor | None, bit_width: int, signed: bool) -> Tensor:
        ctx.save_for_backward(weight, scale, offset)
        ctx.scheme = bit_width, signed
        total = weight.new_zeros((), dtype=torch.float64)
        for _, residual, _, _ in _residuals(weight, scale, offset, bit_width, signed):
            total += residual.square_().sum(dtype=torch.float64)
        return total.to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, offset = ctx.saved_tensors
        to_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        rows, factor = to_weight.view(-1, weight.shape[2]), 2 * gradients[0]
        for block, residual, _, _ in _residuals(weight, scale, offset, *ctx.scheme):
            torch.mul(residual, factor, out=rows[block])
        return to_weight, None, None, None, None


class _BinLoss(torch.autograd.Function):
    """The values and gradients of `oscillation_bin_loss`, block by block, from three sums a bin.

    Within a bin w_q is constant, so the residuals have the bin's variance, and are small: their squares lose nothing in
    float64. A sum of float32 values added one by one would be off by 2e-4.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, offset: Tensor | None, bit_width: int, signed: bool
    ) -> tuple[Tensor, Tensor]:
        outer, groups, inner = weight.shape
        low, high = quant_range(bit_width, signed)
        levels = high - low + 1
        # A block counts in the bins of its own rows: tables of all bins would be cleared and added up for each block.
        top, left = next(blocks(in_rows(weight, scale, offset)[0]))  # no block is larger
        table = min(top.stop, outer * groups) * levels
        # Sums that follow each other into the same bin wait for each other: neighbouring columns get tables of their
        # own. That and the shorter type of integer take a third off the time.
        lanes = max(1, min(8, _NUMBERED // table))
        dtype = torch.int16 if table <= _NUMBERED else torch.int32
        lane = torch.arange(min(left.stop, inner), device=weight.device).remainder_(lanes).mul_(table).to(dtype)
        sums = weight.new_zeros(3, lanes, outer * groups, levels, dtype=torch.float64)
        for (rows, _), residual, codes, _ in _residuals(weight, scale, offset, bit_width, signed):
            bins, exact = _bins(codes, low, levels, lanes * table, lane), residual.flatten().double()
            for total, values in zip(sums[:, :, rows], (None, exact, exact.square()), strict=True):
                found = torch.bincount(bins, values, minlength=lanes * table).view(lanes, -1, levels)
                total += found[:, : len(codes)]
        count, total, squares = sums.view(3, lanes * outer, groups, levels).sum(dim=1)
        count.clamp_(min=1)
        ctx.save_for_backward(weight, scale, offset, count, total / count)
        ctx.scheme = bit_width, signed
        variance = ((squares - total.square() / count) / count).clamp_(min=0).sum()
        return squares.sum().to(weight.dtype), variance.to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """2 (w - w_q) of the distance, 2 (w - mean) / |bin| of the variance, inside the clip.

        The bin's mean is no constant, but what flows through it cancels: the deviations of a bin sum to 0.
        """
        weight, scale, offset, count, mean = ctx.saved_tensors
        to_distance, to_variance = gradients
        factor = (2 * to_distance + 2 * to_variance / count).to(weight.dtype).repeat(len(weight), 1)
        shift = (-2 * to_variance / count * mean).to(weight.dtype).repeat(len(weight), 1)
        low, levels = quant_range(*ctx.scheme)[0], count.shape[1]
        to_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        result = to_weight.view(-1, weight.shape[2])
        for block, residual, codes, v in _residuals(weight, scale, offset, *ctx.scheme):
            bins = _bins(codes, low, levels, len(codes) * levels)
            # index_select: ten times as fast as factor[bins].
            factors, shifts = (x[block[0]].flatten().index_select(0, bins).view_as(codes) for x in (factor, shift))
            torch.addcmul(_inside_(v, *ctx.scheme).mul_(shifts), residual, factors, out=result[block])
        return to_weight, None, None, None, None


def _residuals(
    weight: Tensor, scale: Tensor, offset: Tensor | None, bit_width: int, signed: bool
) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor, Tensor]]:
    """Each block of `in_rows`, with clip(w) - w_q, the integer codes, and the weights in steps.

    A weight at or beyond the clip lies on the grid point at its end: the residual is 0 there.
    """
    rows, scales, offsets = in_rows(weight, scale, offset)
    for block in blocks(rows):
        s = scales[block[0]]
        v = in_steps(rows[block], s, None if offsets is None else offsets[block[0]])
        clipped = v.clamp(*quant_range(bit_width, signed))
        codes = to_codes_(clipped.clone(), bit_width, signed) if signed and bit_width == 1 else clipped.round()
        yield block, clipped.sub_(codes).mul_(s[:, None]), codes, v


def _inside_(v: Tensor, bit_width: int, signed: bool) -> Tensor:
    """1.0 where weights in steps lie inside the clip, 0.0 at and beyond it; in the place of `v`.

    By comparison, as in `quant.functional.fake_quantize`, and not by clamp's own gradient. Floats: masks of booleans
    take five times as long.
    """
    return torch.eq(v.clamp(*_outermost(bit_width, signed, v.dtype)), v, out=v)


@cache
def _outermost(bit_width: int, signed: bool, dtype: torch.dtype) -> tuple[float, float]:
    """The outermost numbers between the ends of the range of the codes."""
    ends = torch.tensor(quant_range(bit_width, signed), dtype=dtype)
    low, high = ends.nextafter(ends.flip(0)).tolist()
    return low, high


def _bins(codes: Tensor, low: int, levels: int, size: int, lane: Tensor | None = None) -> Tensor:
    """The numbers of the bins of a block's codes, flat, below `size`: `levels` bins a row, and what `lane` adds.

    By integer code: comparing w_q / s with n in floating point loses whole bins. NaN has no code: the loss shall be
    NaN, for the loop to stop on, not an error.
    """
    dtype = torch.int32 if lane is None else lane.dtype
    first = torch.arange(len(codes), dtype=dtype, device=codes.device).mul_(levels).sub_(low)
    bins = codes.to(dtype).add_(first[:, None])
    if lane is not None:
        bins.add_(lane[: codes.shape[1]])
    return bins.flatten().clamp_(0, size - 1)


class _Kurtosis(torch.autograd.Function):
    """Raw kurtosis of all values, dividing by their number; 0 where they are all the same."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        mean = weight.mean(dtype=torch.float64)
        variance, third, fourth = weight.new_zeros(3, dtype=torch.float64)
        for _, centred in _standardized(weight, mean, torch.ones_like(mean)):
            variance += centred.square_().sum(dtype=torch.float64) / weight.numel()
        std = torch.where(variance > 0, variance, 1.0).sqrt()
        for _, z in _standardized(weight, mean, std):
            squares = z.square()
            third += z.mul_(squares).sum(dtype=torch.float64) / weight.numel()
            fourth += squares.square_().sum(dtype=torch.float64) / weight.numel()
        ctx.save_for_backward(weight, mean, std, third, fourth)
        return fourth.to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """4 (z^3 - kurtosis z - mean of z^3) / (N std), z the standardized weight."""
        weight, mean, std, third, fourth = ctx.saved_tensors
        factor = (4 * gradients[0] / (weight.numel() * std)).to(weight.dtype)
        to_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        result = to_weight.view(1, -1)
        for block, z in _standardized(weight, mean, std):
            slope = z.square().sub_(fourth.to(weight.dtype))
            torch.mul(z.mul_(slope).sub_(third.to(weight.dtype)), factor, out=result[block])
        return to_weight


def _standardized(weight: Tensor, mean: Tensor, std: Tensor) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Each block of the flat weight, with (w - mean) / std."""
    flat, mean, std = weight.reshape(1, -1), mean.to(weight.dtype), std.to(weight.dtype)
    for block in blocks(flat):
        yield block, (flat[block] - mean).div_(std)
