"""Training in a loop of one's own: rates and decay, bounds, oscillation and regularization."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from quant.config import QATConfig
from quant.errors import InputError
from quant.insertion import latent_weights
from quant.loss_terms import weight_terms
from quant.optimizer import parameter_groups
from quant.own_loop import attach_, oscillation_table, regularization
from quant.prepare import prepare_qat_, restore_float_
from quant.quantizer import MIN_SCALE_RATIO
from tests.plans import uniform
from tests.test_prepare_qat import network, quantizers
from tests.test_prepared_model import IMAGES, LABELS, ConvNet, prepared


def train(model, steps, *, learning_rate=1e-2, attached=True, **rates):
    """Steps of AdamW in training mode."""
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=learning_rate, **rates))
    if attached:
        attach_(optimizer, model)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES), LABELS).backward()
        optimizer.step()


@pytest.mark.parametrize("rate", [None, 1e-3])
def test_groups_hold_every_parameter_once_with_its_rate(rate):
    """Weights decay; scales have their own rate, a share of their start or the number itself; frozen ones are out."""
    model, _ = prepared("vit")
    model.patch_embed.proj.bias.requires_grad_(False)
    frozen = quantizers(model)[0].scale.requires_grad_(False)
    groups = parameter_groups(model, learning_rate=0.1, scale_learning_rate=rate, weight_decay=0.05)
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters())) - 2
    assert id(frozen) not in held
    assert [group["name"] for group in groups[:2]] == ["weights", "no decay"]
    assert len({group["name"] for group in groups}) == len(groups)
    start = {id(q.scale): q.initial_scale for q in quantizers(model)}
    for group in groups:
        assert group["weight_decay"] == (0.05 if group["name"] == "weights" else 0)
        for p in group["params"]:
            if id(p) in start:
                share = group["lr"] / (1e-2 * start[id(p)])
                assert group["lr"] == rate or (rate is None and 0.7 < share < 1.42)
            elif "scales" not in group["name"]:
                assert group["lr"] == 0.1
    torch.optim.AdamW(groups)


@pytest.mark.parametrize("rates", [{"learning_rate": 0.0}, {"scale_learning_rate": -1.0}, {"weight_decay": math.nan}])
def test_rates_that_train_nothing_are_refused(rates):
    """The argument is named."""
    with pytest.raises(InputError, match=next(iter(rates))):
        parameter_groups(prepared("conv")[0], **rates)


def test_attached_scales_stay_above_their_bound():
    """With a rate that would carry them below 0 in the first step; removed, or without it, they leave it."""
    model, _ = prepared("conv")
    train(model, 5, scale_learning_rate=10.0)
    assert all((q.scale >= q.min_scale).all() for q in quantizers(model))
    assert any(torch.equal(q.scale, q.min_scale) for q in quantizers(model))
    with pytest.warns(UserWarning, match="attach_"):
        train(prepared("conv")[0], 2, attached=False, scale_learning_rate=10.0)


def test_a_forgotten_attach_is_warned_of_once():
    """In the training-mode forward after the step that moved a scale out of its bounds, and not again."""
    model, images = prepared("conv")
    model.train()
    model(images)
    with torch.no_grad():
        quantizers(model)[0].scale.mul_(MIN_SCALE_RATIO / 2)
    with torch.no_grad():
        model(images)
    model.eval()(images)  # no training
    with pytest.warns(UserWarning, match="attach_") as caught:
        model.train()(images)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images)
        copy.deepcopy(model).eval()(images)


def test_attach_again_replaces_and_remove_ends():
    """Steps are counted once, whatever the number of calls; after `remove` and after `restore_float_` no more."""
    model, images = prepared("conv")
    optimizer = torch.optim.SGD(parameter_groups(model))
    attach_(optimizer, model)
    attachment = attach_(optimizer, model)

    def step():
        F.cross_entropy(model(images), LABELS).backward()
        optimizer.step()

    step()
    assert oscillation_table(model)["steps"].eq(1).all()
    attachment.remove()
    attachment.remove()
    step()
    assert oscillation_table(model)["steps"].eq(1).all()
    attach_(optimizer, model)
    restore_float_(model)
    optimizer.step()
    assert not optimizer._optimizer_step_post_hooks


def test_what_cannot_be_attached_is_refused():
    """A float model, an optimizer made before the scales were there, and none at all."""
    net, images = network()
    early = torch.optim.SGD(net.model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="prepare_qat_"):
        attach_(early, net.model)
    prepare_qat_(net, uniform(net, [images]), [images])
    with pytest.raises(InputError, match="parameter_groups"):
        attach_(early, net.model)
    with pytest.raises(InputError, match="Optimizer"):
        attach_(object(), net.model)


def test_oscillating_weights_are_counted():
    """Codes that go up and down with every step: all weights of that layer oscillate, those of the others do not."""
    model, _ = prepared("conv")
    optimizer = torch.optim.SGD(parameter_groups(model, learning_rate=1.0))
    assert oscillation_table(model)["note"].eq("attach_ was not called").all()
    attach_(optimizer, model)
    table = oscillation_table(model)
    assert table["note"].eq("no step was counted").all()
    assert table[["oscillating", "oscillating_ema"]].isna().all(axis=None)
    latent, quantizer = next(iter(latent_weights(model).values()))
    grid = quantizer.scale.detach()[:, None, None, None]
    for i in range(6):
        with torch.no_grad():
            model.first._parameters["weight"].copy_(grid * (1 if i % 2 else -1) * torch.ones_like(latent))
        optimizer.step()
    table = oscillation_table(model).set_index("module")
    assert table["oscillating"].to_dict() == {"first": 1.0, "second": 0.0, "head": 0.0}
    assert table.loc["first", "oscillating_ema"] == 1.0
    assert table["weights"].to_dict() == {"first": 72, "second": 288, "head": 80}
    assert table["note"].eq("").all()


def test_only_weights_of_few_bits_can_oscillate():
    """At 8 bits the table is empty, with its columns."""
    net, images = network()
    prepare_qat_(net, uniform(net, [images], weights=8), [images])
    train(net.model, 1)
    table = oscillation_table(net.model)
    assert table.empty
    assert {"module", "tensor", "weights", "oscillating", "oscillating_ema", "note"} <= set(table.columns)
    with pytest.raises(InputError, match="not prepared"):
        oscillation_table(ConvNet())


@pytest.mark.parametrize("progress", [0.0, 0.3, 0.7, 1.0])
def test_regularization_is_the_sum_of_the_training_loops_terms(progress):
    """With the same weights and ramp: value, and gradients of latent weights alone."""
    model, _ = prepared("vit")
    config = QATConfig(obr_weight=1e-3, dampening_weight=1e-2, kurtosis_weight=0.1, ramp_start=0.2)
    loss = regularization(model, obr=1e-3, dampening=1e-2, kurtosis=0.1, progress=progress, ramp_start=0.2)
    assert loss == torch.stack(list(weight_terms(latent_weights(model), config, progress).values())).sum()
    loss.backward()
    assert all(q.scale.grad is None for q in quantizers(model))
    assert model.blocks[0].mlp.fc1._parameters["weight"].grad.abs().sum() > 0


def test_regularization_that_is_off_is_zero():
    """A scalar that adds to a loss, before the ramp and for a float model too; wrong arguments are named."""
    model, images = prepared("conv")
    for loss in (regularization(model), regularization(model, obr=1.0, progress=0.1), regularization(ConvNet())):
        assert loss.shape == ()
        assert loss.item() == 0
    (F.cross_entropy(model(images), LABELS) + regularization(model)).backward()
    with pytest.raises(InputError, match="`obr`"):
        regularization(model, obr=-1.0)
    with pytest.raises(InputError, match="`ramp_start`"):
        regularization(model, obr=1.0, ramp_start=1.0)
    with pytest.raises(InputError, match="not prepared"):
        regularization(ConvNet(), obr=1.0)
