"""Benchmarks follow the code that they time: the same calls on networks that take a second."""

import json

from click.testing import CliRunner

from benchmarks import qat_step, sensitivity, statistics


def test_statistics_are_timed():
    """Both passes and the observer beside them run, and weights and tables are timed apart."""
    subject = statistics.Subject("test_resnet", 1)
    for work in (subject.plain, subject.layers, subject.everything, subject.histogram_observer):
        work()
    assert len(subject.once) == 1
    assert subject.once[0] > 0


def test_the_sweep_equals_the_plain_loop():
    """The last line is the ratio; the figures of both sides are compared inside."""
    done = CliRunner().invoke(
        sensitivity.main, ["test_vit", "--images", "2", "--batch-size", "2", "--every", "9"], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert json.loads(done.output.splitlines()[-1])["test_vit"] > 0


def test_a_quantized_step_is_timed(monkeypatch):
    """A step of ours quantizes and moves the weights."""
    monkeypatch.setitem(qat_step.MODELS, "tiny_attention_obr", "test_vit")
    step = qat_step.Step("tiny_attention_obr", "ours", 2)
    before = next(iter(step.model.parameters())).detach().clone()
    assert step() > 0
    assert step.quantizers
    assert not before.equal(next(iter(step.model.parameters())))
