"""Groups of sites, what a row quantizes, and rank bands: against sets and orders made by hand."""

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from analysis.scoring import compare, reference_of
from analysis.sensitivity import SweepConfig, quantized_sites, sensitivity_table, sweep_keys
from analysis.sweeps.groups import EVERYTHING, groups_of, stage_of
from analysis.sweeps.rank_bands import images_to_separate, rank_bands
from analysis.sweeps.sweep import sweep
from analysis.tasks import classification
from quant.calibrate import default_scheme, make_quantizer, observe_activations
from quant.insertion import quantized
from quant.sites import find_sites
from tests.networks import logits_of, net_of

IMAGES = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24) % 10
BATCHES = list(zip(IMAGES.split(8), LABELS.split(8), strict=True))


def opened(name, **options):
    """A small network, its trace, the sites that can be quantized, and the names of its blocks."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **options).eval()
    trace, sites = find_sites(model, IMAGES[:2])
    return (model, trace, [info for info in sites if info.quantizable],
            {info.site.module for info in sites if info.kind == "block"})  # fmt: skip


@pytest.fixture(scope="module")
def vit():
    """Two blocks of a ViT."""
    return opened("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)


@pytest.fixture(scope="module")
def swin():
    """Two stages of a Swin."""
    return opened("swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=24, depths=(2, 2),
                  num_heads=(2, 4))  # fmt: skip


def test_kinds_of_a_vit(vit):
    """Attention and MLP are whole; query holds its rows of the weight and the tensor; every site is in a group."""
    _, _, sites, blocks = vit
    groups = groups_of(sites, "kind", blocks=blocks)
    names = {name: {str(info.site) for info in members} for name, members in groups.items()}
    assert names["kind:query"] == {f"blocks.{i}.attn{x}" for i in (0, 1) for x in (".qkv:weight.query", ":query")}
    assert names["kind:ffn"] == {
        f"blocks.{i}.mlp.fc{j}:{t}" for i in (0, 1) for j in (1, 2) for t in ("weight", "input")
    }
    assert names["kind:mhsa"] >= names["kind:query"] | names["kind:key"] | names["kind:value"] | names["kind:softmax"]
    assert not names["kind:mhsa"] & names["kind:ffn"]
    assert set().union(*names.values()) == {str(info.site) for info in sites}
    assert len(names["kind:patch_embed"]) == len(names["kind:head"]) == 2


def test_blocks_and_stages_of_a_swin(swin):
    """Blocks by name, what lies in none by its first name; a stage holds its blocks and its downsampling."""
    _, _, sites, blocks = swin
    by_block = groups_of(sites, "block", blocks=blocks)
    expected = {f"block:layers.{i}.blocks.{j}" for i in (0, 1) for j in (0, 1)}
    assert set(by_block) == expected | {"block:patch_embed", "block:layers", "block:head"}
    by_stage = groups_of(sites, "stage", blocks=blocks)
    assert set(by_stage) == {"stage:layers.0", "stage:layers.1", "stage:patch_embed", "stage:head"}
    assert any("downsample" in info.site.module for info in by_stage["stage:layers.1"])
    for groups in (by_block, by_stage, groups_of(sites, "module", blocks=blocks)):
        assert sum(map(len, groups.values())) == len(sites)


@pytest.mark.parametrize(
    ("block", "stage"),
    [("layers.0.blocks.1", "layers.0"), ("layer2.0", "layer2"), ("blocks.3", "blocks"), ("blocks.2.1", "blocks.2")],
)
def test_the_stage_of_a_block(block, stage):
    """The parent, without a container that is only called blocks."""
    assert stage_of(block) == stage


def test_leave_one_out_is_everything_but_one(vit):
    """Each row quantizes all sites but its own; first layer and classifier keep 8 bits; `all` leaves nothing out."""
    model, _, sites, blocks = vit
    config = SweepConfig(bit_widths=(3,), protocol="leave_one_out", groups="kind")
    keys = sweep_keys(model, sites, config, blocks=blocks)
    groups = groups_of(sites, "kind", blocks=blocks)
    assert [key["group"] for key in keys] == [EVERYTHING, *groups]
    assert [key["protocol"] for key in keys] == ["single"] + ["leave_one_out"] * len(groups)
    for key in keys:
        chosen = dict(quantized_sites(key, sites, blocks=blocks))
        left_out = {info.site for info in groups.get(key["group"], [])}
        assert {info.site for info in chosen} == {info.site for info in sites} - left_out
        assert all(bits == (8 if info.pinned else 3) for info, bits in chosen.items())
    single = sweep_keys(model, sites, SweepConfig(bit_widths=(3,), protocol="leave_one_out"))
    assert len(single) == len(sites) + 1
    assert all(key["tensor"] for key in single)


@pytest.mark.parametrize("protocol", ["single", "leave_one_out"])
def test_a_group_s_row_is_what_quantizing_by_hand_gives(swin, protocol):
    """The figures of a row equal those of a model quantized without the sweep, and rows come in network order."""
    model, trace, sites, blocks = swin
    config = SweepConfig(bit_widths=(4,), protocol=protocol, groups="stage")
    keys = sweep_keys(model, sites, config, blocks=blocks)
    rows = {
        row["group"]: row
        for row in sweep(net_of(model, trace, sites, blocks=blocks), sites, BATCHES, keys, task=classification())
    }
    key = next(key for key in keys if key["group"] == "stage:layers.1")
    chosen = dict(quantized_sites(key, sites, blocks=blocks))
    samples = observe_activations(
        net_of(model, trace, list(chosen)), [i.site for i in chosen], IMAGES.split(8), count=3
    )
    quantizers = {}
    for info, bits in chosen.items():
        scheme = default_scheme(model, info, bits, sample=samples.get(info.site))
        quantizers[info.site] = make_quantizer(model, info, scheme, sample=samples.get(info.site), estimator="mse")
    with quantized(net_of(model, trace, list(chosen)), quantizers):
        logits = logits_of(model, BATCHES)
    whole = [(IMAGES, LABELS)]
    reference = reference_of(classification(), [logits_of(model, BATCHES)], whole)
    expected, _ = compare(classification(), [logits], reference, whole)
    assert rows["stage:layers.1"]["kl"] == pytest.approx(expected["kl"], rel=1e-3)  # attention by its formula
    assert rows["stage:layers.1"]["delta_loss"] == pytest.approx(expected["delta_loss"], rel=1e-2, abs=1e-5)
    table = sensitivity_table(list(rows.values()))
    assert table["order"].is_monotonic_increasing
    assert table.loc[table["group"] != EVERYTHING, "rank_low"].between(1, 4).all()


def test_bands_of_clear_and_of_equal_sites():
    """Sites far apart keep their ranks; equal ones share a wide band."""
    generator = np.random.default_rng(1)
    clear = np.array([[3.0], [1.0], [2.0]]) + 0.01 * generator.standard_normal((3, 50))
    low, high = rank_bands(clear)
    assert low.tolist() == high.tolist() == [1, 3, 2]
    low, high = rank_bands(generator.exponential(1.0, (8, 50)))
    assert ((high - low) >= 3).all()


@settings(deadline=None, max_examples=20)
@given(npst.arrays(np.float64, (5, 12), elements=st.floats(0, 10)), st.floats(0.1, 10))
def test_bands_hold_some_rank_and_no_unit_matters(values, factor):
    """1 <= low <= high <= sites; a factor changes nothing; a site that costs more on every image ranks first."""
    values = np.vstack([values, values.max(0) + 1])
    low, high = rank_bands(values)
    assert ((low >= 1) & (low <= high) & (high <= 6)).all()
    assert (low[5], high[5]) == (1, 1)
    again = rank_bands(values * 2.0 ** round(factor))
    assert again[0].tolist() == low.tolist()


def test_images_to_separate_two_sites():
    """Differences of mean 1 and standard deviation 5 need (1.96 * 5)^2 images; equal sites never separate."""
    generator = np.random.default_rng(0)
    difference = generator.standard_normal(4000)
    difference = 1 + 5 * (difference - difference.mean()) / difference.std(ddof=1)
    other = generator.exponential(1.0, 4000)
    assert images_to_separate(np.array([other + difference, other])) == pytest.approx((1.96 * 5) ** 2)
    assert images_to_separate(np.array([other, other])) == np.inf
