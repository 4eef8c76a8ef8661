"""What makes a module's products and softmaxes attention: the records that a trace keeps, and what it asks of them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from quant.attention import AttentionForm

NO_SCORES = "its softmax is not of a product of query and key"


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
class Product:
    """A matrix product of two activations, which may be attention's scores on their way to a softmax."""

    frame: CallFrame
    place: int
    left: Tensor
    right: Tensor


@dataclass(eq=False)
class SoftmaxResult:
    """A softmax's result on its way to a matrix product, and the products that it was taken of."""

    frame: CallFrame
    place: int
    result: Tensor
    over_last_axis: bool
    scores: list[Product]


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
    """Rows of query, key, value where `output` (batch, tokens, 3 heads d) holds `value` as its last third, by head.

    Query and key may have been normalised or rotated since, so they are only checked not to have changed places.
    """
    if value.ndim != 4:
        return None
    batch, heads, tokens, d = value.shape
    width = heads * d
    if output.shape[-1] != 3 * width or output.numel() != batch * tokens * 3 * width:
        return None
    thirds = output.reshape(batch, tokens, 3, heads, d).permute(2, 0, 3, 1, 4)
    if not torch.equal(thirds[2], value) or torch.equal(thirds[0], key) or torch.equal(thirds[1], query):
        return None
    return {"query": (0, width), "key": (width, 2 * width), "value": (2 * width, 3 * width)}
