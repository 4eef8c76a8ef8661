"""Which sites a network has: order, kinds, shapes and costs."""

import re
import warnings

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, LayerNorm2d
from timm.layers.grn import GlobalResponseNorm
from timm.layers.halo_attn import HaloAttn
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from analysis.cost import cost_table
from analysis.models import ModelSource, load_model
from analysis.tensor_stats import collect_stats
from quant.errors import InputError
from quant.site import Site
from quant.sites import KINDS, find_sites
from tests.networks import net_of


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


ATTENTIONS = {
    "efficientvit_m0": dict(img_size=64, embed_dim=(16, 16, 16), depth=(1, 1, 1), num_heads=(2, 2, 2),
                            key_dim=(4, 4, 4)),
    "levit_128s": dict(img_size=64, embed_dim=(32, 32, 32), depth=(1, 1, 1), num_heads=(2, 2, 2), key_dim=8),
    "twins_svt_small": dict(img_size=64, embed_dims=(16, 16, 16, 16), depths=(2, 1, 1, 1), num_heads=(2, 2, 2, 2)),
    "vit_dlittle_patch16_reg1_gap_256": dict(img_size=64, patch_size=16, embed_dim=32, depth=1, num_heads=4),
    "edgenext_xx_small": {},
    "mobilenetv4_hybrid_medium": {},
}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenetv3_small_050", "swin", "vit_tiny_patch16_224", *sorted(ATTENTIONS)]
)
def test_multiply_accumulates_agree_with_torchs_flop_counter(name):
    """Twice the sum of all sites' MACs is what torch counts, attention products of every kind included."""
    model = swin() if name == "swin" else timm.create_model(name, **ATTENTIONS.get(name, {})).eval()
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


def test_normalisations_that_hold_their_activation_function_are_norms():
    """BatchNormAct2d has children, and is a normalisation all the same; what holds a convolution is none."""
    model = timm.create_model("mobilenetv3_small_050").eval()
    _, sites = find_sites(model, torch.rand(1, 3, 64, 64))
    norms = {name for name, module in model.named_modules() if isinstance(module, BatchNormAct2d)}
    assert {i.site.module for i in sites if i.kind == "norm"} == norms
    assert all(i.channels == i.shape[0] for i in sites if i.kind == "norm")


@pytest.mark.parametrize(
    ("layers", "shape", "expected"),
    [
        ([nn.Conv1d(3, 5, 1), nn.BatchNorm1d(5)], (2, 3, 7), {"0": (1, 5), "1": (1, 5)}),
        ([nn.Conv1d(3, 7, 1), nn.BatchNorm1d(7)], (2, 3, 7), {"0": (1, 7), "1": (1, 7)}),
        ([nn.Linear(3, 5), nn.LayerNorm(5)], (2, 7, 3), {"0": (2, 5), "1": (2, 5)}),
        ([nn.Conv2d(3, 5, 1), LayerNorm2d(5)], (2, 3, 4, 4), {"0": (1, 5), "1": (1, 5)}),
        ([nn.Linear(3, 5), nn.LayerNorm(5), GlobalResponseNorm(5)], (2, 4, 4, 3), {"1": (3, 5), "2": (3, 5)}),
        ([nn.Conv2d(3, 5, 1), GlobalResponseNorm(5, channels_last=False)], (2, 3, 4, 4), {"1": (1, 5)}),
        ([nn.Conv2d(3, 5, 1), nn.Flatten(), nn.Linear(20, 4)], (2, 3, 2, 2), {"0": (1, 5), "2": (1, 4)}),
    ],
)
def test_channels_lie_on_the_axis_of_the_weights_width(layers, shape, expected):
    """Planes have them first and tokens last; a normalisation's own weight says which of the two it takes."""
    _, sites = find_sites(nn.Sequential(*layers).eval(), torch.randn(shape))
    found = {i.site.module: (i.channel_axis, i.channels) for i in sites if i.site.tensor == "output"}
    assert {name: found[name] for name in expected} == expected


def heads_of(model, image):
    """(axis, heads, note) of the query of each attention module."""
    _, sites = find_sites(model.eval(), image)
    return [(i.head_axis, i.heads, i.note) for i in sites if i.site.tensor == "query"]


def test_heads_lie_on_the_axis_that_is_as_long_as_the_module_says():
    """Twins has windows before its heads, in all but one block; EfficientViT has no axis of heads at all."""
    twins = timm.create_model("twins_svt_small", **ATTENTIONS["twins_svt_small"])
    windows_and_all = heads_of(twins, torch.rand(1, 3, 64, 64))  # attention within windows, or to all of them
    assert windows_and_all == [(axis, 2, "") for axis in (2, 1, 2, 2, 2)]
    efficientvit = timm.create_model("efficientvit_m0", **ATTENTIONS["efficientvit_m0"])
    assert {(axis, heads) for axis, heads, _ in heads_of(efficientvit, torch.rand(1, 3, 64, 64))} == {(-1, 0)}


@pytest.mark.parametrize(("size", "note"), [(8, "heads cannot be told from windows"), (16, "")])
def test_windows_are_not_taken_for_heads(size, note):
    """HaloNet folds its heads into the batch, and may have as many windows as heads: then no axis is theirs."""
    model = nn.Sequential(HaloAttn(16, feat_size=(size, size), num_heads=4, dim_head=4, block_size=4, halo_size=1))
    assert heads_of(model, torch.rand(1, 16, size, size)) == [(-1, 0, note)]


def test_heads_beside_as_many_windows_are_known_by_their_values():
    """Swin's four windows of one image and four heads: qkv's parts, found by value, say which axis is which."""
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, patch_size=4, window_size=4, embed_dim=16,
                              depths=(1,), num_heads=(4,))  # fmt: skip
    assert heads_of(model, torch.rand(1, 3, 32, 32)) == [(1, 4, "")]


def test_a_block_that_returns_several_tensors_is_described_by_its_first():
    """Pooling vision transformers hand on tokens and their grid: the row says what was observed."""
    model = timm.create_model("mvitv2_tiny", img_size=64).eval()
    trace, sites = find_sites(model, torch.rand(1, 3, 64, 64))
    blocks = [i for i in sites if i.kind == "block"]
    assert len(blocks) == 10
    assert {i.note for i in blocks} == {"the first tensor of a tuple of 2"}
    stats = collect_stats(net_of(model, trace, blocks, "mvitv2"), blocks, [torch.rand(2, 3, 64, 64)]).stats
    assert list(stats["count"]) == [2 * i.numel for i in blocks]


def test_calls_of_different_shapes_share_no_channels():
    """A normalisation without parameters may meet 4 channels, then 6: its moments are of all, by no channel."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow, self.norm = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.InstanceNorm2d(1)

        def forward(self, x):
            return self.norm(self.narrow(self.norm(self.wide(x)))).flatten(1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch, on the channels that InstanceNorm2d was told
        model, images = Two().eval(), torch.rand(2, 3, 4, 4)
        trace, sites = find_sites(model, images[:1])
        norm = next(i for i in sites if i.kind == "norm")
        assert (norm.channels, norm.numel) == (0, (6 + 4) * 16)
        assert "its calls have different shapes: (1, 4, 4, 4), (1, 6, 4, 4)" in norm.note
        assert "called 2 times" in norm.note
        stats = collect_stats(net_of(model, trace, [norm], "two"), [norm], [images]).stats
    assert stats["count"].item() == 2 * norm.numel


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
    """The second of two modules that hold one parameter owns nothing; the input of each is a site."""
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    _, sites = find_sites(nn.Sequential(first, second), torch.rand(2, 4))
    weights = [i for i in sites if i.site.is_weight]
    assert [(i.quantizable, i.numel) for i in weights] == [(True, 16), (False, 0)]
    assert weights[1].note == "shares its weight with 0"
    assert weights[0].shared_with == ("1",)
    assert "also used by 1" in weights[0].note
    assert [i.quantizable for i in sites if i.site.tensor == "input"] == [True, True]
