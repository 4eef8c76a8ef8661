"""Uniform quantization: the integer range, the codes, and the value that they stand for.

Every function takes `x` in the canonical form (outer, groups, inner) of `to_groups`, and one scale a group.
"""

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
    """Quantize, then dequantize; shapes as in `quantize`."""
    return dequantize(quantize(x, scale, offset, bit_width, signed), scale, offset)
