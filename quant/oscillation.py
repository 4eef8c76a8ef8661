"""Oscillating weights: which integer codes go back and forth during training, and how near the edges weights lie."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quant.functional import in_single, in_steps, quant_range, to_groups
from quant.quantizer import LSQQuantizer
from quant.site import Site

POSITIONS = 20
"""Equal parts of the way from a bin's centre to the next, in which latent weights are counted; halfway is the edge."""
_UNSEEN = -128  # no code of at most 4 bits
_NEVER = -(2**30)  # a step before every window


@torch.no_grad()
def edge_counts(x: Tensor, scale: Tensor, offset: Tensor | None, bit_width: int, signed: bool) -> Tensor:
    """How many values lie in each of `POSITIONS` parts of the way between neighbouring bin centres: (POSITIONS,) int64.

    An edge is where the code changes, halfway between two centres; a weight that oscillates goes back and forth across
    one. Clipped values, at and beyond the outermost centres, are left out. `x`: (outer, groups, inner), `scale` and
    `offset`: (groups,), as in `quant.functional`.
    """
    v = in_steps(*in_single(x, scale, offset))
    low, high = quant_range(bit_width, signed)
    inside = v[(v > low) & (v < high)]
    step = 2 if signed and bit_width == 1 else 1  # between the codes -1 and 1
    way = (inside - low).div_(step).frac_()
    return torch.bincount((way * POSITIONS).long().clamp_(max=POSITIONS - 1), minlength=POSITIONS)


def edge_rows(weights: Mapping[Site, tuple[Tensor, LSQQuantizer]], step: int) -> list[dict[str, Any]]:
    """`POSITIONS` rows a site, of latent weights and their quantizers: step, module, tensor, position, weights.

    `position` is the middle of a part, in steps of the quantizer from the nearest edge: -0.5 and 0.5 are bin centres.
    """
    rows = []
    for site, (weight, q) in weights.items():
        grouped = to_groups(weight.detach(), q.axis, q.groups)
        counts = edge_counts(grouped, q.scale, q.offset, q.scheme.bit_width, q.scheme.signed).tolist()
        for part, count in enumerate(counts):
            position = round((part + 0.5) / POSITIONS - 0.5, 6)
            rows.append(
                {"step": step, "module": site.module, "tensor": site.tensor, "position": position, "weights": count}
            )
    return rows


class OscillationTracker(nn.Module):
    """Counts the weights that oscillate, from the integer codes after each optimizer step; it observes only.

    A reversal is a change of a weight's code in the direction opposite to its last change. With o_t = 1 at a reversal
    and 0 elsewhere, two figures are kept: the share of weights with at least two reversals in the last `window` steps,
    and the share with f_t = m o_t + (1 - m) f_(t-1) above `threshold`, m being `momentum` (Nagel et al., ICML 2022,
    arXiv:2203.11086). With m = 0.01 one reversal lifts f above 0.005 for 69 steps: shares of different m cannot be
    compared.

    `sizes` says how many weights each site has, in the order of the rows. The sites have at most 4 bits: coarser grids
    are what oscillates, and int8 holds their codes. The state is in buffers, 14 bytes a weight, the sites one after the
    other: a state_dict loaded into a tracker of the same sizes continues exactly.
    """

    codes: Tensor
    direction: Tensor
    last_reversal: Tensor
    previous_reversal: Tensor
    frequency: Tensor

    def __init__(
        self, sizes: Mapping[Site, int], *, window: int = 200, momentum: float = 0.01, threshold: float = 0.005
    ):
        super().__init__()
        self.sizes = dict(sizes)
        self.window, self.momentum, self.threshold = window, momentum, threshold
        total = sum(self.sizes.values())
        self.register_buffer("codes", torch.full((total,), _UNSEEN, dtype=torch.int8))
        self.register_buffer("direction", torch.zeros(total, dtype=torch.int8))  # of the last change; 0: none yet
        # The steps of the last two reversals tell whether two lie in the window, without a window of bits.
        self.register_buffer("last_reversal", torch.full((total,), _NEVER, dtype=torch.int32))
        self.register_buffer("previous_reversal", torch.full((total,), _NEVER, dtype=torch.int32))
        self.register_buffer("frequency", torch.zeros(total))  # f at the last reversal, whence it only decays

    @torch.no_grad()
    def update(self, codes: Mapping[Site, Tensor], step: int) -> None:
        """Take in the codes of every site after optimizer step `step`, each flat: (weights,), of any real dtype.

        Steps rise; one that is left out counts as a step without reversals. Raises ValueError where sites or sizes are
        not those of the tracker.
        """
        new = self._joined(codes)
        # Few codes change in a step: all but the comparison is done for those alone.
        changed = (new != self.codes).nonzero().squeeze(1)
        old, new = self.codes[changed], new[changed]
        move = torch.where(new > old, 1, -1).to(torch.int8)
        move.masked_fill_(old == _UNSEEN, 0)  # the first codes are no change
        reversed_ = changed[move * self.direction[changed] < 0]
        self.codes[changed], self.direction[changed] = new, move

        last = self.last_reversal[reversed_]
        decayed = self.frequency[reversed_] * self._decay(step, last)
        self.frequency[reversed_] = (self.momentum + decayed).to(self.frequency.dtype)
        self.previous_reversal[reversed_] = last
        self.last_reversal[reversed_] = step

    def rows(self, step: int) -> list[dict[str, Any]]:
        """One row a site: step, module, tensor, weights, and the shares `oscillating` and `oscillating_ema` at `step`.

        `step` is that of the last update, or later.
        """
        oscillating = self.previous_reversal > step - self.window
        oscillating_ema = self.frequency * self._decay(step, self.last_reversal) > self.threshold
        rows, end = [], 0
        for site, size in self.sizes.items():
            start, end = end, end + size
            rows.append(
                {
                    "step": step,
                    "module": site.module,
                    "tensor": site.tensor,
                    "weights": size,
                    "oscillating": oscillating[start:end].sum().item() / size,
                    "oscillating_ema": oscillating_ema[start:end].sum().item() / size,
                }
            )
        return rows

    def _joined(self, codes: Mapping[Site, Tensor]) -> Tensor:
        """The codes of all sites one after the other, as int8."""
        if codes.keys() != self.sizes.keys():
            differing = ", ".join(sorted(map(str, codes.keys() ^ self.sizes.keys())))
            raise ValueError(f"`codes` must have the sites of the tracker; in one of the two only: {differing}.")
        joined, end = torch.empty_like(self.codes), 0
        for site, size in self.sizes.items():
            if codes[site].shape != (size,):
                raise ValueError(f"`codes` of {site} must have shape ({size},), got {tuple(codes[site].shape)}.")
            start, end = end, end + size
            joined[start:end].copy_(codes[site])
        return joined

    def _decay(self, step: int, since: Tensor) -> Tensor:
        """(1 - m)^(step - since), in float64: what remains of f after steps without a reversal."""
        return (1 - self.momentum) ** (step - since).double()
