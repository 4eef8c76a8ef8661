"""`qvw compare`: the figures' data agree with what numpy makes of the raw tensors, and the figures with their data."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.collections import PathCollection

from analysis.cli import main
from analysis.figures.panels import channels_figure, depth_figure, heads_figure, ridges_figure
from analysis.figures.variation_panels import STEMS, variation_figures
from analysis.figures.variation_plots import (
    FLOOR,
    KIND_STYLES,
    RIDGE,
    TOP,
    plot_channels,
    plot_head_spread,
    plot_head_std,
    plot_ridges,
    plot_variation_by_depth,
)
from analysis.report import report_html
from analysis.running_stats import stats_of
from analysis.statistics.variation_frames import Measured, channel_frame, depth_frame, distribution_frame, head_frame
from quant.errors import InputError

RESNET = '{"layers": [1, 1, 1, 1], "num_classes": 10, "in_chans": 1, "stem_width": 8, "channels": [8, 8, 16, 16]}'
VIT = '{"img_size": 32, "patch_size": 8, "in_chans": 1, "num_classes": 10, "embed_dim": 32, "depth": 2, "num_heads": 4}'
Tensors = list[tuple[str, str, str, torch.Tensor]]  # module, kind, tensor, values with channels or heads along axis 0


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def measured(name: str, tensors: Tensors) -> Measured:
    """The three tables of a run that observed these tensors."""
    rows, channels, histograms = [], [], []
    for order, (module, kind, tensor, values) in enumerate(tensors):
        stats = stats_of(values, 0, len(values))
        site = {"module": module, "tensor": tensor}
        by_head = tensor in ("query", "key", "value", "attention")
        cv = {"head_std_cv" if by_head else "channel_std_cv": stats.std_cv()}
        ratio = float("nan") if by_head else stats.range_ratio()
        rows.append({"model": name, **site, "kind": kind, "order": order, "numel": values.numel(), "note": "",
                     **stats.row(), "channel_range_ratio": ratio, **cv})  # fmt: skip
        axis = "head" if by_head else "channel"
        channels += [{**site, "axis": axis, **row} for row in stats.group_rows()]
        histograms += [{**site, "left": a, "right": b, "count": n} for a, b, n in stats.histogram_rows()]
    table = pd.DataFrame(rows, columns=[*rows[0], *({"head_std_cv", "channel_std_cv"} - set(rows[0]))])
    return Measured(name=name, stats=table, channels=pd.DataFrame(channels), histograms=pd.DataFrame(histograms))


def network(seed: int = 0) -> Tensors:
    """A convolution behind a ReLU, linears of different size, one with a wide channel, a fused qkv, attention."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    wide = normal(12, 2000)
    wide[7] *= 30
    return [
        ("conv", "conv", "weight", normal(16, 300)),
        ("conv", "conv", "input", normal(16, 5000).relu()),
        ("blocks.0.attn.qkv", "attn.qkv", "weight.query", normal(8, 200) + 3),
        ("blocks.0.attn.qkv", "attn.qkv", "weight.key", normal(8, 200) * 0.1),
        ("blocks.0.attn.qkv", "attn.qkv", "weight.value", normal(8, 200) * 10),
        ("blocks.0.attn.qkv", "attn.qkv", "input", normal(24, 200)),
        ("blocks.0.attn", "attn.query", "query", normal(4, 900) * torch.tensor([[1.0], [2.0], [3.0], [4.0]])),
        ("blocks.0.attn", "attn.softmax", "attention", normal(4, 900).exp()),
        ("blocks.0.mlp.fc2", "mlp.fc2", "weight", normal(12, 40)),
        ("blocks.0.mlp.fc2", "mlp.fc2", "input", wide),
        ("blocks.1.mlp.fc2", "mlp.fc2", "weight", normal(12, 9000) ** 3),
        ("blocks.1.mlp.fc2", "mlp.fc2", "input", normal(12, 2000)),
        ("constant", "mlp.fc2", "weight", torch.ones(4, 4)),
        ("head", "head", "weight", normal(10, 24)),
        ("head", "head", "input", normal(24, 200)),
    ]


def deep(model: str, blocks: int) -> pd.DataFrame:
    """The frame over depth of a network with every kind of layer: 15 tensors a block."""
    generator = np.random.default_rng(0)
    kinds = [*KIND_STYLES, "conv"]
    frame = pd.DataFrame({"kind": kinds * blocks, "model": model, "tensor": "weight"})
    frame["relative_depth"] = np.linspace(0, 1, len(frame))
    for value in ("abs_mean", "std", "channel_range_ratio", "channel_std_cv"):
        frame[value] = 10.0 ** generator.normal(size=len(frame))
    return frame.assign(excess_kurtosis=generator.normal(size=len(frame)) * 20, outlier_fraction=0.0)


def on_the_paper(figure) -> bool:
    """Whether all that the figure holds lies within its edges, half a pixel aside."""
    figure.set_dpi(200)  # as it is saved: letters are wider than at 100
    figure.canvas.draw()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    return box.x0 >= -0.005 and box.y0 >= -0.005 and box.x1 <= width + 0.005 and box.y1 <= height + 0.005


def test_densities_are_those_of_the_raw_values():
    """Standardised values of each tensor, binned by numpy, averaged over the tensors of a kind: the same distribution.

    The sum is 1, also with far outliers, ReLU's zeros and a mean that is far from 0; a small tensor counts as a large.
    """
    tensors = network()
    for role in ("weight", "input"):
        frame = distribution_frame([measured("net", tensors)], tensor=role)
        groups: dict[tuple[str, str], list[np.ndarray]] = {}
        for _, kind, tensor, values in tensors:
            part = tensor.partition(".")[0]
            if values.std() > 0 and (part == "weight") == (role == "weight"):
                x = values.double().numpy().ravel()
                groups.setdefault((kind, part), []).append((x - x.mean()) / x.std())
        assert set(groups) == set(zip(frame["kind"], frame["tensor"], strict=True))
        for (kind, part), pooled in groups.items():
            rows = frame[(frame["kind"] == kind) & (frame["tensor"] == part)]
            edges = np.append(rows["left"], rows["right"].iloc[-1])
            shares = (rows["density"] * np.diff(edges)).to_numpy()
            expected = np.mean([np.histogram(x, edges)[0] / len(x) for x in pooled], axis=0)
            assert shares.sum() == pytest.approx(1, abs=1e-9)
            assert expected.sum() == pytest.approx(1, abs=1e-9)
            assert (rows["tensors"] == len(pooled)).all()
            assert np.abs(shares.cumsum() - expected.cumsum()).max() < 0.02, kind
            far = (rows["left"] >= 4) | (rows["right"] <= -4)
            assert shares[far].sum() == pytest.approx(expected[far].sum(), rel=0.25, abs=2e-4), kind
            assert np.sum(rows["gaussian"] * np.diff(edges)) == pytest.approx(1, abs=1e-4)


def test_attention_is_pooled_unless_a_part_of_its_note_says_no():
    """A note that names something else keeps its tensor among the densities, one that starts so leaves it out."""
    run = measured("net", network())
    inside = run.stats["tensor"].isin(("query", "attention"))
    for note, kept in (("the first tensor of a constant_pair of 2", True), ("its own; not observed", False)):
        noted = run.stats.assign(note=run.stats["note"].where(~inside, note))
        frame = distribution_frame([replace(run, stats=noted)], tensor="input")
        assert ({"query", "attention"} <= set(frame["tensor"])) == kept
        assert kept or not {"query", "attention"} & set(frame["tensor"])


def test_zeros_of_a_relu_fall_into_one_bin():
    """Half of the values lie on one point: their whole share is in the bin that holds it, none beside it."""
    tensors = [("conv", "conv", "input", torch.cat([torch.zeros(4, 1000), torch.rand(4, 1000) + 1], dim=1))]
    frame = distribution_frame([measured("net", tensors)], tensor="input")
    x = tensors[0][3].double()
    at = float(-x.mean() / x.std(correction=0))
    holds = (frame["left"] <= at) & (at < frame["right"])
    shares = frame["density"] * (frame["right"] - frame["left"])
    assert shares[holds].tolist() == pytest.approx([0.5])
    assert shares[frame["right"] < at].sum() == 0


def test_several_runs_share_the_bins():
    """The same edges for a run of short tails beside one of long tails, so that ridges can be laid over each other."""
    short = [("a", "conv", "weight", torch.linspace(-1, 1, 1000).view(4, 250))]
    frame = distribution_frame([measured("short", short), measured("long", network())])
    edges = [rows["left"].tolist() for _, rows in frame.groupby(["model", "kind"])]
    assert all(each == edges[0] for each in edges)


def test_ridges_draw_the_frame():
    """Each outline is the logarithm of its densities, the points are the outermost bins met, attention comes last."""
    frame = distribution_frame([measured("a", network()), measured("b", network(1)[:2])], tensor="input")
    ax = plot_ridges(frame)
    titles = [label.get_text() for label in ax.get_yticklabels()]
    assert titles == ["conv", "attn.qkv", "mlp.fc2", "head", "query", "attention"]
    runs = [label.get_text() for label in ax.child_axes[0].get_yticklabels()]
    assert runs == ["a (1)", "b (1)", "a (1)", "a (2)", "a (1)", "a (1)", "a (1)"]
    rows = frame[(frame["kind"] == "conv") & (frame["model"] == "a")]
    outline = ax.collections[0].get_paths()[0].vertices
    heights = (np.log10(rows["density"].clip(FLOOR, TOP)) - np.log10(FLOOR)) / np.log10(TOP / FLOOR)
    assert outline[:, 1].min() == pytest.approx(1 - RIDGE * heights.max())
    assert set(np.round(1 - RIDGE * heights, 9)) <= set(np.round(outline[:, 1], 9))
    points = next(c for c in ax.collections if isinstance(c, PathCollection)).get_offsets()
    met = rows[rows["density"] > 0]
    np.testing.assert_allclose(points[:, 0], [met["left"].iloc[0], met["right"].iloc[-1]])
    assert on_the_paper(ridges_figure(frame, "input"))


def test_channels_are_those_of_the_most_uneven_layer():
    """The module, the order and every figure against the raw tensors; a fused weight's parts are ranked together."""
    tensors = network()
    frame = channel_frame([measured("net", tensors)])
    assert frame["module"].unique().tolist() == ["blocks.0.mlp.fc2"]
    rows = frame[frame["tensor"] == "input"]
    raw = next(values for *site, values in tensors if site == ["blocks.0.mlp.fc2", "mlp.fc2", "input"]).double().numpy()
    reach = np.abs(raw).max(axis=1)
    assert rows["rank"].tolist() == list(range(1, 13))
    assert rows["index"].tolist() == np.argsort(-reach).tolist()
    assert rows["index"].iloc[0] == 7
    order = rows["index"].to_numpy()
    for column, expected in {"min": raw.min(1), "max": raw.max(1), "mean": raw.mean(1), "std": raw.std(1)}.items():
        np.testing.assert_allclose(rows[column], expected[order], rtol=1e-6, atol=1e-9)
    assert rows["median_abs_max"].unique().tolist() == pytest.approx([np.median(reach)])

    fused = channel_frame([measured("net", tensors)], ["*qkv"])
    weights = fused[fused["tensor"] != "input"]
    assert len(weights) == 24
    assert sorted(weights["rank"]) == list(range(1, 25))
    assert set(weights["tensor"].head(8)) == {"weight.value"}  # ten times as wide as the next


def test_a_pattern_chooses_the_module_of_each_run():
    """Of those that match the most uneven; a run without one is left out; a pattern that meets none is an error."""
    runs = [measured("net", network()), measured("small", network()[:2])]
    assert channel_frame(runs, ["*fc2"])["model"].unique().tolist() == ["net"]
    chosen = channel_frame(runs, ["blocks.1.*", "conv"])
    assert chosen.groupby("model")["module"].unique().map(list).to_dict() == {
        "net": ["conv"] if _ratio(network(), "conv") > _ratio(network(), "blocks.1.mlp.fc2") else ["blocks.1.mlp.fc2"],
        "small": ["conv"],
    }
    with pytest.raises(InputError, match=r"--module 'layer9\*' matches no layer; they are named such as conv, blocks"):
        channel_frame(runs, ["conv", "layer9*"])


def _ratio(tensors: Tensors, name: str) -> float:
    """The larger of weight's and input's, from the raw values."""
    reaches = [values.abs().amax(dim=1).double().numpy() for module, *_, values in tensors if module == name]
    return max(float(reach.max() / np.median(reach)) for reach in reaches)


@pytest.mark.parametrize("role", ["weight.query", "weight", "input"])
def test_weight_and_input_choose_the_layer_alike(role):
    """One wide channel draws the figure to its layer, be it of a weight, of a part of a fused one, or of an input."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        (f"blocks.{i}.attn.qkv", "attn.qkv", tensor, torch.randn(8, 100, generator=generator) * (1 + i))
        for i in range(3) for tensor in (role, "input")
    ]  # fmt: skip
    tensors[2 if role != "input" else 3][3][5] *= 20
    assert channel_frame([measured("net", tensors)])["module"].unique().tolist() == ["blocks.1.attn.qkv"]


def test_a_pattern_may_be_of_the_short_name():
    """The figures write `b0.mlp.fc2`: it chooses the layer as its full name does, and alone if both names are exact."""
    runs = [measured("net", network())]
    for pattern in ("b1.mlp.fc2", "blocks.1.mlp.fc2", "b1.*"):
        assert channel_frame(runs, [pattern])["module"].unique().tolist() == ["blocks.1.mlp.fc2"]
    with pytest.raises(InputError, match=r"--module 'b9\.\*' matches no layer"):
        channel_frame(runs, ["b9.*"])


def test_a_run_of_weights_only_shows_its_most_uneven_weight():
    """Without inputs the weights decide, and the panel of the input says that it was not measured."""
    weights = [site for site in network() if site[2].startswith("weight")]
    frame = channel_frame([measured("net", weights)])
    ratios = measured("net", weights).stats.set_index("module")["channel_range_ratio"]
    assert frame["module"].unique().tolist() == [ratios.idxmax()]
    assert set(frame["tensor"]) == {"weight"}
    texts = [text.get_text() for text in channels_figure(frame).axes[1].texts]
    assert texts == ["input not measured"]


@pytest.mark.parametrize("channels", [1, 16, 100])
def test_channels_are_drawn_one_by_one(channels):
    """The light band runs from minimum to maximum, the dark one a standard deviation about the mean, if within them."""
    values = torch.randn(channels, 50, generator=torch.Generator().manual_seed(0)).relu()
    values[0] *= 100
    run = measured("net", [("fc", "head", "weight", values), ("fc", "head", "input", values)])
    frame = channel_frame([run])
    ax = plot_channels(frame)
    rows = frame[frame["tensor"] == "input"]
    light, dark = (collection.get_paths()[0].vertices[:, 1] for collection in ax.collections)
    assert set(rows["min"]) | set(rows["max"]) == set(light)
    assert (rows["mean"] - rows["std"]).min() < 0  # a ReLU's: its band would reach below every value
    lower, upper = rows["mean"] - rows["std"], rows["mean"] + rows["std"]
    assert set(np.maximum(lower, rows["min"])) | set(np.minimum(upper, rows["max"])) == set(dark)
    assert ax.get_xlabel().startswith(f"{channels} channels, widest first: 0")
    assert "step" not in ax.get_xlabel()
    assert ax.get_yscale() == ("linear" if channels == 1 else "symlog")
    assert on_the_paper(channels_figure(frame))


@pytest.mark.parametrize("channels", [101, 2048])
def test_many_channels_share_steps(channels):
    """At most 100 steps, each from the lowest minimum to the highest maximum of its channels; the label says so."""
    values = torch.randn(channels, 50, generator=torch.Generator().manual_seed(0))
    frame = channel_frame([measured("net", [("fc", "head", "input", values)])])
    ax = plot_channels(frame)
    size = int(np.ceil(channels / 100))
    groups = [frame.iloc[start : start + size] for start in range(0, channels, size)]
    light, dark = (collection.get_paths()[0].vertices[:, 1] for collection in ax.collections)
    assert len(groups) <= 100
    assert {rows["min"].min() for rows in groups} | {rows["max"].max() for rows in groups} == set(light)
    ends = [(rows["mean"] + sign * rows["std"]).median() for rows in groups for sign in (-1, 1)]
    assert set(np.round(ends, 9)) == set(np.round(dark, 9))
    assert f"a step: range of {size} channels" in ax.get_xlabel()
    assert on_the_paper(channels_figure(frame))


def test_the_widest_channels_are_seen():
    """One value of -99 in one of 2048 channels: a point at it, inside the frame, in a step of some pixels' width."""
    values = torch.rand(2048, 50, generator=torch.Generator().manual_seed(0)) - 0.5
    values[700, 0] = -99
    frame = channel_frame([measured("net", [("fc", "head", "input", values)])])
    figure = channels_figure(frame)
    ax = figure.axes[1]
    figure.canvas.draw()
    points = next(line for line in ax.lines if line.get_marker() == "o").get_xydata()
    assert points[0].tolist() == [1, -99]
    reach = np.maximum(-frame["min"], frame["max"]).head(3)
    assert np.abs(points[:, 1]).tolist() == reach.tolist()
    (x, y), box = ax.transData.transform(points[0]), ax.get_window_extent()
    assert x > box.x0
    assert y > box.y0 + 1
    vertices = ax.collections[0].get_paths()[0].vertices
    lowest = ax.transData.transform(vertices[vertices[:, 1] == -99])[:, 0]
    assert np.ptp(lowest) > 2  # pixels at 100 dots an inch


def test_channels_that_are_all_zero_are_told():
    """More than half of the channels dead: no median to compare with, no logarithm of 0; the label counts them."""
    values = torch.zeros(8, 50)
    values[0] = torch.rand(50)
    frame = channel_frame([measured("net", [("fc", "head", "input", values)])])
    ax = plot_channels(frame)
    assert ax.get_yscale() == "linear"
    assert "\n7 channels always 0" in ax.get_xlabel()
    assert "always" not in plot_channels(frame.iloc[:1]).get_xlabel()
    assert on_the_paper(channels_figure(frame))


def test_the_title_of_channels_tells_the_rule():
    """Which layer it is, and of which patterns the user chose; long ones do not leave the paper, $ is no formula."""
    frame = channel_frame([measured("net", network())])
    assert "whose weight or input has the widest channel" in channels_figure(frame).get_suptitle()
    figure = channels_figure(frame, ["*fc2", "a$b$", *("layer1.*.a_rather_long_name" for _ in range(6))])
    assert "among those that match *fc2 or a\\$b\\$ or" in figure.get_suptitle().replace("\n", " ")
    assert on_the_paper(figure)


def test_heads_are_those_of_the_raw_tensors():
    """The standard deviation of each head and its coefficient of variation; layers count from 0; nothing without."""
    tensors = network()
    frame = head_frame([measured("net", tensors), measured("plain", tensors[:2])])
    assert frame["model"].unique().tolist() == ["net"]
    query = frame[frame["tensor"] == "query"]
    raw = next(values for _, _, tensor, values in tensors if tensor == "query").double().numpy().std(axis=1)
    np.testing.assert_allclose(query["std"], raw, rtol=1e-6)
    np.testing.assert_allclose(query["head_std_cv"], raw.std() / raw.mean(), rtol=1e-6)
    assert query["head"].tolist() == [0, 1, 2, 3]
    assert set(frame["layer"]) == {0}
    assert head_frame([measured("plain", tensors[:2])]).empty
    ax = plot_head_std(frame, tensor="query")
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), query["std"])
    spread = plot_head_spread(frame)
    assert [line.get_xydata()[0, 1] for line in spread.lines] == frame["head_std_cv"].drop_duplicates().tolist()
    assert on_the_paper(heads_figure(frame))


def test_an_attention_of_one_head_counts_as_a_layer():
    """It has no rows of heads, and the layers after it keep their place in the network, whatever the order of rows."""
    values = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    tensors = [
        (f"blocks.{block}.attn", f"attn.{tensor}", tensor, values[:heads])
        for block, heads in enumerate((4, 1, 2)) for tensor in ("query", "key")
    ]  # fmt: skip
    run = measured("net", tensors)
    assert run.channels is not None
    several = run.channels[run.channels["module"] != "blocks.1.attn"]  # `qvw stats` writes no rows of a single head
    frame = head_frame([replace(run, stats=run.stats.iloc[::-1], channels=several)])
    layers = frame.drop_duplicates(["module", "tensor"])
    assert layers[["module", "tensor", "layer"]].to_numpy().tolist() == [
        ["blocks.0.attn", "query", 0], ["blocks.0.attn", "key", 0],
        ["blocks.2.attn", "query", 2], ["blocks.2.attn", "key", 2],
    ]  # fmt: skip


@pytest.mark.parametrize("value", ["abs_mean", "excess_kurtosis", "outlier_fraction", "head_std_cv"])
def test_depth_has_a_line_per_kind(value):
    """Lines hold the frame's figures; logarithmic where all are positive; the axes are drawn also without data."""
    frame = pd.concat([deep("a", 2), deep("b", 10)]).assign(head_std_cv=np.nan)
    ax = plot_variation_by_depth(frame, value=value, model="b")
    if value == "head_std_cv":
        assert not ax.lines
        return
    assert len(ax.lines) == len(KIND_STYLES)
    rows = frame[(frame["model"] == "b") & (frame["kind"] == "conv")]
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), rows[["relative_depth", value]])
    assert ax.get_yscale() == {"abs_mean": "log", "excess_kurtosis": "symlog", "outlier_fraction": "linear"}[value]
    with pytest.raises(ValueError, match="holds 2 models: choose one of a, b"):
        plot_variation_by_depth(frame, value=value)


@pytest.mark.parametrize("models", [1, 5])
def test_depth_figure_fits_the_paper(models):
    """A column a run, one scale a row, a legend of all kinds; 15 and 150 layers side by side, nothing cut off."""
    frame = pd.concat([deep(f"a_rather_long_name_{i}"[: 20 if i else 3], 10 if i else 1) for i in range(models)])
    figure = depth_figure(frame, "weight")
    assert on_the_paper(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(KIND_STYLES)
    grid = np.array(figure.axes).reshape(6, models)
    for row in grid:
        assert len({ax.get_ylim() for ax in row}) == 1


def test_a_run_without_the_tensor_keeps_its_column():
    """Empty, with the words; the runs beside it keep their lines and their place."""
    figure = depth_figure(deep("b", 2), "input", ["a", "b", "b"])
    grid = np.array(figure.axes).reshape(6, 2)
    for empty, full in grid:
        assert [text.get_text() for text in empty.texts] == ["not measured"]
        assert not empty.lines
        assert full.lines
        assert not full.texts
    assert [ax.get_title() for ax in grid[0]] == ["a", "b"]
    assert on_the_paper(figure)


@pytest.mark.parametrize("shares", [[0.0, 1e-5, 3e-3], [0.0, 0.0, 0.0], [0.0, 0.2, 0.3]])
def test_shares_are_not_below_zero(shares):
    """The axis starts at 0 and ends above the largest of all runs; markers on the frame are drawn whole, over it."""
    frame = deep("a", 1).assign(outlier_fraction=0.0)
    other = deep("b", 1).iloc[:3].assign(outlier_fraction=shares)
    figure = depth_figure(pd.concat([frame, other]), "weight", ["a", "b", "c"])
    row = np.array(figure.axes).reshape(6, 3)[3]
    for ax in row:
        assert ax.get_ylim()[0] == 0
        assert ax.get_ylim()[1] > max(shares)
    for line in [*row[0].lines, *row[1].lines]:
        assert not line.get_clip_on()
        assert line.get_zorder() > row[0].spines["bottom"].get_zorder()


def test_parts_of_a_fused_weight_have_lines_of_their_own():
    """Query, key and value differ in scale: one line through all three would say nothing."""
    frame = depth_frame([measured("net", network())])
    kinds = frame.loc[frame["module"] == "blocks.0.attn.qkv", "kind"].tolist()
    assert kinds == ["attn.query", "attn.key", "attn.value"]


def test_kinds_are_told_apart_without_colour():
    """Marker, dash and filling together are different for each kind of layer; so are colour and marker."""
    assert len({style[1:] for style in KIND_STYLES.values()}) == len(KIND_STYLES)
    assert len({style[:2] for style in KIND_STYLES.values()}) == len(KIND_STYLES)
    assert len({KIND_STYLES[kind][0] for kind in ("conv", "attn.qkv", "attn.query", "attn.key", "attn.value")}) == 5


def qvw(*arguments) -> int:
    """Run the command line and return its exit code."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """`resnet` and `vit`, measured with images; `weights`, the same ViT without."""
    root = tmp_path_factory.mktemp("runs")
    data = ["--data", "digits", "--images", 32, "--num-workers", 0, "--batch-size", 32, "--quiet"]
    vit = ["vit_tiny_patch16_224", "--model-kwargs", VIT]
    assert qvw("stats", "resnet18", "--model-kwargs", RESNET, "--run", root / "resnet", *data) == 0
    assert qvw("stats", *vit, "--run", root / "vit", *data) == 0
    assert qvw("stats", *vit, "--run", root / "weights", "--quiet") == 0
    return root


@pytest.fixture(scope="module")
def compared(runs) -> Path:
    """The folder that compares the ResNet with the ViT."""
    assert qvw("compare", runs / "resnet", runs / "vit", "--out", runs / "out", "--quiet") == 0
    return runs / "out"


def test_every_figure_has_its_data(compared, runs):
    """PNG, SVG and CSV of one stem each; the table is what the figure was drawn from, to the last digit."""
    names = {path.name for path in compared.iterdir()}
    assert names == {
        "comparison.csv", "differences.csv", "index.html",
        *(f"{stem}.{suffix}" for stem in STEMS for suffix in ("png", "svg", "csv")),
    }  # fmt: skip
    tables = [
        Measured(name=name, **{t: pd.read_parquet(runs / name / f"{t}.parquet")
                               for t in ("stats", "channels", "histograms")})
        for name in ("resnet", "vit")
    ]  # fmt: skip
    for each in variation_figures(tables):
        written = pd.read_csv(compared / f"{each.stem}.csv")
        pd.testing.assert_frame_equal(written, each.frame, check_dtype=False, check_exact=True)
        assert on_the_paper(each.figure), each.stem
        plt.close(each.figure)
    heads = pd.read_csv(compared / "heads.csv")
    assert heads.groupby("tensor").size().to_dict() == dict.fromkeys(("attention", "key", "query", "value"), 8)


def test_measured_attention_agrees_with_its_heads(runs):
    """head_std_cv of stats.parquet is the spread of the standard deviations that the strip shows."""
    frame = head_frame([Measured(name="vit", **{t: pd.read_parquet(runs / "vit" / f"{t}.parquet")
                                                for t in ("stats", "channels", "histograms")})])  # fmt: skip
    for _, rows in frame.groupby(["module", "tensor"]):
        assert rows["std"].std(ddof=0) / rows["std"].mean() == pytest.approx(rows["head_std_cv"].iloc[0], rel=1e-5)


def test_a_pattern_without_a_layer_writes_nothing(runs, tmp_path, capsys):
    """Exit code 2, the names of layers, and no folder."""
    out = tmp_path / "out"
    assert qvw("compare", runs / "resnet", runs / "vit", "--out", out, "--module", "nosuch*") == 2
    message = capsys.readouterr().err
    assert "--module 'nosuch*' matches no layer" in message
    assert "layer1.0.conv1" in message
    assert "blocks.0.attn.qkv" in message
    assert not out.exists()


def test_what_a_run_lacks_is_told_and_left_out(runs, tmp_path, capsys):
    """Images, channels, histograms, a layer that matches; the page says it too; no figure of other runs stays."""
    bare = shutil.copytree(runs / "vit", tmp_path / "bare")
    (bare / "channels.parquet").unlink()
    (bare / "histograms.parquet").unlink()
    out = tmp_path / "out"
    out.mkdir()
    (out / "heads.png").write_bytes(b"of other runs")
    folders = [runs / "resnet", runs / "weights", bare]
    assert qvw("compare", *folders, "--out", out, "--module", "layer3*conv1") == 0
    told = capsys.readouterr()
    for file in ("channels.parquet", "histograms.parquet"):
        assert f"{bare} has no {file}" in told.err
    assert f"qvw stats --run {bare} --overwrite" in told.err
    assert "weights was measured without images" in told.out
    assert "weights has no layer that matches --module" in told.out

    def shown(stem: str) -> set[str]:
        return set(pd.read_csv(out / f"{stem}.csv")["model"])

    assert shown("variation_weight") == {"resnet", "weights", "bare"}
    assert shown("variation_input") == {"resnet", "bare"}
    assert shown("distributions_weight") == {"resnet", "weights"}
    assert shown("distributions_input") == shown("channels") == {"resnet"}
    assert not (out / "heads.png").exists()
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "channels of layer3.0.conv1" in page
    assert "has no channels.parquet" in page
    assert len(page) < 5 * 2**20


def test_a_damaged_table_is_named(runs, tmp_path):
    """A file that was cut short is wrong input, not left out in silence."""
    broken = shutil.copytree(runs / "vit", tmp_path / "broken")
    (broken / "channels.parquet").write_bytes((broken / "channels.parquet").read_bytes()[:100])
    assert qvw("compare", runs / "weights", broken, "--out", tmp_path / "out") == 2
    with pytest.raises(InputError, match=r"channels\.parquet cannot be read"):
        report_html([broken])


def test_statistics_that_were_not_finished_are_refused(runs, tmp_path, capsys):
    """A stats step that was killed may have left tables of two measurements: exit code 2, nothing written."""
    broken, out = tmp_path / "broken", tmp_path / "out"
    shutil.copytree(runs / "resnet", broken)
    record = json.loads((broken / "run.json").read_text())
    record["steps"]["stats"]["status"] = "running"
    (broken / "run.json").write_text(json.dumps(record))
    assert qvw("compare", broken, runs / "vit", "--out", out) == 2
    assert "were not finished" in capsys.readouterr().err
    assert not out.exists()


def test_runs_may_be_named_as_columns_or_alike(runs, tmp_path):
    """A run called `reading`, and three of one name in folders of one name: each has a column of its own."""
    folders = [tmp_path / name for name in ("reading", "a/p/same", "b/p/same", "c/p/same")]
    for folder, run in zip(folders, ["resnet", "vit", "vit", "resnet"], strict=True):
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(runs / run, folder)
    out = tmp_path / "out"
    assert qvw("compare", *folders, "--out", out, "--quiet") == 0
    columns = list(pd.read_csv(out / "comparison.csv").columns)
    assert columns[2:-1] == [f"{tmp_path.name}/reading", "same", "p/same", "c/p/same"]
