"""Uniform quantization: the integer range, the codes, and the value that they stand for.

Every function takes `x` in the canonical form (outer, groups, inner) of `to_groups`, and one scale a group.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quant.compiled import compiled_once
from quant.errors import InputError

_AT_ONCE = 2**17
"""Elements of one block: what a CPU's second cache holds, with the temporaries, is computed several times as fast."""


def quant_range(bit_width: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest integer code: signed 4-bit is (-8, 7), unsigned (0, 15), signed 1-bit (-1, 1).

    One signed bit is binary: its two codes are -1 and 1, there is no 0 (Rastegari et al., ECCV 2016,
    arXiv:1603.05279).

    >>> quant_range(4, signed=True)
    (-8, 7)
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
    if not is_traced() and x.shape[axis] % groups:  # a tracer would take the answer for a constant
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
    return to_codes_(in_steps(x, scale, offset), bit_width, signed)


def in_steps(x: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """(x - offset) / scale, before it is clipped and rounded; a new tensor, shapes as in `quantize`."""
    return (x if offset is None else x - offset[:, None]) / scale[:, None]


def in_single(*tensors: Tensor | None) -> Iterator[Any]:
    """Half-precision tensors in float32, others as they are: codes are computed in float32 at least."""
    for x in tensors:
        yield x if x is None else x.to(torch.promote_types(x.dtype, torch.float32))


def to_codes_(v: Tensor, bit_width: int, signed: bool) -> Tensor:
    """The integer codes of what `in_steps` gives, in its place."""
    if signed and bit_width == 1:
        return _signs_(v)
    return v.clamp_(*quant_range(bit_width, signed)).round_()


def dequantize(codes: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """The values that integer codes stand for: scale * codes + offset, shapes as in `quantize`."""
    values = codes * scale[:, None]
    return values if offset is None else values + offset[:, None]


def fake_quantize(
    x: Tensor, scale: Tensor, offset: Tensor | None, bit_width: int, signed: bool, *, compiled: bool = False
) -> Tensor:
    """Quantize, then dequantize; shapes as in `quantize`. Differentiable in `x`, `scale` and `offset`, once.

    With v = (x - offset) / scale, and inside meaning Q_N < v < Q_P strictly, before rounding:

        d x_q / d x      = 1 inside, 0 outside
        d x_q / d scale  = round(v) - v inside, Q_N at and below Q_N, Q_P at and above Q_P
        d x_q / d offset = 0 inside, 1 outside

    Esser et al., ICLR 2020, arXiv:1902.08153 (LSQ); the offset: Bhalgat et al., CVPRW 2020, arXiv:2004.09576 (LSQ+).
    One signed bit is scale * sign(x): the gradient of x passes where |x| <= scale (Hubara et al., NeurIPS 2016,
    arXiv:1602.02830), that of scale is sign(x).

    `compiled` runs the same formulas through torch.compile (`check_compiler` says whether that works). On a CPU the
    value and the gradient of `x` are the same to the bit; those of scale and offset are summed in float64 in another
    order, which now and then changes the last bit of their float32. Where the caller itself is compiled, traced or
    exported, the formulas are written in torch's own operations: the same value to the bit, gradients of scale and
    offset summed in float32.
    """
    if is_traced():
        return _in_plain_operations(x, scale, offset, bit_width, signed)
    return _FakeQuantize.apply(x, scale, offset, bit_width, signed, compiled)


def check_compiler(device: torch.device) -> None:
    """Compile `fake_quantize` for the device, which takes up to a minute; InputError where that does not work."""
    try:
        for groups in (1, 2):  # per tensor and with several scales: other forms to torch.compile
            x = torch.zeros(1, groups, 64, device=device, requires_grad=True)
            scale = torch.ones(groups, device=device, requires_grad=True)
            fake_quantize(x, scale, None, 4, True, compiled=True).sum().backward()
    except Exception as error:  # whatever a compiler that is missing, or too old, raises
        raise InputError(
            f"torch.compile does not work here: {str(error).strip().partition(chr(10))[0]}. "
            "Install a C++ compiler, or train without `compiled`: slower, and otherwise the same."
        ) from error


def scale_gradient(x: Tensor, factor: float | Tensor) -> Tensor:
    """`x` itself, bit for bit, whose gradient is multiplied by `factor`, a constant."""
    if is_traced():
        return x if _is_exported() else _with_gradient_of(x, x * factor)
    return _ScaleGradient.apply(x, factor)


def is_traced() -> bool:
    """Whether operations are being recorded: by torch.compile, torch.export, torch.jit.trace or an ONNX export."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]  # public, and missing in the list of exports
    return torch.compiler.is_compiling() or tracing or torch.onnx.is_in_onnx_export()


def _is_exported() -> bool:
    """Whether a network is written down to be run elsewhere: it learns no more."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


def _in_plain_operations(x: Tensor, scale: Tensor, offset: Tensor | None, bit_width: int, signed: bool) -> Tensor:
    """`fake_quantize` in operations that a tracer can record: it sees nothing inside an autograd function."""
    low, high = quant_range(bit_width, signed)
    shifted = x if offset is None else x - offset[:, None]
    v = shifted.detach() / scale.detach()[:, None]
    binary = signed and bit_width == 1
    codes = torch.where(shifted.detach() >= 0, 1.0, -1.0).to(x.dtype) if binary else v.clamp(low, high).round()
    values = dequantize(codes, scale.detach(), None if offset is None else offset.detach())
    if not torch.is_grad_enabled() or _is_exported():
        return values
    inside = v.abs() <= high if binary else (v > low) & (v < high)
    nothing = torch.zeros_like(v)
    by_scale = codes if binary else codes - torch.where(inside, v, nothing)
    differentiable = torch.where(inside, shifted, nothing) + scale[:, None] * by_scale
    return _with_gradient_of(values, differentiable if offset is None else differentiable + offset[:, None])


def _with_gradient_of(values: Tensor, differentiable: Tensor) -> Tensor:
    """`values`, bit for bit, with the gradient of another tensor."""
    return values.detach() + (differentiable - differentiable.detach())


def blocks(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each block in which (rows, columns) is best computed; on a GPU the whole is one block."""
    rows, columns = x.shape
    at_once = _AT_ONCE * torch.get_num_threads() if x.device.type == "cpu" else x.numel()
    tall = max(1, at_once // columns)
    for top in range(0, rows, tall):
        for left in range(0, columns, at_once):
            yield slice(top, top + tall), slice(left, left + at_once)


def in_rows(x: Tensor, scale: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """`x` as (outer * groups, inner), with scale and offset of each row: a form that `quantize` takes as well."""
    outer, _, inner = x.shape
    if outer == 1:
        return x[0], scale, offset
    return x.reshape(-1, inner), scale.repeat(outer), None if offset is None else offset.repeat(outer)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float | Tensor) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0] * ctx.factor, None


class _FakeQuantize(torch.autograd.Function):
    """The value and gradients of `fake_quantize`; the codes are computed again in backward rather than kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, offset: Tensor | None, bit_width: int, signed: bool, compiled: bool
    ) -> Tensor:
        ctx.save_for_backward(x, scale, offset)
        ctx.binary, ctx.range, ctx.compiled = signed and bit_width == 1, quant_range(bit_width, signed), compiled
        rows, *grid = in_rows(x, scale, offset)
        (values,) = _computed(_binary_values if ctx.binary else _values, (rows,), grid, ctx.range, compiled)
        return values.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, offset = ctx.saved_tensors
        rows, *grid = in_rows(x, scale, offset)
        formula = _binary_gradients if ctx.binary else _gradients
        both = (gradients[0].reshape(rows.shape), rows)
        to_x, *of_rows = _computed(formula, both, grid, ctx.range, ctx.compiled)
        by_group = [total.view(-1, scale.numel()).sum(dim=0).to(scale.dtype) for total in of_rows]
        return to_x.view(x.shape), by_group[0], None if offset is None else by_group[1], None, None, None


def _values(x: Tensor, scale: Tensor, offset: Tensor | None, low: Any, high: Any) -> tuple[Tensor]:
    """x_q; rows as in `in_rows`, and the bounds as numbers or, compiled, as 0-d tensors."""
    v = in_steps(x, scale, offset)
    values = v.clamp_(low, high).round_().mul_(scale[:, None])
    return (values if offset is None else values.add_(offset[:, None]),)


def _gradients(
    gradient: Tensor, x: Tensor, scale: Tensor, offset: Tensor | None, low: Any, high: Any
) -> tuple[Tensor, ...]:
    """Of x, and summed over each row in float64: of scale and, where there is one, of offset."""
    v = in_steps(x, scale, offset)
    # Compared explicitly: clamp's own gradient at the bounds depends on torch's version. Masks of 0.0 and 1.0: those of
    # booleans take five times as long on a CPU.
    inside = v.clone().gt_(low).mul_(v.clone().lt_(high))
    clipped = v.clamp_(low, high)
    by_scale = clipped.round().sub_(clipped.mul_(inside))
    return _with_sums(gradient, inside, by_scale, offset)


def _binary_values(x: Tensor, scale: Tensor, offset: Tensor | None, low: Any, high: Any) -> tuple[Tensor]:
    """As `_values`, of one signed bit."""
    values = _signs_(x.clone() if offset is None else x - offset[:, None]).mul_(scale[:, None])
    return (values if offset is None else values.add_(offset[:, None]),)


def _binary_gradients(
    gradient: Tensor, x: Tensor, scale: Tensor, offset: Tensor | None, low: Any, high: Any
) -> tuple[Tensor, ...]:
    """As `_gradients`, of one signed bit."""
    v = in_steps(x, scale, offset)
    return _with_sums(gradient, v.abs().le_(high), _signs_(v), offset)


def _with_sums(gradient: Tensor, inside: Tensor, by_scale: Tensor, offset: Tensor | None) -> tuple[Tensor, ...]:
    to_x = inside.mul_(gradient)
    to_scale = by_scale.mul_(gradient).sum(dim=1, dtype=torch.float64)
    if offset is None:
        return to_x, to_scale
    return to_x, to_scale, (gradient - to_x).sum(dim=1, dtype=torch.float64)


def _signs_(v: Tensor) -> Tensor:
    """1 where `v` is at least 0, else -1, in its place."""
    return v.ge_(0).mul_(2).sub_(1)


def _computed(
    formula: Callable[..., tuple[Tensor, ...]],
    tensors: tuple[Tensor, ...],
    grid: Sequence[Tensor | None],
    bounds: tuple[int, int],
    compiled: bool,
) -> tuple[Tensor, ...]:
    """What `formula` gives of tensors (rows, columns): one of that shape, and sums (rows,). `grid`: scale, offset."""
    first = tensors[0]
    if compiled:
        # One form for all: contiguous, always an offset, bounds that are no constants of the graph, no autocast.
        inputs = (*tensors, *(first.new_zeros(len(first)) if t is None else t for t in grid))
        with torch.autocast(first.device.type, enabled=False):
            return compiled_once(formula)(
                *(t.detach().contiguous() for t in inputs), *(torch.tensor(float(bound)) for bound in bounds)
            )
    whole, sums = torch.empty_like(first, memory_format=torch.contiguous_format), list[Tensor]()
    for block in blocks(first):
        row_grid = (None if t is None else t[block[0]] for t in grid)
        whole[block], *of_rows = formula(*(t[block] for t in tensors), *row_grid, *bounds)
        sums = sums or [of_row.new_zeros(len(whole)) for of_row in of_rows]
        for total, of_row in zip(sums, of_rows, strict=True):
            total[block[0]] += of_row
    return whole, *sums
