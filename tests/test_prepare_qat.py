"""A network becomes its quantized self from a plan and data, and comes back bit for bit."""

import copy

import pytest
import torch
from torch import nn

from quant import prepare as prepare_module
from quant.batchnorm import reestimate_batchnorm_
from quant.bit_plan import PlannedSite
from quant.calibrate import calibrate
from quant.errors import InputError
from quant.insertion import latent_weights, quantized
from quant.network import Network
from quant.prepare import prepare_qat_, restore_float_
from quant.quantizer import LSQQuantizer
from tests.plans import plan_of, uniform
from tests.test_prepared_model import LABELS, NETWORKS, prepared


def network(name="conv"):
    """A float network, not prepared, with statistics of BatchNorm that are not trivial; and images for it."""
    build, images, _ = NETWORKS[name]
    torch.manual_seed(0)
    model = build().train()
    with torch.no_grad():
        model(images * 2 + 1)
    return Network(model.eval(), [images]), images


def quantizers(model):
    """The learned quantizers of a model."""
    return [module for module in model.modules() if isinstance(module, LSQQuantizer)]


def state(model):
    """All that must come back: classes, flags, hooks, keys and values."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    values = {key: value.clone() for key, value in model.state_dict().items()}
    return [type(m) for m in model.modules()], [m.training for m in model.modules()], hooks, values


def assert_same_state(model, before):
    """Bit for bit."""
    classes, flags, hooks, values = state(model)
    assert (classes, flags, hooks) == before[:3]
    assert values.keys() == before[3].keys()
    assert all(torch.equal(values[key], before[3][key]) for key in values)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["conv", "vit", "unused forward"])
def test_prepared_and_restored_is_the_float_model_bit_for_bit(name, training):
    """Statistics of BatchNorm, re-estimated while it was prepared, and the state of random numbers too."""
    net, images = network(name)
    plan, output = uniform(net, [images]), net(images[:4])
    net.model.train(training)
    before, random = state(net.model), torch.get_rng_state()
    assert prepare_qat_(net, plan, [images]) is net.model
    assert all(q.training == training for q in quantizers(net.model))
    assert torch.equal(torch.get_rng_state(), random)
    assert isinstance(net.model.get_submodule(plan.sites[0].module), nn.Conv2d)
    restore_float_(net.model)
    assert_same_state(net.model, before)
    net.model.eval()
    assert torch.equal(net(images[:4]), output)


def test_it_starts_as_the_calibrated_network_with_statistics_of_its_own():
    """The quantizers are those of `calibrate`, and BatchNorm's statistics those of the quantized network."""
    net, images = network()
    plan = uniform(net, [images])
    with torch.no_grad(), quantized(net, calibrate(net, plan.sites, [images])):
        stale = net(images)
        twin = copy.deepcopy(net.model)
        reestimate_batchnorm_(twin, [images])
        expected = twin(images)
    prepare_qat_(net, plan, [images])
    with torch.no_grad():
        torch.testing.assert_close(net(images), expected, rtol=1e-5, atol=1e-6)
    restore_float_(net.model)
    prepare_qat_(net, plan, [images], reestimate_batchnorm=False)
    with torch.no_grad():
        assert torch.equal(net(images), stale)


@pytest.mark.parametrize("training", [False, True])
def test_statistics_that_training_updated_stay(training):
    """After a pass in training mode they are the trained model's; in evaluation mode the stored ones return."""
    net, images = network()
    stored = net.model.norm1.running_mean.clone()
    prepare_qat_(net, uniform(net, [images]), [images])
    net.model.train(training)(images)
    now = net.model.norm1.running_mean.clone()
    assert not torch.equal(now, stored)
    restore_float_(net.model)
    assert torch.equal(net.model.norm1.running_mean, now if training else stored)


def test_a_plain_module_is_traced_on_the_first_batch():
    """A model in place of a network; pairs of inputs and targets as a loader yields them."""
    net, images = network()
    plan, model = uniform(net, [images]), copy.deepcopy(net.model)
    batches = [(images[:8], LABELS[:8]), (images[8:], LABELS[8:])]
    prepare_qat_(model, plan, batches)
    prepare_qat_(net, plan, batches)
    assert torch.equal(model(images), net.model(images))


class TwoInputs(nn.Module):
    """Two named inputs and a dictionary of outputs."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 8), nn.Linear(4, 8)

    def forward(self, first, second):
        """A dictionary, as ModelOutput is one."""
        return {"logits": self.left(first) + self.right(second)}


def test_inputs_in_a_dictionary():
    """A batch of two named inputs and labels, through calibration, proof and back."""
    torch.manual_seed(0)
    batch = {"first": torch.randn(8, 6), "second": torch.randn(8, 4), "labels": torch.zeros(8)}
    net = Network(TwoInputs().eval(), batch)
    prepare_qat_(net, uniform(net, [batch]), [batch])
    assert len(latent_weights(net.model)) == 2
    assert net(batch)["logits"].requires_grad


def with_site(plan, **changes):
    """The plan, its first site changed."""
    first = plan.sites[0]
    fields = {name: getattr(first, name) for name in PlannedSite.__dataclass_fields__} | changes
    return plan_of([PlannedSite(**fields), *plan.sites[1:]])


WRONG = {
    "no plan": (lambda plan: "w4a4", {}, "`plan` is a str"),
    "an empty plan": (lambda plan: plan_of([]), {}, "no site"),
    "another network's site": (lambda plan: with_site(plan, module="frist"), {}, "no site frist:weight"),
    "an axis that is not there": (lambda plan: with_site(plan, granularity="per_head"), {}, "per_head"),
    "an estimator": (lambda plan: plan, {"estimator": "mean"}, "`estimator`"),
    "a normalization of gradients": (lambda plan: plan, {"gradient_scale": "none"}, "`gradient_scale`"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_prepared_is_refused_and_leaves_the_model(case):
    """The error names what came; the model is as before, bit for bit."""
    change, options, message = WRONG[case]
    net, images = network()
    plan, before = uniform(net, [images]), state(net.model)
    with pytest.raises(InputError, match=message) as error:
        prepare_qat_(net, change(plan), [images], **options)
    assert "--" not in str(error.value)
    assert_same_state(net.model, before)


@pytest.mark.parametrize("broken", ["calibrate", "attach_quantizers_", "reestimate_batchnorm_"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_at_any_stage_leaves_the_model(monkeypatch, broken, error):
    """Also an interrupt, and after BatchNorm's statistics were changed."""
    net, images = network()
    plan, before = uniform(net, [images]), state(net.model)
    original = getattr(prepare_module, broken)

    def failing(*args, **options):
        original(*args, **options)
        raise error("stop")

    monkeypatch.setattr(prepare_module, broken, failing)
    if broken == "attach_quantizers_":  # it restores after errors of its own
        monkeypatch.setattr(prepare_module, broken, original)
        monkeypatch.setattr("quant.insertion._check_execution", lambda *_: (_ for _ in ()).throw(error("stop")))
    with pytest.raises(error):
        prepare_qat_(net, plan, [images])
    assert_same_state(net.model, before)


def test_batches_of_one_sample_cannot_set_statistics_and_say_how_to_go_on():
    """The model comes back; without the re-estimation it is prepared."""
    net, images = network()
    plan, before = uniform(net, [images]), state(net.model)
    with pytest.raises(InputError, match="reestimate_batchnorm=False"):
        prepare_qat_(net, plan, [images[:1]])
    assert_same_state(net.model, before)
    prepare_qat_(net, plan, [images[:1]], reestimate_batchnorm=False)


def test_a_prepared_model_is_not_prepared_again():
    """As a network or as a plain model; it stays prepared."""
    model, images = prepared("conv")
    net, _ = network()
    plan = uniform(net, [images])
    for again in (model, prepare_qat_(net, plan, [images]) and net):
        with pytest.raises(InputError, match="restore_float_"):
            prepare_qat_(again, plan, [images])
    assert quantizers(model)
