"""Statistics of a network's tensors: against scipy on tensors taken by hand, streamed or at once."""

import math
import pickle
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import timm
import torch
from torch import nn

from analysis.tensor_stats import (
    STATS_COLUMNS,
    centres_of,
    collect_stats,
    measure_activations,
    start_activations,
    stats_tables,
    take_centres_,
)
from quant.errors import InputError
from quant.site import Site
from quant.sites import find_sites
from tests.networks import net_of

IMAGES = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def swin():
    """A small Swin with its trace and sites."""
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, patch_size=4, window_size=4, embed_dim=24, depths=(2, 2),
        num_heads=(2, 4), num_classes=10,
    ).eval()  # fmt: skip
    return model, *find_sites(model, IMAGES[:2])


def row(tables, module, tensor):
    """The row of one site."""
    stats = tables.stats
    return stats[(stats["module"] == module) & (stats["tensor"] == tensor)].iloc[0]


def taken(model, module, what):
    """A tensor as a plain hook sees it, over all images, float64."""
    kept = []
    layer = model.get_submodule(module)
    if what == "input":
        handle = layer.register_forward_pre_hook(lambda _m, args: kept.append(args[0]))
    else:
        handle = layer.register_forward_hook(lambda _m, _args, output: kept.append(output))
    with torch.no_grad():
        model(IMAGES)
    handle.remove()
    return torch.cat(kept).double().numpy()


def check_moments(figures, x):
    """Every figure of a row against numpy and scipy on the whole tensor."""
    flat = x.ravel()
    assert figures["count"] == flat.size
    assert figures["min"] == pytest.approx(flat.min())
    assert figures["max"] == pytest.approx(flat.max())
    assert figures["mean"] == pytest.approx(flat.mean(), rel=1e-5, abs=1e-6 * flat.std())
    assert figures["std"] == pytest.approx(flat.std(), rel=1e-5)
    assert figures["abs_mean"] == pytest.approx(np.abs(flat).mean(), rel=1e-5)
    assert figures["skewness"] == pytest.approx(scipy.stats.skew(flat), abs=1e-3)
    assert figures["excess_kurtosis"] == pytest.approx(scipy.stats.kurtosis(flat), abs=2e-3)
    assert figures["abs_max_over_std"] == pytest.approx(np.abs(flat).max() / flat.std(), rel=1e-5)
    for name, q in (("q01", 0.01), ("q50", 0.5), ("q99", 0.99)):
        expected = np.quantile(flat, q)
        assert abs(figures[name] - expected) <= 0.01 * abs(expected) + 0.01 * flat.std()


def test_all_columns_are_there_in_network_order(swin):
    """One row a site, weights, inputs, outputs of layers, norms and blocks, and the four tensors inside attention."""
    model, trace, sites = swin
    tables = collect_stats(net_of(model, trace, sites, "m"), sites, IMAGES.split(5))
    assert list(tables.stats.columns) == list(STATS_COLUMNS)
    assert tables.stats["order"].is_monotonic_increasing
    assert {"weight", "weight.key", "input", "output", "query", "key", "value", "attention"} <= set(
        tables.stats["tensor"]
    )
    assert set(tables.stats["kind"]) >= {"norm", "block", "attn.softmax", "mlp.fc2", "head", "patch_embed"}
    figures = tables.stats[["mean", "std", "abs_mean", "min", "max", "excess_kurtosis", "q0001", "q9999"]]
    assert np.isfinite(figures.to_numpy(dtype=float)).all()


@pytest.mark.parametrize(
    ("module", "tensor"),
    [("layers.0.blocks.0.mlp.fc2", "input"), ("layers.1.blocks.1.mlp.fc1", "output"), ("patch_embed.proj", "input"),
     ("layers.0.blocks.0.norm1", "output"), ("layers.1.blocks.1", "output")],
)  # fmt: skip
def test_activations_agree_with_scipy(swin, module, tensor):
    """Streamed in batches of 5, 5 and 2, the figures are those of the whole tensor."""
    model, trace, sites = swin
    tables = collect_stats(net_of(model, trace, sites, "m"), sites, IMAGES.split(5))
    check_moments(row(tables, module, tensor), taken(model, module, tensor))


def test_attention_is_observed_per_head(swin):
    """Softmax results lie in [0, 1] with mean 1 / keys; a row a head in channels.parquet; head_std_cv only there."""
    model, trace, sites = swin
    tables = collect_stats(net_of(model, trace, sites, "m"), sites, IMAGES.split(5))
    attention = row(tables, "layers.0.blocks.0.attn", "attention")
    assert attention["mean"] == pytest.approx(1 / 16, rel=1e-5)
    assert 0 <= attention["min"] <= attention["max"] <= 1
    heads = tables.channels.query("module == 'layers.0.blocks.0.attn' and tensor == 'query'")
    assert list(heads["axis"]) == ["head", "head"]
    query = row(tables, "layers.0.blocks.0.attn", "query")
    assert query["head_std_cv"] == pytest.approx(np.std(heads["std"]) / np.mean(heads["std"]), rel=1e-6)
    assert math.isnan(row(tables, "layers.0.blocks.0.mlp.fc1", "input")["head_std_cv"])


def test_weights_are_exact(swin):
    """Quantiles and outlier fractions of weights are numpy's in float64; channels are output channels."""
    model, trace, sites = swin
    tables = collect_stats(net_of(model, trace, sites, "m"), sites, None)
    assert all(tensor.startswith("weight") for tensor in tables.stats["tensor"])
    weight = model.layers[0].blocks[0].mlp.fc1.weight.detach().double().numpy()
    figures = row(tables, "layers.0.blocks.0.mlp.fc1", "weight")
    check_moments(figures, weight)
    assert figures["q0001"] == pytest.approx(np.quantile(weight, 0.0001), rel=1e-9)
    outside = np.abs(weight - weight.mean()) > 3 * weight.std()
    assert figures["outlier_fraction_3"] == pytest.approx(outside.mean(), abs=1e-12)
    largest = np.abs(weight).max(axis=1)
    assert figures["channel_range_ratio"] == pytest.approx(largest.max() / np.median(largest), rel=1e-6)
    value = row(tables, "layers.0.blocks.0.attn.qkv", "weight.value")
    check_moments(value, model.layers[0].blocks[0].attn.qkv.weight.detach()[48:].double().numpy())


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "swinv2_tiny_window8_256"])
def test_beit_and_swinv2_are_observed(name):
    """Their qkv linear is never called; its input and the tensors inside attention are measured all the same."""
    torch.manual_seed(0)
    small = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4) if name.startswith("beit") else dict(
        img_size=32, patch_size=4, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4)
    )  # fmt: skip
    model = timm.create_model(name, num_classes=10, **small).eval()
    trace, sites = find_sites(model, IMAGES[:2])
    stats = collect_stats(net_of(model, trace, sites, "m"), sites, IMAGES.split(6)).stats
    seen = stats[stats["count"] > 0]
    blocks = len(trace.attention)
    for tensor in ("query", "key", "value", "attention"):
        assert (seen["tensor"] == tensor).sum() == blocks
    qkv_inputs = seen[(seen["kind"] == "attn.qkv") & (seen["tensor"] == "input")]
    assert len(qkv_inputs) == blocks


@contextmanager
def spoiled(tensor):
    """Let the first element of a tensor be NaN for a while."""
    kept = tensor.detach().clone()
    try:
        with torch.no_grad():
            tensor.view(-1)[0] = float("nan")
        yield
    finally:
        with torch.no_grad():
            tensor.copy_(kept)


def test_the_first_site_with_nan_is_named(swin):
    """A NaN that arises in the middle is reported where it first appears, not at the logits; no hook stays behind."""
    model, trace, sites = swin
    with (
        spoiled(model.layers[0].blocks[1].mlp.fc1.bias),
        pytest.raises(
            InputError,
            match=r"^layers\.0\.blocks\.1\.mlp\.fc1:output holds NaN or Inf \(.*\) on the image number 0 and all "
            r"others of its batch of 6; no site before it does\. Look at the weights of layers\.0\.blocks\.1\.",
        ),
    ):
        collect_stats(net_of(model, trace, sites, "m"), sites, IMAGES.split(6))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_weight_with_nan_is_named_before_any_image_runs(swin):
    """Damaged weights are told as such, not as what they do to activations."""
    model, trace, sites = swin

    def never():
        raise AssertionError("an image was read")
        yield

    with (
        spoiled(model.layers[1].blocks[0].mlp.fc2.weight),
        pytest.raises(InputError, match=r"the weight of layers\.1\.blocks\.0\.mlp\.fc2 holds NaN or Inf \(1 NaN"),
    ):
        collect_stats(net_of(model, trace, sites, "m"), sites, never())


def test_a_table_inside_attention_with_nan_is_found(swin):
    """A tensor that is no site itself, the relative positions' biases, is found at the softmax that it spoils."""
    model, trace, sites = swin
    with (
        spoiled(model.layers[0].blocks[0].attn.relative_position_bias_table),
        pytest.raises(
            InputError, match=r"^layers\.0\.blocks\.0\.attn:attention holds NaN .* on the image number 0 and"
        ),
    ):
        collect_stats(net_of(model, trace, sites, "m"), sites, IMAGES.split(6))


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_the_image_with_nan_is_named(swin, batch_size):
    """An image that holds NaN itself is told by its number, whatever the batches; no weight is blamed."""
    model, trace, sites = swin
    images = IMAGES.clone()
    images[7, 1, 4, 4] = float("nan")
    with pytest.raises(InputError, match=r"^the image number 7 itself holds NaN"):
        collect_stats(net_of(model, trace, sites, "m"), sites, images.split(batch_size))


def test_statistics_of_parts_are_those_of_the_whole(swin):
    """Batches measured apart, pickled and merged: equal counts, extremes and histograms, moments to 1e-9.

    Exactly equal histograms need the same centres: those of the first batch of all, as processes hand them on.
    """
    model, trace, sites = swin
    batches = [(images, [""] * len(images)) for images in IMAGES.split(3)]
    whole, merged, other = (start_activations(sites) for _ in range(3))
    measure_activations(net_of(model, trace, sites), sites, batches, whole)
    measure_activations(net_of(model, trace, sites), sites, batches[::2], merged)
    take_centres_(other, centres_of(merged))
    measure_activations(net_of(model, trace, sites), sites, batches[1::2], other)
    merged, other = pickle.loads(pickle.dumps((merged, other)))
    for site, stats in merged.items():
        stats.merge(other[site])
    one, two = (stats_tables(net_of(model, trace, sites), sites, m, with_activations=True) for m in (whole, merged))
    for table, exact in (("stats", ["count", "min", "max"]), ("histograms", ["left", "right", "count"])):
        pd.testing.assert_frame_equal(getattr(one, table)[exact], getattr(two, table)[exact], check_exact=True)
    for mine, theirs in zip(one, two, strict=True):
        numbers = [frame.select_dtypes("number").to_numpy(dtype=float) for frame in (mine, theirs)]
        np.testing.assert_allclose(*numbers, rtol=1e-9, atol=1e-12)


def test_histograms_count_every_value(swin):
    """The bins of a site hold as many values as the site, in rising order."""
    model, trace, sites = swin
    tables = collect_stats(net_of(model, trace, sites, "m"), sites, IMAGES.split(5))
    bins = tables.histograms.query("module == 'layers.0.blocks.0.mlp.fc2' and tensor == 'input'")
    assert bins["count"].sum() == row(tables, "layers.0.blocks.0.mlp.fc2", "input")["count"]
    assert (bins["left"] < bins["right"]).all()
    assert bins["left"].is_monotonic_increasing


def test_a_degenerate_site_says_so():
    """A constant weight has variance 0, kurtosis NaN and a note."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    torch.nn.init.constant_(model[0].weight, 0.5)
    trace, sites = find_sites(model, torch.rand(2, 4))
    figures = row(collect_stats(net_of(model, trace, sites, "m"), sites, None), "0", "weight")
    assert figures["std"] == 0
    assert math.isnan(figures["excess_kurtosis"])
    assert "constant" in figures["note"]
    assert Site("0", "weight") in {info.site for info in sites}


class Odd(nn.Module):
    """A layer beside modules whose results are no plain activations."""

    class IndexBlock(nn.Module):
        """A block that returns indices first."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            """(batch, 4) in; indices and values out."""
            y = self.layer(x)
            return y.argmax(dim=1), y

    class Planes(nn.Module):
        """A block that is given every channel as an image of its own."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(1, 1, 1)

        def forward(self, x):
            """(images, channels, h, w) in and out."""
            return self.layer(x.reshape(-1, 1, *x.shape[2:])).reshape(1, -1, *x.shape[2:])

    class PlanesBlock(Planes):
        """The kind of module whose output is a site."""

    def __init__(self):
        super().__init__()
        self.conv, self.planes = nn.Conv2d(3, 8, 3), self.PlanesBlock()
        self.index, self.up = self.IndexBlock(), nn.ConvTranspose2d(8, 12, 2, groups=4)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        """Images in, logits out."""
        y = self.conv(x)
        y = self.planes(y).reshape(len(x), 8, *y.shape[2:])
        _, z = self.index(self.up(y).mean((2, 3))[:, :4])
        return self.head(z)


def test_odd_tensors_are_noted_and_channels_never_mixed():
    """Indices get no figures, channels folded into the batch or of grouped transposed convolutions no groups."""
    torch.manual_seed(0)
    model = Odd().eval()
    images = torch.rand(6, 3, 8, 8)
    trace, sites = find_sites(model, images[:1])
    tables = collect_stats(net_of(model, trace, sites, "odd"), sites, images.split(3))
    rows = tables.stats.set_index(["module", "tensor"])
    assert rows.loc[("index", "output"), "count"] == 0
    assert "holds int64" in rows.loc[("index", "output"), "note"]
    assert rows.loc[("planes", "output"), "count"] == 6 * 8 * 6 * 6
    assert "pooled" in rows.loc[("planes", "output"), "note"]
    by_channel = tables.channels.groupby(["module", "tensor"]).size()
    assert ("planes", "output") not in by_channel
    assert ("up", "weight") not in by_channel
    assert by_channel[("up", "output")] == 12
