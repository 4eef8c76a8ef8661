"""Streaming, mergeable statistics of one tensor: moments to the fourth order, extremes, quantiles, outliers."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from analysis.float_histogram import FloatHistogram, centre_of
from quant.functional import to_groups

QUANTILES = {"q0001": 0.0001, "q001": 0.001, "q01": 0.01, "q50": 0.5, "q99": 0.99, "q999": 0.999, "q9999": 0.9999}
OUTLIERS = {"outlier_fraction_3": 3.0, "outlier_fraction": 6.0}  # column -> number of standard deviations
CPU_BLOCK, ACCELERATOR_BLOCK = 1 << 16, 1 << 24  # elements a step; 256 KiB and two buffers of it stay in the L2 cache
SAFE_RANGE = 2.0**24  # the fourth powers of deviations in [1/SAFE_RANGE, SAFE_RANGE] fit into float32


class NonFiniteError(ValueError):
    """A tensor holds NaN or infinities; `nan` and `infinite` count them. The caller knows the site and names it."""

    def __init__(self, nan: int, infinite: int, numel: int) -> None:
        self.nan, self.infinite = nan, infinite
        super().__init__(f"{nan} NaN and {infinite} infinite among {numel} values.")


@dataclass
class Moments:
    """Count, mean, central sums, extremes and sum of magnitudes; float64 arrays of one shape."""

    count: np.ndarray
    mean: np.ndarray
    m2: np.ndarray  # sums of the 2nd, 3rd and 4th powers of the deviation from `mean`
    m3: np.ndarray
    m4: np.ndarray
    minimum: np.ndarray
    maximum: np.ndarray
    abs_sum: np.ndarray

    def pooled(self, axis: int | tuple[int, ...]) -> "Moments":
        """The moments of the union along `axis` (Chan, Golub and LeVeque, 1983; Pébay, Sandia SAND2008-6212)."""
        count = self.count.sum(axis, keepdims=True)
        reference = self.mean.min(axis, keepdims=True)  # keeps digits where the means are large and close
        mean = reference + (self.count * (self.mean - reference)).sum(axis, keepdims=True) / np.maximum(count, 1)
        delta = self.mean - mean
        square = delta * delta  # products: numpy's ** with 3 or 4 is twenty times slower
        first = self.count * square
        m2 = self.m2 + first
        m3 = self.m3 + delta * (3 * self.m2 + first)
        m4 = self.m4 + delta * (4 * self.m3) + square * (6 * self.m2 + first)
        return Moments(
            count.squeeze(axis), mean.squeeze(axis), m2.sum(axis), m3.sum(axis), m4.sum(axis),
            self.minimum.min(axis), self.maximum.max(axis), self.abs_sum.sum(axis),
        )  # fmt: skip

    def joined(self, other: "Moments") -> "Moments":
        """The moments of both, element by element."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__)
        return Moments(*(np.stack(pair) for pair in pairs)).pooled(0)

    def figures(self) -> dict[str, np.ndarray]:
        """mean, population std, min, max, abs_mean, skewness, excess_kurtosis; the last two NaN where constant."""
        constant = self.minimum == self.maximum
        variance = np.where(constant, 0.0, self.m2 / self.count)
        std = np.sqrt(variance)
        spread = np.where(variance > 0, variance, np.nan)
        return {
            "mean": np.clip(self.mean, self.minimum, self.maximum),
            "std": std,
            "abs_mean": self.abs_sum / self.count,
            "min": self.minimum,
            "max": self.maximum,
            "skewness": self.m3 / self.count / spread**1.5,
            "excess_kurtosis": self.m4 / self.count / spread**2 - 3,
        }


class RunningStats:
    """Statistics of one tensor site, seen batch by batch; mergeable with those of other batches.

    Moments: float32 power sums about the mean of each block of a batch, merged in float64 per group and then over the
    groups: against float64 the variance agrees within 1e-6 (commonly 1e-7), the excess kurtosis within 3e-4, also at
    mean 100 and std 1. float64 input is summed in float64. The same batches in another order or split give the same
    count, min and max, and moments within 1e-9.

    Quantiles: from a `FloatHistogram`, so off by at most one bin, 2^-7 of their distance from its centre, commonly far
    less (`quantile_error`). The centre is fixed by the first batch, and 0 unless its mean exceeds one or two std;
    statistics of different centres merge with the error stated there. Outlier fractions are off by at most the share
    of the bins that hold the thresholds (`outlier_fraction_error`). `stats_of` gives both exactly, for weights.
    """

    def __init__(self, groups: int = 1) -> None:
        """`groups`: number of channels or heads; 1 where there are none."""
        self.groups = groups
        self.histogram: FloatHistogram | None = None
        self._moments: Moments | None = None  # per group
        self._exact: dict[str, float] = {}

    @property
    def count(self) -> int:
        """Number of values seen."""
        return 0 if self._moments is None else int(self._moments.count.sum())

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add the batch `x`: (outer, groups, inner), or any shape where there is one group; floating, any device.

        Raises NonFiniteError, and adds nothing, where `x` holds NaN or infinities.
        """
        if self.groups == 1 and x.ndim != 3:
            x = x.reshape(1, 1, -1)
        if x.ndim != 3 or x.shape[1] != self.groups or not x.is_floating_point():
            expected = f"a floating (outer, {self.groups}, inner) tensor"
            raise ValueError(f"Expected {expected}, got {x.dtype} {tuple(x.shape)}.")
        if x.numel() == 0:
            return
        if x.transpose(1, 2).is_contiguous():  # channels last: the groups are columns already
            x = x.transpose(1, 2).reshape(-1, self.groups, 1)
        x = x.contiguous()
        moments = _group_moments(x)
        if self.histogram is None:
            tensor = moments.pooled(0).figures()
            self.histogram = FloatHistogram(centre_of(float(tensor["mean"]), float(tensor["std"])))
        self.histogram.update(x)
        self._moments = moments if self._moments is None else self._moments.joined(moments)
        self._exact = {}

    def merge(self, other: "RunningStats") -> None:
        """Add what `other` has seen; exact but for float64 rounding, and for histograms of different centres."""
        if other.groups != self.groups:
            raise ValueError(f"Cannot merge statistics of {other.groups} groups into those of {self.groups}.")
        if other._moments is None or other.histogram is None:
            return
        if self.histogram is None:
            self.histogram = FloatHistogram(other.histogram.centre)
        self.histogram.merge(other.histogram)
        self._moments = other._moments if self._moments is None else self._moments.joined(other._moments)
        self._exact = {}

    @property
    def note(self) -> str:
        """Why a figure is NaN: `not observed`, `constant`, or that the median group is zero; else empty."""
        if self._moments is None:
            return "not observed"
        if self._moments.minimum.min() == self._moments.maximum.max():
            return "constant"
        return "median channel is zero" if self.groups > 1 and np.median(self._group_abs_max()) == 0 else ""

    def row(self) -> dict[str, float | int | str]:
        """The tensor's columns of stats.parquet, in its own unit; std divides by count; `note` says why NaN."""
        names = ["mean", "std", "abs_mean", "min", "max", "skewness", "excess_kurtosis", "abs_max_over_std"]
        if self._moments is None:
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
        if self._moments is None:
            return []
        figures = self._moments.figures()
        names = ("mean", "std", "min", "max", "abs_mean", "excess_kurtosis")
        columns = zip(*(figures[name].tolist() for name in names), strict=True)
        return [{"index": index} | dict(zip(names, values, strict=True)) for index, values in enumerate(columns)]

    def range_ratio(self) -> float:
        """The largest group's abs-max over the median group's; NaN for a single group or a median of 0."""
        if self._moments is None or self.groups == 1:
            return float("nan")
        ranges = self._group_abs_max()
        return float(ranges.max() / np.median(ranges)) if np.median(ranges) > 0 else float("nan")

    def std_cv(self) -> float:
        """Standard deviation of the groups' std over their mean; NaN for a single group or where all are constant."""
        if self._moments is None or self.groups == 1:
            return float("nan")
        std = self._moments.figures()["std"]
        return float(std.std() / std.mean()) if std.mean() > 0 else float("nan")

    def histogram_rows(self) -> list[tuple[float, float, int]]:
        """(left, right, count) of the bins that are not empty, ascending, 8 an octave of distance from the centre."""
        if self.histogram is None:
            return []
        left, right, count = self.histogram.bins(per_octave=8)
        return list(zip(left.tolist(), right.tolist(), count.tolist(), strict=True))

    def _group_abs_max(self) -> np.ndarray:
        assert self._moments is not None
        return np.maximum(-self._moments.minimum, self._moments.maximum)

    def _tensor_figures(self) -> dict[str, float]:
        assert self._moments is not None
        return {name: float(value) for name, value in self._moments.pooled(0).figures().items()}

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


def stats_of(tensor: Tensor, axis: int = 0, groups: int = 1) -> RunningStats:
    """Statistics of a tensor that is all there, such as a weight: moments, quantiles and outliers exact in float64.

    `axis` is split into `groups` channels or heads. Raises NonFiniteError.
    """
    stats = RunningStats(groups)
    exact = tensor.detach().double()
    stats.update(to_groups(exact, axis, groups))
    if stats.count:
        values = exact.cpu().numpy().ravel()
        figures = stats._tensor_figures()
        distance = np.abs(values - figures["mean"])
        stats._exact = {name: float((distance > factor * figures["std"]).mean()) for name, factor in OUTLIERS.items()}
        stats._exact |= zip(QUANTILES, np.quantile(values, list(QUANTILES.values())).tolist(), strict=True)
    return stats


def _group_moments(x: Tensor) -> Moments:
    """Moments of each group of a contiguous (outer, groups, inner) tensor, (groups,). Raises NonFiniteError."""
    outer, groups, inner = x.shape
    columns = inner < min(outer, 128)  # short rows are slow to reduce: take groups x inner as columns instead
    matrix, dim = (x.view(outer, groups * inner), 0) if columns else (x.view(outer * groups, inner), 1)
    count, sums = _power_sums(matrix, dim, None)
    minimum, maximum, shift = sums[:3]
    if not (np.isfinite(minimum).all() and np.isfinite(maximum).all()):
        raise NonFiniteError(int(x.isnan().sum()), int(x.isinf().sum()), x.numel())
    spread = np.maximum(maximum - shift, shift - minimum).max(axis=0)
    spread[spread == 0] = 1.0
    if spread.min() < 1 / SAFE_RANGE or spread.max() > SAFE_RANGE:
        scale = np.exp2(-np.clip(np.round(np.log2(spread)), -120, 120))  # a power of two: exact
        count, sums = _power_sums(matrix, dim, scale)
        shift = sums[2]
        s1, s2, s3, s4 = (sums[3 + k] / scale ** (k + 1) for k in range(4))
    else:
        s1, s2, s3, s4 = sums[3:7]
    n = np.broadcast_to(count[:, None], s1.shape)
    e = s1 / n  # what float32 rounding left between the shift and the mean
    square = e * e
    moments = Moments(
        count=n,
        mean=shift + e,
        m2=np.maximum(s2 - n * square, 0.0),
        m3=s3 - e * (3 * s2 - 2 * n * square),
        m4=np.maximum(s4 - 4 * e * s3 + square * (6 * s2 - 3 * n * square), 0.0),
        minimum=minimum,
        maximum=maximum,
        abs_sum=sums[7],
    )
    shape = (-1, groups, inner) if columns else (len(count), outer, groups)
    apart = Moments(*(getattr(moments, name).reshape(shape) for name in moments.__dataclass_fields__))
    return apart.pooled((0, 2) if columns else (0, 1))


def _power_sums(matrix: Tensor, dim: int, scale: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Reduce `matrix` along `dim` in blocks: elements per block (blocks,), and float64 (8, blocks, width).

    The eight: min, max, shift (the block's mean), sums of the powers 1 to 4 of (x - shift) * scale, sum of magnitudes.
    """
    size = CPU_BLOCK if matrix.device.type == "cpu" else ACCELERATOR_BLOCK
    width, length = matrix.shape[1 - dim], matrix.shape[dim]
    lines = min(width, 512) if dim == 0 else max(1, size // min(length, size))
    step = min(length, size // lines)
    starts = range(0, length, step)
    dtype = matrix.dtype if matrix.dtype == torch.float64 else torch.float32
    out = torch.empty(8, len(starts), width, dtype=dtype, device=matrix.device)
    factor = None if scale is None else torch.from_numpy(scale).to(out)
    # Written over and over: fresh memory for each block costs more than the sums.
    buffers = torch.empty(2, step * min(lines, width), dtype=dtype, device=matrix.device)
    for piece, start in enumerate(starts):
        for first in range(0, width, lines):
            block = matrix.narrow(dim, start, min(step, length - start))
            block = block.narrow(1 - dim, first, min(lines, width - first)).to(dtype)
            at = out[:, piece, first : first + lines]
            at[0], at[1] = block.amin(dim), block.amax(dim)
            shift = block.mean(dim, keepdim=True)
            at[2] = shift.squeeze(dim)
            deviation, square = (buffer[: block.numel()].view(block.shape) for buffer in buffers)
            torch.sub(block, shift, out=deviation)
            if factor is not None:
                deviation *= factor[first : first + lines].unsqueeze(dim)
            at[3] = deviation.sum(dim)
            at[4] = torch.mul(deviation, deviation, out=square).sum(dim)
            at[5] = deviation.mul_(square).sum(dim)
            at[6] = square.mul_(square).sum(dim)
            at[7] = torch.abs(block, out=square).sum(dim)
    count = np.array([min(step, length - start) for start in starts], dtype=np.float64)
    return count, out.cpu().double().numpy()
