"""Streaming statistics agree with scipy in float64 and do not depend on how the data was cut."""

import math
import pickle
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from analysis.running_stats import OUTLIERS, QUANTILES, RunningStats, stats_of
from analysis.statistics.float_histogram import FloatHistogram, centre_of, count_distances
from analysis.statistics.moments import NonFiniteError

GROUPS, MILLION = 8, 1_000_000
LAWS = ("gaussian", "student_t5", "shifted", "sparse", "tiny", "huge", "relu", "far")


@cache
def sample(law: str) -> torch.Tensor:
    """10^6 float32 values of a named law."""
    generator = np.random.default_rng(LAWS.index(law))
    normal = generator.standard_normal(MILLION)
    values = {
        "gaussian": lambda: normal,
        "student_t5": lambda: generator.standard_t(5, MILLION),
        "shifted": lambda: 100 + normal,
        "sparse": lambda: normal * (generator.random(MILLION) < 0.1),
        "tiny": lambda: 1e-12 * normal,
        "huge": lambda: 1e12 * normal,
        "relu": lambda: 3 * np.maximum(normal - 0.5, 0),
        "far": lambda: 1e4 + normal,
    }[law]()
    return torch.from_numpy(values.astype(np.float32))


def streamed(x: torch.Tensor, groups: int, batches: int) -> RunningStats:
    """Statistics of `x` (outer, groups, inner), given in batches."""
    running = RunningStats(groups)
    for batch in x.chunk(batches):
        running.update(batch)
    return running


@pytest.mark.parametrize("shape", [(125, GROUPS, 1000), (MILLION // GROUPS, GROUPS, 1), (50, GROUPS, 2500)])
@pytest.mark.parametrize("law", LAWS)
def test_moments_agree_with_scipy(law, shape):
    """Mean, variance, skewness, kurtosis, extremes and abs-mean of 10^6 values, per tensor and per group."""
    x = sample(law).view(shape)
    running = streamed(x, GROUPS, 5)
    exact = x.double().numpy()
    row = running.row()
    std = exact.std()
    assert row["count"] == MILLION
    assert (row["min"], row["max"]) == (exact.min(), exact.max())
    assert row["mean"] == pytest.approx(exact.mean(), rel=1e-9, abs=1e-7 * std)
    assert row["std"] ** 2 == pytest.approx(exact.var(), rel=1e-6)
    assert row["abs_mean"] == pytest.approx(np.abs(exact).mean(), rel=1e-6)
    assert row["skewness"] == pytest.approx(scipy_stats.skew(exact, axis=None), abs=3e-4)
    assert row["excess_kurtosis"] == pytest.approx(scipy_stats.kurtosis(exact, axis=None), abs=3e-4)
    assert row["abs_max_over_std"] == pytest.approx(np.abs(exact).max() / std, rel=1e-6)
    by_group = exact.transpose(1, 0, 2).reshape(GROUPS, -1)
    table = running.group_rows()
    assert [group["index"] for group in table] == list(range(GROUPS))
    np.testing.assert_allclose([group["std"] for group in table], by_group.std(1), rtol=1e-6)
    np.testing.assert_array_equal([group["max"] for group in table], by_group.max(1))
    kurtosis = scipy_stats.kurtosis(by_group, axis=1)
    np.testing.assert_allclose([group["excess_kurtosis"] for group in table], kurtosis, atol=3e-4)
    ranges = np.abs(by_group).max(1)
    assert running.range_ratio() == pytest.approx(ranges.max() / np.median(ranges))
    assert running.std_cv() == pytest.approx(by_group.std(1).std() / by_group.std(1).mean(), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("law", LAWS)
def test_quantiles_and_outlier_fractions_keep_the_stated_bounds(law):
    """Each quantile is within a bin of numpy's, each outlier fraction within the share of its threshold bins."""
    running = streamed(sample(law).view(100, 1, -1), 1, 4)
    exact, row = sample(law).double().numpy(), running.row()
    for name, probability in QUANTILES.items():
        expected = np.quantile(exact, probability)
        assert abs(row[name] - expected) <= running.quantile_error(expected) + 1e-15 * abs(expected), name
        assert running.quantile_error(expected) <= 8.1e-3 * (abs(expected - running.histogram.centre))
    for name, factor in OUTLIERS.items():
        expected = (np.abs(exact - exact.mean()) > factor * exact.std()).mean()
        assert abs(row[name] - expected) <= running.outlier_fraction_error[name] + 1e-12, name
        assert running.outlier_fraction_error[name] < 2e-3


def test_the_centre_is_zero_unless_the_mean_is_far():
    """ReLU's zeros stay exact zeros; a mean of 100 std moves the centre there, so that quantiles stay sharp."""
    assert streamed(sample("relu").view(1, 1, -1), 1, 1).row()["q50"] == 0.0
    running = streamed(sample("shifted").view(1, 1, -1), 1, 1)
    assert abs(running.histogram.centre - 100) <= 2
    assert running.row()["q50"] == pytest.approx(100.0, abs=0.01)
    assert centre_of(7.0, 0.0) == 7.0


@pytest.mark.parametrize("value", [0.0, 0.1, -3e-12, 1e6])
def test_a_constant_tensor_has_no_variance_and_no_kurtosis(value):
    """Variance 0, skewness and kurtosis NaN, with the note `constant`; quantiles are the value."""
    x = torch.full((40, 4, 333), value)
    for running in (streamed(x, 4, 3), stats_of(x, 1, 4)):
        row = running.row()
        assert (row["std"], row["mean"], row["q50"]) == (0.0, x[0, 0, 0], x[0, 0, 0])
        assert math.isnan(row["excess_kurtosis"])
        assert math.isnan(row["skewness"])
        assert (row["outlier_fraction"], row["note"]) == (0.0, "constant")


def test_a_tiny_channel_beside_a_large_one_keeps_its_kurtosis():
    """Channels of std 1 and 1e-13: the fourth power of the small one would underflow in float32."""
    x = sample("student_t5").view(-1, 2, 100) * torch.tensor([1.0, 1e-13]).view(1, 2, 1)
    small = RunningStats(2)
    small.update(x)
    expected = scipy_stats.kurtosis(x[:, 1].double().numpy(), axis=None)
    assert small.group_rows()[1]["excess_kurtosis"] == pytest.approx(expected, abs=3e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_any_dtype_and_layout(dtype, layout):
    """Values, not storage, decide: other dtypes and strides give what their float64 copy gives."""
    x = sample("gaussian")[:60_000].view(20, 10, 300).to(dtype)
    expected = x.double().numpy()
    if layout == "channels_last":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "strided":
        x = x.repeat_interleave(2, dim=2)[:, :, ::2]
    running = RunningStats(10)
    running.update(x)
    assert running.row()["excess_kurtosis"] == pytest.approx(scipy_stats.kurtosis(expected, axis=None), abs=3e-4)
    mean = expected.mean((0, 2))
    np.testing.assert_allclose([group["mean"] for group in running.group_rows()], mean, rtol=1e-6, atol=1e-7)
    assert running.histogram.count == x.numel()


def test_stats_of_is_exact():
    """A weight's quantiles and outlier fractions equal numpy's in float64, its moments scipy's."""
    weight = sample("student_t5")[: 32 * 9 * 500].view(32, 500, 3, 3)
    exact, stats = weight.double().numpy(), stats_of(weight, 0, 32)
    row = stats.row()
    quantiles = np.quantile(exact, list(QUANTILES.values()))
    np.testing.assert_allclose([row[name] for name in QUANTILES], quantiles, rtol=1e-15)
    outliers = (np.abs(exact - exact.mean()) > 6 * exact.std()).mean()
    assert outliers > 0
    assert row["outlier_fraction"] == pytest.approx(outliers, rel=1e-12)
    assert row["excess_kurtosis"] == pytest.approx(scipy_stats.kurtosis(exact, axis=None), rel=1e-10)
    assert stats.outlier_fraction_error == {"outlier_fraction_3": 0.0, "outlier_fraction": 0.0}
    assert stats.quantile_error(1.0) == 0.0
    assert stats.group_rows()[5]["std"] == pytest.approx(exact[5].std(), rel=1e-12)


@pytest.mark.parametrize("bad", [[math.nan, math.inf], [-math.inf, math.nan]])
def test_nan_and_infinity_are_counted_and_change_nothing(bad):
    """The error counts both kinds; what was seen before stays as it was."""
    running = RunningStats(2)
    running.update(torch.randn(5, 2, 7))
    before = running.row()
    x = torch.randn(5, 2, 7)
    x[0, 0, :2] = torch.tensor(bad)
    with pytest.raises(NonFiniteError, match="1 NaN and 1 infinite among 70 values"):
        running.update(x)
    assert running.row() == before


def test_wrong_shapes_are_refused():
    """The group axis must hold as many groups as were announced; integers are not statistics of a network."""
    with pytest.raises(ValueError, match=r"\(outer, 3, inner\)"):
        RunningStats(3).update(torch.randn(2, 4, 5))
    with pytest.raises(ValueError, match="int64"):
        RunningStats(1).update(torch.arange(3))
    with pytest.raises(ValueError, match="2 groups into those of 3"):
        RunningStats(3).merge(RunningStats(2))


def test_nothing_seen_is_noted():
    """A site that never ran has count 0, NaN figures and a note, and takes over what it is merged with."""
    empty = RunningStats(2)
    empty.update(torch.empty(0, 2, 5))
    row = empty.row()
    assert (row["count"], row["note"]) == (0, "not observed")
    assert math.isnan(row["q50"])
    seen = RunningStats(2)
    seen.update(torch.randn(5, 2, 7))
    assert set(row) == set(seen.row())
    seen.merge(empty)
    empty.merge(seen)
    assert empty.row() == seen.row()


def test_zero_channels_are_noted():
    """Where most channels are all zero the range ratio has no median to compare with: NaN and a note."""
    x = torch.randn(10, 4, 25)
    x[:, :3] = 0
    running = RunningStats(4)
    running.update(x)
    assert math.isnan(running.range_ratio())
    assert running.row()["note"] == "median channel is zero"


@settings(max_examples=25, deadline=None)
@example(seed=1496, mean=0.0, cuts=[0], order=list(range(12)))  # the median lies between values of other signs
@given(
    seed=st.integers(0, 2**31),
    mean=st.sampled_from([0.0, 1.0, 100.0]),
    cuts=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    order=st.permutations(range(12)),
)
def test_any_split_or_order_of_the_same_batches(seed, mean, cuts, order):
    """Counts, min and max are the same to the bit, moments to 1e-9; the histogram keeps its counts and its bound."""
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(6, 3, 50, generator=generator) * (1 + i) + mean for i in range(12)]
    whole = RunningStats(3)
    for batch in batches:
        whole.update(batch)
    bounds = [0, *sorted(cuts), 12]
    merged = RunningStats(3)
    for start, stop in pairwise(bounds):
        worker = RunningStats(3)
        for index in order[start:stop]:
            worker.update(batches[index])
        merged.merge(pickle.loads(pickle.dumps(worker)))
    one, other = whole.row(), merged.row()
    for name in ("count", "min", "max"):
        assert one[name] == other[name]
    for name in ("mean", "std", "abs_mean", "skewness", "excess_kurtosis"):
        assert other[name] == pytest.approx(one[name], rel=1e-9, abs=1e-9)
    assert [g["max"] for g in whole.group_rows()] == [g["max"] for g in merged.group_rows()]
    exact = torch.cat(batches).double().numpy()
    assert merged.histogram.count == exact.size
    for name, probability in QUANTILES.items():
        expected, *between = (np.quantile(exact, probability, method=m) for m in ("linear", "lower", "higher"))
        slack = max(merged.quantile_error(v) for v in (other[name], *between))
        assert abs(other[name] - expected) <= slack + 1e-12


def test_histograms_of_one_centre_add_exactly():
    """Merged histograms equal the histogram of all values, bin by bin, and the bins hold what numpy finds in them."""
    x = sample("gaussian")
    whole, first, second = (FloatHistogram(0.5) for _ in range(3))
    for histogram, values in ((whole, x), (first, x[:123_456]), (second, x[123_456:])):
        histogram.add(count_distances(values, 0.5))
    first.merge(second)
    for merged, direct in zip(first.bins(), whole.bins(), strict=True):
        np.testing.assert_array_equal(merged, direct)
    left, right, count = whole.bins(per_octave=8)
    assert count.sum() == MILLION
    assert (np.diff(left) > 0).all()
    wide = np.argsort(count)[-20:]
    values = (x - 0.5).double().numpy() + 0.5
    for i in wide:
        assert abs(((values >= left[i]) & (values < right[i])).sum() - count[i]) <= 2  # values on an edge


def test_histogram_rows_cover_all_values():
    """Rows ascend, do not overlap, count every value, and lie around [min, max]."""
    running = streamed(sample("sparse").view(10, 1, -1), 1, 2)
    rows = running.histogram_rows()
    left, right, count = (np.array(column) for column in zip(*rows, strict=True))
    assert count.sum() == MILLION
    assert (left[1:] >= right[:-1]).all()
    assert left[0] <= running.row()["min"]
    assert right[-1] >= running.row()["max"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_figures():
    """The accelerator's blocks are larger, the figures the same within the stated error."""
    x = sample("student_t5").view(125, GROUPS, 1000)
    here, there = streamed(x, GROUPS, 2).row(), streamed(x.cuda(), GROUPS, 2).row()
    assert there["excess_kurtosis"] == pytest.approx(here["excess_kurtosis"], abs=3e-4)
    assert [there[name] for name in QUANTILES] == [here[name] for name in QUANTILES]
