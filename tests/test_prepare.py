"""Preparing a network for training: what is quantized, that it is proven, and that the network comes back."""

import copy
import io
import runpy

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

from analysis.models import ModelSource, load_model
from quant.calibrate import default_scheme, make_quantizer, observe_activations
from quant.errors import InputError
from quant.insertion import attach_quantizers_, detach_quantizers_, latent_weights, quantized
from quant.layers import is_quantized
from quant.network import Network
from quant.quantizer import LSQQuantizer
from quant.site import Site
from tests.test_sensitivity import IMAGES, model_of
from tests.test_trace import small

IMAGE = IMAGES[:1]


def opened(model, bits=4, images=IMAGES):
    """The network, and calibrated quantizers of every site that can be quantized."""
    net = Network(model, images[:1])
    wanted = {info.site: info for info in net.infos if info.quantizable}
    samples = observe_activations(net, wanted, [images], count=1)
    quantizers = {}
    for site, info in wanted.items():
        scheme = default_scheme(model, info, bits, sample=samples.get(site))
        quantizers[site] = make_quantizer(model, info, scheme, sample=samples.get(site), estimator="mse")
    return net, quantizers


def same_padding():
    """A small MobileNet whose convolutions pad as TensorFlow does (Conv2dSame), depthwise ones among them."""
    torch.manual_seed(0)
    return timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=10).eval()


def grouped():
    """A small ResNeXt, whose 3 x 3 convolutions have four groups, with BatchNorm that is not trivial."""
    torch.manual_seed(0)
    model = ResNet(Bottleneck, layers=(1, 1, 1, 1), channels=(8, 16, 16, 16), cardinality=4, base_width=32,
                   stem_width=8, num_classes=10, zero_init_last=False).train()  # fmt: skip
    with torch.no_grad():
        model(IMAGES)
    return model.eval()


NETWORKS = {
    "resnet": lambda: model_of("resnet"), "vit": lambda: model_of("vit"), "swin": lambda: model_of("swin"),
    "beit": lambda: small("beit_base_patch16_224"), "eva": lambda: small("eva02_tiny_patch14_224"),
    "swinv2": lambda: small("swinv2_tiny_window8_256"), "same padding": same_padding, "grouped": grouped,
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_the_float_model_comes_back_bit_for_bit(name):
    """Classes, parameter objects, switches, keys, values and logits are what they were."""
    model = NETWORKS[name]()
    before, logits = copy.deepcopy(model.state_dict()), model(IMAGES)
    classes = [type(module) for module in model.modules()]
    parameters = [id(p) for p in model.parameters()]
    switches = [getattr(module, "fused_attn", None) for module in model.modules()]
    net, quantizers = opened(model)
    attach_quantizers_(net, quantizers)
    assert not torch.equal(model(IMAGES), logits)
    detach_quantizers_(model)
    assert [type(module) for module in model.modules()] == classes
    assert [id(p) for p in model.parameters()] == parameters
    assert [getattr(module, "fused_attn", None) for module in model.modules()] == switches
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(model(IMAGES), logits)


@pytest.mark.parametrize("name", NETWORKS)
def test_it_starts_as_the_calibrated_network(name):
    """Before the first step the logits are bit for bit those of the calibrated network, and so are a deep copy's."""
    model = NETWORKS[name]()
    net, quantizers = opened(model)
    with torch.no_grad(), quantized(net, quantizers):
        expected = model(IMAGES)
    attach_quantizers_(net, quantizers)
    with torch.no_grad():
        assert torch.equal(model(IMAGES), expected)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(IMAGES), expected)
        next(module for module in twin.modules() if isinstance(module, LSQQuantizer)).scale.mul_(3)
        assert torch.equal(model(IMAGES), expected)
        assert not torch.equal(twin(IMAGES), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_site_is_quantized_and_learns(name):
    """One quantizer a planned site, each with a gradient at its scale; each latent weight has one too."""
    model = NETWORKS[name]()
    net, quantizers = opened(model)
    keys = set(model.state_dict())
    attach_quantizers_(net, quantizers)
    assert keys < set(model.state_dict())  # the latent weights keep their names
    learned = [module for module in model.modules() if isinstance(module, LSQQuantizer)]
    assert len(learned) == len(quantizers)
    model(IMAGES).square().sum().backward()
    assert all(q.scale.grad is not None and torch.isfinite(q.scale.grad).all() for q in learned)
    assert not [q for q in learned if not q.scale.grad.any()]
    assert set(latent_weights(model)) == {site for site in quantizers if site.is_weight}
    for site in quantizers:
        if site.is_weight:
            assert model.get_submodule(site.module)._parameters["weight"].grad.any()


def test_a_part_of_a_fused_weight_can_be_quantized_alone():
    """Only the planned rows are on a grid, the others stay as they are."""
    model = model_of("vit")
    net, quantizers = opened(model, bits=2)
    site = Site("blocks.0.attn.qkv", "weight.value")
    latent = model.blocks[0].attn.qkv.weight.detach().clone()
    attach_quantizers_(net, {site: quantizers[site]})
    weight = model.blocks[0].attn.qkv.weight.detach()
    assert torch.equal(weight[:64], latent[:64])
    assert torch.equal(weight[64:], quantizers[site](latent[64:]))


class Detour(nn.Module):
    """A network whose second layer can be passed over."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.detour, self.times = False, 1

    def forward(self, x):
        """Logits of flat images."""
        x = self.first(x)
        for _ in range(0 if self.detour else self.times):
            x = self.second(x)
        return self.head(x)


@pytest.mark.parametrize(("attribute", "value", "elements"), [("detour", True, "0 of 8"), ("times", 2, "16 of 8")])
def test_a_site_that_is_not_executed_as_planned_is_named(attribute, value, elements):
    """A layer that is passed over, or runs twice where it was traced once, is an error; the model comes back."""
    torch.manual_seed(0)
    model, images = Detour().eval(), torch.randn(16, 8)
    net, quantizers = opened(model, images=images)
    setattr(model, attribute, value)
    with pytest.raises(InputError, match=rf"not executed as planned: .*second:input \({elements} elements\)"):
        attach_quantizers_(net, quantizers)
    assert not any(is_quantized(module) for module in model.modules())


def test_a_quantizer_that_does_nothing_is_found(monkeypatch):
    """The proof looks at what comes out: values that are not on the grid are not quantized, whatever their number."""
    model = model_of("vit")
    net, quantizers = opened(model)
    monkeypatch.setattr(LSQQuantizer, "forward", lambda self, x: x + 0)
    with pytest.raises(InputError, match=rf"{len(quantizers)} of {len(quantizers)} planned sites were not executed"):
        attach_quantizers_(net, quantizers)


@pytest.mark.parametrize("name", ["cifar10_resnet20", "cifar10_vit_d128_l4", "cifar10_swin_e48"])
def test_four_bits_start_far_above_chance(shared, name):
    """Trained networks at 4 bits everywhere, calibrated, answer 200 training images as before; chance is 10 %.

    A start of 2 mean|x| / sqrt(Q_P) for the softmax clips every probability above 0.058 and begins at chance.
    """
    model = load_model(ModelSource(model=f"{shared / 'models.py'}:{name}",
                                   weights=str(shared / "weights" / f"{name}.safetensors")))  # fmt: skip
    images = load_images(shared, name)
    with torch.no_grad():
        answers = model(images).argmax(dim=1)
    net, quantizers = opened(model, images=images)
    quantizers = {site: q for site, q in quantizers.items() if "downsample" not in site.module}
    attach_quantizers_(net, quantizers)
    with torch.no_grad():
        agreement = (model(images).argmax(dim=1) == answers).float().mean().item()
    assert agreement > (0.4 if name == "cifar10_resnet20" else 0.7)  # BatchNorm's statistics are stale here


def load_images(shared, name):
    """200 CIFAR-10 training images, prepared as the network expects."""
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in runpy.run_path(str(shared / "models.py"))["NORMALISATION"][name]
    )
    archive = np.load(shared / "data" / "cifar10_jpeg.npz")
    jpeg, offsets = archive["train_jpeg"], archive["train_offsets"]
    files = (io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes()) for i in range(200))
    pixels = torch.stack([torch.from_numpy(np.asarray(Image.open(file), dtype=np.float32)) for file in files])
    return (pixels.permute(0, 3, 1, 2) / 255 - mean) / std
