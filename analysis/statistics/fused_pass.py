"""Moments and histogram of a float32 tensor in one pass over its memory, on the CPU, compiled by numba.

The same figures as `moments.group_moments` and `FloatHistogram.update`, two to three times as fast: a piece of at most
2,048 values stays in the first-level cache while everything is taken from it.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
from numba import njit

from analysis.statistics.moments import SAFE_RANGE, Moments

BINS = 1 << 16  # the upper 16 of the 32 bits of a float32
_PIECE = 2048  # values summed in float32; their sums are merged in float64
_EXACT = 128  # of them whose sum is taken in float32
_ROWS, _COLUMNS = 256, 16  # of a piece whose groups lie side by side: 16 float32 fill a cache line
_SHORT = 16  # rows of fewer values than this are gathered with those of the other images
_SHARED = 1 << 18  # values from which on the work is shared out over threads, and counted in several tables
# Sums may be reordered, which lets them be vectorised; NaN and infinities keep their meaning. All is put into the two
# functions that are compiled: functions of their own would be ordered in one way when they are compiled and in another
# when they are loaded from numba's cache, and the last digits would differ from the first run to the next.
_REORDERED = {"reassoc", "contract", "nsz", "arcp"}
_float = np.float32


def fused_pass(x: np.ndarray, centre: float, threads: int) -> tuple[Moments, np.ndarray] | None:
    """Moments of each group of `x`, and how often each upper half of the float32 of x - `centre` occurs.

    `x` is float32 (outer, groups, inner) and contiguous. The moments have shape (groups,), the counts are int64
    (65536,). None where a sum of magnitudes is not finite: NaN, infinities, or values near the end of float32.
    """
    tables = 4 if x.size >= _SHARED else 1  # equal values in a row would wait for one another's count
    parts = _shares(x, threads) if x.size >= _SHARED and threads > 1 else [x]
    arguments = [(part, _start(x.shape[1]), _float(centre), np.zeros((tables, BINS), dtype=np.uint32))
                 for part in parts]  # fmt: skip
    if len(parts) == 1:
        finite = [_measure(*arguments[0])]
    else:
        finite = list(_pool(threads).map(lambda given: _measure(*given), arguments))
    if not all(finite):
        return None
    moments = Moments(*arguments[0][1])
    counts = arguments[0][3].sum(0, dtype=np.int64)
    for _, sums, _, table in arguments[1:]:
        moments = moments.joined(Moments(*sums))
        counts += table.sum(0, dtype=np.int64)
    return moments, counts


def _shares(x: np.ndarray, threads: int) -> list[np.ndarray]:
    """`x` divided for the threads where one thread would begin a new piece too: the pieces stay the same."""
    unit = _ROWS if x.shape[2] < _SHORT else 1
    share = -(-len(x) // (threads * unit)) * unit
    return [x[start : start + share] for start in range(0, len(x), share)]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that wait for work; the compiled code runs without the interpreter's lock."""
    return ThreadPoolExecutor(threads, thread_name_prefix="statistics")


def _start(groups: int) -> np.ndarray:
    """Rows in the order of the fields of `Moments`, of nothing seen yet."""
    sums = np.zeros((8, groups))
    sums[5], sums[6] = np.inf, -np.inf
    return sums


def _measure(x: np.ndarray, sums: np.ndarray, centre: np.float32, tables: np.ndarray) -> bool:
    """Add `x` to `sums` and to the counts; whether all sums were finite."""
    outer, groups, inner = x.shape
    if inner < _SHORT:
        return _measure_columns(x.reshape(outer, groups * inner), inner, sums, centre, tables)
    return _measure_rows(x, sums, centre, tables)


@njit(nogil=True, cache=True, fastmath=_REORDERED)
def _measure_rows(x, sums, centre, tables):
    """`_measure` where the values of a group lie side by side: every row in pieces."""
    outer, groups, inner = x.shape
    distance = np.empty(_PIECE, dtype=np.float32)
    for i in range(outer):
        for group in range(groups):
            for start in range(0, inner, _PIECE):
                piece = x[i, group, start : start + _PIECE]
                if not _add(piece, sums, group, distance):
                    return False
                _count(piece, centre, distance, tables)
    return True


@njit(nogil=True, cache=True, fastmath=_REORDERED)
def _measure_columns(matrix, inner, sums, centre, tables):
    """`_measure` of (outer, groups * inner): columns are gathered, 16 together, to be summed as rows."""
    outer, width = matrix.shape
    gathered = np.empty((_COLUMNS, _ROWS + 16), dtype=np.float32)  # 16 more: rows start in different cache sets
    distance = np.empty(_PIECE, dtype=np.float32)
    for start in range(0, outer, _ROWS):
        rows = min(_ROWS, outer - start)
        for first in range(0, width, _COLUMNS):
            columns = min(_COLUMNS, width - first)
            if columns == _COLUMNS:  # a fixed number of turns lets the compiler unroll the inner loop
                for i in range(rows):
                    for j in range(_COLUMNS):
                        gathered[j, i] = matrix[start + i, first + j]
            else:
                for i in range(rows):
                    for j in range(columns):
                        gathered[j, i] = matrix[start + i, first + j]
            for j in range(columns):
                piece = gathered[j, :rows]
                if not _add(piece, sums, (first + j) // inner, distance):
                    return False
                _count(piece, centre, distance, tables)
    return True


@njit(inline="always")
def _add(piece, sums, group, buffer):
    """Merge the moments of `piece` into column `group` of `sums` (Pébay, Sandia SAND2008-6212); whether finite."""
    low, high, total, magnitudes = _extremes(piece)
    if not np.isfinite(magnitudes):
        return False
    n = float(piece.shape[0])
    shift = _float(total / n)
    spread = max(float(high) - float(shift), float(shift) - float(low))
    if spread == 0.0 or 1 / SAFE_RANGE <= spread <= SAFE_RANGE:
        s1, s2, s3, s4 = _powers(piece, shift)
        if s1 * s1 > 0.01 * n * s2:  # nearly constant: rounding moved the shift by a part of the standard deviation
            shift = _float(shift + s1 / n)
            s1, s2, s3, s4 = _powers(piece, shift)
    else:  # a power of two makes the fourth powers fit into float32 and rounds nothing
        scale = 2.0 ** -min(max(round(np.log2(spread)), -120), 120)
        for i in range(piece.shape[0]):
            buffer[i] = (piece[i] - shift) * _float(scale)
        s1, s2, s3, s4 = _powers(buffer[: piece.shape[0]], _float(0))
        if s1 * s1 > 0.01 * n * s2:
            rest = _float(s1 / n)
            shift += rest / scale
            s1, s2, s3, s4 = _powers(buffer[: piece.shape[0]], rest)
        s1, s2, s3, s4 = s1 / scale, s2 / scale**2, s3 / scale**3, s4 / scale**4
    rest = s1 / n  # what float32 rounding left between the shift and the mean
    square = rest * rest
    m2 = max(s2 - n * square, 0.0)
    m3 = s3 - rest * (3 * s2 - 2 * n * square)
    m4 = max(s4 - 4 * rest * s3 + square * (6 * s2 - 3 * n * square), 0.0)
    before, a2, a3 = sums[0, group], sums[2, group], sums[3, group]
    count = before + n
    delta = shift + rest - sums[1, group]
    step = delta / count
    between = delta * step * before * n
    sums[0, group] = count
    sums[1, group] += step * n
    sums[2, group] += m2 + between
    sums[3, group] += m3 + between * step * (before - n) + 3 * step * (before * m2 - n * a2)
    sums[4, group] += (
        m4 + between * step * step * (before * before - before * n + n * n)
        + 6 * step * step * (before * before * m2 + n * n * a2) + 4 * step * (before * m3 - n * a3)
    )  # fmt: skip
    sums[5, group] = min(sums[5, group], low)
    sums[6, group] = max(sums[6, group], high)
    sums[7, group] += magnitudes
    return True


@njit(inline="always")
def _extremes(piece):
    low, high, total, magnitudes = _float(np.inf), _float(-np.inf), np.float64(0), np.float64(0)
    for start in range(0, piece.shape[0], _EXACT):  # sums of many like values in float32 drift
        part, part_magnitudes = _float(0), _float(0)
        for i in range(start, min(start + _EXACT, piece.shape[0])):
            value = piece[i]
            low, high = min(low, value), max(high, value)
            part += value
            part_magnitudes += abs(value)
        total += part
        magnitudes += part_magnitudes
    return low, high, total, magnitudes


@njit(inline="always")
def _powers(piece, shift):
    s1, s2, s3, s4 = _float(0), _float(0), _float(0), _float(0)
    for i in range(piece.shape[0]):
        deviation = piece[i] - shift
        square = deviation * deviation
        s1 += deviation
        s2 += square
        s3 += square * deviation
        s4 += square * square
    return float(s1), float(s2), float(s3), float(s4)


@njit(inline="always")
def _count(piece, centre, distance, tables):
    """Add one to the bin of each value; four tables in turn, where there are four."""
    n = piece.shape[0]
    bits = distance.view(np.uint32)
    for i in range(n):
        distance[i] = piece[i] - centre
    whole = n - n % 4 if tables.shape[0] == 4 else 0
    for i in range(0, whole, 4):
        tables[0, bits[i] >> 16] += 1
        tables[1, bits[i + 1] >> 16] += 1
        tables[2, bits[i + 2] >> 16] += 1
        tables[3, bits[i + 3] >> 16] += 1
    for i in range(whole, n):
        tables[0, bits[i] >> 16] += 1
