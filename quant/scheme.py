"""The scheme of one quantized tensor, and the default scheme of each site."""

from dataclasses import dataclass

from torch import nn

from quant.choices import ALLOWED_BIT_WIDTHS, GRANULARITIES, Granularity
from quant.errors import InputError
from quant.functional import quant_range
from quant.site import SiteInfo

OFFSET_LIMIT = -0.1
"""A minimum above this share of the maximum is a tail (GELU, Swish): unsigned with an offset, not signed."""


@dataclass(frozen=True, kw_only=True)
class QuantScheme:
    """How ONE tensor is quantized: bits, sign, offset, and which elements share a scale."""

    bit_width: int
    signed: bool
    offset: bool = False
    granularity: Granularity = "per_tensor"

    def __post_init__(self) -> None:
        if self.bit_width not in ALLOWED_BIT_WIDTHS:
            raise InputError(f"bit-width {self.bit_width} is not offered; choose from {ALLOWED_BIT_WIDTHS}.")
        if self.granularity not in GRANULARITIES:
            raise InputError(f"granularity {self.granularity!r} is unknown; choose from {GRANULARITIES}.")

    @property
    def quant_min(self) -> int:
        """Smallest integer code (Q_N)."""
        return quant_range(self.bit_width, self.signed)[0]

    @property
    def quant_max(self) -> int:
        """Largest integer code (Q_P)."""
        return quant_range(self.bit_width, self.signed)[1]


def default_granularity(info: SiteInfo, module: nn.Module) -> Granularity:
    """Which elements share a scale where nobody says otherwise.

    Convolution weights: a scale per output channel, one for all where groups mix them. Linear weights and inputs: one
    scale. Weights of a fused qkv and of the attention projection, query, key, value and attention: a scale per head
    (Huang et al., TMLR 2024, arXiv:2307.00331).
    """
    if info.heads and (info.site.is_weight or info.site.is_attention):
        return "per_head"
    if info.site.is_weight and info.channels and isinstance(module, nn.modules.conv._ConvNd):
        return "per_channel"
    return "per_tensor"


def default_range(info: SiteInfo, minimum: float, maximum: float) -> tuple[bool, bool]:
    """(signed, offset) of a site whose calibration values lie in [minimum, maximum].

    Only inputs look at their values: no negative value is unsigned, a short negative tail is unsigned with an offset.
    """
    if info.site.tensor == "attention":
        return False, False
    if info.site.tensor != "input":
        return True, False
    if minimum >= 0:
        return False, False
    return (False, True) if minimum > OFFSET_LIMIT * maximum else (True, False)


def axis_and_groups(info: SiteInfo, granularity: str) -> tuple[int, int]:
    """The arguments of `to_groups` for a site at a granularity; refuses heads where there are none."""
    if granularity == "per_tensor":
        return 0, 1
    axis, groups = (info.head_axis, info.heads) if granularity == "per_head" else (info.channel_axis, info.channels)
    if not groups:
        raise InputError(
            f"{info.site} has no {granularity.removeprefix('per_')} axis that is known; use per_tensor there."
        )
    return axis, groups
