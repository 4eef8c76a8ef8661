"""The integer grid: closed forms and laws of fake quantization."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.errors import InputError
from quant.functional import dequantize, fake_quantize, quant_range, quantize, to_groups
from quant.scheme import QuantScheme

BIT_WIDTHS = [1, 2, 3, 4, 5, 6, 7, 8, 16]
LEARNED = [(b, signed) for b in BIT_WIDTHS for signed in (True, False) if (b, signed) != (1, True)]


@pytest.mark.parametrize(
    ("bit_width", "signed", "expected"),
    [(1, True, (-1, 1)), (1, False, (0, 1)), (2, True, (-2, 1)), (4, True, (-8, 7)), (4, False, (0, 15)),
     (16, True, (-32768, 32767))],
)  # fmt: skip
def test_quant_range_is_the_two_complement_range(bit_width, signed, expected):
    """Signed codes are two's complement, unsigned start at 0, one signed bit is binary."""
    assert quant_range(bit_width, signed) == expected


@pytest.mark.parametrize(("bit_width", "signed"), LEARNED)
def test_fake_quantize_equals_the_closed_form_in_float64(bit_width, signed):
    """The formula s * round(clip((x - o) / s, Q_N, Q_P)) + o, as numpy computes it in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 50, generator=generator, dtype=torch.float64)
    scale = torch.rand(4, generator=generator, dtype=torch.float64) * 0.3 + 0.05
    offset = torch.randn(4, generator=generator, dtype=torch.float64)
    low, high = quant_range(bit_width, signed)
    s, o = scale.numpy()[None, :, None], offset.numpy()[None, :, None]
    expected = np.round(np.clip((x.numpy() - o) / s, low, high)) * s + o
    result = fake_quantize(x, scale, offset, bit_width, signed)
    np.testing.assert_allclose(result.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bit_width", BIT_WIDTHS)
@pytest.mark.parametrize("signed", [True, False])
def test_fake_quantize_is_idempotent_with_at_most_2_to_the_b_codes(bit_width, signed):
    """A value already on the grid is its own quantization, and there are no more values than codes."""
    x, scale = torch.randn(1, 1, 2000, generator=torch.Generator().manual_seed(1)), torch.tensor([0.1])
    once = fake_quantize(x, scale, None, bit_width, signed)
    torch.testing.assert_close(fake_quantize(once, scale, None, bit_width, signed), once)
    assert once.unique().numel() <= 2**bit_width


@settings(deadline=None)
@given(
    scale=st.floats(0.01, 10),
    bit_width=st.sampled_from([2, 3, 4, 8]),
    values=st.lists(st.floats(-1, 1), min_size=1, max_size=50),
)
def test_error_inside_the_range_is_at_most_half_a_step(scale, bit_width, values):
    """Inside [s Q_N, s Q_P] rounding moves a value by at most s / 2."""
    low, high = quant_range(bit_width, True)
    x = (torch.tensor(values, dtype=torch.float64) * min(-low, high) * scale).reshape(1, 1, -1)
    error = (fake_quantize(x, torch.tensor([scale], dtype=torch.float64), None, bit_width, True) - x).abs().max()
    assert error <= scale / 2 * (1 + 1e-9)


@given(seed=st.integers(0, 100), bit_width=st.sampled_from([2, 3, 4, 7]))
def test_one_more_bit_at_half_the_scale_never_raises_the_error_inside_the_range(seed, bit_width):
    """The finer grid contains the coarser one."""
    x = torch.randn(1, 1, 500, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scale = torch.tensor([0.25], dtype=torch.float64)
    coarse = (fake_quantize(x, scale, None, bit_width, True) - x).square().sum()
    fine = (fake_quantize(x, scale / 2, None, bit_width + 1, True) - x).square().sum()
    assert fine <= coarse + 1e-12


def test_codes_are_integers_and_dequantize_gives_their_values():
    """Codes times scale plus offset is what fake_quantize returns."""
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(2))
    scale, offset = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([-0.5, 0.0, 0.5])
    codes = quantize(x, scale, offset, 4, False)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= 0
    assert codes.max() <= 15
    assert torch.equal(dequantize(codes, scale, offset), fake_quantize(x, scale, offset, 4, False))


def test_to_groups_puts_each_head_in_its_own_group():
    """Activations (B, H, N, d) along axis 1, and a projection's input columns (C, H d) along axis 1."""
    activation = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    grouped = to_groups(activation, 1, 3)
    assert torch.equal(grouped[1, 2], activation[1, 2].flatten())
    weight = torch.arange(6 * 12).reshape(6, 12)
    grouped = to_groups(weight, 1, 3)
    assert torch.equal(grouped[4, 1], weight[4, 4:8])


def test_to_groups_refuses_a_split_that_does_not_come_out():
    """A head count that does not divide the axis is a mistake of the caller."""
    with pytest.raises(ValueError, match="cannot be split into 5"):
        to_groups(torch.zeros(6, 12), 1, 5)


def test_scheme_refuses_bit_widths_outside_the_allowed_ones():
    """1 to 8 and 16, nothing else."""
    with pytest.raises(InputError, match="bit-width 9"):
        QuantScheme(bit_width=9, signed=True)


def reference(x, scale, offset, bit_width, signed):
    """LSQ's formula in float64 with straight-through rounding, its mask an explicit constant, for torch to derive."""
    low, high = quant_range(bit_width, signed)
    v = (x - offset[:, None]) / scale[:, None]
    inside = ((v > low) & (v < high)).detach()
    bound = torch.where(v >= high, float(high), float(low)).to(x)
    rounded = v + (v.round() - v).detach()
    return torch.where(inside, rounded, bound) * scale[:, None] + offset[:, None]


@pytest.mark.parametrize(("bit_width", "signed"), LEARNED)
def test_gradients_of_x_scale_and_offset_are_those_of_lsq(bit_width, signed):
    """Against torch's own derivative of the straight-through formula in float64, values on the bounds included."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, 60, generator=generator, dtype=torch.float64) * 2
    scale = torch.rand(3, generator=generator, dtype=torch.float64) * 0.4 + 0.1
    offset = torch.randn(3, generator=generator, dtype=torch.float64) * 0.3
    low, high = quant_range(bit_width, signed)
    x[0, :, 0], x[0, :, 1] = low * scale + offset, high * scale + offset  # exactly on the bounds: outside
    weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    gradients = []
    for function in (fake_quantize, reference):
        leaves = [t.clone().requires_grad_() for t in (x, scale, offset)]
        (function(*leaves, bit_width, signed) * weight).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    assert (gradients[0][0] == 0).any()


def test_the_scale_gradient_in_closed_form():
    """round(v) - v inside, Q_N below, Q_P above, for three values worked by hand."""
    scale = torch.tensor([0.5], requires_grad=True)
    x = torch.tensor([[[0.6, -10.0, 10.0]]], requires_grad=True)
    fake_quantize(x, scale, None, 4, True).backward(torch.tensor([[[1.0, 10.0, 100.0]]]))
    assert scale.grad.item() == pytest.approx((1 - 1.2) * 1 + (-8) * 10 + 7 * 100, rel=1e-6)
    assert x.grad.flatten().tolist() == [1, 0, 0]


def test_one_signed_bit_in_closed_form():
    """The sign times the scale, 0 to the positive side; x passes up to the scale and no further, the scale gets signs.

    Exactly at the scale the gradient passes, |x| <= scale (Hubara et al., NeurIPS 2016, arXiv:1602.02830).
    """
    x = torch.tensor([[[-3.0, -0.75, -0.25, 0.25, 0.5, 1.25, 1.5]]], requires_grad=True)
    scale, offset = (torch.tensor([value], requires_grad=True) for value in (1.0, 0.25))
    out = fake_quantize(x, scale, offset, 1, True)
    assert out.flatten().tolist() == [-0.75, -0.75, -0.75, 1.25, 1.25, 1.25, 1.25]
    out.backward(torch.tensor([[[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]]]))
    assert x.grad.flatten().tolist() == [0, 2, 4, 8, 16, 32, 0]
    assert scale.grad.item() == -1 - 2 - 4 + 8 + 16 + 32 + 64
    assert offset.grad.item() == 1 + 64


@pytest.mark.parametrize("shape", [(1, 1, 300_000), (1, 400, 500), (300, 3, 200), (3, 2, 90_000)])
def test_blocks_leave_no_trace(shape):
    """The number of threads decides how large a block is: the same value and gradients to the bit, strided or not."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(*shape[:2], 2 * shape[2], generator=generator)[..., ::2]
    weight = torch.randn(shape, generator=generator)
    results = []
    try:
        for threads, values in ((1, x), (1, x.contiguous()), (7, x)):
            torch.set_num_threads(threads)
            scale, offset = torch.linspace(0.25, 0.75, shape[1]), torch.linspace(-1, 1, shape[1])
            leaves = [t.detach().requires_grad_() for t in (values, scale, offset)]
            out = fake_quantize(*leaves, 4, True)
            out.backward(weight)
            results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    finally:
        torch.set_num_threads(1)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))
    assert torch.equal(results[0][0], dequantize(quantize(x, scale, offset, 4, True), scale, offset))


def test_its_gradients_have_no_gradient():
    """A second derivative is refused rather than wrong."""
    x, scale = torch.randn(1, 1, 5, requires_grad=True), torch.ones(1, requires_grad=True)
    (first,) = torch.autograd.grad(fake_quantize(x, scale, None, 4, True).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
