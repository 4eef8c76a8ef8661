"""A calibrated quantizer: a scheme with its scale and offset."""

from dataclasses import dataclass

from torch import Tensor

from quant.functional import fake_quantize, to_groups
from quant.scheme import QuantScheme


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """Fake-quantizes a tensor with fixed scales.

    `scale` and `offset` have one float32 value a group; `axis` and `groups` are those of
    `quant.functional.to_groups`. `degenerate` counts groups whose scale was borrowed from the others.
    """

    scheme: QuantScheme
    scale: Tensor
    offset: Tensor | None
    axis: int
    groups: int
    degenerate: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        """`x` on the grid, in its own shape and type; the arithmetic is float32."""
        grouped = to_groups(x, self.axis, self.groups).float()
        scheme = self.scheme
        return fake_quantize(grouped, self.scale, self.offset, scheme.bit_width, scheme.signed).reshape(x.shape).to(x)
