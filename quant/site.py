"""A site: one tensor of a network that can be observed or quantized."""

from dataclasses import dataclass
from typing import NamedTuple

WEIGHT_TENSORS = ("weight", "weight.query", "weight.key", "weight.value")
ATTENTION_TENSORS = ("query", "key", "value", "attention")
PRODUCT = "product"
"""In tables of costs: all products of a module that are of no site."""


class Site(NamedTuple):
    """A tensor, named by the module that it belongs to and its role there.

    `module` is the dotted name of `named_modules()`. `tensor` is `weight` (or `weight.query`, `weight.key`,
    `weight.value` of a fused qkv layer), `input`, or on an attention module `query`, `key`, `value` (the operands
    of the two matrix products) and `attention` (the result of the softmax). `output` can be observed only.
    """

    module: str
    tensor: str

    @property
    def is_weight(self) -> bool:
        """Whether the tensor is a weight, or a part of a fused one."""
        return self.tensor.startswith("weight")

    @property
    def is_attention(self) -> bool:
        """Whether the tensor lies inside an attention module, where no module of its own holds it."""
        return self.tensor in ATTENTION_TENSORS

    def __str__(self) -> str:
        return f"{self.module}:{self.tensor}"

    @classmethod
    def parse(cls, text: str) -> "Site":
        """The site of `str(site)`; module names hold no colon."""
        module, _, tensor = text.rpartition(":")
        return cls(module, tensor)


@dataclass(frozen=True, kw_only=True)
class SiteInfo:
    """What is known of a site of one network after one forward pass.

    `shape` is a weight's own shape (of its rows, for a part of a fused one), an activation's shape of ONE image with
    the batch axis left out where the model splits it (windows): then its leading axis is windows per image times 1.
    `channel_axis` and `head_axis` count in the tensor as it flows (the batch axis included); -1 where there is none.
    `parameter` is the name of a weight in its module, `in_proj_weight` in `nn.MultiheadAttention`; `shared_with` are
    the other modules that have the very same weight and are quantized with it. `macs` are multiply-accumulates of one
    image in the matrix product that this site owns: weights own theirs, `query` owns query x key, `attention` owns
    attention x value; 0 for the others. `numel` and `macs` are over all calls of a module in one forward pass. `same`
    is an earlier input, or the weight of an earlier layer, that is the very same tensor. A site that is `excluded` by
    the user, or not `quantizable`, still costs.
    """

    site: Site
    kind: str
    order: int
    shape: tuple[int, ...]
    numel: int
    channel_axis: int = -1
    channels: int = 0
    head_axis: int = -1
    heads: int = 0
    rows: tuple[int, int] | None = None
    parameter: str = "weight"
    shared_with: tuple[str, ...] = ()
    macs: int = 0
    edges: tuple[Site, ...] = ()
    same: Site | None = None
    quantizable: bool = True
    excluded: bool = False
    pinned: bool = False
    note: str = ""
