"""The learned quantizer: its start, its two gradients with their factor, and what training and copying leave of it."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from quant.functional import quant_range
from quant.insertion import attach_quantizers_, latent_weights
from quant.quantizer import MIN_SCALE_RATIO, LSQQuantizer, Quantizer
from quant.range_estimators import estimate_range
from quant.scheme import QuantScheme
from tests.test_prepare import opened
from tests.test_sensitivity import model_of


def calibrated(x, *, bit_width, signed=True, offset=False, axis=0, groups=1, granularity="per_tensor"):
    """A quantizer fitted to `x` by least squares."""
    scheme = QuantScheme(bit_width=bit_width, signed=signed, offset=offset, granularity=granularity)
    values = x.reshape(1, -1) if groups == 1 else x.movedim(axis, 0).reshape(groups, -1)
    scale, zero, _ = estimate_range(values, scheme, "mse")
    return Quantizer(scheme=scheme, scale=scale, offset=zero, axis=axis, groups=groups)


def by_hand(x, g, scale, offset, bit_width, signed, factor):
    """Value and gradients of LSQ and LSQ+ of one group, element by element in float64 (METHODS: Esser; Bhalgat)."""
    low, high = quant_range(bit_width, signed)
    value, to_x, to_scale, to_offset = [], [], 0.0, 0.0
    for xi, gi in zip(np.asarray(x, dtype=np.float64), np.asarray(g, dtype=np.float64), strict=True):
        v = (xi - offset) / scale
        inside = low < v < high
        code = min(max(np.rint(v), low), high)
        value.append(scale * code + offset)
        to_x.append(gi if inside else 0.0)
        to_scale += gi * (np.rint(v) - v if inside else (low if v <= low else high))
        to_offset += 0.0 if inside else gi
    return np.array(value), np.array(to_x), to_scale * factor, to_offset * factor


@given(
    seed=st.integers(0, 2**31), bit_width=st.sampled_from([2, 3, 4, 5, 6, 7, 8]), signed=st.booleans(),
    offset=st.booleans(), exponent=st.integers(-6, 3), elements=st.integers(1, 10**6),
)  # fmt: skip
def test_value_and_gradients_are_those_of_the_papers(seed, bit_width, signed, offset, exponent, elements):
    """Forward and the gradients of x, scale and offset equal the closed form in float64; 1/sqrt(N Q_P) on the last two.

    Scale and offset are exact in binary, so that values exactly at the bounds are among them.
    """
    generator = np.random.default_rng(seed)
    scheme = QuantScheme(bit_width=bit_width, signed=signed, offset=offset)
    scale, shift = 2.0**exponent, int(generator.integers(-64, 64)) / 64 * 2.0**exponent if offset else 0.0
    v = generator.integers(scheme.quant_min - 3, scheme.quant_max + 4, 60) + generator.uniform(-0.45, 0.45, 60)
    v[:4] = [scheme.quant_min, scheme.quant_max, scheme.quant_min + 0.25, scheme.quant_max - 0.25]
    x = torch.tensor(v * scale + shift, dtype=torch.float32, requires_grad=True)
    g = torch.tensor(generator.normal(size=60), dtype=torch.float32)
    start = Quantizer(
        scheme=scheme, scale=torch.tensor([scale]), offset=torch.tensor([shift]) if offset else None, axis=0, groups=1
    )
    quantizer = LSQQuantizer(start, elements_per_scale=elements)
    out = quantizer(x)
    (out * g).sum().backward()
    factor = 1 / np.sqrt(elements * scheme.quant_max)
    value, to_x, to_scale, to_offset = by_hand(x.detach(), g, scale, shift, bit_width, signed, factor)
    np.testing.assert_allclose(out.detach(), value, rtol=1e-6, atol=1e-6 * scale)
    np.testing.assert_allclose(x.grad, to_x, rtol=1e-6)
    terms = factor * np.abs(g.numpy()).sum() * 2**bit_width
    np.testing.assert_allclose(quantizer.scale.grad.item(), to_scale, rtol=1e-5, atol=1e-6 * terms)
    if offset:
        np.testing.assert_allclose(quantizer.offset.grad.item(), to_offset, rtol=1e-5, atol=1e-6 * terms)


def test_exactly_at_the_bounds_no_gradient_passes():
    """Inside is strict: at Q_N and Q_P the gradient of x is 0 and that of the scale Q_N and Q_P."""
    scheme = QuantScheme(bit_width=3, signed=True)
    start = Quantizer(scheme=scheme, scale=torch.tensor([0.5]), offset=None, axis=0, groups=1)
    for x, expected in ((-2.0, -4), (1.5, 3)):  # -4 * 0.5 and 3 * 0.5: exact in binary
        quantizer = LSQQuantizer(start, elements_per_scale=1)
        value = torch.tensor([x], requires_grad=True)
        quantizer(value).sum().backward()
        assert value.grad.item() == 0
        assert quantizer.scale.grad.item() == pytest.approx(expected / np.sqrt(3))


@pytest.mark.parametrize(("bit_width", "signed", "offset"), [(1, True, False), (2, True, False), (4, False, True),
                                                              (8, False, False)])  # fmt: skip
def test_it_starts_where_calibration_ended(bit_width, signed, offset):
    """The learned quantizer gives bit for bit what the calibrated one gave; at most 2^bits values a group."""
    x = torch.randn(8, 6, 5, 4, generator=torch.Generator().manual_seed(1)).abs() - (0.1 if offset else 0)
    start = calibrated(
        x, bit_width=bit_width, signed=signed, offset=offset, axis=1, groups=6, granularity="per_channel"
    )
    quantizer = LSQQuantizer(start, elements_per_scale=20)
    assert torch.equal(quantizer(x), start(x))
    assert all(len(group.unique()) <= 2**bit_width for group in quantizer(x).movedim(1, 0).flatten(1))


def test_the_factor_does_not_depend_on_the_batch():
    """Twice the images with the same gradients: twice the gradient of the scale, since N counts one image."""
    x = torch.randn(4, 100, generator=torch.Generator().manual_seed(2))
    start = calibrated(x, bit_width=4)
    grads = []
    for batch in (x, torch.cat((x, x))):
        quantizer = LSQQuantizer(start, elements_per_scale=100)
        quantizer(batch).square().sum().backward()
        grads.append(quantizer.scale.grad.item())
    assert grads[1] == pytest.approx(2 * grads[0], rel=1e-5)


def test_the_scales_of_two_heads_diverge():
    """Each head has a scale of its own: heads of different spread are driven to different scales."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(16, 2, 9, 8, generator=generator) * torch.tensor([1.0, 5.0])[:, None, None]
    start = Quantizer(
        scheme=QuantScheme(bit_width=3, signed=True, granularity="per_head"), scale=torch.ones(2), offset=None, axis=1,
        groups=2,
    )  # fmt: skip
    quantizer = LSQQuantizer(start, elements_per_scale=72)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.5)
    before = (quantizer(x) - x).square().mean().item()
    for _ in range(200):
        optimizer.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        optimizer.step()
        quantizer.clamp_scale_()
    first, second = quantizer.scale.tolist()
    assert second > 2 * first
    assert (quantizer(x) - x).square().mean().item() < before


def test_the_scale_stays_above_a_share_of_its_start():
    """However far a step goes below 0, the scale is held at 1e-3 of where it began, group by group."""
    start = Quantizer(scheme=QuantScheme(bit_width=2, signed=True, granularity="per_channel"),
                      scale=torch.tensor([1e-6, 4.0]), offset=None, axis=0, groups=2)  # fmt: skip
    quantizer = LSQQuantizer(start, elements_per_scale=3)
    with torch.no_grad():
        quantizer.scale -= 10
    quantizer.clamp_scale_()
    torch.testing.assert_close(quantizer.scale.detach(), MIN_SCALE_RATIO * start.scale)


def test_scales_stay_float32_under_autocast():
    """Under bf16 the arithmetic and the gradient of the scale are float32; the result has the input's type."""
    x = torch.randn(32, 16)
    quantizer = LSQQuantizer(calibrated(x, bit_width=4), elements_per_scale=16)
    linear = nn.Linear(16, 4)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = linear(quantizer(x))
        again = quantizer(hidden)
    assert hidden.dtype == again.dtype == torch.bfloat16
    again.float().sum().backward()
    assert quantizer.scale.dtype == quantizer.scale.grad.dtype == torch.float32


def test_copies_and_loaded_states_are_the_same_quantizer():
    """A deep copy is independent; a state_dict brings scale, offset and floor."""
    x = torch.rand(64) - 0.05
    quantizer = LSQQuantizer(calibrated(x, bit_width=4, signed=False, offset=True), elements_per_scale=64)
    twin = copy.deepcopy(quantizer)
    with torch.no_grad():
        twin.scale *= 3
    assert not torch.equal(twin(x), quantizer(x))
    twin.load_state_dict(quantizer.state_dict())
    assert torch.equal(twin(x), quantizer(x))
    assert set(quantizer.state_dict()) == {"scale", "offset", "min_scale"}


def test_it_goes_through_pickle():
    """As a process that is started, or a whole saved model, needs it."""
    x = torch.rand(64) - 0.05
    start = calibrated(x, bit_width=4, signed=False, offset=True)
    quantizer = LSQQuantizer(start, elements_per_scale=64, gradient_scale="module", compiled=True)
    twin = pickle.loads(pickle.dumps(quantizer))
    twin.compiled = False
    assert torch.equal(twin(x), start(x))
    assert (twin.gradient_scale, quantizer.compiled) == ("module", True)


def test_distributed_training_averages_the_gradients_of_scales(tmp_path):
    """DistributedDataParallel takes a quantizer as any module: in a group of one the gradients are those without."""
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(5))
    quantizer = LSQQuantizer(calibrated(x, bit_width=3), elements_per_scale=16)
    twin = copy.deepcopy(quantizer)
    twin(x).square().sum().backward()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        nn.parallel.DistributedDataParallel(quantizer)(x).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(quantizer.scale.grad, twin.scale.grad)


@given(seed=st.integers(0, 2**31), bit_width=st.sampled_from([1, 2, 4, 8]), spread=st.floats(1e-3, 1e3))
def test_module_dependent_gradients_are_those_of_lsq_times_a_factor(seed, bit_width, spread):
    """1 / sqrt(Q_P ||w||_1) of each channel in place of 1 / sqrt(N Q_P): of scales alone, the weight's is the same."""
    weight = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed)) * torch.tensor([[1], [spread], [3.0]])
    start = calibrated(weight, bit_width=bit_width, groups=3, granularity="per_channel")
    gradients = {}
    for name in ("lsq", "module"):
        leaf, quantizer = (
            weight.clone().requires_grad_(),
            LSQQuantizer(start, elements_per_scale=20, gradient_scale=name),
        )
        quantizer(leaf).square().sum().backward()
        gradients[name] = leaf.grad, quantizer.scale.grad
    factor = torch.sqrt(20 / weight.double().abs().sum(dim=1)).float()
    assert torch.equal(gradients["module"][0], gradients["lsq"][0])
    torch.testing.assert_close(gradients["module"][1], gradients["lsq"][1] * factor, rtol=1e-4, atol=0)


def test_the_module_dependent_factor_follows_the_weight():
    """The norm is that of the step's own weight, a constant to its gradient; a channel of zeros gives no NaN."""
    weight = torch.tensor([[1.0, -3.0], [0.0, 0.0]])
    scheme = QuantScheme(bit_width=3, signed=True, granularity="per_channel")
    start = Quantizer(scheme=scheme, scale=torch.tensor([1.0, 1.0]), offset=None, axis=0, groups=2)
    quantizer = LSQQuantizer(start, elements_per_scale=2, gradient_scale="module")
    assert quantizer.gradient_factor(weight[None]).tolist() == pytest.approx([1 / np.sqrt(3 * 4), 0])
    assert quantizer.gradient_factor(4 * weight[None]).tolist() == pytest.approx([1 / np.sqrt(3 * 16), 0])
    quantizer(weight).sum().backward()
    assert quantizer.scale.grad.tolist() == [0, 0]  # both weights lie on the grid


def test_module_dependent_gradients_are_for_weights():
    """`attach_quantizers_` gives them to weights alone; activations keep LSQ's."""
    model = model_of("vit")
    net, quantizers = opened(model)
    attach_quantizers_(net, quantizers, gradient_scale="module")
    weights = [id(quantizer) for _, quantizer in latent_weights(model).values()]
    learned = [module for module in model.modules() if isinstance(module, LSQQuantizer)]
    assert len(learned) > len(weights) > 0
    assert all((q.gradient_scale == "module") == (id(q) in weights) for q in learned)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused(scale):
    """The scale starts finite and above 0."""
    scheme = QuantScheme(bit_width=4, signed=True)
    start = Quantizer(scheme=scheme, scale=torch.tensor([scale]), offset=None, axis=0, groups=1)
    with pytest.raises(ValueError, match="finite and above 0"):
        LSQQuantizer(start, elements_per_scale=1)
