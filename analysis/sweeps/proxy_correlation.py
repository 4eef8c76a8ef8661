"""How well a proxy ranks the sites: rank correlation with the measured sweep, beside what the sweep's noise allows."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import kendalltau, rankdata

from analysis.sensitivity import IMAGE_COLUMNS, stored_rows
from quant.choices import PROXIES
from quant.site import ATTENTION_TENSORS, WEIGHT_TENSORS

CORRELATION_COLUMNS = (
    "tensors", "bit_width", "proxy", "sites", "spearman", "spearman_low", "spearman_high", "kendall", "ceiling",
)  # fmt: skip
SITE_KEY = ["module", "tensor", "bit_width", "granularity", "estimator"]
LEAST_SITES = 5
HALVINGS = 200
RESAMPLES = 1000


def proxy_correlations(proxies: pd.DataFrame, measured: pd.DataFrame, images: pd.DataFrame) -> pd.DataFrame:
    """Spearman's and Kendall's correlation of each proxy with what was measured, by bit-width and class of tensor.

    `measured` are single-site rows of sensitivity.parquet in one treatment, `images` the frame of
    sensitivity_images.parquet. `tensors` is weight, input, attention (all four inside attention) or `all`;
    `spearman_low` and `spearman_high` are the 95 % percentile bootstrap over sites, which are no independent sample.
    Sites that a proxy cannot score are left out, and `sites` says how many remain; fewer than five give no row.
    `ceiling` is the Spearman correlation that a proxy of the true values would reach (`noise_ceiling`).
    """
    key = [name for name in images.columns if name not in IMAGE_COLUMNS]
    values = images.merge(measured[[*key, "divergence"]], on=key)
    rows = []
    for bits, at_bits in values.groupby("bit_width", sort=True):
        for name, holds in _CLASSES.items():
            chosen = at_bits[at_bits["tensor"].map(holds)]
            ceilings: dict[tuple[str, ...], float] = {}  # most proxies score the same sites
            for proxy in PROXIES:
                scored = chosen.merge(proxies[proxies["proxy"] == proxy], on=SITE_KEY).dropna(subset="score")
                if len(scored) < LEAST_SITES:
                    continue
                score, kl = scored["score"].to_numpy(dtype=np.float64), scored["divergence"].to_numpy(dtype=np.float64)
                spearman, (low, high) = float(_spearman(score, kl)), _interval(score, kl)
                kendall = kendalltau(score, kl).statistic
                sites = tuple(scored["module"] + ":" + scored["tensor"])
                if sites not in ceilings:
                    ceilings[sites] = noise_ceiling(np.stack(scored["image_divergence"].to_list()).astype(np.float64))
                rows.append((name, bits, proxy, len(scored), spearman, low, high, kendall, ceilings[sites]))
    return pd.DataFrame(rows, columns=list(CORRELATION_COLUMNS))


_CLASSES = {
    "all": lambda tensor: True,
    "weight": lambda tensor: tensor in WEIGHT_TENSORS,
    "input": lambda tensor: tensor == "input",
    "attention": lambda tensor: tensor in ATTENTION_TENSORS,
}


def measured_beside(proxies: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """The rows of sensitivity.parquet that the proxies are compared with: single sites, by the same quantizers.

    With BatchNorm as stored where it was measured so: proxies know of no other. Without the task's own column `score`,
    which is what proxies call theirs.
    """
    own = table.drop(columns="score", errors="ignore")
    known = own.merge(proxies[SITE_KEY].drop_duplicates(), on=SITE_KEY)
    return stored_rows(known)


def noise_ceiling(values: NDArray[np.float64]) -> float:
    """The Spearman correlation with these measurements that the true means would have; `values` (sites, images).

    The correlation r of the means over random halves of the images, 2 r / (1 + r) for all of them (Spearman-Brown), and
    of that the square root: noise lowers a correlation once where only one side is measured (Spearman, 1904). NaN for
    fewer than two images and for sites that are all alike, 0 where the halves do not agree at all.
    """
    images = values.shape[1]
    if images < 2:
        return float("nan")
    generator = np.random.default_rng(0)
    orders = [generator.permutation(images) for _ in range(HALVINGS)]
    first = np.stack([values[:, order[: images // 2]].mean(1) for order in orders])
    second = np.stack([values[:, order[images // 2 :]].mean(1) for order in orders])
    r = float(_mean(_spearman(first, second)))
    return 0.0 if r <= 0 else float(np.sqrt(2 * r / (1 + r)))


def _spearman(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman's correlation along the last axis; NaN where one side is constant."""
    first, second = (rankdata(side, axis=-1) - (side.shape[-1] + 1) / 2 for side in (x, y))
    with np.errstate(invalid="ignore"):
        return (first * second).sum(-1) / np.sqrt((first**2).sum(-1) * (second**2).sum(-1))


def _mean(values: NDArray[np.float64]) -> float:
    """The mean of the finite values; NaN where there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _interval(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float]:
    places = np.random.default_rng(0).integers(len(x), size=(RESAMPLES, len(x)))
    found = _spearman(x[places], y[places])
    found = found[np.isfinite(found)]
    if not len(found):
        return float("nan"), float("nan")
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
