"""Which sites a network has: order, kinds, shapes and costs."""

import re

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from analysis.cost import cost_table
from analysis.models import ModelSource, load_model
from analysis.sites import KINDS, find_sites
from quant.errors import InputError
from quant.site import Site


def swin():
    """A small Swin with two stages."""
    torch.manual_seed(0)
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, patch_size=4, window_size=4, embed_dim=24, depths=(2, 2),
        num_heads=(2, 4), num_classes=10,
    ).eval()  # fmt: skip


def test_sites_come_in_order_of_execution_with_their_kind():
    """Of a Swin block: qkv weights and input, query to attention, projection, then the two layers of the MLP."""
    _, sites = find_sites(swin(), torch.rand(2, 3, 32, 32))
    block = [(i.site.module.removeprefix("layers.0.blocks.0."), i.site.tensor, i.kind) for i in sites
             if i.site.module.startswith("layers.0.blocks.0.") and i.site.tensor != "output"]  # fmt: skip
    assert block == [
        ("attn.qkv", "weight.query", "attn.qkv"), ("attn.qkv", "weight.key", "attn.qkv"),
        ("attn.qkv", "weight.value", "attn.qkv"), ("attn.qkv", "input", "attn.qkv"),
        ("attn", "query", "attn.query"), ("attn", "key", "attn.key"), ("attn", "value", "attn.value"),
        ("attn", "attention", "attn.softmax"),
        ("attn.proj", "weight", "attn.proj"), ("attn.proj", "input", "attn.proj"),
        ("mlp.fc1", "weight", "mlp.fc1"), ("mlp.fc1", "input", "mlp.fc1"), ("mlp.fc2", "weight", "mlp.fc2"),
        ("mlp.fc2", "input", "mlp.fc2"),
    ]  # fmt: skip
    assert [i.order for i in sites] == list(range(len(sites)))
    assert {i.kind for i in sites} <= set(KINDS)
    assert {i.site.module for i in sites if i.pinned} == {"patch_embed.proj", "head.fc"}


@pytest.mark.parametrize(
    ("name", "module", "kind"),
    [
        ("resnet18", "layer2.0.downsample.0", "downsample"),
        ("resnet18", "layer1.0", "block"),
        ("resnet18", "bn1", "norm"),
        ("mobilenetv3_small_050", "blocks.0.0.conv_dw", "conv.depthwise"),
        ("mobilenetv3_small_050", "blocks.0.0.conv_pw", "conv.pointwise"),
        ("vit_tiny_patch16_224", "patch_embed.proj", "patch_embed"),
        ("vit_tiny_patch16_224", "head", "head"),
        ("convnext_atto", "stages.0.blocks.0.mlp.fc1", "mlp.fc1"),
    ],
)
def test_kinds_of_well_known_layers(name, module, kind):
    """The closed list of kinds is filled as a reader of the architecture would."""
    model = timm.create_model(name).eval()
    _, sites = find_sites(model, torch.rand(1, 3, 64 if "vit" not in name else 224, 64 if "vit" not in name else 224))
    assert {i.kind for i in sites if i.site.module == module} == {kind}


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "swin", "vit_tiny_patch16_224"])
def test_multiply_accumulates_agree_with_torchs_flop_counter(name):
    """Twice the sum of all sites' MACs is what torch counts, attention products included."""
    model = swin() if name == "swin" else timm.create_model(name).eval()
    size = {"swin": 32, "vit_tiny_patch16_224": 224}.get(name, 64)
    images = torch.rand(2, 3, size, size)
    _, sites = find_sites(model, images)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(images)
    assert 2 * sum(i.macs for i in sites) * len(images) == counter.get_total_flops()


def test_every_edge_is_told_from_both_sides():
    """Weight x input, query x key, attention x value: if a names b then b names a, with the MACs of their owner."""
    _, sites = find_sites(swin(), torch.rand(2, 3, 32, 32))
    cost = cost_table(sites)
    edges = {Site(r.module, r.tensor): {Site.parse(e) for e in r.edges} for r in cost.itertuples()}
    assert all(a in edges[b] for a, bs in edges.items() for b in bs)
    macs = {Site(r.module, r.tensor): r.macs for r in cost.itertuples()}
    name = "layers.0.blocks.0.attn"
    assert macs[Site(name, "query")] == macs[Site(name, "key")] == 4 * 2 * 16 * 16 * 12
    assert macs[Site(f"{name}.qkv", "input")] == 3 * macs[Site(f"{name}.qkv", "weight.key")]


def test_include_and_exclude_choose_modules():
    """Shell patterns over module names mark what they leave out; it is not quantized, and costs all the same."""
    _, all_sites = find_sites(swin(), torch.rand(1, 3, 32, 32))
    _, fewer = find_sites(swin(), torch.rand(1, 3, 32, 32), include=["*attn*"], exclude=["layers.1.*"])
    assert [i.site for i in fewer] == [i.site for i in all_sites]
    for info in fewer:
        left_out = "attn" not in info.site.module or info.site.module.startswith("layers.1.")
        assert info.excluded == left_out
        assert not (left_out and (info.quantizable or info.pinned))
    assert list(cost_table(fewer)["macs"]) == list(cost_table(all_sites)["macs"])


def test_a_pattern_without_a_match_is_an_error_that_shows_names():
    """A mistyped pattern must not silently leave everything in, or out."""
    with pytest.raises(InputError, match=re.escape("no module matches 'layerz*'") + ".*patch_embed.proj"):
        find_sites(swin(), torch.rand(1, 3, 32, 32), exclude=["layerz*"])


def test_modules_never_called_are_listed_with_a_note():
    """Their weight can be described; it cannot be quantized, and no activation is invented."""

    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x)

    _, sites = find_sites(Partly(), torch.rand(2, 4))
    unused = [i for i in sites if i.site.module == "unused"]
    assert [(i.site.tensor, i.quantizable, i.note) for i in unused] == [
        ("weight", False, "never executed: its weight only")
    ]


def test_a_module_called_twice_is_counted_and_said():
    """Its weight is one site; the note says how often it ran."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.layer(self.layer(x)))

    _, sites = find_sites(Twice(), torch.rand(2, 4))
    weight = next(i for i in sites if i.site == Site("layer", "weight"))
    assert "called 2 times" in weight.note


def test_weights_that_a_layer_transforms_itself_are_not_quantized():
    """A weight-standardised convolution normalises its weight in forward: the stored one is not what multiplies."""
    model = timm.create_model("resnetv2_50x1_bit", num_classes=10).eval()
    _, sites = find_sites(model, torch.rand(1, 3, 64, 64))
    convolutions = [i for i in sites if i.kind.startswith("conv") and i.site.tensor == "weight"]
    assert convolutions
    assert not any(i.quantizable for i in convolutions)
    assert "transforms its weight" in convolutions[0].note


def test_blocks_of_channels_last_networks_have_their_channels_last():
    """Swin hands on (B, H, W, C), ConvNeXt (B, C, H, W), though both end in a linear."""
    _, sites = find_sites(swin(), torch.rand(1, 3, 32, 32))
    assert next(i for i in sites if i.site == Site("layers.0.blocks.0", "output")).channels == 24
    convnext = timm.create_model("convnext_atto").eval()
    _, sites = find_sites(convnext, torch.rand(1, 3, 64, 64))
    assert next(i for i in sites if i.site == Site("stages.0.blocks.0", "output")).channels == 40


def test_mobilenet_of_real_weights_keeps_the_padding_of_conv2d_same(shared):
    """Sites of imagenet_mobilenetv1_025 are its own layers: nothing is replaced, so `same` padding stays."""
    model = load_model(ModelSource(model=f"{shared}/models.py:imagenet_mobilenetv1_025"))
    before = {name: type(module) for name, module in model.named_modules()}
    _, sites = find_sites(model, torch.rand(1, 3, 224, 224))
    assert {name: type(module) for name, module in model.named_modules()} == before
    stem = next(i for i in sites if i.site == Site("conv_stem", "output"))
    assert stem.shape == (8, 112, 112)


def test_modules_called_twice_cost_twice():
    """A convolution that runs three times has three times the MACs, as torch counts them."""

    class Thrice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.layer(self.layer(self.layer(x))).mean(dim=(2, 3)))

    images = torch.rand(2, 3, 8, 8)
    _, sites = find_sites(Thrice(), images)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        Thrice()(images)
    assert 2 * sum(i.macs for i in sites) * 2 == counter.get_total_flops()
    assert next(i for i in sites if i.site == Site("layer", "input")).numel == 3 * 3 * 8 * 8


def test_tables_of_relative_positions_are_counted_once():
    """SwinV2 computes its position bias once, whatever the number of images: one image gives torch's total."""
    model = timm.create_model("swinv2_tiny_window8_256", img_size=32, patch_size=4, window_size=4, embed_dim=24,
                              depths=(2, 2), num_heads=(2, 4), num_classes=10).eval()  # fmt: skip
    image = torch.rand(1, 3, 32, 32)
    _, sites = find_sites(model, image)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(image)
    assert 2 * sum(i.macs for i in sites) == counter.get_total_flops()


def test_a_shared_weight_is_counted_and_quantized_once():
    """The second of two modules that hold one parameter owns nothing."""
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    _, sites = find_sites(nn.Sequential(first, second), torch.rand(2, 4))
    weights = [i for i in sites if i.site.is_weight]
    assert [(i.quantizable, i.numel) for i in weights] == [(True, 16), (False, 0)]
    assert weights[1].note == "shares its weight with 0"
