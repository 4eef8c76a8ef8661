"""The compiled pass gives the figures of the one that runs on any device, on any shape and any float32 values."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from analysis import running_stats
from analysis.running_stats import RunningStats
from analysis.statistics.float_histogram import count_distances
from analysis.statistics.fused_pass import fused_pass
from analysis.statistics.moments import group_moments
from analysis.statistics.shared_tensors import SharedTensors

SHAPES = [
    (3, 5, 4000),
    (16, 12, 49),
    (1000, 33, 1),
    (700, 3, 4),
    (40, 7, 15),
    (1, 1, 300_000),
    (1, 6, 1),
    (2, 4, 65_600),
]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_passes_agree(shape, threads):
    """Counts to the last one, extremes exactly, moments within the stated errors of float64, for rows and columns."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) * torch.rand(shape[1], 1, generator=generator) + 2
    moments, counts = fused_pass(x.numpy(), 0.5, threads)
    np.testing.assert_array_equal(counts, count_distances(x, 0.5))
    exact = group_moments(x.double())
    for name in ("count", "minimum", "maximum"):
        np.testing.assert_array_equal(getattr(moments, name), getattr(exact, name))
    np.testing.assert_allclose(moments.mean, exact.mean, rtol=1e-7)
    np.testing.assert_allclose(moments.abs_sum, exact.abs_sum, rtol=1e-6)
    np.testing.assert_allclose(moments.m2, exact.m2, rtol=1e-6, atol=1e-9)
    figures, expected = moments.figures(), exact.figures()
    np.testing.assert_allclose(figures["excess_kurtosis"], expected["excess_kurtosis"], atol=3e-4)
    np.testing.assert_allclose(figures["skewness"], expected["skewness"], atol=3e-4)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.integers(1, 6000),
    mean=st.sampled_from([0.0, 1.0, -100.0, 1e4]),
    exponent=st.integers(-100, 100),
    zeros=st.floats(0, 0.99),
)
def test_any_scale_and_mean(seed, length, mean, exponent, zeros):
    """Variance and kurtosis hold from 2^-100 to 2^100, with a far mean, many zeros, and rows cut into pieces."""
    generator = np.random.default_rng(seed)
    values = (generator.standard_normal(length) + mean) * (generator.random(length) >= zeros)
    x = (values * 2.0**exponent).astype(np.float32)
    moments, _ = fused_pass(x.reshape(1, 1, -1), 0.0, 1)
    exact = x.astype(np.float64)
    figures = moments.figures()
    assert figures["min"][0] == exact.min()
    assert figures["max"][0] == exact.max()
    assert figures["mean"][0] == pytest.approx(exact.mean(), rel=1e-7, abs=1e-7 * exact.std())
    assert figures["std"][0] ** 2 == pytest.approx(exact.var(), rel=1e-6, abs=1e-14 * float(np.abs(exact).max()) ** 2)
    if exact.std() > 1e-3 * np.abs(exact).max():
        assert figures["excess_kurtosis"][0] == pytest.approx(scipy_stats.kurtosis(exact), rel=1e-5, abs=3e-4)


@pytest.mark.parametrize("inner", [1, 4000])
@pytest.mark.parametrize(
    ("value", "share"), [(13.1, 0.1), (13.1, 0.5), (-1.7, 0.1), (1_000_003.0, 0.001), (1e-30, 0.2)]
)
def test_values_one_step_of_float32_apart_keep_their_kurtosis(value, share, inner):
    """A nearly constant channel: rounding the mean to float32 is as large as the spread itself."""
    generator = np.random.default_rng(0)
    x = np.full(4000, value, dtype=np.float32)
    x[generator.random(4000) < share] = np.nextafter(np.float32(value), np.float32(np.inf))
    moments, _ = fused_pass(x.reshape(-1, 1, inner) if inner > 1 else x.reshape(4000, 1, 1), 0.0, 1)
    kurtosis = scipy_stats.kurtosis(x.astype(np.float64) - value)
    assert moments.figures()["excess_kurtosis"][0] == pytest.approx(kurtosis, rel=1e-4, abs=3e-4)


@pytest.mark.parametrize("shape", [(5000, 96, 1), (7, 24, 4000)])
def test_the_number_of_threads_changes_nothing(shape):
    """Threads begin where pieces begin: the same moments within 1e-9, also of skewness."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).exp().numpy()
    alone, _ = fused_pass(x, 0.0, 1)
    for threads in (2, 3, 7):
        together, _ = fused_pass(x, 0.0, threads)
        for name, figure in alone.figures().items():
            np.testing.assert_allclose(together.figures()[name], figure, rtol=1e-9, atol=1e-9)


def test_compiling_and_loading_give_the_same_bits(tmp_path):
    """The first run compiles, the second loads what numba has kept: not a digit differs."""
    script = (
        "import numpy as np; from analysis.statistics.fused_pass import fused_pass\n"
        "generator = np.random.default_rng(0)\n"
        "for shape in ((1, 1, 1792), (700, 5, 1)):\n"
        "    moments, _ = fused_pass(generator.standard_normal(shape).astype(np.float32), 0.0, 1)\n"
        "    print([getattr(moments, name).tolist() for name in moments.__dataclass_fields__])"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    runs = [
        subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert list(tmp_path.rglob("*.nbc"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(2, 3, 500), (300, 20, 1)])
def test_what_is_not_finite_is_left_to_the_other_pass(bad, shape):
    """None is returned, wherever the value stands."""
    for place in (0, math.prod(shape) // 2, math.prod(shape) - 1):
        x = torch.randn(shape)
        x.view(-1)[place] = bad
        assert fused_pass(x.numpy(), 0.0, 1) is None


def test_sums_beyond_float32_still_give_figures():
    """Values near the end of float32, whose sum overflows, are measured by the other pass."""
    x = torch.full((1, 1, 5000), 3e38)
    x[..., ::3] = -3e38
    running = RunningStats(1)
    running.update(x)
    exact = x.double().numpy()
    assert running.count == 5000
    assert running.row()["mean"] == pytest.approx(exact.mean(), rel=1e-9)
    assert running.row()["std"] == pytest.approx(exact.std(), rel=1e-6)
    assert running.row()["excess_kurtosis"] == pytest.approx(scipy_stats.kurtosis(exact, axis=None), abs=3e-4)


def test_a_tensor_that_passes_two_sites_is_measured_once(monkeypatch):
    """The same object gives both sites the same figures by one measurement; one changed in place is measured again."""
    measured = []
    update = RunningStats.update
    monkeypatch.setattr(RunningStats, "update", lambda self, x: measured.append(self) or update(self, x))
    shared, first, second, third = SharedTensors(), RunningStats(8), RunningStats(8), RunningStats(8)
    for seed in range(3):
        x = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(seed))
        expected = RunningStats(8)
        shared.update(first, x, 1, 8)
        shared.update(second, x, 1, 8)
        x.relu_()
        shared.update(third, x, 1, 8)
        update(expected, x.reshape(4, 8, 36))
        assert third.row()["min"] == expected.row()["min"] == 0
    assert measured == [first, third] * 3
    assert second.row() == first.row()
    assert second.group_rows() == first.group_rows()
    assert second.histogram_rows() == first.histogram_rows()
    assert first.row()["min"] < 0


@pytest.mark.parametrize("change", [lambda x: x.data.mul_(100), lambda x: x.numpy().__imul__(100),
                                    lambda x: setattr(x, "data", x.data * 100)])  # fmt: skip
def test_a_tensor_that_was_changed_behind_torch_s_back_is_measured_anew(change):
    """Writes through .data and numpy raise no version: the values tell."""
    shared, before, after = SharedTensors(), RunningStats(8), RunningStats(8)
    x = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(0))
    shared.update(before, x, 1, 8)
    change(x)
    shared.update(after, x, 1, 8)
    assert after.row()["std"] == pytest.approx(100 * before.row()["std"], rel=1e-6)


def test_tensors_of_inference_mode_are_measured_each_time():
    """They have no version; nothing is shared, nothing fails."""
    shared, first, second = SharedTensors(), RunningStats(8), RunningStats(8)
    with torch.inference_mode():
        x = torch.randn(4, 8, 6)
        shared.update(first, x, 1, 8)
        shared.update(second, x.mul_(2), 1, 8)
    assert second.row()["std"] == pytest.approx(2 * first.row()["std"], rel=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_like_values_keep_their_absolute_mean(share):
    """Thousands of equal values: the float32 sum of magnitudes does not drift."""
    generator = np.random.default_rng(0)
    x = np.where(generator.random((8, 4, 4096)) < share, 0, 0.6).astype(np.float32)
    moments, _ = fused_pass(x, 0.0, 1)
    exact = np.abs(x.astype(np.float64)).mean((0, 2))
    np.testing.assert_allclose(moments.figures()["abs_mean"], exact, rtol=1e-6)


def test_a_numba_that_does_not_work_is_told_and_done_without(monkeypatch, capsys):
    """A numba of another numpy, or without a place for its files: a warning, and the same figures."""
    x = torch.randn(4, 8, 600, generator=torch.Generator().manual_seed(0))
    expected, without = RunningStats(8), RunningStats(8)
    expected.update(x)
    monkeypatch.setitem(sys.modules, "analysis.statistics.fused_pass", None)
    running_stats._compiled_pass.cache_clear()
    without.update(x)
    running_stats._compiled_pass.cache_clear()
    assert "numba cannot be used" in capsys.readouterr().err
    assert without.row()["excess_kurtosis"] == pytest.approx(expected.row()["excess_kurtosis"], abs=3e-4)
    assert without.histogram_rows() == expected.histogram_rows()


def test_a_tensor_whose_channels_lie_elsewhere_is_measured_anew():
    """The same tensor by channel and by position has other groups: nothing is shared."""
    shared, by_channel, by_row = SharedTensors(), RunningStats(8), RunningStats(6)
    x = torch.randn(4, 8, 6)
    shared.update(by_channel, x, 1, 8)
    shared.update(by_row, x, 2, 6)
    assert len(by_row.group_rows()) == 6
    assert by_row.group_rows()[2]["mean"] == pytest.approx(float(x[:, :, 2].mean()), abs=1e-6)
