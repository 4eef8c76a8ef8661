"""First scales: against a fine search, and on degenerate data."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.choices import ESTIMATORS
from quant.functional import fake_quantize
from quant.range_estimators import estimate_range
from quant.scheme import QuantScheme


def squared_error(x, estimate, scheme):
    """Squared error of each group."""
    x_q = fake_quantize(x[None], estimate.scale, estimate.offset, scheme.bit_width, scheme.signed)[0]
    return (x_q - x).square().sum(dim=1)


@pytest.mark.parametrize("bit_width", [2, 3, 4, 8])
def test_least_squares_is_within_two_percent_of_a_fine_search(bit_width):
    """On Gaussian and heavy-tailed groups no scale of a grid of 4,000 has a much smaller error."""
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(1, 20_000, generator=generator)
    x = torch.cat((gaussian, gaussian**3))
    scheme = QuantScheme(bit_width=bit_width, signed=True)
    ours = squared_error(x, estimate_range(x, scheme, "mse"), scheme)
    best = torch.full((2,), float("inf"))
    full = x.abs().amax(dim=1) / scheme.quant_max
    for share in torch.linspace(0.001, 1.2, 1500):
        x_q = fake_quantize(x[None], full * share, None, bit_width, True)[0]
        best = torch.minimum(best, (x_q - x).square().sum(dim=1))
    assert (ours <= best * 1.02).all(), (ours / best).tolist()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), bit_width=st.sampled_from([2, 3, 4, 8]), offset=st.booleans())
def test_least_squares_is_never_worse_than_min_max(seed, bit_width, offset):
    """Min-max is the first point of its search."""
    x = torch.nn.functional.gelu(torch.randn(3, 400, generator=torch.Generator().manual_seed(seed)) * 2)
    scheme = QuantScheme(bit_width=bit_width, signed=not offset, offset=offset)
    mse = squared_error(x, estimate_range(x, scheme, "mse"), scheme)
    minmax = squared_error(x, estimate_range(x, scheme, "minmax"), scheme)
    assert (mse <= minmax * (1 + 1e-5) + 1e-9).all()


def test_an_offset_keeps_the_tail_of_gelu():
    """Unsigned codes without an offset lose every negative value of GELU; with one the error falls."""
    x = torch.nn.functional.gelu(torch.randn(1, 50_000, generator=torch.Generator().manual_seed(3)))
    plain = QuantScheme(bit_width=4, signed=False)
    shifted = QuantScheme(bit_width=4, signed=False, offset=True)
    estimate = estimate_range(x, shifted, "mse")
    assert estimate.offset is not None
    assert estimate.offset.item() < -0.05
    assert squared_error(x, estimate, shifted) < 0.8 * squared_error(x, estimate_range(x, plain, "mse"), plain)


@pytest.mark.parametrize("bit_width", [2, 4, 8])
@pytest.mark.parametrize("estimator", ["minmax", "mse"])
def test_signed_and_unsigned_codes_with_an_offset_are_the_same_grids(estimator, bit_width):
    """Both start at the same error: the offset of signed codes belongs to the middle of the range, not to its end."""
    x = torch.nn.functional.gelu(torch.randn(2, 2000, generator=torch.Generator().manual_seed(0)) * 2)
    errors = []
    for signed in (False, True):
        scheme = QuantScheme(bit_width=bit_width, signed=signed, offset=True)
        errors.append(squared_error(x, estimate_range(x, scheme, estimator), scheme))
    torch.testing.assert_close(errors[1], errors[0], rtol=1e-3, atol=0)


def test_one_signed_bit_with_an_offset_is_the_mean_and_the_mean_deviation():
    """The offset of a plan is there, and no other scale about it has a smaller squared error."""
    x = torch.randn(2, 500, generator=torch.Generator().manual_seed(0)) * 0.1 + 3
    scheme = QuantScheme(bit_width=1, signed=True, offset=True)
    found = estimate_range(x, scheme, "mse")
    torch.testing.assert_close(found.offset, x.mean(dim=1))
    best = squared_error(x, found, scheme)
    for share in (0.9, 0.99, 1.01, 1.1):
        assert (squared_error(x, found._replace(scale=found.scale * share), scheme) > best).all()


def test_minmax_covers_every_value_and_percentile_leaves_out_the_tails():
    """The grid of min-max ends at the largest magnitude; one outlier in 10,000 does not move percentile much."""
    x = torch.linspace(-1, 1, 10_000)[None].clone()
    x[0, 5000] = 100
    scheme = QuantScheme(bit_width=8, signed=True)
    assert estimate_range(x, scheme, "minmax").scale.item() == pytest.approx(100 / 127)
    assert estimate_range(x, scheme, "percentile").scale.item() == pytest.approx(1 / 127, rel=0.01)


def test_one_signed_bit_is_binary_with_the_mean_magnitude():
    """The least-squares scale of {-s, s} is s = mean |x|."""
    x = torch.randn(2, 1000, generator=torch.Generator().manual_seed(4))
    estimate = estimate_range(x, QuantScheme(bit_width=1, signed=True), "minmax")
    torch.testing.assert_close(estimate.scale, x.abs().mean(dim=1))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_degenerate_group_takes_the_median_scale(estimator):
    """All-zero channels and channels near 1e-13 borrow their scale and are counted; the others keep theirs."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(5, 200, generator=generator)
    x[1] = 0
    x[3] *= 1e-13
    scheme = QuantScheme(bit_width=4, signed=True)
    estimate = estimate_range(x, scheme, estimator)
    sound = estimate_range(x[[0, 2, 4]], scheme, estimator)
    assert estimate.degenerate == 2
    torch.testing.assert_close(estimate.scale[[0, 2, 4]], sound.scale)
    assert estimate.scale[1] == estimate.scale[3] == sound.scale.median()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("value", [0.0, 0.7])
def test_a_constant_tensor_gives_a_usable_scale(estimator, value):
    """Scales stay positive and finite, and an all-zero tensor stays zero."""
    x = torch.full((1, 100), value)
    for scheme in (QuantScheme(bit_width=3, signed=True), QuantScheme(bit_width=3, signed=False, offset=True)):
        estimate = estimate_range(x, scheme, estimator)
        assert torch.isfinite(estimate.scale).all()
        assert (estimate.scale > 0).all()
        torch.testing.assert_close(squared_error(x, estimate, scheme), torch.zeros(1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("bit_width", [2, 3, 4])
def test_an_offset_is_searched_together_with_the_scale(bit_width):
    """On GELU outputs of small inputs no start of a dense grid of (scale, offset) ends with a much smaller error."""
    generator = torch.Generator().manual_seed(6)
    x = torch.nn.functional.gelu(torch.randn(1, 20_000, generator=generator) ** 3 * 0.7 - 0.3)
    scheme = QuantScheme(bit_width=bit_width, signed=False, offset=True)
    ours = squared_error(x, estimate_range(x, scheme, "mse"), scheme)
    best = torch.tensor([float("inf")])
    for offset in torch.linspace(x.min().item() * 1.2, 0.1, 25):
        for scale in torch.logspace(-2, 0.5, 60) * x.max() / scheme.quant_max:
            x_q = fake_quantize(x[None], scale[None], offset[None], bit_width, False)[0]
            best = torch.minimum(best, (x_q - x).square().sum(dim=1))
    assert ours <= best * 1.05


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_weights_of_values_are_repetitions(estimator):
    """A value of weight 3 counts as three of them."""
    x = torch.randn(1, 300, generator=torch.Generator().manual_seed(7))
    weights = torch.arange(300) % 3 + 1
    scheme = QuantScheme(bit_width=3, signed=True)
    weighted = estimate_range(x, scheme, estimator, weights.float())
    repeated = estimate_range(x.repeat_interleave(weights, dim=1), scheme, estimator)
    torch.testing.assert_close(weighted.scale, repeated.scale, rtol=1e-4, atol=0)
