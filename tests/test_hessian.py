"""Traces of the Hessian: against exact Hessians in float64, laws of the probe, and a model that comes back."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from analysis.sweeps.hessian import hessian_traces
from analysis.tasks import classification
from quant.intercept import intercept
from quant.site import Site
from quant.sites import find_sites
from tests.networks import net_of

IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 2, 1, 0])


class SmallCNN(nn.Module):
    """A convolution with an activation function in place, one with a smooth one, and a classifier of three classes."""

    def __init__(self):
        super().__init__()
        self.conv1, self.relu = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(inplace=True)
        self.conv2, self.fc = nn.Conv2d(4, 5, 3, stride=2), nn.Linear(5, 3)

    def forward(self, x):
        """Logits of (images, 3, height, width)."""
        x = torch.tanh(self.conv2(self.relu(self.conv1(x))))
        return 2 * self.fc(x.mean(dim=(2, 3)))


def model_of(name):
    """A small network in float64."""
    torch.manual_seed(0)
    if name == "cnn":
        model = SmallCNN()
    elif name == "vit":
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=16, embed_dim=8, depth=1, num_heads=2,
                                  num_classes=3)  # fmt: skip
    else:
        model = timm.create_model("swin_tiny_patch4_window7_224", img_size=16, patch_size=4, window_size=2, embed_dim=4,
                                  depths=(2,), num_heads=(2,), num_classes=3)  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval().double()


def opened(name):
    """Network, trace, sites, and the images in its size."""
    model = model_of(name)
    images = IMAGES[:, :, :8, :8] if name == "cnn" else IMAGES if name == "vit" else IMAGES[:, :, :16, :16]
    trace, sites = find_sites(model, images[:2])
    return model, trace, {info.site: info for info in sites if info.quantizable}, images


def exact_trace(model, trace, info, image, label):
    """Trace of the Hessian of one image's loss by a site, from the whole matrix."""
    site = info.site
    if site.is_weight:
        name = f"{site.module}.weight"
        own = model.get_parameter(name).detach()
        rows = slice(*(info.rows or (None,)))

        def loss(part):
            weight = torch.cat([own[: rows.start], part, own[rows.stop :]]) if info.rows else part
            return F.cross_entropy(functional_call(model, {name: weight}, image[None]), label[None])

        at = own[rows]
    else:
        seen = []
        with intercept(net_of(model, trace), {site: lambda x: seen.append(torch.zeros_like(x))}), torch.no_grad():
            model(image[None])

        def loss(shift):
            with intercept(net_of(model, trace), {site: lambda x: x + shift}):
                return F.cross_entropy(model(image[None]), label[None])

        (at,) = seen
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        hessian = torch.autograd.functional.hessian(loss, at)
    return hessian.reshape(at.numel(), at.numel()).trace().item()


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("cnn", [("conv1", "weight"), ("conv1", "input"), ("conv2", "weight"), ("conv2", "input"), ("fc", "weight"),
                 ("fc", "input")]),
        ("vit", [("blocks.0.attn", "query"), ("blocks.0.attn", "attention"), ("blocks.0.attn.qkv", "weight.key"),
                 ("blocks.0.attn.qkv", "weight.value"), ("head", "input")]),
        ("swin", [("layers.0.blocks.1.attn", "value"), ("layers.0.blocks.1.attn.qkv", "weight.query"),
                  ("layers.0.blocks.1.attn.proj", "input"), ("head.fc", "weight")]),
    ],
)  # fmt: skip
def test_the_traces_are_those_of_the_whole_hessians(name, chosen):
    """Mean of 400 probes over the same two images: within 4.5 of the standard errors that are given with it.

    One probe for several sites; of an activation the Hessian is that of one image, windows and all. Sites have errors
    small enough for a wrong factor to be seen.
    """
    model, trace, sites, images = opened(name)
    sites = {Site(*site): sites[Site(*site)] for site in chosen}
    found = hessian_traces(net_of(model, trace, sites), sites, [(images[:2], LABELS[:2])] * 400, classification())
    assert list(found) == list(sites)
    precise = 0
    for site, info in sites.items():
        exact = np.mean([exact_trace(model, trace, info, images[i], LABELS[i]) for i in range(2)])
        assert abs(found[site].trace - exact) < 4.5 * found[site].error
        precise += found[site].error < 0.15 * abs(exact)  # half or double would be 3 errors away, or 7
    assert precise >= 2


def test_trace_and_error_are_those_of_a_ratio_of_sums():
    """Batches of 3, 2 and 4 images: sum of v^T H v over sum of images, and the jackknife's linearised error of it.

    The sum of each batch follows from the figures of the first batch, the first two, and so on.
    """
    model, trace, sites, images = opened("cnn")
    images, labels = images.repeat(2, 1, 1, 1), LABELS.repeat(2)
    batches = [(images[a:b], labels[a:b]) for a, b in ((0, 3), (3, 5), (5, 9))]
    up_to = [hessian_traces(net_of(model, trace, sites), sites, batches[:n], classification()) for n in (1, 2, 3)]
    counts = np.array([3, 2, 4])
    for site in sites:
        assert math.isnan(up_to[0][site].error)
        totals = np.array([up_to[i][site].trace * counts[: i + 1].sum() for i in range(3)])
        sums = np.diff(totals, prepend=0)
        residual = sums - totals[-1] / 9 * counts
        assert up_to[2][site].error == pytest.approx(math.sqrt(3 / 2 * (residual**2).sum()) / 9, rel=1e-9)


def test_the_parts_of_a_fused_weight_add_up_to_the_whole():
    """Rows of query, key and value have the products of their rows: with the same probe they add up exactly."""
    model, trace, sites, images = opened("vit")
    parts = {site: info for site, info in sites.items() if site.module == "blocks.0.attn.qkv" and site.is_weight}
    assert len(parts) == 3
    fused = Site("blocks.0.attn.qkv", "weight")
    info = dataclasses.replace(next(iter(parts.values())), site=fused, rows=None)
    batches = [(images, LABELS)]
    apart = hessian_traces(net_of(model, trace, parts), parts, batches, classification())
    whole = hessian_traces(net_of(model, trace, {fused: info}), {fused: info}, batches, classification())
    total = sum(value.trace for value in apart.values())
    assert total == pytest.approx(whole[fused].trace, rel=1e-9)


def test_the_order_of_images_in_a_batch_does_not_matter_to_a_weight():
    """The loss is a sum over images, and the probe of a weight knows none of them."""
    model, trace, sites, images = opened("swin")
    sites = {site: info for site, info in sites.items() if site.is_weight}
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    first = hessian_traces(net_of(model, trace, sites), sites, [(images, LABELS)], classification())
    second = hessian_traces(net_of(model, trace, sites), sites, [(images[order], LABELS[order])], classification())
    for site in sites:
        assert first[site].trace == pytest.approx(second[site].trace, rel=1e-9, abs=1e-12)


class Idle(nn.Module):
    """`idle` runs, but what it returns is not used."""

    def __init__(self):
        super().__init__()
        self.idle, self.fc = nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, x):
        """Logits of (images, 3, 2, 2)."""
        x = x.flatten(1)
        self.idle(x)
        return self.fc(x)


@pytest.mark.parametrize("with_others", [True, False])
def test_a_site_without_influence_has_trace_zero(with_others):
    """Beside sites that matter, and alone, where the loss depends on nothing that is asked for."""
    torch.manual_seed(0)
    model, images = Idle().double(), IMAGES[:, :, :2, :2]
    trace, sites = find_sites(model, images[:2])
    sites = {info.site: info for info in sites if with_others or info.site.module == "idle"}
    found = hessian_traces(
        net_of(model, trace, sites), sites, [(images[:3], LABELS[:3]), (images[3:], LABELS[3:])], classification()
    )
    assert found[Site("idle", "weight")] == (0, 0)
    assert found[Site("idle", "input")] == (0, 0)
    if with_others:
        assert found[Site("fc", "weight")].trace > 0


def test_of_a_linear_classifier_the_trace_has_a_closed_form():
    """H by the weight is (diag(p) - p p^T) x x^T: tr H = (1 - sum p^2) |x|^2, whatever the label."""
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double(), IMAGES[:, :, :2, :2]
    trace, sites = find_sites(model, images[:2])
    sites = {info.site: info for info in sites}
    found = hessian_traces(net_of(model, trace, sites), sites, [(images, LABELS)] * 400, classification())
    p, x = model(images).softmax(dim=1).detach(), images.reshape(6, 12)
    spread = 1 - p.square().sum(dim=1)
    weight = (spread * x.square().sum(dim=1)).mean().item()
    columns = model[1].weight.detach()  # H by the input is W^T (diag(p) - p p^T) W
    inputs = torch.stack([(columns.T @ (q.diag() - q.outer(q)) @ columns).trace() for q in p]).mean().item()
    for tensor, exact in (("weight", weight), ("input", inputs)):
        trace_, error = found[Site("1", tensor)]
        assert abs(trace_ - exact) < 4 * error
        assert error < 0.05 * exact


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_the_model_comes_back_bit_for_bit(name, fails):
    """Values, parameter objects, mixed requires_grad, no gradients, no hooks; also where the second batch is wrong."""
    model, trace, sites, images = opened(name)
    for parameter in list(model.parameters())[::3]:
        parameter.requires_grad_(False)
    before = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    state = copy.deepcopy(model.state_dict())
    batches = [(images[:3], LABELS[:3]), (images[3:], LABELS[:2] if fails else LABELS[3:])]
    if fails:
        with pytest.raises(ValueError, match="batch_size"):
            hessian_traces(net_of(model, trace, sites), sites, batches, classification())
    else:
        hessian_traces(net_of(model, trace, sites), sites, batches, classification())
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(type(m).__name__.startswith("LoadedRun") for m in model.modules())
