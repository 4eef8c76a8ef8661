"""What makes a module's products and softmaxes attention: the records that a trace keeps, and what it asks of them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from quant.attention import AttentionForm
from quant.products import Product

NO_SCORES = "its softmax is not of a product of query and key"
KNOWN_LAYOUTS = "three equal parts, query, key and value, each head after head (ViT, Swin, BEiT, EVA, SwinV2)"
"""The layouts of a fused qkv weight's rows that `equal_parts_by_head` finds."""


@dataclass(eq=False)
class CallFrame:
    """A module whose forward is running: what it counted so far, and which places are attention's."""

    name: str
    owns_parameters: bool
    products: int = 0
    softmaxes: int = 0
    fused: bool = False
    places: dict[str, set[int]] = field(default_factory=dict)  # field of AttentionForm -> places
    linears: dict[str, Tensor] = field(default_factory=dict)

    def is_new(self, role: str, place: int) -> bool:
        """Note a place; whether it was not known yet."""
        known = self.places.setdefault(role, set())
        new = place not in known
        known.add(place)
        return new

    def form(self) -> AttentionForm:
        """What this call of the module computed."""
        places = {role: frozenset(numbers) for role, numbers in self.places.items()}
        return AttentionForm(module=self.name, fused=self.fused, **places)


@dataclass(eq=False)
class MatrixProduct:
    """A matrix product of two activations, which may be attention's scores on their way to a softmax."""

    frame: CallFrame
    place: int
    left: Tensor
    right: Tensor
    product: Product


@dataclass(eq=False)
class SoftmaxResult:
    """A softmax's result on its way to a matrix product, and the products that it was taken of."""

    frame: CallFrame
    place: int
    result: Tensor
    over_last_axis: bool
    scores: list[MatrixProduct]


def why_not_attention(softmax: SoftmaxResult, weights: Tensor, running: list[CallFrame]) -> str:
    """Why a softmax's result that is multiplied by an activation is not attention that we know; else empty.

    `weights` is what has become of the result, its last axis the one that is summed over; `running` are the modules.
    """
    if not softmax.scores:
        return NO_SCORES
    if len(softmax.scores) > 1:
        return "its scores are a sum of several matrix products"
    if softmax.frame not in running:
        return "its two matrix products are in different modules"
    result = softmax.result
    same_memory = result.untyped_storage().data_ptr() == weights.untyped_storage().data_ptr()
    turned = same_memory and min(result.shape[-2:]) > 1 and weights.stride(-1) != result.stride(-1)
    return "its softmax is not over the keys" if turned or not softmax.over_last_axis else ""


def equal_parts_by_head(output: Tensor, query: Tensor, key: Tensor, value: Tensor) -> dict[str, tuple[int, int]] | None:
    """Rows of query, key, value where the last third of `output` (..., 3 heads d) is `value`, head by head.

    `value` is (batch, heads, tokens, d), or has windows beside the heads, or d before the tokens: only its values are
    compared, in any order. Query and key may have been normalised, rotated or pooled since, so they are only checked
    not to have changed places.
    """
    width = output.shape[-1] // 3
    if output.shape[-1] != 3 * width or output.numel() != 3 * value.numel():
        return None
    thirds = output.split(width, dim=-1)
    if not torch.equal(_sorted(thirds[2]), _sorted(value)):
        return None
    if torch.equal(_sorted(thirds[0]), _sorted(key)) or torch.equal(_sorted(thirds[1]), _sorted(query)):
        return None
    if not any(_is_by_head(thirds[2], value, axis) for axis in range(1, value.ndim - 2)):
        return None
    return {"query": (0, width), "key": (width, 2 * width), "value": (2 * width, 3 * width)}


def _is_by_head(columns: Tensor, value: Tensor, axis: int) -> bool:
    """Whether equal consecutive parts of the last axis of `columns` are the slices of `value` along `axis`."""
    heads = value.shape[axis]
    if columns.shape[-1] % heads:
        return False
    parts = columns.split(columns.shape[-1] // heads, dim=-1)
    return all(torch.equal(_sorted(x), _sorted(y)) for x, y in zip(parts, value.unbind(axis), strict=True))


def _sorted(x: Tensor) -> Tensor:
    return x.flatten().sort().values
