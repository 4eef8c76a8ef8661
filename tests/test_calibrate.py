"""Calibration samples: the number of batches does not move the scale."""

import pytest
import torch

from quant.calibrate import ActivationSample
from quant.functional import fake_quantize
from quant.range_estimators import estimate_range
from quant.scheme import QuantScheme


def sampled(x, batches, estimator, bit_width):
    """The scale estimated from the sample of `x` in that many batches."""
    sample = ActivationSample(0, 1, batches)
    for part in x.chunk(batches):
        sample.update(part)
    return estimate_range(sample.values, QuantScheme(bit_width=bit_width, signed=True), estimator, sample.weights)


@pytest.mark.parametrize("bit_width", [3, 4, 8])
def test_the_error_does_not_depend_on_the_number_of_batches(bit_width):
    """The scale from a sample of 3 million values, in 1 or 64 batches, is next to as good as that from all of them."""
    x = torch.randn(256, 6, 64, 32, generator=torch.Generator().manual_seed(0))
    scheme = QuantScheme(bit_width=bit_width, signed=True)

    def error(estimate):
        return (fake_quantize(x.reshape(1, 1, -1), estimate.scale, None, bit_width, True) - x.reshape(1, 1, -1)).norm()

    best = error(estimate_range(x.reshape(1, -1), scheme, "mse"))
    for batches in (1, 64):
        assert error(sampled(x, batches, "mse", bit_width)) <= 1.05 * best


def test_percentiles_do_not_depend_on_the_number_of_batches():
    """The extremes of 64 batches stand for 128 values, not for the outermost part of the sample."""
    x = torch.randn(256, 6, 64, 32, generator=torch.Generator().manual_seed(0))
    whole = estimate_range(x.reshape(1, -1), QuantScheme(bit_width=4, signed=True), "percentile").scale
    for batches in (1, 64):
        assert sampled(x, batches, "percentile", 4).scale.item() == pytest.approx(whole.item(), rel=0.06)


def test_min_max_covers_the_extremes_of_every_batch():
    """The extremes are kept whatever the sample."""
    x = torch.randn(64, 3, 100, 100, generator=torch.Generator().manual_seed(1))
    assert sampled(x, 8, "minmax", 8).scale.item() == pytest.approx(x.abs().max().item() / 127)


def test_small_activations_are_kept_whole():
    """Below the size of the sample every value is there once, with weight 1."""
    x = torch.randn(4, 2, 5)
    sample = ActivationSample(1, 2, 1)
    sample.update(x)
    assert torch.equal(sample.values.sort(dim=1).values, x.transpose(0, 1).reshape(2, -1).sort(dim=1).values)
    assert torch.equal(sample.weights, torch.ones(20))


def test_weights_add_up_to_the_number_of_values():
    """Sampled values stand for the others, extremes for themselves."""
    sample = ActivationSample(1, 4, 10)
    for _ in range(2):
        sample.update(torch.randn(64, 4, 100, 10))
    assert sample.weights.sum().item() == pytest.approx(2 * 64 * 1000)
    assert sample.values.shape[1] == len(sample.weights)
