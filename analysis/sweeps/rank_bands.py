"""Ranks of sites by what they cost, with the band in which resampled images would put them."""

import numpy as np
from numpy.typing import NDArray

RESAMPLES, CONFIDENCE = 2000, 0.95


def rank_bands(values: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lowest and highest rank of each site in 95 % of bootstrap samples of the images; rank 1 has the greatest mean.

    `values` is (sites, images), such as the KL divergence of each image. The images are resampled for all sites
    together (seed 0), which keeps what they have in common (Efron, 1979).
    """
    sites, images = values.shape
    generator = np.random.default_rng(0)
    ranks = np.empty((RESAMPLES, sites), dtype=np.int64)
    for i in range(RESAMPLES):
        weights = np.bincount(generator.integers(images, size=images), minlength=images)
        ranks[i, np.argsort(-(values @ weights), kind="stable")] = np.arange(1, sites + 1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(ranks, [tail, 1 - tail], axis=0, method="nearest")
    return low.astype(np.int64), high.astype(np.int64)


def images_to_separate(values: NDArray[np.float64], first: int = 10) -> float:
    """How many images would tell each of the `first` costliest sites from the next one, at 95 %; inf where never.

    From the paired differences of neighbours in rank: n = (1.96 std / mean)^2, the largest over the neighbours. NaN for
    fewer than two sites or images.
    """
    if values.shape[1] < 2:
        return float("nan")
    order = np.argsort(-values.mean(1), kind="stable")[: first + 1]
    differences = values[order[:-1]] - values[order[1:]]
    mean, std = differences.mean(1), differences.std(1, ddof=1)
    if not len(mean):
        return float("nan")
    with np.errstate(divide="ignore", invalid="ignore"):
        needed = np.where(std > 0, (1.96 * std / mean) ** 2, np.where(mean > 0, 1.0, np.inf))
    return float(needed.max())
