"""Figures show what the frame holds: every site once, in network order, units on the axes, no text over text."""

from itertools import pairwise
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from matplotlib.collections import LineCollection, PathCollection, QuadMesh
from matplotlib.figure import Figure
from torch import nn

from analysis.figures.panels import figure_files, save_figure
from analysis.plots import (
    heatmap_size,
    leave_room,
    plot_bits,
    plot_distribution,
    plot_sensitivity_heatmap,
)
from analysis.running_stats import stats_of
from analysis.statistics.names import shorten, shorten_site


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def stats_frame(sites: int) -> pd.DataFrame:
    """Rows of stats.parquet of `sites` random weights under a Swin's names, the last one with a far outlier."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(sites):
        weight = torch.randn(16, 64, generator=generator) * 2.0 ** -(i % 5)
        if i == sites - 1:
            weight[0, 0] = 100.0
        module = f"layers.{i // 40}.blocks.{i // 4 % 10}.{('attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2')[i % 4]}"
        rows.append({"module": module, "tensor": "weight", "kind": "mlp.fc1", "order": i, **stats_of(weight).row()})
    return pd.DataFrame(rows)


def sensitivity_frame(sites: int) -> pd.DataFrame:
    """Rows of sensitivity.parquet at four bit-widths, positive and negative, shuffled, one cell missing."""
    frame = stats_frame(sites)[["module", "tensor", "kind", "order"]].merge(
        pd.DataFrame({"bit_width": [2, 3, 4, 8]}), how="cross"
    )
    frame["delta_loss"] = np.random.default_rng(0).normal(size=len(frame)) * 10.0 ** -frame["bit_width"]
    frame.loc[frame.index == 5, "delta_loss"] = np.nan
    return frame.sample(frac=1, random_state=0)


def overlapping_labels(labels) -> int:
    """How many neighbours among the visible labels touch each other once the figure is drawn."""
    boxes = [label.get_window_extent() for label in labels if label.get_text() and label.get_visible()]
    return sum(one.overlaps(two) for one, two in pairwise(boxes))


def drawn_inside(ax) -> bool:
    """Whether all that belongs to the axes lies on the paper."""
    ax.figure.canvas.draw()
    box = ax.get_tightbbox()
    return box.x0 >= 0 and box.y0 >= 0 and box.x1 <= ax.figure.bbox.x1 and box.y1 <= ax.figure.bbox.y1


@pytest.mark.parametrize("sites", [1, 21, 53, 150])
def test_heatmap_shows_every_site_in_network_order(sites):
    """Each cell holds its figure, rows are labelled one by one in network order, the scale is centred at 0."""
    frame = sensitivity_frame(sites)
    ax = plot_sensitivity_heatmap(frame, tensors="weight")
    mesh = next(c for c in ax.collections if isinstance(c, QuadMesh))
    table = frame.pivot(index="order", columns="bit_width", values="delta_loss").to_numpy()
    np.testing.assert_array_equal(np.ma.filled(mesh.get_array().reshape(sites, 4), np.nan), table)
    assert mesh.norm.vmin == -mesh.norm.vmax
    assert mesh.norm.vmax >= np.nanmax(np.abs(table))
    assert len(set(label.get_text() for label in ax.get_yticklabels())) == sites
    assert ax.get_yticklabels()[0].get_text() == "l0.b0.attn.qkv"
    assert ax.yaxis_inverted()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["2", "3", "4", "8"]
    assert drawn_inside(ax)
    assert overlapping_labels(ax.get_yticklabels()) == 0
    assert tuple(ax.figure.get_size_inches()) == pytest.approx(heatmap_size(sites))


def test_heatmap_names_the_unit_and_hatches_what_was_not_measured():
    """The colour bar carries the unit; a missing cell is masked, so that the hatched ground shows."""
    ax = plot_sensitivity_heatmap(sensitivity_frame(21))
    assert ax.child_axes[0].get_title() == "loss increase (nats), symmetric log scale"
    mesh = next(c for c in ax.collections if isinstance(c, QuadMesh))
    assert np.ma.getmaskarray(mesh.get_array()).sum() == 1
    assert ax.patch.get_hatch()


def test_heatmap_of_a_positive_measure_starts_at_zero():
    """KL has no sign: a sequential scale from 0."""
    frame = sensitivity_frame(4).assign(kl=lambda f: f["delta_loss"].abs())
    ax = plot_sensitivity_heatmap(frame, value="kl")
    mesh = next(c for c in ax.collections if isinstance(c, QuadMesh))
    assert mesh.norm.vmin == 0


@pytest.mark.parametrize("fill", [0.0, np.nan])
def test_heatmap_of_nothing_is_still_drawn(fill):
    """All zero (an untrained network whose branches start at 0) or all missing: no error, no division by 0."""
    assert drawn_inside(plot_sensitivity_heatmap(sensitivity_frame(4).assign(delta_loss=fill)))


def test_heatmap_refuses_two_protocols_at_once():
    """Two rows for one cell would be overdrawn silently."""
    frame = pd.concat([sensitivity_frame(4), sensitivity_frame(4)])
    with pytest.raises(ValueError, match="choose one protocol"):
        plot_sensitivity_heatmap(frame)


@pytest.mark.parametrize("sites", [1, 21, 150])
def test_distribution_has_one_band_a_site(sites):
    """Two bars a site, in units of its own standard deviation; names do not touch, all lies on the paper."""
    frame = stats_frame(sites)
    ax = plot_distribution(frame)
    light, dark = ax.containers[:2]
    assert len(light) == len(dark) == sites
    first = frame.iloc[0]
    assert dark[0].get_y() == pytest.approx((first["q01"] - first["mean"]) / first["std"])
    assert dark[0].get_height() == pytest.approx((first["q99"] - first["q01"]) / first["std"])
    assert drawn_inside(ax)
    assert overlapping_labels(ax.get_xticklabels()) == 0
    assert overlapping_labels(ax.get_yticklabels()) == 0
    assert ax.get_ylabel().startswith("weight - mean (in std")


@pytest.mark.parametrize("sites", [4, 150])
def test_distribution_shows_medians_and_whole_points(sites):
    """A median on the edge of its bar stays dark with a white outline; no point touches the frame, however far out."""
    frame = stats_frame(sites)
    frame.loc[0, "q50"] = frame.loc[0, "q01"]
    ax = plot_distribution(frame)
    median = next(c for c in ax.collections if isinstance(c, LineCollection))
    assert tuple(median.get_color()[0][:3]) == (0, 0, 0)
    assert median.get_path_effects()
    ax.figure.canvas.draw()
    frame_box = ax.get_window_extent()
    points = [c for c in ax.collections if isinstance(c, PathCollection)]
    heights = np.concatenate([ax.transData.transform(c.get_offsets())[:, 1] for c in points])
    assert heights.min() > frame_box.y0 + 3  # pixels: the radius of a point
    assert heights.max() < frame_box.y1 - 3


def test_numbers_of_ticks_have_a_minus_sign():
    """No hyphen stands for a minus on the axes or on a colour bar."""
    axes = [plot_distribution(stats_frame(4)), plot_sensitivity_heatmap(sensitivity_frame(4)).child_axes[0]]
    for labels in (axes[0].get_yticklabels(), axes[1].get_xticklabels()):
        texts = [label.get_text() for label in labels]
        assert not any("-" in text for text in texts)
        assert any("\N{MINUS SIGN}" in text for text in texts)


@pytest.mark.parametrize("scale", [{}, {"value": "log"}, {"value": "symlog", "linthresh": 0.5}])
def test_room_is_a_share_of_the_paper(scale):
    """The margin has the same length on every scale, none where none was asked for."""
    ax = Figure().subplots()
    ax.set_yscale(**scale or {"value": "linear"})
    leave_room(ax, 1, 100, below=0, above=0.1)
    heights = (ax.get_ylim()[0], 1, 100, ax.get_ylim()[1])
    bottom, low, high, top = ax.transData.transform([(0, height) for height in heights])[:, 1]
    assert bottom == pytest.approx(low)
    assert top - high == pytest.approx(0.1 * (high - low))


def test_distribution_leaves_constant_sites_out():
    """A tensor without spread has no unit to be drawn in."""
    frame = stats_frame(5)
    frame.loc[2, "std"] = 0.0
    assert len(plot_distribution(frame).containers[0]) == 4
    assert drawn_inside(plot_distribution(frame.iloc[:0]))


@pytest.mark.parametrize("sites", [1, 21, 150])
def test_bits_are_shown_for_each_site(sites):
    """The digits are the plan's bits where they fit, sites outside the plan stay empty, modules in network order."""
    weights = stats_frame(sites)[["module", "tensor", "kind", "order"]].assign(bit_width=3)
    inputs = weights.assign(tensor="input", bit_width=8).iloc[::2]
    ax = plot_bits(pd.concat([inputs, weights]))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["weight", "input"]
    mesh = next(c for c in ax.collections if isinstance(c, QuadMesh))
    assert np.ma.count(mesh.get_array()) == sites + len(inputs)
    digits = [text.get_text() for text in ax.texts]
    assert sorted(digits) == (["3"] * sites + ["8"] * len(inputs) if sites <= 60 else [])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["3 bit", "8 bit"]
    assert drawn_inside(ax)
    assert overlapping_labels(ax.get_xticklabels()) == 0


def test_an_empty_plan_is_refused():
    """There is no picture of no sites."""
    with pytest.raises(ValueError, match="names no site"):
        plot_bits(pd.DataFrame(columns=["module", "tensor", "bit_width", "kind", "order"]))


def test_plots_draw_on_the_axes_given_and_leave_the_style_alone():
    """The axes come back; matplotlib's settings are those of before."""
    before = dict(mpl.rcParams)
    ax = Figure(layout="constrained").subplots()
    assert plot_sensitivity_heatmap(sensitivity_frame(4), ax=ax) is ax
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "convnext_atto", "mobilenetv3_small_050"])
def test_short_names_stay_different(name):
    """Every module of real networks keeps a label of its own, never a longer one."""
    with torch.device("meta"):
        model = timm.create_model(name)
    names = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.LayerNorm))]
    short = {shorten(n) for n in names}
    assert len(short) == len(names)
    assert all(len(shorten(n)) <= len(n) for n in names)


def test_short_names_are_as_documented():
    """The examples of the docstring; parts of a fused weight are distinguished."""
    assert shorten("layers.0.blocks.1.mlp.fc1") == "l0.b1.mlp.fc1"
    assert shorten("layers.1.downsample.reduction") == "l1.down.reduction"
    assert shorten("layer1.0.conv1") == "layer1.0.conv1"
    assert shorten_site("blocks.0.attn.qkv", "weight.key") == "b0.attn.qkv key"
    assert shorten_site("blocks.0.attn.qkv", "input") == "b0.attn.qkv"


def test_saved_figures_are_the_same_bytes_each_time(tmp_path: Path):
    """PNG and SVG, under the name given, without dates or random ids."""
    contents = []
    for _ in range(2):
        figure = plot_distribution(stats_frame(3)).get_figure(root=True)
        assert figure is not None
        save_figure(figure, tmp_path / "weights")
        files = [tmp_path / name for name in figure_files("weights")]
        assert sorted(tmp_path.iterdir()) == files
        assert files[0].read_bytes().startswith(b"\x89PNG")
        contents.append([path.read_bytes() for path in files])
    assert contents[0] == contents[1]


def test_heatmap_fades_what_is_within_its_noise():
    """A change below two standard errors is drawn under white, one above it is not."""
    frame = pd.DataFrame(
        {"module": ["a", "a"], "tensor": ["weight"] * 2, "order": [0, 0], "bit_width": [2, 4],
         "delta_loss": [0.5, 0.01], "delta_loss_se": [0.1, 0.1]}
    )  # fmt: skip
    ax = plot_sensitivity_heatmap(frame)
    assert "2 s.e." in ax.get_xlabel()
    faded = ax.collections[1].get_array()
    assert np.ma.getmaskarray(faded).ravel().tolist() == [True, False]
    assert "s.e." not in plot_sensitivity_heatmap(frame.drop(columns="delta_loss_se")).get_xlabel()
