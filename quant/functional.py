"""Uniform quantization: the integer range, the codes, and the value that they stand for.

Every function takes `x` in the canonical form (outer, groups, inner) of `to_groups`, and one scale a group.
"""

from typing import Any

import torch
from torch import Tensor


def quant_range(bit_width: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest integer code: signed 4-bit is (-8, 7), unsigned (0, 15), signed 1-bit (-1, 1).

    One signed bit is binary: its two codes are -1 and 1, there is no 0 (Rastegari et al., ECCV 2016,
    arXiv:1603.05279).
    """
    if not signed:
        return 0, 2**bit_width - 1
    if bit_width == 1:
        return -1, 1
    return -(2 ** (bit_width - 1)), 2 ** (bit_width - 1) - 1


def to_groups(x: Tensor, axis: int, groups: int) -> Tensor:
    """`x` as (outer, groups, inner), where axis `axis` is split into `groups` equal consecutive parts.

    A weight (O, I, h, w) by output channel is `axis=0, groups=O`; activations (B, H, N, d) by head are
    `axis=1, groups=H`; the input columns of an attention projection (C, H d) by head are `axis=1, groups=H`; the
    whole tensor is `axis=0, groups=1`. A view where strides allow it.
    """
    if groups == 1:
        return x.reshape(1, 1, -1)
    axis = axis % x.ndim
    if x.shape[axis] % groups:
        raise ValueError(f"Axis {axis} of shape {tuple(x.shape)} cannot be split into {groups} equal groups.")
    outer = 1
    for size in x.shape[:axis]:
        outer *= size
    return x.reshape(outer, groups, -1)


def quantize(x: Tensor, scale: Tensor, offset: Tensor | None, bit_width: int, signed: bool) -> Tensor:
    """Integer codes round(clip((x - offset) / scale, Q_N, Q_P)), in the float type of `x`.

    `x`: (outer, groups, inner); `scale`, `offset`: (groups,). Rounds half to even, as torch does.
    Esser et al., ICLR 2020, arXiv:1902.08153; the offset: Bhalgat et al., CVPRW 2020, arXiv:2004.09576.
    """
    centred = x if offset is None else x - offset[:, None]
    if signed and bit_width == 1:
        return torch.where(centred >= 0, 1.0, -1.0).to(x.dtype)
    return (centred / scale[:, None]).clamp(*quant_range(bit_width, signed)).round()


def dequantize(codes: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """The values that integer codes stand for: scale * codes + offset, shapes as in `quantize`."""
    values = codes * scale[:, None]
    return values if offset is None else values + offset[:, None]


def fake_quantize(x: Tensor, scale: Tensor, offset: Tensor | None, bit_width: int, signed: bool) -> Tensor:
    """Quantize, then dequantize; shapes as in `quantize`. Differentiable in `x`, `scale` and `offset`.

    With v = (x - offset) / scale, and inside meaning Q_N < v < Q_P strictly, before rounding:

        d x_q / d x      = 1 inside, 0 outside
        d x_q / d scale  = round(v) - v inside, Q_N at and below Q_N, Q_P at and above Q_P
        d x_q / d offset = 0 inside, 1 outside

    Esser et al., ICLR 2020, arXiv:1902.08153 (LSQ); the offset: Bhalgat et al., CVPRW 2020, arXiv:2004.09576 (LSQ+).
    One signed bit is scale * sign(x): the gradient of x passes where |x| <= scale (Hubara et al., NeurIPS 2016,
    arXiv:1602.02830), that of scale is sign(x).
    """
    return _FakeQuantize.apply(x, scale, offset, bit_width, signed)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x` itself, bit for bit, whose gradient is multiplied by `factor`."""
    return _ScaleGradient.apply(x, factor)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0] * ctx.factor, None


class _FakeQuantize(torch.autograd.Function):
    """The value and gradients of `fake_quantize`; the codes are computed again in backward rather than kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, offset: Tensor | None, bit_width: int, signed: bool) -> Tensor:
        ctx.save_for_backward(x, scale, offset)
        ctx.bit_width, ctx.signed = bit_width, signed
        return dequantize(quantize(x, scale, offset, bit_width, signed), scale, offset)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, scale, offset = ctx.saved_tensors
        v = (x if offset is None else x - offset[:, None]) / scale[:, None]
        codes = quantize(x, scale, offset, ctx.bit_width, ctx.signed)
        low, high = quant_range(ctx.bit_width, ctx.signed)
        inside = (v > low) & (v < high)  # by comparison: clamp's own gradient at the bounds depends on torch's version
        by_scale = torch.where(inside, codes - v, codes)
        if ctx.signed and ctx.bit_width == 1:
            inside, by_scale = v.abs() <= 1, codes
        to_x = gradient * inside if ctx.needs_input_grad[0] else None
        to_scale = (gradient * by_scale).sum(dim=(0, 2)) if ctx.needs_input_grad[1] else None
        to_offset = (gradient * ~inside).sum(dim=(0, 2)) if offset is not None and ctx.needs_input_grad[2] else None
        return to_x, to_scale, to_offset, None, None
