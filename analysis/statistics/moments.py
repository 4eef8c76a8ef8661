"""Moments to the fourth order of the groups of a tensor, mergeable in float64."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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


def group_moments(x: Tensor) -> Moments:
    """Moments of each group of a contiguous (outer, groups, inner) tensor, (groups,); any device and floating dtype.

    float32 power sums about the mean of each block, merged in float64; float64 is summed in float64. Raises
    NonFiniteError.
    """
    outer, groups, inner = x.shape
    columns = inner < min(outer, 128)  # short rows are slow to reduce: take groups x inner as columns instead
    matrix, dim = (x.view(outer, groups * inner), 0) if columns else (x.view(outer * groups, inner), 1)
    count, sums = _power_sums(matrix, dim, None)
    minimum, maximum, shift = sums[:3]
    if not (np.isfinite(minimum).all() and np.isfinite(maximum).all()):
        raise NonFiniteError(int(x.isnan().sum()), int(x.isinf().sum()), x.numel())
    if not np.isfinite(sums[7]).all():  # values near the end of float32
        if x.dtype == torch.float64:
            raise NonFiniteError(0, int((x.abs() > 1e300).sum()), x.numel())  # their sum is infinite
        return group_moments(x.double())
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
