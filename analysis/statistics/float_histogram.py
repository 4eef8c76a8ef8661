"""A histogram that needs no range: its bins are the leading bits of the float32 distance from a centre."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MANTISSA_BITS = 7  # with sign and exponent these are the upper 16 of the 32 bits
BINS_PER_OCTAVE = 2**MANTISSA_BITS
RELATIVE_BIN_WIDTH = 1 / BINS_PER_OCTAVE
CPU_BLOCK, ACCELERATOR_BLOCK = 1 << 20, 1 << 24  # elements a bincount; 4 MiB stay in the last-level cache


class FloatHistogram:
    """Counts of x - centre by sign, exponent and the first 7 bits of the mantissa, as float32 stores them.

    A bin spans at most 2^-7 of its own distance from `centre`, over the whole range of float32, so no first look at
    the data is needed and nothing overflows. Histograms of one centre add exactly, in any order. Only octaves that
    were met are kept: 2 KiB each, about 60 KiB for a Gaussian site. Distances below 2^-126 count as `centre` itself.
    """

    def __init__(self, centre: float) -> None:
        self.centre = float(np.float32(centre))
        self.other_centres: list[float] = []  # of histograms merged in that had another centre
        self.octaves: dict[int, np.ndarray] = {}  # biased exponent -> int64 counts (2 signs, 128), never written into

    @property
    def count(self) -> int:
        """Number of values counted."""
        return sum(int(octave.sum()) for octave in self.octaves.values())

    def copy(self) -> "FloatHistogram":
        """The histogram as it stands: what is added to either afterwards does not reach the other."""
        copied = FloatHistogram(self.centre)
        copied.other_centres, copied.octaves = list(self.other_centres), dict(self.octaves)
        return copied

    def merge(self, other: "FloatHistogram") -> None:
        """Add the counts of `other`; exact where the centres agree.

        Where they differ each bin of `other` moves, whole, to the bin of its midpoint: its values are then off by up
        to 2^-8 of their distance from the other centre besides the error of the bin that they fall into.
        """
        if other.centre == self.centre:
            for exponent, octave in other.octaves.items():
                self.octaves[exponent] = self.octaves.get(exponent, 0) + octave
        else:
            left, right, count = other.bins()
            distance = ((left + right) / 2 - self.centre).astype(np.float32)
            counts = np.zeros(1 << 16, dtype=np.int64)
            np.add.at(counts, distance.view(np.uint32) >> 16, count)
            self.add(counts)
            self.other_centres.append(other.centre)
        self.other_centres.extend(c for c in other.other_centres if c not in self.other_centres)

    def bins(self, per_octave: int = BINS_PER_OCTAVE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Left edges, right edges and int64 counts of the bins that are not empty, ascending, in the unit of x.

        `per_octave`, a power of two up to 128, merges neighbours.
        """
        if not self.octaves:
            return np.empty(0), np.empty(0), np.empty(0, dtype=np.int64)
        exponents = np.array(sorted(self.octaves))
        counts = np.stack([self.octaves[exponent] for exponent in exponents], axis=1)  # (2, octaves, 128)
        counts = counts.reshape(2, -1, per_octave, BINS_PER_OCTAVE // per_octave).sum(-1)
        base = np.where(exponents == 0, 0.0, np.exp2(exponents - 127.0))[:, None]  # octave 0: zero and denormals
        near = (base * (1 + np.arange(per_octave) / per_octave)).ravel()
        far = near + np.repeat(base.ravel(), per_octave) / per_octave
        plus, minus = counts.reshape(2, -1)
        left = self.centre + np.concatenate([-far[::-1], near])
        right = self.centre + np.concatenate([-near[::-1], far])
        count = np.concatenate([minus[::-1], plus])
        return left[count > 0], right[count > 0], count[count > 0]

    def quantiles(self, probabilities: Sequence[float], minimum: float, maximum: float) -> np.ndarray:
        """Quantiles by linear interpolation of order statistics (numpy's default), each within `quantile_error`.

        Values are taken as spread evenly inside a bin, and clipped to [`minimum`, `maximum`] of the data.
        """
        left, right, count = self.bins()
        above = np.cumsum(count)
        total = int(above[-1])
        rank = np.asarray(probabilities, dtype=np.float64) * (total - 1)

        def order_statistic(k: np.ndarray) -> np.ndarray:
            at = np.searchsorted(above, k, side="right")
            inside = (k - (above[at] - count[at]) + 0.5) / count[at]
            value = np.clip(left[at] + inside * (right[at] - left[at]), minimum, maximum)
            return np.where(k == 0, minimum, np.where(k == total - 1, maximum, value))

        low, high = order_statistic(np.floor(rank)), order_statistic(np.ceil(rank))
        return low + (rank - np.floor(rank)) * (high - low)

    def quantile_error(self, value: float) -> float:
        """Largest error of an order statistic near `value`: its bin, plus the shift of merges of another centre.

        A quantile is interpolated between two of them; where these lie far apart, the larger of their errors holds.
        """
        shift = max((abs(value - centre) for centre in self.other_centres), default=0.0) * RELATIVE_BIN_WIDTH / 2
        return (abs(value - self.centre) + shift) * RELATIVE_BIN_WIDTH * (1 + RELATIVE_BIN_WIDTH) + shift

    def fraction_below(self, value: float, minimum: float, maximum: float) -> tuple[float, float]:
        """Share of the values below `value` (1 from `maximum` on), and the share in doubt: the most it is off by."""
        if value <= minimum:
            return 0.0, 0.0
        if value >= maximum:
            return 1.0, 0.0
        left, right, count = self.bins()
        width = right - left  # 0 where values lie on the centre
        inside = np.where(width > 0, (value - left) / np.where(width > 0, width, 1.0), value > left).clip(0.0, 1.0)
        shift = max((abs(value - centre) for centre in self.other_centres), default=0.0) * RELATIVE_BIN_WIDTH / 2
        doubt = (left <= value + shift) & (right >= value - shift)
        total = count.sum()
        return float((inside * count).sum() / total), float(count[doubt].sum() / total)

    def add(self, counts: np.ndarray) -> None:
        """Add int64 counts (65536,) of the upper 16 bits of the float32 of x - centre."""
        table = counts.reshape(2, 256, BINS_PER_OCTAVE)
        for exponent in np.flatnonzero(table.any(axis=(0, 2))).tolist():
            self.octaves[exponent] = self.octaves.get(exponent, 0) + table[:, exponent]


def centre_of(mean: float, std: float) -> float:
    """The centre for data of this mean and standard deviation: the multiple of 4 * 2^floor(log2 std) nearest the mean.

    Being so coarse (2 to 4 std) it is 0 for most tensors and the same for most batches of one tensor, so that
    histograms that began with different batches still add exactly; and zeros, as ReLU leaves, fall on the centre.
    """
    if std == 0 or not math.isfinite(std):
        return mean
    step = 4 * 2.0 ** math.floor(math.log2(std))
    return round(mean / step) * step


def count_distances(x: Tensor, centre: float) -> np.ndarray:
    """How often each value of the upper 16 bits of the float32 of x - `centre` occurs: int64 (65536,)."""
    size = CPU_BLOCK if x.device.type == "cpu" else ACCELERATOR_BLOCK
    counts = torch.zeros(1 << 16, dtype=torch.int64, device=x.device)
    buffer = torch.empty(min(size, x.numel()), dtype=torch.float32, device=x.device)
    for block in x.view(-1).split(size):
        distance = buffer[: block.numel()]
        if block.dtype == torch.float32:
            torch.sub(block, centre, out=distance)
        else:
            distance.copy_((block if block.dtype == torch.float64 else block.float()) - centre)
        upper = distance.view(torch.int32).bitwise_right_shift_(16).bitwise_and_(0xFFFF)
        counts += torch.bincount(upper, minlength=1 << 16)
    return counts.cpu().numpy()
