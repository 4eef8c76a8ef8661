"""Logit distillation against the definition of the Kullback-Leibler divergence."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant.distill import distillation_loss
from quant.errors import InputError


def logits(seed: int, batch: int = 4, classes: int = 5, spread: float = 3.0) -> torch.Tensor:
    """Random logits (batch, classes) in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, classes, generator=generator, dtype=torch.float64) * spread


def softmax(row: list[float], temperature: float) -> list[float]:
    """Probabilities of one row of logits."""
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def by_definition(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> float:
    """T^2 times the mean over images of sum_c p_T log(p_T / p_S), in plain Python."""
    total = 0.0
    for student_row, teacher_row in zip(student.tolist(), teacher.tolist(), strict=True):
        p_student, p_teacher = softmax(student_row, temperature), softmax(teacher_row, temperature)
        total += sum(t * math.log(t / s) for s, t in zip(p_student, p_teacher, strict=True))
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_loss_is_the_definition(temperature):
    """T^2 KL(teacher || student), the mean over the batch, the teacher first."""
    student, teacher = logits(0), logits(1)
    loss = distillation_loss(student, teacher, temperature=temperature)
    assert loss.item() == pytest.approx(by_definition(student, teacher, temperature), rel=1e-12)
    assert by_definition(student, teacher, temperature) != pytest.approx(by_definition(teacher, student, temperature))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_gradient_is_the_difference_of_probabilities(temperature):
    """It is T (p_S - p_T) / batch in the logits; gradcheck agrees; nothing flows into the teacher."""
    student, teacher = logits(2).requires_grad_(), logits(3).requires_grad_()
    distillation_loss(student, teacher, temperature=temperature).backward()
    rows = zip(student.tolist(), teacher.tolist(), strict=True)
    pairs = [(softmax(s, temperature), softmax(t, temperature)) for s, t in rows]
    expected = [[temperature * (s - t) / 4 for s, t in zip(*pair, strict=True)] for pair in pairs]
    torch.testing.assert_close(student.grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert teacher.grad is None
    assert torch.autograd.gradcheck(lambda x: distillation_loss(x, teacher, temperature=temperature), (student,))


@given(seed=st.integers(0, 1000), temperature=st.floats(0.1, 20), spread=st.floats(0, 30))
def test_distilling_a_model_from_itself_costs_nothing(seed, temperature, spread):
    """KL of a distribution with itself is 0, at any temperature, and so is the gradient."""
    student = logits(seed, spread=spread).requires_grad_()
    loss = distillation_loss(student, student, temperature=temperature)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == 0
    assert gradient.abs().max() < 1e-14 * max(temperature, 1)


@given(seed=st.integers(0, 1000), temperature=st.floats(0.1, 20), shift=st.floats(-100, 100))
def test_loss_is_never_negative_and_ignores_a_common_shift(seed, temperature, shift):
    """KL is at least 0, and adding a number to every logit of an image changes no probability."""
    student, teacher = logits(seed), logits(seed + 1)
    loss = distillation_loss(student, teacher, temperature=temperature)
    assert loss.item() > 0
    shifted = distillation_loss(student + shift, teacher - shift, temperature=temperature)
    torch.testing.assert_close(shifted, loss, rtol=1e-9, atol=1e-9)


def test_half_precision_logits_are_computed_in_float32():
    """The loss of bfloat16 logits is that of the same numbers in float32: under autocast nothing more is rounded."""
    student, teacher = logits(4).bfloat16(), logits(5).bfloat16()
    loss = distillation_loss(student, teacher, temperature=3.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_definition(student.double(), teacher.double(), 3.0), rel=1e-5)


@pytest.mark.parametrize(
    ("student", "teacher"), [((4, 5), (4, 6)), ((4, 5), (1, 5)), ((5,), (5,)), ((4, 5, 2), (4, 5))]
)
def test_other_shapes_are_refused(student, teacher):
    """Logits of other classes or batches do not broadcast in silence, and there is an axis of classes."""
    with pytest.raises(InputError, match="one shape"):
        distillation_loss(torch.zeros(student), torch.zeros(teacher), temperature=1.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    """A division by 0, or a student drawn to the teacher's least likely class, is no distillation."""
    with pytest.raises(InputError, match="temperature"):
        distillation_loss(logits(0), logits(1), temperature=temperature)


def test_positions_are_averaged_like_samples():
    """The loss of a segmentation is that of its pixels as rows, by the definition, the classes on axis 1."""
    student, teacher = logits(6, batch=24), logits(7, batch=24)
    maps = [x.reshape(2, 3, 4, 5).permute(0, 3, 1, 2) for x in (student, teacher)]
    assert distillation_loss(*maps).item() == pytest.approx(by_definition(student, teacher, 1.0), rel=1e-12)


@pytest.mark.parametrize("key", ["logits", "out"])
def test_logits_are_found_in_a_dictionary(key):
    """Of either network; without them the error says what came."""
    student, teacher = logits(8), logits(9)
    loss = distillation_loss({"aux": 0, key: student}, {key: teacher})
    assert loss == distillation_loss(student, teacher)
    with pytest.raises(InputError, match="`teacher` is a dict"):
        distillation_loss(student, {"other": teacher})
