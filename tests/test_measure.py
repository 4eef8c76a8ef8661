"""Measurements of live networks: any inputs and outputs, the model left as it was, refusals."""

import copy
from contextlib import suppress

import pandas as pd
import pytest
import torch
from torch import nn

import analysis
from analysis import tasks

CLASSES = 3


class Pair(nn.Module):
    """Two inputs by name, a dictionary out."""

    def __init__(self):
        super().__init__()
        self.image, self.numbers = nn.Conv2d(1, 4, 3), nn.Linear(5, 4)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, image, numbers):
        """Logits of both."""
        joined = torch.cat([self.image(image).relu().mean((2, 3)), self.numbers(numbers).relu()], dim=1)
        return {"logits": self.head(joined)}


class Segmenter(nn.Module):
    """Logits of each pixel under `out`, as torchvision's."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Conv2d(4, CLASSES, 1)

    def forward(self, x):
        """A dictionary."""
        return {"out": self.head(self.body(x))}


class Tokens(nn.Module):
    """A small language model."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens):
        """Logits of the next token."""
        return self.head(self.body(self.embed(tokens)))


def classifier(convolution, pool):
    """A network over signals, images or volumes."""
    return nn.Sequential(convolution, nn.ReLU(), pool(1), nn.Flatten(), nn.Linear(4, CLASSES))


def labelled(*shape):
    """Two batches of which the last is smaller."""
    return [(torch.randn(n, *shape), torch.arange(n) % CLASSES) for n in (6, 3)]


def case(name):
    """A network, its data and its task."""
    torch.manual_seed(0)
    if name == "segmentation":
        return (
            Segmenter(),
            [(torch.randn(n, 2, 6, 6), torch.randint(CLASSES, (n, 6, 6))) for n in (4, 2)],
            tasks.segmentation(),
        )
    if name == "two inputs":
        data = [{"image": torch.randn(n, 1, 6, 6), "numbers": torch.randn(n, 5), "labels": torch.arange(n) % CLASSES}
                for n in (6, 3)]  # fmt: skip
        return Pair(), data, None
    if name == "signal":
        return classifier(nn.Conv1d(2, 4, 3), nn.AdaptiveAvgPool1d), labelled(2, 12), None
    if name == "volume":
        return classifier(nn.Conv3d(1, 4, 3), nn.AdaptiveAvgPool3d), labelled(1, 4, 5, 6), None
    if name == "embedding":
        return (
            classifier(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d),
            [x for x, _ in labelled(1, 6, 6)],
            tasks.embedding(),
        )
    return Tokens(), [torch.randint(11, (n, 7)) for n in (4, 2)], tasks.language_modeling()


CASES = ("segmentation", "two inputs", "signal", "volume", "embedding", "tokens")


@pytest.mark.parametrize("name", CASES)
def test_any_network_is_measured_estimated_and_left_as_it_was(name):
    """Every site has finite figures over all samples, also of a smaller last batch; nothing in the model moves."""
    model, data, task = case(name)
    model.train()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    samples = 9 if name in ("two inputs", "signal", "volume", "embedding") else 6
    stats = analysis.measure_stats(model, data, task=task)
    swept = analysis.measure_sensitivity(model, data, bits=(2, 4), task=task)
    quick = analysis.estimate_sensitivity(model, data, bits=(2, 4), task=task)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert (stats.table["count"] > 0).all()
    assert (swept.table["images"] == samples).all()
    assert swept.table["task"].unique().tolist() == [
        name if name in ("segmentation", "embedding") else "language_modeling" if name == "tokens" else "classification"
    ]
    assert (swept.table["divergence"] >= 0).all()
    assert swept.table["divergence"].max() > 0
    assert swept.table["loss"].notna().all() == (name != "embedding")
    assert list(quick.table.columns) == list(swept.table.columns)
    sites = [frame[["module", "tensor", "bit_width"]].values.tolist() for frame in (quick.table, swept.table)]
    assert sites[0] == sites[1]
    assert quick.table["divergence"].notna().mean() > 0.5


def test_the_estimate_of_one_linear_layer_with_one_output_is_exact():
    """There the divergence of regression is its second order, whatever the sign of the probe, sample by sample."""
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(6, 1)), [torch.randn(20, 6), torch.randn(5, 6)]
    swept, quick = (
        call(model, data, bits=(2, 4), sites=("weight", "input"), task=tasks.regression())
        for call in (analysis.measure_sensitivity, analysis.estimate_sensitivity)
    )
    for name in ("divergence", "divergence_se"):
        torch.testing.assert_close(quick.table[name].tolist(), swept.table[name].tolist(), rtol=1e-3, atol=1e-7)
    for one, other in zip(quick.per_sample["image_divergence"], swept.per_sample["image_divergence"], strict=True):
        torch.testing.assert_close(list(one), list(other), rtol=1e-2, atol=1e-6)


def test_batchnorm_of_an_estimate_is_noted():
    """The estimate keeps the stored statistics, and each row says so; without BatchNorm nothing is said."""
    model, data, task = case("segmentation")
    table = analysis.estimate_sensitivity(model, data, bits=(2,), task=task).table
    assert (table["batchnorm"] == "stored").all()
    assert table["note"].str.contains("BatchNorm").all()
    model, data, _ = case("signal")
    assert not analysis.estimate_sensitivity(model, data, bits=(2,)).table["note"].str.contains("BatchNorm").any()


@pytest.mark.parametrize("call", [analysis.measure_stats, analysis.measure_sensitivity, analysis.estimate_sensitivity])
def test_data_that_can_be_read_only_once_is_refused(call):
    """A generator would be empty at its second use."""
    model, data, _ = case("signal")
    net = analysis.Network(model, data)
    with pytest.raises(analysis.InputError, match="once"):
        call(net, (batch for batch in data))


@pytest.mark.parametrize("call", [analysis.measure_stats, analysis.measure_sensitivity, analysis.estimate_sensitivity])
def test_models_that_cannot_be_measured_are_refused(call):
    """Half precision and an exported program, each with what to do instead."""
    model, data, _ = case("signal")
    exported = torch.export.export(model.eval(), (data[0][0],)).module()
    with pytest.raises(analysis.InputError, match="export"):
        call(exported, data)
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(analysis.InputError, match="float32"):
            call(copy.deepcopy(model).to(dtype), data)


def test_the_device_may_be_named():
    """`device="cpu"` changes nothing for a model on the CPU; an unknown one is an InputError."""
    model, data, _ = case("signal")
    named, plain = (analysis.measure_sensitivity(model, data, bits=(2,), **way) for way in ({"device": "cpu"}, {}))
    pd.testing.assert_frame_equal(named.table, plain.table, check_exact=True)
    with pytest.raises(analysis.InputError, match="nowhere"):
        analysis.measure_sensitivity(model, data, bits=(2,), device="nowhere")


def test_a_time_limit_ends_at_a_row_the_fewest_bits_first():
    """What is missing is NaN with a note; what was measured is what an unlimited sweep has."""
    model, data, _ = case("signal")
    limited = analysis.measure_sensitivity(model, data, bits=(2, 4), time_limit=0).table
    whole = analysis.measure_sensitivity(model, data, bits=(2, 4)).table
    done = limited["divergence"].notna()
    assert len(limited) == len(whole)
    assert done.sum() == 1
    assert limited.loc[done, "bit_width"].tolist() == [2]
    assert limited.loc[~done, "note"].str.contains("time limit").all()
    assert limited.loc[done, "divergence"].tolist() == whole.loc[done, "divergence"].tolist()


class Failing(nn.Module):
    """A network whose forward pass raises after some calls."""

    def __init__(self, error):
        super().__init__()
        self.body, self.head = nn.Conv1d(2, 4, 3), nn.Linear(4, CLASSES)
        self.norm = nn.BatchNorm1d(4)
        self.error, self.left = error, -1

    def forward(self, x):
        """Logits, or the error."""
        x = self.norm(self.body(x)).relu()
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.head(x.mean(2))


@pytest.mark.parametrize("call", [analysis.measure_stats, analysis.measure_sensitivity, analysis.estimate_sensitivity])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("own")])
@pytest.mark.parametrize("after", [1, 2, 4, 7])
def test_an_interrupt_leaves_the_model_as_it_was(call, error, after):
    """Wherever the forward pass is stopped: parameters, buffers, flags, hooks, random state."""
    torch.manual_seed(0)
    model, data = Failing(error), labelled(2, 12)
    net = analysis.Network(model, data)
    model.train()
    model.body.weight.requires_grad_(False)
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    kinds = [type(module) for module in model.modules()]
    model.left = after
    with suppress(KeyboardInterrupt, ValueError):  # an InputError is a ValueError; a short measurement does not fail
        call(net, data)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert kinds == [type(module) for module in model.modules()]
    assert all(module.training for module in model.modules())
    assert not model.body.weight.requires_grad
    assert model.head.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_where_memory_runs_out_smaller_batches_are_measured():
    """The rows are there, with a note, and the model is as it was."""

    class Greedy(nn.Module):
        """Cannot hold more than four samples while something is quantized."""

        def __init__(self):
            super().__init__()
            self.body = classifier(nn.Conv1d(2, 4, 3), nn.AdaptiveAvgPool1d)

        def forward(self, x):
            """Logits."""
            if len(x) > 4 and self.full:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return self.body(x)

    torch.manual_seed(0)
    model, data = Greedy(), labelled(2, 12)
    model.full = False
    net = analysis.Network(model, data)
    whole = analysis.measure_sensitivity(net, data, bits=(2,)).table
    seen = []

    def forward(module, batch):
        seen.append(len(batch[0]))
        module.full = len(seen) > 1
        return module(batch[0])

    task = analysis.Task(**{**vars(tasks.classification()), "forward": forward})
    table = analysis.measure_sensitivity(net, data, bits=(2,), task=task).table
    assert table["note"].str.contains("memory ran out").all()
    assert table["images"].tolist() == whole["images"].tolist()
    torch.testing.assert_close(table["divergence"].tolist(), whole["divergence"].tolist(), rtol=1e-4, atol=1e-7)
