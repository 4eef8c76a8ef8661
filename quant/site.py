"""A site: one tensor of a network that can be observed or quantized."""

from typing import NamedTuple

WEIGHT_TENSORS = ("weight", "weight.query", "weight.key", "weight.value")
ATTENTION_TENSORS = ("query", "key", "value", "attention")
ACTIVATION_TENSORS = ("input", *ATTENTION_TENSORS)
ALLOWED_BIT_WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 16)


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

    def __str__(self) -> str:
        return f"{self.module}:{self.tensor}"

    @classmethod
    def parse(cls, text: str) -> "Site":
        """The site of `str(site)`; module names hold no colon."""
        module, _, tensor = text.rpartition(":")
        return cls(module, tensor)
