"""The books: every product of a forward pass is counted, whoever makes it, and what belongs to no site is named."""

import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from analysis.cost import cost_table
from analysis.planning import accounting
from analysis.storage.table_checks import checked
from analysis.storage.tables import TABLES
from quant.calibrate import default_scheme
from quant.errors import InputError
from quant.multihead import without_fast_path
from quant.network import Network
from quant.scheme import axis_and_groups
from quant.site import Site
from quant.sites import find_sites


class Functional(nn.Module):
    """Convolutions, linears and products by parameters of its own, a called layer first, and no layer last."""

    def __init__(self):
        super().__init__()
        self.first, self.kernel = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(8, 8, 3, 3))
        self.own, self.layer = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)
        self.mix = nn.Parameter(torch.randn(8, 5))

    def forward(self, x):
        """Five numbers of images."""
        x = F.conv2d(self.first(x).relu(), self.kernel).flatten(2).transpose(1, 2)
        x = F.linear(x, self.own)
        x = self.layer(x.mean(1) + torch.einsum("btc,btd->bcd", x, x).mean(1))
        return x @ self.mix


class UNet(nn.Module):
    """Transposed convolutions: grouped with one output a group, grouped with several, and plain."""

    def __init__(self):
        super().__init__()
        self.down, self.depthwise = nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=8)
        self.grouped, self.narrow = nn.ConvTranspose2d(8, 6, 2, 2, groups=2), nn.ConvTranspose2d(6, 3, 2, groups=3)
        self.plain, self.head = nn.ConvTranspose2d(3, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        """Two planes of images."""
        return self.head(self.plain(self.narrow(self.grouped(self.depthwise(self.down(x))))))


def encoder():
    """An encoder of torch's own, over channels as tokens."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return nn.Sequential(nn.Flatten(2), nn.Linear(256, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 2))


def _timm(name, **options):
    return lambda: timm.create_model(name, **options)


VIT = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)
NETWORKS = {
    "resnet18": (_timm("resnet18"), 64), "mobilenetv3": (_timm("mobilenetv3_small_050"), 64),
    "vit": (_timm("vit_tiny_patch16_224", **VIT), 32), "beit": (_timm("beit_base_patch16_224", **VIT), 32),
    "swin": (_timm("swin_tiny_patch4_window7_224", img_size=32, patch_size=4, window_size=4, embed_dim=24,
                   depths=(2, 2), num_heads=(2, 4)), 32),
    "convnext": (_timm("convnext_atto"), 64), "vit_b_16": (lambda: torchvision.models.vit_b_16(image_size=32), 32),
    "encoder": (encoder, 16), "unet": (UNet, 16), "functional": (Functional, 16),
    "linear attention": (_timm("efficientvit_b0"), 64),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_every_product_is_counted(name):
    """Sites and what belongs to none together are torch's own count; the table of costs holds it, by its own laws."""
    torch.manual_seed(0)
    model, images = NETWORKS[name][0]().eval(), torch.rand(2, 3, NETWORKS[name][1], NETWORKS[name][1])
    trace, sites = find_sites(model, images)
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), without_fast_path(), math:
        model(images)
    assert 2 * len(images) * (sum(i.macs for i in sites) + sum(trace.unplanned.values())) == counter.get_total_flops()
    cost = cost_table(sites, trace.unplanned)
    assert 2 * len(images) * accounting.edges(cost)["macs"].sum() == counter.get_total_flops()
    checked(cost, TABLES["cost"], list(cost.columns), source="cost", remedy="")


def test_what_is_of_no_layer_is_named_and_counts_at_32_bits():
    """Its parameters are listed, the module is in `unobserved`, and no wrong layer is the head."""
    model = Functional().eval()
    trace, sites = find_sites(model, torch.rand(1, 3, 16, 16))
    assert trace.unplanned_parameters == {"kernel": 576, "own": 64, "mix": 40}
    assert "kernel" in trace.unobserved[""]
    assert {i.site.module for i in sites if i.pinned} == {"first"}
    assert not any(i.kind == "head" for i in sites)
    cost = cost_table(sites, trace.unplanned)
    bits = {i.site: 4 for i in sites if i.quantizable}
    inside = sum(i.macs for i in sites)
    assert accounting.bitops(bits, cost) == 16 * inside + 1024 * trace.unplanned[""]


@pytest.mark.parametrize(
    ("layer", "shape", "word", "macs"),
    [
        (nn.LSTM(4, 8, 2, bidirectional=True, batch_first=True), (1, 5, 4), "LSTM", 5 * 64 * (4 + 8 + 16 + 8)),
        (nn.GRU(4, 8), (5, 1, 4), "GRU", 5 * 24 * (4 + 8)),
        (nn.RNN(4, 8), (5, 1, 4), "RNN", 5 * 8 * (4 + 8)),
        (nn.GRUCell(4, 8), (1, 4), "GRU", 24 * (4 + 8)),
    ],
)
def test_recurrent_layers_are_named_and_counted(layer, shape, word, macs):
    """They multiply inside one kernel: each matrix once a step, by hand."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = layer, nn.LazyLinear(2)

        def forward(self, x):
            found = self.layer(x)
            return self.head(found[0] if isinstance(found, tuple) else found)

    model = Recurrent().eval()
    model(torch.rand(shape))
    trace, _ = find_sites(model, torch.rand(shape), samples=lambda _: 1)
    assert word in trace.unobserved["layer"]
    assert trace.unplanned == {"layer": macs}
    assert all(name.startswith("layer.weight") for name in trace.unplanned_parameters)


def test_bags_and_bilinear_layers_are_named():
    """What multiplies, or sums rows of a table, where no site is."""

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.both, self.head = nn.EmbeddingBag(9, 4), nn.Bilinear(4, 4, 3), nn.Linear(3, 2)

        def forward(self, x):
            x = self.bag(x)
            return self.head(self.both(x, x))

    trace, sites = find_sites(Words().eval(), torch.randint(9, (2, 5)))
    assert trace.unobserved.keys() == {"bag", "both"}
    assert trace.unplanned == {"both": 3 * 4 * 4}
    assert trace.unplanned_parameters == {"bag.weight": 36, "both.weight": 48}
    assert {i.site.module for i in sites if i.kind == "head"} == {"head"}


def test_transposed_convolutions_have_a_scale_an_output_channel():
    """Along axis 1, or along the first where each group has one output; several outputs a group share one, noted."""
    _, sites = find_sites(UNet().eval(), torch.rand(1, 3, 16, 16))
    weights = {i.site.module: i for i in sites if i.site.is_weight}
    found = {name: (i.channel_axis, i.channels) for name, i in weights.items()}
    assert found == {"down": (0, 8), "depthwise": (0, 8), "grouped": (-1, 0), "narrow": (0, 3), "plain": (1, 4),
                     "head": (0, 2)}  # fmt: skip
    assert {name for name, i in weights.items() if i.note} == {"grouped"}
    assert all(i.quantizable for i in weights.values())


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_functional_transposed_convolutions_are_sites(dimensions):
    """A transposed convolution whose weight is used without calling it, as of the forward ones."""

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1](3, 4, 3)

        def forward(self, x):
            function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dimensions - 1]
            return function(x, self.up.weight, self.up.bias)

    trace, sites = find_sites(Functional().eval(), torch.rand(2, 3, *[5] * dimensions))
    assert trace.functional == {"up"}
    macs = next(i for i in sites if i.site == Site("up", "weight")).macs
    assert macs == 3 * 5**dimensions * 4 * 3**dimensions


def test_a_site_without_channels_alone_has_one_scale():
    """Asked for a scale a channel, or for nothing, the grouped convolution falls back, and no other layer."""
    model = UNet().eval()
    _, sites = find_sites(model, torch.rand(1, 3, 16, 16))
    for asked in (None, "per_channel"):
        found = {}
        for info in sites:
            if info.site.is_weight:
                scheme = default_scheme(model, info, 4, sample=None, granularity=asked)
                found[info.site.module] = scheme.granularity
                axis_and_groups(info, scheme.granularity)
        assert {name for name, granularity in found.items() if granularity == "per_tensor"} == {"grouped"}


def test_a_network_says_once_what_is_not_observed():
    """One warning with the share and the first names; none where all is observed; nothing to quantize is an error."""
    with pytest.warns(UserWarning, match="kernel") as told:
        net = Network(Functional(), torch.rand(2, 3, 16, 16))
    assert len(told) == 1
    assert list(net.unobserved) == [""]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Network(UNet(), torch.rand(2, 3, 16, 16))
    with pytest.raises(InputError, match="nothing to quantize"):
        Network(nn.LSTM(4, 8), torch.rand(2, 5, 4))


def test_a_module_that_is_called_several_times_keeps_its_reason():
    """A cell of a recurrent network is called once a step: its products of all steps are counted."""

    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.LSTMCell(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            h = c = x.new_zeros(len(x), 8)
            for step in x.unbind(1):
                h, c = self.cell(step, (h, c))
            return self.head(h)

    trace, sites = find_sites(Steps().eval(), torch.rand(2, 5, 4))
    assert "LSTM" in trace.unobserved["cell"]
    assert trace.unplanned == {"cell": 5 * 32 * (4 + 8)}
    assert {i.site.module for i in sites if i.pinned} == {"head"}
