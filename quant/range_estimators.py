"""The first scale (and offset) of a quantizer, from data: min-max, percentile, least squares."""

from typing import NamedTuple

import torch
from torch import Tensor

from quant.choices import Estimator
from quant.functional import fake_quantize, quantize
from quant.scheme import QuantScheme

DEGENERATE = 1e-6
"""A group whose abs-max is below this share of the tensor's holds no signal that a scale could be fitted to."""
TAIL = 0.0005
"""Share of the values that `percentile` leaves out at each end."""
_COARSE = tuple(0.82**i for i in range(1, 25))
_FINE = tuple(0.82 ** (i / 6) for i in range(-5, 6) if i)
_OFFSETS = (1.0, 0.5, 0.2, 0.0)  # shares of the minimum: the best offset of GELU's tail is often far inside it
_ITERATIONS = 25
_TOLERANCE = 1e-5
_AT_ONCE = 2**18  # values that are searched together: what a CPU's cache holds is searched six times as fast


class Estimate(NamedTuple):
    """Scales and offsets, (groups,) float32 each, and how many groups were degenerate."""

    scale: Tensor
    offset: Tensor | None
    degenerate: int


def estimate_range(x: Tensor, scheme: QuantScheme, estimator: Estimator, weights: Tensor | None = None) -> Estimate:
    """The scale and offset of each group of `x`: (groups, values).

    `minmax` covers every value, `percentile` all but 0.05 % at each end (below 2,000 values a group: all), `mse`
    minimises the squared error. One signed bit is binary and has a closed form, mean |x| (Rastegari et al., ECCV 2016,
    arXiv:1603.05279), whatever the estimator; an offset is the mean, and the scale that of what is left. `weights`:
    (values,), how many values each one stands for. A degenerate group takes the median scale of the sound ones
    (all-zero tensors: 1).
    """
    x = x.float()
    w = torch.ones(x.shape[1], device=x.device) if weights is None else weights.to(x)
    if scheme.bit_width == 1 and scheme.signed:
        offset = (x * w).sum(dim=1) / w.sum() if scheme.offset else None
        centred = x if offset is None else x - offset[:, None]
        scale = (centred.abs() * w).sum(dim=1) / w.sum()
    elif estimator == "mse":
        fits = [_least_squares(part, w, scheme) for part in x.split(max(1, _AT_ONCE // x.shape[1]))]
        scale = torch.cat([scale for scale, _ in fits])
        offsets = [offset for _, offset in fits if offset is not None]
        offset = torch.cat(offsets) if offsets else None
    else:
        low, high = _bounds(x, w, 0.0 if estimator == "minmax" else TAIL)
        scale, offset = _covering(low, high, scheme)
    return _mend_degenerate(x, scale, offset)


def _bounds(x: Tensor, w: Tensor, tail: float) -> tuple[Tensor, Tensor]:
    """Values with a share `tail` of the weight below, and above."""
    if tail == 0:
        return x.amin(dim=1), x.amax(dim=1)
    ordered, places = x.sort(dim=1)
    up_to = w.double()[places].cumsum(dim=1)
    last = x.shape[1] - 1
    low = (up_to <= tail * up_to[:, -1:]).sum(dim=1, keepdim=True).clamp(max=last)
    high = (up_to < (1 - tail) * up_to[:, -1:]).sum(dim=1, keepdim=True).clamp(max=last)
    return ordered.gather(1, low)[:, 0], ordered.gather(1, high)[:, 0]


def _covering(low: Tensor, high: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor | None]:
    """Scale and offset whose grid reaches from `low` to `high`."""
    if scheme.offset:
        scale = (high - low) / (scheme.quant_max - scheme.quant_min)
        return scale, low - scale * scheme.quant_min
    if scheme.signed:
        return torch.maximum(low.abs(), high.abs()) / scheme.quant_max, None
    return high.clamp(min=0) / scheme.quant_max, None


def _least_squares(x: Tensor, w: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor | None]:
    """The best of a coarse and a fine grid of scales, then codes and the straight line through them in turn, by group.

    For fixed codes q the best scale is <x, q> / <q, q>; with an offset, scale and offset are the regression of x on q,
    and the search starts from several offsets. The result is never worse than min-max, the first point of the grid.
    """
    low = x.amin(dim=1)
    full_scale, full_offset = _covering(low, x.amax(dim=1), scheme)
    best = _Fit(full_scale, full_offset, _squared_error(x, w, full_scale, full_offset, scheme))
    for share in _OFFSETS if full_offset is not None else (1.0,):
        # The grid begins at a share of the lowest value, whatever the scale.
        offset = None if full_offset is None else low * share - full_scale * scheme.quant_min
        found = _Fit(full_scale, offset, _squared_error(x, w, full_scale, offset, scheme))
        for grid in (_COARSE, _FINE):  # fine: at 8 bits the alternation alone stays where it starts
            centre = found.scale
            for step in grid:
                scale = centre * step
                offset = None if full_offset is None else low * share - scale * scheme.quant_min
                found = _better(found, _Fit(scale, offset, _squared_error(x, w, scale, offset, scheme)))
        best = _better(best, _better(found, _alternated(x, w, found, scheme)))
    return best.scale, best.offset


def _alternated(x: Tensor, w: Tensor, fit: "_Fit", scheme: QuantScheme) -> "_Fit":
    scale, offset = fit.scale, fit.offset
    for _ in range(_ITERATIONS):
        previous = scale
        scale, offset = _refit(x, w, scale, offset, scheme)
        if ((scale - previous).abs() <= _TOLERANCE * previous).all():
            break
    return _Fit(scale, offset, _squared_error(x, w, scale, offset, scheme))


class _Fit(NamedTuple):
    scale: Tensor
    offset: Tensor | None
    error: Tensor


def _better(old: _Fit, new: _Fit) -> _Fit:
    """By group, the fit of least error."""
    wins = new.error < old.error
    offset = None if old.offset is None or new.offset is None else torch.where(wins, new.offset, old.offset)
    return _Fit(torch.where(wins, new.scale, old.scale), offset, torch.where(wins, new.error, old.error))


def _refit(
    x: Tensor, w: Tensor, scale: Tensor, offset: Tensor | None, scheme: QuantScheme
) -> tuple[Tensor, Tensor | None]:
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    if offset is None:
        power, product = torch.zeros_like(scale), torch.zeros_like(scale)
        for part, weights in zip(x.split(_AT_ONCE, dim=1), w.split(_AT_ONCE), strict=True):
            codes = quantize(part[None], safe, None, scheme.bit_width, scheme.signed)[0]
            power += (weights * codes.square()).sum(dim=1)
            product += (weights * part * codes).sum(dim=1)
        fitted = product / power
        return torch.where((power > 0) & (fitted > 0), fitted, scale), None
    codes = quantize(x[None], safe, offset, scheme.bit_width, scheme.signed)[0]
    total = w.sum()
    mean_x, mean_code = (w * x).sum(dim=1) / total, (w * codes).sum(dim=1) / total
    spread = (w * (codes - mean_code[:, None]).square()).sum(dim=1)
    fitted = (w * (x - mean_x[:, None]) * (codes - mean_code[:, None])).sum(dim=1) / spread
    sound = (spread > 0) & (fitted > 0)
    fitted = torch.where(sound, fitted, scale)
    return fitted, torch.where(sound, mean_x - fitted * mean_code, offset)


def _squared_error(x: Tensor, w: Tensor, scale: Tensor, offset: Tensor | None, scheme: QuantScheme) -> Tensor:
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    total = torch.zeros_like(scale)
    for part, weights in zip(x.split(_AT_ONCE, dim=1), w.split(_AT_ONCE), strict=True):
        error = fake_quantize(part[None], safe, offset, scheme.bit_width, scheme.signed)[0] - part
        total += (weights * error.square()).sum(dim=1)
    return total


def _mend_degenerate(x: Tensor, scale: Tensor, offset: Tensor | None) -> Estimate:
    abs_max = x.abs().amax(dim=1)
    sound = (abs_max >= DEGENERATE * abs_max.max()) & (scale > 0)
    substitute = scale[sound].median() if sound.any() else scale.new_tensor(1.0)
    return Estimate(torch.where(sound, scale, substitute), offset, int((~sound).sum()))
