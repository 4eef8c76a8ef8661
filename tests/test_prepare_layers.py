"""What training quantizes in attention, in layers that nobody calls, and in the two layouts."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from analysis.cost import cost_table
from analysis.planning.bit_options import uniform_bits
from quant.calibrate import default_scheme, make_quantizer, observe_activations
from quant.errors import InputError
from quant.functional import to_groups
from quant.insertion import attach_quantizers_, detach_quantizers_, quantized
from quant.layers import is_quantized
from quant.network import Network
from quant.quantizer import LSQQuantizer
from quant.site import ATTENTION_TENSORS, Site
from tests.test_prepare import IMAGE, NETWORKS, opened
from tests.test_sensitivity import IMAGES
from tests.test_trace import FORMS, small

ATTENTIONS = ("vit", "swin", "beit", "eva", "swinv2")


def prepared(name, bits=4):
    """A small network with every site quantized, and its learned quantizers by site."""
    model = NETWORKS[name]()
    net, quantizers = opened(model, bits=bits)
    attach_quantizers_(net, quantizers)
    return model, net.trace, learned(model)


def learned(model):
    """The learned quantizers of a prepared network, by their name in it."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LSQQuantizer)}


def train(model, steps):
    """A few steps of Adam on labels that mean nothing, in training mode."""
    labels = torch.arange(len(IMAGES)) % 10
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES), labels).backward()
        optimizer.step()


@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_scales_of_heads_diverge(name):
    """Query, key, value, attention, their weights and proj's have a scale a head, and no two move alike."""
    model, trace, quantizers = prepared(name)
    by_head = {key: q for key, q in quantizers.items() if q.scheme.granularity == "per_head"}
    assert len(by_head) == len(trace.attention) * (len(ATTENTION_TENSORS) + len(("query", "key", "value", "proj")))
    before = {key: q.scale.detach().clone() for key, q in by_head.items()}
    train(model, steps=5)
    for key, q in by_head.items():
        ratios = (q.scale.detach() / before[key]).sort().values
        assert q.groups > 1
        assert (ratios.diff() > 1e-6).all(), key  # ten times what a float32 near 1 resolves


@pytest.mark.parametrize("name", NETWORKS)
def test_each_site_has_at_most_16_codes_in_training(name):
    """In every step all quantizers run, and what comes out of one has at most 2^4 values a scale, on its grid."""
    model, _, quantizers = prepared(name)
    train(model, steps=1)
    values = {}

    def keep(key):
        def hook(quantizer, _args, output):
            grouped = to_groups(output.detach(), quantizer.axis, quantizer.groups).transpose(0, 1)
            values[key] = [group.unique() for group in grouped]

        return hook

    for key, quantizer in quantizers.items():
        quantizer.register_forward_hook(keep(key))
    model.train()(IMAGES)
    assert values.keys() == quantizers.keys()
    for key, groups in values.items():
        quantizer = quantizers[key]
        assert len(groups) == quantizer.groups
        assert max(map(len, groups)) <= 16, key
        for group, values_of_it in enumerate(groups):
            offset = 0 if quantizer.offset is None else quantizer.offset[group]
            codes = ((values_of_it - offset) / quantizer.scale[group]).detach()
            torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", ["paper", "strict"])
@pytest.mark.parametrize("name", ["resnet", *ATTENTIONS])
def test_layouts_decide_over_the_first_layer_and_the_classifier(name, layout):
    """`paper` keeps weights and inputs of these two at 8 bits, all else as planned; `strict` has no exception."""
    model = NETWORKS[name]()
    net = Network(model, IMAGE)
    infos = net.by_site
    planned = uniform_bits(cost_table(net.infos), 2, 2, layout)
    samples = observe_activations(net, planned, [IMAGES], count=1)
    quantizers = {}
    for site, width in planned.items():
        scheme = default_scheme(model, infos[site], width, sample=samples.get(site))
        quantizers[site] = make_quantizer(model, infos[site], scheme, sample=samples.get(site), estimator="minmax")
    attach_quantizers_(net, quantizers)
    ends = {net.infos[0].site.module, model.pretrained_cfg["classifier"]}
    widths = {key: quantizer.scheme.bit_width for key, quantizer in learned(model).items()}
    assert len(widths) == len(planned) == sum(info.quantizable for info in net.infos)
    for key, width in widths.items():
        at_an_end = any(key.startswith(f"{module}.") for module in ends)
        assert width == (8 if layout == "paper" and at_an_end else 2), key
    assert sum(width == 8 for width in widths.values()) == (4 if layout == "paper" else 0)


class Mixed(nn.Module):
    """A convolution and a linear, called as modules or used by their weights, with every way to write it."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.linear, self.way = nn.Conv2d(3, 4, 3, padding=1, groups=1), nn.Linear(4, 5), way

    def forward(self, x):
        """Logits of images."""
        conv, linear = self.conv, self.linear
        if self.way == "called":
            return linear(conv(x).relu().mean(dim=(2, 3)))
        if self.way == "by place":
            x = F.conv2d(x, conv.weight, conv.bias, 1, 1).relu().mean(dim=(2, 3))
            return F.linear(x, linear.weight, linear.bias)
        x = F.conv2d(x, conv.weight, bias=conv.bias, padding=1).relu().mean(dim=(2, 3))
        return F.linear(input=x, weight=linear.weight, bias=linear.bias)


@pytest.mark.parametrize("tensors", [("weight", "input"), ("input",), ("weight",)])
@pytest.mark.parametrize("way", ["by place", "by name"])
def test_a_layer_that_is_not_called_is_quantized_as_one_that_is(way, tensors):
    """Logits and all gradients are the same to the bit, and so are a deep copy's, apart from its own scales."""
    results = []
    for each in ("called", way):
        torch.manual_seed(0)
        model = Mixed(each).eval()
        net, quantizers = opened(model)
        chosen = {site: q for site, q in quantizers.items() if site.tensor in tensors}
        with torch.no_grad(), quantized(net, chosen):
            calibrated = model(IMAGES)
        attach_quantizers_(net, chosen)
        twin = copy.deepcopy(model)
        for network in (model, twin):
            logits = network(IMAGES)
            assert torch.equal(logits, calibrated)
            logits.square().sum().backward()
            results.append({"": logits.detach(), **{name: p.grad for name, p in network.named_parameters()}})
        with torch.no_grad():
            next(iter(learned(twin).values())).scale.mul_(2)
            assert torch.equal(model(IMAGES), calibrated)
            assert not torch.equal(twin(IMAGES), calibrated)
        detach_quantizers_(model)
        assert type(model.conv.weight) is nn.Parameter
    for result in results[1:]:
        assert result.keys() == results[0].keys()
        assert all(torch.equal(result[name], results[0][name]) for name in result)


def test_what_is_made_of_a_weight_is_a_plain_tensor():
    """Shapes, types, slices and products of a weight that quantizes its input are those of the quantized weight."""
    model = Mixed("by place").eval()
    net, quantizers = opened(model)
    attach_quantizers_(net, quantizers)
    weight = model.linear.weight
    expected = quantizers[Site("linear", "weight")](model.linear._parameters["weight"].detach())
    assert (weight.shape, weight.dtype, weight.device) == (expected.shape, expected.dtype, expected.device)
    made_of_it, of_plain = ([x[:2], x.T @ x, 2 * x] for x in (weight, expected))
    for made, plain in zip(made_of_it, of_plain, strict=True):
        assert type(made) is torch.Tensor
        assert torch.equal(made, plain)
    assert F.linear(weight.detach(), torch.eye(4)).equal(expected)  # as an input it is no weight


def test_a_layout_of_heads_that_is_not_known_is_refused():
    """TinyViT interleaves query, key and value head by head: the known layouts are listed, nothing is changed."""
    torch.manual_seed(0)
    model = timm.create_model("tiny_vit_5m_224", embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1),
                              num_heads=(2, 2, 2, 2), window_sizes=(4, 4, 4, 2), num_classes=10).eval()  # fmt: skip
    images = torch.randn(4, 3, 64, 64)
    net, quantizers = opened(model, images=images)
    with pytest.raises(InputError, match=r"stages\.1\.blocks\.0\.attn\.qkv .* three equal parts"):
        attach_quantizers_(net, quantizers)
    assert not any(is_quantized(module) for module in model.modules())
    samples = observe_activations(net, net.by_site, [images], count=1)
    for site in [site for site in quantizers if site.module.endswith("attn.qkv") and site.is_weight]:
        scheme = default_scheme(model, net.by_site[site], 4, sample=None, granularity="per_channel")
        quantizers[site] = make_quantizer(model, net.by_site[site], scheme, sample=samples.get(site), estimator="mse")
    attach_quantizers_(net, quantizers)  # a scale a row needs no layout
    assert len(learned(model)) == len(quantizers)


@pytest.mark.parametrize("name", sorted(FORMS))
def test_other_forms_of_attention_train_too(name):
    """Cascaded heads, mixed heads, channels for tokens: each planned site is executed, and every scale learns."""
    model, size = small(name), FORMS[name][1]["img_size"]
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    net, quantizers = opened(model, images=images)
    before = model(images)
    attach_quantizers_(net, quantizers)
    twin = copy.deepcopy(model).train()  # BatchNorm's statistics move
    twin(images).square().sum().backward()
    assert not [key for key, q in learned(twin).items() if q.scale.grad is None or not q.scale.grad.isfinite().all()]
    assert {f"{site.module}.attention_quantizers.{site.tensor}" for site in quantizers if site.is_attention} <= set(
        learned(model)
    )
    detach_quantizers_(model)
    assert torch.equal(model(images), before)
