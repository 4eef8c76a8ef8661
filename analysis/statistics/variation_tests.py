"""Does one network's modules vary more than another's? Intervals by bootstrap, and the Brown-Forsythe test."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from analysis.statistics.bootstrap import coefficient, interval
from analysis.variation import layer_sites, module_abs_means

LEVEL = 0.05  # of the test, in the readings; the bootstrap intervals are of 95 %
DIFFERENCE_COLUMNS = (
    "tensor", "run_a", "run_b", "modules_a", "modules_b", "cv_a", "cv_b", "cv_difference", "cv_difference_low",
    "cv_difference_high", "brown_forsythe", "p_value", "reading",
)  # fmt: skip


def differences(runs: Sequence[tuple[str, pd.DataFrame]]) -> pd.DataFrame:
    """One row for weights and one for inputs of each pair of runs: whether the modules of one vary more.

    `runs` are names and frames of stats.parquet. `cv_difference` is that of run_a minus that of run_b, with its
    interval, the modules of both resampled. `brown_forsythe` and `p_value` test that the logarithms of the modules'
    mean magnitudes spread alike (Brown and Forsythe, JASA 1974: Levene's test about the median). NaN below three
    modules. The modules of a network are no independent sample, and pairs are not corrected for their number: read
    the p-value as a description.
    """
    rows = []
    for tensor in ("weight", "input"):
        means = [(name, module_abs_means(layer_sites(stats, tensor)).to_numpy(float)) for name, stats in runs]
        for (name_a, a), (name_b, b) in combinations(means, 2):
            row: dict[str, object] = {"tensor": tensor, "run_a": name_a, "run_b": name_b,
                                      "modules_a": len(a), "modules_b": len(b)}  # fmt: skip
            if min(len(a), len(b)) >= 3:
                bounds = interval((a, b), lambda x, y, axis=-1: coefficient(x, axis) - coefficient(y, axis))
                statistic, p_value = _brown_forsythe(np.log(a[a > 0]), np.log(b[b > 0]))
                row |= {
                    "cv_a": coefficient(a), "cv_b": coefficient(b), "cv_difference": coefficient(a) - coefficient(b),
                    "cv_difference_low": bounds.low, "cv_difference_high": bounds.high,
                    "brown_forsythe": statistic, "p_value": p_value,
                }  # fmt: skip
            rows.append(row | {"reading": _reading(row, tensor)})
    return pd.DataFrame(rows, columns=list(DIFFERENCE_COLUMNS))


def _brown_forsythe(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[float, float]:
    """Statistic and p-value; NaN where neither sample varies or one has fewer than three values."""
    if min(len(a), len(b)) < 3 or (np.ptp(a) == 0 and np.ptp(b) == 0):
        return float("nan"), float("nan")
    test = scipy_stats.levene(a, b, center="median")
    return float(test.statistic), float(test.pvalue)


def _reading(row: dict, tensor: str) -> str:
    """One network's modules vary more only where the interval and the test of the logarithms agree.

    The interval alone would find a difference in every tenth pair of equal networks, the test in every thirtieth.
    """
    what = "weights" if tensor == "weight" else "inputs"
    a, b = row["run_a"], row["run_b"]
    if "cv_difference" not in row:
        return f"Too few modules whose {what} were measured in {a} or {b}."
    low, high, p = row["cv_difference_low"], row["cv_difference_high"], row["p_value"]
    test = f"Brown-Forsythe p = {p:.3g}" if np.isfinite(p) else "the Brown-Forsythe test cannot be done"
    differs, alike = not low <= 0 <= high, not p < LEVEL
    more, less = (a, b) if low > 0 else (b, a)
    if differs and not alike:
        return f"Relative to their mean, the {what} of modules vary more in {more} than in {less} ({test})."
    if differs:
        return (
            f"Whether the {what} of modules vary more in {more} than in {less} is not settled: the interval says "
            f"so, the test of the logarithms does not ({test})."
        )
    if not alike:
        return (
            f"How the {what} of modules vary differs between {a} and {b} by the test of the logarithms ({test}), "
            "not by the coefficient, whose interval holds 0."
        )
    return f"No difference between {a} and {b} is shown in how the {what} of modules vary ({test})."
