"""Intervals and tests of variation between networks: against scipy, and against what is known of made-up networks."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from analysis.statistics.bootstrap import cv_interval
from analysis.statistics.variation_tests import DIFFERENCE_COLUMNS, differences


def frame(abs_means, tensor="weight"):
    """Rows of stats.parquet of linears of 10 elements each with these mean magnitudes."""
    return pd.DataFrame(
        {"model": "m", "module": [f"fc{i}" for i in range(len(abs_means))], "kind": "other", "tensor": tensor,
         "numel": 10, "abs_mean": abs_means, "note": ""}
    )  # fmt: skip


def spread(seed, sigma, count=40):
    """Mean magnitudes whose logarithms have the standard deviation `sigma`."""
    return np.exp(np.random.default_rng(seed).normal(-2, sigma, count))


def test_the_wider_network_is_named_with_its_interval():
    """Log spread 1.0 against 0.2: the interval excludes 0, the test agrees with scipy's, the sentence says who."""
    wide, narrow = spread(0, 1.0), spread(1, 0.2)
    table = differences([("wide", frame(wide)), ("narrow", frame(narrow))])
    assert list(table.columns) == list(DIFFERENCE_COLUMNS)
    row = table[table["tensor"] == "weight"].iloc[0]
    assert row["cv_a"] == pytest.approx(wide.std() / wide.mean())
    assert row["cv_difference"] == pytest.approx(wide.std() / wide.mean() - narrow.std() / narrow.mean())
    assert 0 < row["cv_difference_low"] < row["cv_difference"] < row["cv_difference_high"]
    expected = scipy_stats.levene(np.log(wide), np.log(narrow), center="median")
    assert (row["brown_forsythe"], row["p_value"]) == (expected.statistic, expected.pvalue)
    assert "vary more in wide than in narrow" in row["reading"]
    turned = differences([("narrow", frame(narrow)), ("wide", frame(wide))]).iloc[0]
    assert turned["cv_difference"] == pytest.approx(-row["cv_difference"])
    assert "vary more in wide than in narrow" in turned["reading"]


def test_networks_of_one_spread_show_no_difference():
    """Two draws of one distribution: the interval holds 0 and the sentence says that nothing is shown."""
    row = differences([("a", frame(spread(2, 0.5))), ("b", frame(spread(3, 0.5)))]).iloc[0]
    assert row["cv_difference_low"] < 0 < row["cv_difference_high"]
    assert row["reading"].startswith("No difference between a and b is shown")
    assert "but" not in row["reading"]


def test_interval_and_test_that_disagree_are_both_told():
    """Equal coefficients by one large module here and an even spread there: the logarithms tell them apart."""
    one_large = np.append(np.exp(np.random.default_rng(5).normal(0, 0.02, 39)), 6.5)
    row = differences([("a", frame(one_large)), ("b", frame(spread(4, 0.75)))]).iloc[0]
    assert row["cv_difference_low"] < 0 < row["cv_difference_high"]
    assert row["p_value"] < 0.05
    assert "by the test of the logarithms" in row["reading"]
    assert "not by the coefficient" in row["reading"]


def test_equal_networks_are_seldom_told_apart():
    """Of 60 pairs of one spread, 54 modules against 18, the sentence says "vary more" in at most three."""
    told = 0
    for seed in range(60):
        pair = [("a", frame(spread(seed, 0.4, 54))), ("b", frame(spread(seed + 1000, 0.4, 18)))]
        told += differences(pair).iloc[0]["reading"].startswith("Relative to their mean")
    assert told <= 3


def test_modules_that_do_not_vary_have_no_test():
    """Equal modules in both networks: a NaN p-value and a sentence without a claim, no warning."""
    row = differences([("a", frame([0.1] * 5)), ("b", frame([0.3] * 4))]).iloc[0]
    assert np.isnan(row["p_value"])
    assert row["reading"].startswith("No difference between a and b")


@given(factor=st.floats(1e-3, 1e3), seed=st.integers(0, 100))
def test_the_unit_changes_nothing(factor, seed):
    """All of one network times a factor: the same intervals and the same test."""
    values = spread(seed, 0.4, 12)
    assert cv_interval(values * factor) == pytest.approx(cv_interval(values), rel=1e-9)


def test_the_interval_covers_the_true_coefficient():
    """Over 60 made-up networks of 40 modules the interval holds the distribution's own coefficient in most of them."""
    sigma = 0.3
    true = np.sqrt(np.exp(sigma**2) - 1)  # of a log-normal
    intervals = [cv_interval(spread(seed, sigma)) for seed in range(60)]
    covered = np.mean([low <= true <= high for low, high in intervals])
    assert 0.75 <= covered < 1  # 0.95 is asked for; the percentile bootstrap is known to fall short


def test_too_few_modules_give_no_interval():
    """Two modules, or a run of weights alone: NaN and a sentence, no error."""
    table = differences([("a", frame([0.1, 0.2])), ("b", frame(spread(0, 0.3)))])
    assert table[["cv_difference", "p_value"]].isna().all(axis=None)
    assert table["reading"].str.startswith("Too few modules").all()
    assert np.isnan(cv_interval(np.array([0.1, 0.2]))).all()


def test_three_runs_make_three_pairs():
    """Every pair once, for weights and for inputs."""
    runs = [(name, frame(spread(i, 0.4))) for i, name in enumerate("abc")]
    table = differences(runs)
    assert list(zip(table["run_a"], table["run_b"], strict=True)) == [("a", "b"), ("a", "c"), ("b", "c")] * 2
