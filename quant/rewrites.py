"""What torch computes in one function, as functions that can be observed: its own attention, and products by einsum."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.multihead import multi_head_attention


def rewritten(func: Any, args: tuple[Any, ...], kwargs: Any) -> Callable[[], Any] | None:
    """What computes the same as `func(*args, **kwargs)` by functions that a mode knows; None where nothing need be."""
    if func is F.multi_head_attention_forward:
        return partial(multi_head_attention, *args, **kwargs)
    return product_of_einsum(*args) if func is torch.einsum else None


def product_of_einsum(equation: Any, *operands: Any) -> Callable[[], Tensor] | None:
    """An einsum of two activations as one batched matrix product; None where it is another form.

    Both begin with the same axis, that of the batch; axes that only one of them has are in the result, and the last
    axis of the result is the last of the right operand, whichever was written first: of query and key it is the keys'.

    >>> x, y = torch.rand(2, 5, 3, 4), torch.rand(2, 6, 3, 4)
    >>> torch.allclose(product_of_einsum("bqhd,bkhd->bhqk", x, y)(), torch.einsum("bqhd,bkhd->bhqk", x, y))
    True
    """
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if len(operands) != 2 or not isinstance(equation, str) or not all(_is_activation(x) for x in operands):
        return None
    axes = _axes(equation.replace(" ", ""), operands[0].ndim, operands[1].ndim)
    if axes is None:
        return None
    left, right, result = axes
    first, second = operands
    if result[-1] not in right:
        left, right, first, second = right, left, second, first
    shared = [a for a in left if a in right and a in result]
    summed = [a for a in left if a in right and a not in result]
    rows, columns = [a for a in left if a not in right], [a for a in right if a not in left]
    if not summed or left[0] != right[0] or left[0] not in shared or not set(rows + columns) <= set(result):
        return None

    def product() -> Tensor:
        x = first.permute([left.index(a) for a in (*shared, *rows, *summed)])
        y = second.permute([right.index(a) for a in (*shared, *summed, *columns)])
        n = len(shared)
        x, y = x.flatten(n + len(rows)), y.flatten(n, n + len(summed) - 1)
        x = x.flatten(n, -2) if rows else x.unsqueeze(n)
        y = y.flatten(n + 1) if columns else y.unsqueeze(-1)
        z = torch.matmul(x, y)
        sizes = dict(zip(left, first.shape, strict=True)) | dict(zip(right, second.shape, strict=True))
        z = z.reshape(*z.shape[:n], *(sizes[a] for a in (*rows, *columns)))
        order = [*shared, *rows, *columns]
        return z.permute([order.index(a) for a in result])

    return product


def _is_activation(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim >= 2 and not isinstance(x, nn.Parameter)


def _axes(equation: str, left: int, right: int) -> tuple[list[str], list[str], list[str]] | None:
    """The letters of both operands and of the result, "..." as digits; None where an axis is written twice or not."""
    inputs, arrow, result = equation.partition("->")
    parts = inputs.split(",")
    if not arrow or len(parts) != 2 or not result:
        return None
    count = left - len(parts[0].replace("...", "")) if "..." in parts[0] else 0
    digits = "".join(map(str, range(count)))
    found = [list(part.replace("...", digits)) for part in (*parts, result)]
    if ("..." in parts[0]) != ("..." in parts[1]) or [len(found[0]), len(found[1])] != [left, right]:
        return None
    return None if any(len(set(part)) < len(part) for part in found) else (found[0], found[1], found[2])
