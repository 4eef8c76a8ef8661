"""Streaming, mergeable statistics of one tensor: moments to the fourth order, extremes, quantiles, outliers."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from functools import cache, reduce
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from analysis.statistics.float_histogram import FloatHistogram, centre_of, count_distances
from analysis.statistics.moments import Moments, NonFiniteError, group_moments
from analysis.terminal.console import warn
from quant.errors import first_line
from quant.functional import to_groups

QUANTILES = {"q0001": 0.0001, "q001": 0.001, "q01": 0.01, "q50": 0.5, "q99": 0.99, "q999": 0.999, "q9999": 0.9999}
OUTLIERS = {"outlier_fraction_3": 3.0, "outlier_fraction": 6.0}  # column -> number of standard deviations
_SLICE = 1 << 20  # values of a weight that are in float64 at one time


class Batch(NamedTuple):
    """What one tensor adds: moments of each group, and int64 counts (65536,) of its distances from `centre`."""

    moments: Moments
    counts: np.ndarray
    centre: float


class RunningStats:
    """Statistics of one tensor site, seen batch by batch; mergeable with those of other batches.

    Moments: float32 power sums about the mean of each block of a batch, merged in float64 per group and then over the
    groups: against float64 the variance agrees within 1e-6 (commonly 1e-7), the excess kurtosis within 3e-4, or 1e-5
    of it where that is more, also at mean 100 and std 1. float64 input is summed in float64. The same batches in
    another order or split give the same count, min and max, and moments within 1e-9.

    Quantiles: from a `FloatHistogram`, so off by at most one bin, 2^-7 of their distance from its centre, commonly far
    less (`quantile_error`); where one is interpolated between two far values, their distances count. The centre is
    fixed by the first batch, and 0 unless its mean exceeds one or two std; statistics of different centres merge with
    the error stated there. Outlier fractions are off by at most the share of the bins that hold the thresholds
    (`outlier_fraction_error`). `stats_of` gives both exactly, for weights.
    """

    def __init__(self, groups: int = 1) -> None:
        """`groups`: number of channels or heads; 1 where there are none."""
        self.groups = groups
        self.reason = ""  # why nothing could be measured, or no channels distinguished
        self.histogram: FloatHistogram | None = None
        self.moments: Moments | None = None  # per group; None where nothing was seen
        self._exact: dict[str, float] = {}

    @property
    def count(self) -> int:
        """Number of values seen."""
        return 0 if self.moments is None else int(self.moments.count.sum())

    @torch.no_grad()
    def update(self, x: Tensor) -> Batch | None:
        """Add the batch `x`: (outer, groups, inner), or any shape where there is one group; floating, any device.

        What was measured is returned, for `add`; None where `x` is empty. Raises NonFiniteError, and adds nothing,
        where `x` holds NaN or infinities.
        """
        if self.groups == 1 and x.ndim != 3:
            x = x.reshape(1, 1, -1)
        if x.ndim != 3 or x.shape[1] != self.groups or not x.is_floating_point():
            expected = f"a floating (outer, {self.groups}, inner) tensor"
            raise ValueError(f"Expected {expected}, got {x.dtype} {tuple(x.shape)}.")
        if x.numel() == 0:
            return None
        if self.groups > 1 and x.transpose(1, 2).is_contiguous():  # channels last: the groups are columns already
            x = x.transpose(1, 2).reshape(-1, self.groups, 1)
        x = x.contiguous()
        if self.histogram is None:
            try:
                first = group_moments(x[: max(1, len(x) // 8)]).pooled(0).figures()
            except NonFiniteError as error:
                raise NonFiniteError(int(x.isnan().sum()), int(x.isinf().sum()), x.numel()) from error
            self.histogram = FloatHistogram(centre_of(float(first["mean"]), float(first["std"])))
        batch = _measure(x, self.histogram.centre)
        self.add(batch)
        return batch

    def takes(self, batch: Batch) -> bool:
        """Whether `add` is exact: this site has seen nothing, or its histogram has the centre of `batch`."""
        return self.histogram is None or self.histogram.centre == batch.centre

    def add(self, batch: Batch) -> None:
        """Add what another site's `update` returned for a tensor that passes both, of as many groups."""
        if self.histogram is None:
            self.histogram = FloatHistogram(batch.centre)
        self.histogram.add(batch.counts)
        self.moments = batch.moments if self.moments is None else self.moments.joined(batch.moments)
        self._exact = {}

    def merge(self, other: "RunningStats") -> None:
        """Add what `other` has seen; exact but for float64 rounding, and for histograms of different centres."""
        if other.groups != self.groups:
            raise ValueError(f"Cannot merge statistics of {other.groups} groups into those of {self.groups}.")
        if other.moments is None or other.histogram is None:
            return
        if self.histogram is None:
            self.histogram = FloatHistogram(other.histogram.centre)
        self.histogram.merge(other.histogram)
        self.moments = other.moments if self.moments is None else self.moments.joined(other.moments)
        self._exact = {}

    def copy(self) -> "RunningStats":
        """The statistics as they stand: what is added to either afterwards does not reach the other; takes no time."""
        copied = RunningStats(self.groups)
        copied.reason, copied.moments, copied._exact = self.reason, self.moments, self._exact
        copied.histogram = None if self.histogram is None else self.histogram.copy()
        return copied

    @property
    def note(self) -> str:
        """Why a figure is NaN: `not observed`, `constant`, or that the median group is zero; else empty."""
        if self.moments is None:
            return self.reason or "not observed"
        if self.moments.minimum.min() == self.moments.maximum.max():
            return "; ".join(filter(None, (self.reason, "constant")))
        if self.groups > 1 and np.median(self._group_abs_max()) == 0:
            return "median channel is zero"
        return self.reason

    def row(self) -> dict[str, float | int | str]:
        """The tensor's columns of stats.parquet, in its own unit; std divides by count; `note` says why NaN."""
        names = ["mean", "std", "abs_mean", "min", "max", "skewness", "excess_kurtosis", "abs_max_over_std"]
        if self.moments is None:
            return {"count": 0} | dict.fromkeys([*names, *OUTLIERS, *QUANTILES], float("nan")) | {"note": self.note}
        row: dict[str, float | int | str] = {"count": self.count}
        tensor = self._tensor_figures()
        row |= tensor
        row["abs_max_over_std"] = (
            max(-tensor["min"], tensor["max"]) / tensor["std"] if tensor["std"] > 0 else float("nan")
        )
        return row | (self._exact or self._approximate()[0]) | {"note": self.note}

    @property
    def outlier_fraction_error(self) -> dict[str, float]:
        """The most by which each outlier fraction can be off; 0 from `stats_of`."""
        return dict.fromkeys(OUTLIERS, 0.0) if self._exact else self._approximate()[1]

    def quantile_error(self, value: float) -> float:
        """The most by which a quantile near `value` can be off, in the unit of the tensor; 0 from `stats_of`."""
        return 0.0 if self._exact or self.histogram is None else self.histogram.quantile_error(value)

    def group_rows(self) -> list[dict[str, float | int]]:
        """One dictionary per channel or head: index, mean, std, min, max, abs_mean, excess_kurtosis."""
        if self.moments is None:
            return []
        figures = self.moments.figures()
        names = ("mean", "std", "min", "max", "abs_mean", "excess_kurtosis")
        columns = zip(*(figures[name].tolist() for name in names), strict=True)
        return [{"index": index} | dict(zip(names, values, strict=True)) for index, values in enumerate(columns)]

    def range_ratio(self) -> float:
        """The largest group's abs-max over the median group's; NaN for a single group or a median of 0."""
        if self.moments is None or self.groups == 1:
            return float("nan")
        ranges = self._group_abs_max()
        return float(ranges.max() / np.median(ranges)) if np.median(ranges) > 0 else float("nan")

    def std_cv(self) -> float:
        """Standard deviation of the groups' std over their mean; NaN for a single group or where all are constant."""
        if self.moments is None or self.groups == 1:
            return float("nan")
        std = self.moments.figures()["std"]
        return float(std.std() / std.mean()) if std.mean() > 0 else float("nan")

    def histogram_rows(self) -> list[tuple[float, float, int]]:
        """(left, right, count) of the bins that are not empty, ascending, 8 an octave of distance from the centre."""
        if self.histogram is None:
            return []
        left, right, count = self.histogram.bins(per_octave=8)
        return list(zip(left.tolist(), right.tolist(), count.tolist(), strict=True))

    def _group_abs_max(self) -> np.ndarray:
        assert self.moments is not None
        return np.maximum(-self.moments.minimum, self.moments.maximum)

    def _tensor_figures(self) -> dict[str, float]:
        assert self.moments is not None
        return {name: float(value) for name, value in self.moments.pooled(0).figures().items()}

    def _approximate(self) -> tuple[dict[str, float], dict[str, float]]:
        """Outlier fractions and quantiles from the histogram, and the errors of the former."""
        assert self.histogram is not None
        tensor = self._tensor_figures()
        mean, std, low, high = (tensor[name] for name in ("mean", "std", "min", "max"))
        figures, errors = dict.fromkeys(OUTLIERS, 0.0), dict.fromkeys(OUTLIERS, 0.0)
        for name, factor in OUTLIERS.items() if std > 0 else ():
            below, below_error = self.histogram.fraction_below(mean - factor * std, low, high)
            above, above_error = self.histogram.fraction_below(mean + factor * std, low, high)
            figures[name], errors[name] = below + 1 - above, below_error + above_error
        values = self.histogram.quantiles(list(QUANTILES.values()), low, high)
        return figures | dict(zip(QUANTILES, values.tolist(), strict=True)), errors


@cache
def _compiled_pass() -> Callable[..., tuple[Moments, np.ndarray] | None] | None:
    """`fused_pass`, or None where numba is missing, does not fit numpy, or finds no place for what it compiles."""
    try:
        from analysis.statistics.fused_pass import fused_pass  # half a second
    except (ImportError, RuntimeError) as error:
        warn(f"numba cannot be used ({first_line(error)}): statistics take about twice as long, with the same errors.")
        return None
    return fused_pass


def _measure(x: Tensor, centre: float) -> Batch:
    """Of a contiguous (outer, groups, inner) tensor. Raises NonFiniteError."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        compiled = _compiled_pass()
        fused = None if compiled is None else compiled(x.numpy(), centre, torch.get_num_threads())
        if fused is not None:
            return Batch(*fused, centre)
    return Batch(group_moments(x), count_distances(x, centre), centre)


def stats_of(tensor: Tensor, axis: int = 0, groups: int = 1) -> RunningStats:
    """Statistics of a tensor that is all there, such as a weight: moments, quantiles and outliers exact in float64.

    `axis` is split into `groups` channels or heads. Takes the memory of a float32 copy (float64 where `tensor` is).
    Raises NonFiniteError.
    """
    stats = RunningStats(groups)
    x = to_groups(tensor.detach(), axis, groups)
    stats.update(x)
    if stats.count:
        stats.moments = _moments_in_float64(x)
        stats._exact = _order_statistics(x, stats._tensor_figures())
    return stats


def _moments_in_float64(x: Tensor) -> Moments:
    """Moments of an (outer, groups, inner) tensor, a slice of it at a time."""
    outer, groups, inner = x.shape
    if outer > 1:
        pieces = x.split(max(1, _SLICE // (groups * inner)))
        return reduce(Moments.joined, (group_moments(piece.double().contiguous()) for piece in pieces))
    slices = x.split(max(1, _SLICE // inner), dim=1)
    apart = [group_moments(piece.double().contiguous()) for piece in slices]
    fields = Moments.__dataclass_fields__
    return Moments(*(np.concatenate([getattr(moments, name) for moments in apart]) for name in fields))


def _order_statistics(x: Tensor, figures: dict[str, float]) -> dict[str, float]:
    """Quantiles, interpolated as numpy does, and outlier fractions of all values of `x`, whose `figures` are known."""
    values = x.cpu().numpy() if x.dtype in (torch.float32, torch.float64) else x.float().cpu().numpy()
    values = np.sort(values, axis=None)
    rank = np.array(list(QUANTILES.values())) * (len(values) - 1)
    low, high = values[np.floor(rank).astype(int)], values[np.ceil(rank).astype(int)]
    quantiles = low.astype(np.float64) + (rank - np.floor(rank)) * (high.astype(np.float64) - low)
    fractions = {}
    for name, factor in OUTLIERS.items():
        reach = factor * figures["std"]
        inside = bisect_right(values, np.float64(figures["mean"] + reach))
        inside -= bisect_left(values, np.float64(figures["mean"] - reach))
        fractions[name] = 1 - inside / len(values) if inside < len(values) else 0.0
    return fractions | dict(zip(QUANTILES, quantiles.tolist(), strict=True))
