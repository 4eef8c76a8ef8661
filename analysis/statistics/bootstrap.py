"""Bootstrap intervals of how much values vary, the values resampled."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats as scipy_stats

CONFIDENCE = 0.95
_RESAMPLES = 9999


class Interval(NamedTuple):
    """Bounds of a 95 % bootstrap interval; NaN where there are too few modules."""

    low: float
    high: float


def coefficient(values: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    """Population standard deviation over the mean along `axis`: free of the unit."""
    return np.std(values, axis=axis) / np.mean(values, axis=axis)


def cv_interval(abs_means: NDArray[np.float64]) -> Interval:
    """Interval of the coefficient of variation, the modules resampled (percentiles, seed 0; Efron, 1979).

    With a few dozen modules it is rather too short than too long: a bootstrap knows no module that it has not seen.
    """
    if len(abs_means) < 3:
        return Interval(np.nan, np.nan)
    return interval((abs_means,), coefficient)


def interval(samples: tuple[NDArray[np.float64], ...], statistic: Callable) -> Interval:
    """The percentile interval of `statistic`, each sample resampled by itself; the same for the same samples."""
    result = scipy_stats.bootstrap(
        samples, statistic, n_resamples=_RESAMPLES, confidence_level=CONFIDENCE, method="percentile", vectorized=True,
        random_state=np.random.default_rng(0), batch=500,  # resamples that are in memory together
    )  # fmt: skip
    return Interval(float(result.confidence_interval.low), float(result.confidence_interval.high))
