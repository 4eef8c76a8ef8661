"""Laws of the ready-made tasks: divergences, probes, figures without labels, errors of metrics."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import tasks
from analysis.scoring import jackknife, jackknife_error, scores
from analysis.task import Task

SHAPES = {
    "classification": (3, 5), "multilabel": (3, 4), "segmentation": (3, 4, 2, 3), "regression": (4, 3, 2),
    "embedding": (3, 6), "detection": (4, 3, 5), "language_modeling": (3, 4, 6),
}  # fmt: skip


def outputs(name, seed, dtype=torch.float64):
    """Random outputs of a shape that the task takes."""
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2


def ready(name, reference):
    """The task, prepared where it is relative to the float network's outputs."""
    task: Task = getattr(tasks, name)()
    return task.prepared([reference])


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.floats(1e-3, 30))
def test_divergence_is_zero_for_equals_and_never_negative(name, seed, size):
    """For any outputs, one value a sample."""
    reference = outputs(name, seed)
    other = reference + size * outputs(name, seed + 1)
    task = ready(name, reference)
    same, moved = task.divergence(reference, reference), task.divergence(other, reference)
    assert same.shape == moved.shape == (len(reference),)
    torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-12)
    assert (moved >= 0).all()
    assert moved.sum() > 0


@pytest.mark.parametrize("name", SHAPES)
def test_the_probes_second_moment_is_the_curvature_of_the_divergence(name):
    """E (u . d)^2 / 2 over probes u equals divergence(r + eps d, r) / eps^2 as eps goes to 0, each sample alone."""
    reference, direction, eps = outputs(name, 0), outputs(name, 1), 1e-4
    task = ready(name, reference)
    assert task.probe is not None
    expected = sum(task.divergence(reference + s * eps * direction, reference) for s in (1, -1)) / (2 * eps**2)
    generator, squares = torch.Generator().manual_seed(2), []
    for _ in range(2000):
        x = reference.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(task.probe(x, generator), x)
        squares.append((gradient * direction).flatten(1).sum(1).square() / 2)
    found = torch.stack(squares)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - expected).abs() < 5 * error + 1e-3 * expected).all()


@pytest.mark.parametrize("name", [*SHAPES])
def test_without_labels_figures_are_nan_and_divergence_is_not(name):
    """A batch of inputs alone has neither loss nor score; language modelling takes its targets from the tokens."""
    reference = outputs(name, 0)
    task = ready(name, reference)
    batch = torch.zeros(len(reference), 4, dtype=torch.long if name == "language_modeling" else torch.float32)
    loss, score = scores(task, [reference], [batch])
    labelled = name == "language_modeling"
    assert loss.shape == score.shape == (len(reference),)
    assert bool(loss.isfinite().all()) is labelled
    assert bool(score.isfinite().all()) is labelled
    assert task.divergence(reference, reference).isfinite().all()


def test_unknown_labels_of_single_samples_are_nan():
    """A class index of -1, a picture without a counted pixel, a text without a counted token."""
    x = outputs("classification", 0)
    assert tasks.classification().loss(x, (x, torch.tensor([0, -1, 4]))).isnan().tolist() == [False, True, False]
    masks = torch.zeros(3, 2, 3, dtype=torch.long)
    masks[1] = 255
    x = outputs("segmentation", 0)
    for figure in (tasks.segmentation().loss, tasks.segmentation().score):
        assert figure(x, (x, masks)).isnan().tolist() == [False, True, False]
    tokens = torch.zeros(3, 4, dtype=torch.long)
    tokens[1] = -100
    x = outputs("language_modeling", 0)
    for figure in (tasks.language_modeling().loss, tasks.language_modeling().score):
        assert figure(x, (torch.zeros(3, 4, dtype=torch.long), tokens)).isnan().tolist() == [False, True, False]


def test_mean_iou_is_that_of_sets_of_pixels():
    """By its definition, class by class, ignored pixels left out."""
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(2, 3, 4, 4, generator=generator), torch.randint(3, (2, 4, 4), generator=generator))
        for _ in range(3)
    ]
    pairs[0][1][0, 0] = 255
    found = tasks.segmentation().metric([x for x, _ in pairs], [(x, y) for x, y in pairs])
    answers = np.concatenate([x.argmax(1).numpy().ravel() for x, _ in pairs])
    targets = np.concatenate([y.numpy().ravel() for _, y in pairs])
    answers, targets = answers[targets != 255], targets[targets != 255]
    ious = [((answers == k) & (targets == k)).sum() / ((answers == k) | (targets == k)).sum() for k in range(3)]
    assert found == pytest.approx(np.mean(ious))


@pytest.mark.parametrize("groups", [2, 7, 10])
def test_the_jackknife_of_a_mean_is_its_standard_error(groups):
    """With one value a group both formulas give s / sqrt(n); the values left out are counted by hand too."""
    values = np.random.default_rng(groups).normal(size=groups)
    task = Task(
        divergence=lambda x, r: (x - r).abs(),
        metric=lambda outputs, batches: float(torch.cat(outputs).mean()),
    )
    outputs = [torch.tensor([v]) for v in values]
    found = jackknife(task, outputs, outputs)
    assert found[0] == pytest.approx(values.mean())
    assert found[1:] == pytest.approx([np.delete(values, i).mean() for i in range(groups)])
    assert jackknife_error(found) == pytest.approx(values.std(ddof=1) / math.sqrt(groups))
    assert math.isnan(jackknife_error(found[:2]))
