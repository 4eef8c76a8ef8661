"""Training terms against loops over bins in float64, finite differences and scipy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from quant.functional import dequantize
from quant.regularizers import cosine_ramp, dampening_loss, kurtosis_loss, oscillation_bin_loss

RANGES = {(1, True): (-1, 1), (2, True): (-2, 1), (3, True): (-4, 3), (4, True): (-8, 7), (8, True): (-128, 127),
          (1, False): (0, 1), (2, False): (0, 3), (3, False): (0, 7), (4, False): (0, 15)}  # fmt: skip


def example(bit_width, signed, *, offset, seed=0, shape=(3, 4, 40), dtype=torch.float64):
    """A weight (outer, groups, inner) with scales of which some clip, an offset if asked, values on the bounds."""
    generator = torch.Generator().manual_seed(seed)
    groups = shape[1]
    weight = torch.randn(shape, generator=generator, dtype=dtype)
    scale = (torch.rand(groups, generator=generator, dtype=dtype) + 0.5) * 3 / 2**bit_width
    shift = torch.randn(groups, generator=generator, dtype=dtype) * 0.3 if offset else None
    return weight, scale, shift


def by_loops(weight, scale, offset, bit_width, signed):
    """Distance, variance and the gradient of each in the weight, by loops over groups and codes in NumPy float64."""
    low, high = RANGES[bit_width, signed]
    w, s = weight.detach().double().numpy(), scale.double().numpy()
    o = np.zeros_like(s) if offset is None else offset.double().numpy()
    distance = variance = 0.0
    by_distance, by_variance = np.zeros_like(w), np.zeros_like(w)
    for group in range(w.shape[1]):
        values = w[:, group]
        v = (values - o[group]) / s[group]
        inside = (v > low) & (v < high)
        clipped = np.clip(values, s[group] * low + o[group], s[group] * high + o[group])
        binary = signed and bit_width == 1
        codes = (np.where(v >= 0, 1, -1) if binary else np.rint(np.clip(v, low, high))).astype(int)
        for code in range(low, high + 1):
            members = codes == code
            error = clipped[members] - (s[group] * code + o[group])
            distance += (error**2).sum()
            by_distance[:, group][members] = 2 * error * inside[members]
            if members.sum() >= 2:
                mean, count = clipped[members].mean(), members.sum()
                variance += ((clipped[members] - mean) ** 2).sum() / count
                by_variance[:, group][members] = 2 * (clipped[members] - mean) / count * inside[members]
    return distance, variance, by_distance, by_variance


def gradients(weight, *arguments):
    """The gradient of the distance and of the variance part in the weight."""
    leaf = weight.clone().requires_grad_()
    loss = oscillation_bin_loss(leaf, *arguments)
    return [torch.autograd.grad(part, leaf, retain_graph=True)[0].numpy() for part in loss]


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(("bit_width", "signed"), RANGES)
def test_bin_loss_and_its_gradients_equal_the_loops(bit_width, signed, offset):
    """Both parts and both gradients are those of the definition, bin by bin, weights beyond the clip included."""
    weight, scale, shift = example(bit_width, signed, offset=offset)
    arguments = (scale, shift, bit_width, signed)
    distance, variance, by_distance, by_variance = by_loops(weight, *arguments)
    loss = oscillation_bin_loss(weight, *arguments)
    assert loss.distance.item() == pytest.approx(distance, rel=1e-12)
    assert loss.variance.item() == pytest.approx(variance, rel=1e-12)
    for ours, expected in zip(gradients(weight, *arguments), (by_distance, by_variance), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)
        assert (expected == 0).any()
        assert (expected != 0).any()


@pytest.mark.parametrize("shape", [(1, 1, 150_000), (1, 300, 400), (700, 3, 50), (2, 2, 40_000)])
def test_large_weights_equal_the_loops_too(shape):
    """Weights that are computed in several blocks: a row in parts, some groups at a time, rows of all groups."""
    weight, *arguments = *example(3, True, offset=True, shape=shape), 3, True
    distance, variance, by_distance, by_variance = by_loops(weight, *arguments)
    leaf = weight.requires_grad_()
    loss = oscillation_bin_loss(leaf, *arguments)
    assert loss.distance.item() == pytest.approx(distance, rel=1e-10)
    assert loss.variance.item() == pytest.approx(variance, rel=1e-10)
    (3 * loss.distance + 50 * loss.variance).backward()
    np.testing.assert_allclose(leaf.grad.numpy(), 3 * by_distance + 50 * by_variance, rtol=1e-9, atol=1e-12)
    (dampened,) = torch.autograd.grad(dampening_loss(leaf, *arguments), leaf)
    np.testing.assert_allclose(dampened.numpy(), by_distance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(("bit_width", "signed"), [(1, True), (2, True), (3, True), (4, False)])
def test_bin_loss_agrees_with_finite_differences(bit_width, signed, offset):
    """The variance part too, through the mean of its bin, though that is a constant in the code."""
    weight, scale, shift = example(bit_width, signed, offset=offset, shape=(2, 3, 12))
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda w: tuple(oscillation_bin_loss(w, scale, shift, bit_width, signed)), weight)
    assert torch.autograd.gradcheck(lambda w: dampening_loss(w, scale, shift, bit_width, signed), weight)


@pytest.mark.parametrize(("values", "code"), [((0.75, 1.0, 5.0), 1), ((-1.75, -2.0, -9.0), -2)])
def test_bin_loss_worked_by_hand(values, code):
    """Two bits, step 1: clipped weights count in their bin's mean but get no gradient, one at the bound neither."""
    weight, towards = torch.tensor([[values]]), 1 if code < 0 else -1
    loss = oscillation_bin_loss(weight, torch.ones(1), None, 2, True)
    assert loss.distance.item() == pytest.approx(0.25**2)
    assert loss.variance.item() == pytest.approx(((1 / 6) ** 2 + 2 * (1 / 12) ** 2) / 3)
    by_distance, by_variance = gradients(weight, torch.ones(1), None, 2, True)
    np.testing.assert_allclose(by_distance.flatten(), [towards * 2 * 0.25, 0, 0])
    np.testing.assert_allclose(by_variance.flatten(), [towards * 2 * (1 / 6) / 3, 0, 0], rtol=1e-6)


@pytest.mark.parametrize(("bit_width", "least"), [(3, 0.05), (4, 0.2)])
def test_no_bin_is_lost_to_rounding(bit_width, least):
    """Bins found by w_q / s == n lose all their weights at many scales in float32; bins by integer code lose none."""
    low, high = RANGES[bit_width, True]
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(300, generator=generator) * 0.1 + 0.01
    codes = torch.arange(low, high + 1).repeat_interleave(10).float()
    jitter = (torch.rand(1, 300, len(codes), generator=generator) - 0.5) * 0.9
    weight = (codes + jitter).clamp(low + 0.01, high - 0.01) * scale[:, None]
    on_grid = dequantize(codes.expand(1, 300, -1), scale, None)
    lost = (on_grid / scale[:, None] != codes).any(dim=2)[0]
    assert lost.float().mean() > least  # the defect is there to be met
    for group in range(300):
        one = weight[:, group : group + 1], scale[group : group + 1], None, bit_width, True
        assert oscillation_bin_loss(*one).variance.item() == pytest.approx(by_loops(*one)[1], rel=1e-5)


def test_a_million_float32_weights_lose_no_precision():
    """Value and gradients of one large group are within float32 rounding of float64 (a float32 scatter: 2e-4)."""
    weight, _, _ = example(4, True, offset=False, shape=(1, 1, 1_000_000), dtype=torch.float32)
    arguments = (torch.tensor([0.3]), None, 4, True)
    distance, variance, by_distance, by_variance = by_loops(weight, *arguments)
    loss = oscillation_bin_loss(weight, *arguments)
    assert loss.distance.item() == pytest.approx(distance, rel=1e-5)
    assert loss.variance.item() == pytest.approx(variance, rel=1e-5)
    for ours, expected in zip(gradients(weight, *arguments), (by_distance, by_variance), strict=True):
        same_bin = np.abs(ours - expected) < 1e-5 * np.abs(expected).max()
        assert (~same_bin).sum() <= 5  # a weight on a bin's edge may round to either side


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 300, 400), (1, 1, 150_000), (30, 3, 50)])
def test_half_precision_weights_are_computed_in_float32(shape, dtype):
    """Values and gradients are those of float64, rounded once at the end: bins of many groups are numbered exactly."""
    weight, scale, shift = example(4, True, offset=True, shape=shape, dtype=torch.float32)
    leaf, arguments = weight.to(dtype).requires_grad_(), (scale, shift, 4, True)
    distance, variance, by_distance, by_variance = by_loops(leaf, *arguments)
    loss, dampened = oscillation_bin_loss(leaf, *arguments), dampening_loss(leaf, *arguments)
    assert {x.dtype for x in (*loss, dampened)} == {torch.float32}
    assert [x.item() for x in (*loss, dampened)] == pytest.approx([distance, variance, distance], rel=1e-5)
    for part, expected in ((loss.distance, by_distance), (loss.variance, by_variance), (dampened, by_distance)):
        (ours,) = torch.autograd.grad(2**12 * part, leaf, retain_graph=True)  # far from what is 0 in float16
        assert ours.dtype == dtype
        off = np.abs(ours.double().numpy() / 2**12 - expected) > 2**-8 * np.abs(expected) + 1e-5 * expected.max()
        assert off.sum() <= 5  # a weight on a bin's edge may round to either side


def test_kurtosis_of_half_precision_weights_is_computed_in_float32():
    """The value is that of the same weights in float64, the gradient in the weight's own type."""
    weight = layers()[0].bfloat16().requires_grad_()
    loss = kurtosis_loss([weight])
    assert loss.item() == pytest.approx(kurtosis_loss([weight.detach().double()]).item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, weight)
    expected = weight.detach().double().requires_grad_()
    kurtosis_loss([expected]).backward()
    torch.testing.assert_close(gradient.double(), expected.grad, rtol=2**-7, atol=1e-5)


@given(seed=st.integers(0, 1000), bit_width=st.sampled_from([1, 2, 3, 4]), signed=st.booleans())
def test_weights_on_the_grid_cost_nothing(seed, bit_width, signed):
    """Every weight on its grid point: no distance, no variance, no gradient, but for rounding of w / scale."""
    weight, scale, offset = example(bit_width, signed, offset=True, seed=seed, dtype=torch.float32)
    low, high = RANGES[bit_width, signed]
    codes = torch.randint(low, high + 1, weight.shape, generator=torch.Generator().manual_seed(seed)).float()
    if (bit_width, signed) == (1, True):
        codes = codes.sign() + (codes == 0)  # binary has no 0
    arguments = (scale, offset, bit_width, signed)
    on_grid = dequantize(codes, scale, offset)
    rounding = 2 * torch.finfo(torch.float32).eps * float((on_grid.abs() + offset.abs()[:, None]).max())
    assert all(0 <= part.item() <= weight.numel() * rounding**2 for part in oscillation_bin_loss(on_grid, *arguments))
    assert all((abs(gradient) <= 4 * rounding).all() for gradient in gradients(on_grid, *arguments))


def test_the_variance_is_about_the_mean_of_the_bin_and_not_its_centre():
    """Weights of a bin that lie together off its centre have a distance and no variance; so has a lone weight."""
    together = torch.full((1, 1, 6), 0.3)
    alone = torch.tensor([[[0.3, 1.3, 2.3, -1.7]]])
    for weight in (together, alone):
        loss = oscillation_bin_loss(weight, torch.ones(1), None, 3, True)
        assert loss.distance.item() == pytest.approx(0.09 * weight.numel(), rel=1e-5)
        assert loss.variance.item() == 0


@given(seed=st.integers(0, 1000), bit_width=st.sampled_from([2, 3, 4]))
def test_order_within_a_group_does_not_matter(seed, bit_width):
    """A permutation of a group's weights, over outer and inner, leaves the loss and permutes the gradient."""
    weight, scale, _ = example(bit_width, True, offset=False, seed=seed)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(seed))

    def permuted(tensor):
        return tensor.transpose(0, 1).reshape(4, 120)[:, order].reshape(4, 3, 40).transpose(0, 1)

    arguments = (scale, None, bit_width, True)
    torch.testing.assert_close(
        torch.stack(oscillation_bin_loss(permuted(weight), *arguments)),
        torch.stack(oscillation_bin_loss(weight, *arguments)),
        rtol=1e-10,
        atol=0,
    )
    by_variance = torch.from_numpy(gradients(weight, *arguments)[1])
    np.testing.assert_allclose(gradients(permuted(weight), *arguments)[1], permuted(by_variance), atol=1e-12)


@given(seed=st.integers(0, 1000), bit_width=st.sampled_from([1, 2, 3, 4]), signed=st.booleans())
def test_groups_do_not_mix(seed, bit_width, signed):
    """The loss of a tensor is the sum of the losses of its groups, each alone with its own scale and offset."""
    weight, scale, offset = example(bit_width, signed, offset=True, seed=seed)
    alone = [
        torch.stack(oscillation_bin_loss(weight[:, g : g + 1], scale[g : g + 1], offset[g : g + 1], bit_width, signed))
        for g in range(4)
    ]
    whole = torch.stack(oscillation_bin_loss(weight, scale, offset, bit_width, signed))
    torch.testing.assert_close(torch.stack(alone).sum(0), whole, rtol=1e-10, atol=1e-14)


@given(seed=st.integers(0, 1000), factor=st.floats(1e-3, 1e3))
def test_loss_grows_with_the_square_of_the_unit(seed, factor):
    """Weights and scales in another unit change the loss by the unit's square."""
    weight, scale, offset = example(3, True, offset=True, seed=seed)
    loss = torch.stack(oscillation_bin_loss(weight, scale, offset, 3, True))
    scaled = torch.stack(oscillation_bin_loss(weight * factor, scale * factor, offset * factor, 3, True))
    torch.testing.assert_close(scaled, loss * factor**2, rtol=1e-8, atol=0)


@pytest.mark.parametrize(("bit_width", "signed"), [(1, True), (3, True), (4, False)])
def test_scale_and_offset_get_no_gradient(bit_width, signed):
    """The terms move weights alone, through the clip neither: many weights here lie beyond it."""
    weight, scale, offset = example(bit_width, signed, offset=True)
    for tensor in (weight, scale, offset):
        tensor.requires_grad_()
    loss = oscillation_bin_loss(weight, scale, offset, bit_width, signed)
    (sum(loss) + dampening_loss(weight, scale, offset, bit_width, signed)).backward()
    assert weight.grad is not None
    assert scale.grad is None
    assert offset.grad is None


def test_a_weight_of_nan_makes_the_loss_nan():
    """A training that diverged shows in the loss, where the loop looks; it is no failure inside the term."""
    weight, scale, _ = example(4, True, offset=False)
    weight[1, 2, 3] = math.nan
    assert all(part.isnan() for part in oscillation_bin_loss(weight, scale, None, 4, True))


def test_an_infinite_weight_lies_beyond_the_clip():
    """It counts like any weight beyond the last grid point, as the quantizer takes it."""
    weight, scale, _ = example(4, True, offset=False)
    losses = []
    for value in (1e6, math.inf):
        weight[1, 2, 3] = value
        losses.append(torch.stack(oscillation_bin_loss(weight, scale, None, 4, True)))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)


@pytest.mark.parametrize(("bit_width", "signed"), RANGES)
def test_dampening_is_the_distance_part(bit_width, signed):
    """Nagel's term is the squared distance of the clipped weights to the grid, with the loops' gradient."""
    weight, scale, offset = example(bit_width, signed, offset=True)
    distance, _, by_distance, _ = by_loops(weight, scale, offset, bit_width, signed)
    loss = dampening_loss(weight.requires_grad_(), scale, offset, bit_width, signed)
    loss.backward()
    assert loss.item() == pytest.approx(distance, rel=1e-12)
    np.testing.assert_allclose(weight.grad.numpy(), by_distance, rtol=1e-9, atol=1e-12)


def layers(seed=0):
    """Weights of three layers of different law and shape, in float64."""
    generator = np.random.default_rng(seed)
    drawn = generator.standard_normal((6, 5)), generator.standard_t(4, (4, 3, 3)) + 2, generator.random(50) * 1e-3
    return [torch.from_numpy(values) for values in drawn]


def test_kurtosis_loss_agrees_with_scipy():
    """The mean over layers of (scipy's raw kurtosis - 1.8)^2."""
    expected = np.mean([(scipy_stats.kurtosis(w.numpy(), axis=None, fisher=False) - 1.8) ** 2 for w in layers()])
    assert kurtosis_loss(layers()).item() == pytest.approx(expected, rel=1e-10)


def test_kurtosis_loss_of_a_large_layer_is_that_of_the_plain_formula():
    """Value and gradient of 200,000 weights about a mean of 5, computed in several blocks, against torch's own."""
    weight = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).add(5)
    gradients = []
    for plain in (False, True):
        leaf = weight.clone().requires_grad_()
        z = (leaf - leaf.mean()) / leaf.std(correction=0)
        loss = (z.pow(4).mean() - 1.8).square() if plain else kurtosis_loss([leaf])
        loss.backward()
        gradients.append((loss.detach(), leaf.grad))
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-15)


def test_kurtosis_loss_agrees_with_finite_differences():
    """The gradient in every layer's weights."""
    weights = [w.requires_grad_() for w in layers()[:2]]
    assert torch.autograd.gradcheck(lambda *w: kurtosis_loss(w), weights)


def test_kurtosis_loss_prefers_the_uniform_distribution():
    """Near 0 for a uniform weight, near (3 - 1.8)^2 for a Gaussian one, in float32."""
    generator = torch.Generator().manual_seed(0)
    assert kurtosis_loss([torch.rand(200_000, generator=generator)]).item() < 1e-3
    gaussian = kurtosis_loss([torch.randn(200_000, generator=generator)]).item()
    assert gaussian == pytest.approx(1.2**2, rel=0.1)


@settings(max_examples=30)
@given(factor=st.floats(1e-8, 1e6), shift=st.floats(-3, 3), seed=st.integers(0, 100))
def test_kurtosis_loss_ignores_unit_and_shift(factor, shift, seed):
    """Kurtosis has no unit: small weights are no exception."""
    moved = [(w + shift) * factor for w in layers(seed)[:2]]
    torch.testing.assert_close(kurtosis_loss(moved), kurtosis_loss(layers(seed)[:2]), rtol=1e-8, atol=0)


def test_a_layer_of_zeros_leaves_the_kurtosis_loss_finite():
    """It has no shape to correct: no NaN, no gradient, and the other layers keep theirs."""
    zeros, other = torch.zeros(3, 3, requires_grad=True), layers()[0].requires_grad_()
    loss = kurtosis_loss([zeros.double(), other])
    of_zeros, of_other = torch.autograd.grad(loss, (zeros, other))
    assert math.isfinite(loss.item())
    assert not of_zeros.any()
    assert of_other.abs().max() > 0


def test_kurtosis_loss_needs_a_weight():
    """The mean over no layer is not a number."""
    with pytest.raises(ValueError, match="at least one weight tensor"):
        kurtosis_loss([])


def test_ramp_is_zero_then_half_a_cosine():
    """0 up to the start, 0.5 half way from there to the end, 1 at the end and past it."""
    assert [cosine_ramp(progress) for progress in (-1, 0, 0.1, 0.25)] == [0, 0, 0, 0]
    assert cosine_ramp(0.5) == pytest.approx((1 - math.cos(math.pi / 3)) / 2)
    assert cosine_ramp(0.625) == pytest.approx(0.5)
    assert [cosine_ramp(progress) for progress in (1, 1.01)] == [1, 1]
    assert [cosine_ramp(progress, start=1) for progress in (0.5, 0.999)] == [0, 0]
    assert cosine_ramp(0.5, start=0) == pytest.approx(0.5)


@given(early=st.floats(0, 1), late=st.floats(0, 1), start=st.floats(0, 0.99))
def test_ramp_never_falls(early, late, start):
    """Later in the training the factor is at least as large, and always within 0 and 1."""
    early, late = sorted((early, late))
    assert 0 <= cosine_ramp(early, start) <= cosine_ramp(late, start) <= 1
