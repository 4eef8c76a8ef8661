"""Figures of a sweep draw what the table holds."""

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from analysis.figures.sensitivity_panels import STEMS, block_frame, sensitivity_figures
from analysis.figures.sensitivity_plots import plot_blocks, plot_costs, plot_groups, plot_rank_bands

PARTS = (
    ("attn.qkv", "attn.qkv", "weight.query"),
    ("attn.qkv", "attn.qkv", "weight.key"),
    ("attn.qkv", "attn.qkv", "input"),
    ("attn", "attn.softmax", "attention"),
    ("mlp.fc1", "mlp.fc1", "weight"),
    ("mlp.fc1", "mlp.fc1", "input"),
)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def table(blocks=3):
    """Rows as of sensitivity.parquet: sites of some blocks and a head, two bit-widths, groups in both protocols."""
    generator = np.random.default_rng(0)
    sites = [(f"blocks.{b}.{module}", kind, tensor) for b in range(blocks) for module, kind, tensor in PARTS]
    sites.append(("head", "head", "weight"))
    common = {"model": "m", "granularity": "per_tensor", "estimator": "mse", "batchnorm": "none", "divergence_se": 0.01,
              "images": 64, "module": "", "tensor": "weight", "kind": "", "group": "", "order": 0, "protocol": "single",
              "delta_loss": 0.1, "delta_loss_se": 0.05, "sqnr_db": 12.0, "rank_low": 1, "rank_high": 4}  # fmt: skip
    groups = ["kind:mhsa", "kind:ffn", "block:blocks.0"]
    together = [("single", name) for name in ("all", *groups)] + [("leave_one_out", name) for name in groups]
    rows = []
    for bits in (2, 4):
        rows += [
            {"module": module, "kind": kind, "tensor": tensor, "order": order, "bit_width": bits,
             "divergence": generator.exponential(2.0**-bits)}
            for order, (module, kind, tensor) in enumerate(sites)
        ]  # fmt: skip
        rows += [{"group": name, "protocol": p, "bit_width": bits, "divergence": 2.0**-bits} for p, name in together]
    return pd.DataFrame([common | row for row in rows])


def single(bits=2):
    """The single-site rows of one bit-width."""
    rows = table()
    return rows[(rows["group"] == "") & (rows["bit_width"] == bits)]


def test_sites_stand_by_cost_and_bands_beside_them():
    """The costliest is on top; points are the KL; a band runs from the lowest to the highest rank."""
    ax = plot_costs(single())
    x = ax.containers[0].lines[0].get_xdata()
    assert np.allclose(x, np.sort(single()["divergence"])[::-1])
    assert ax.yaxis_inverted()
    assert "(input)" in " ".join(text.get_text() for text in ax.get_yticklabels())
    segments = plot_rank_bands(single()).collections[0].get_segments()
    assert np.allclose([segment[:, 0] for segment in segments], [0.6, 4.4])


def test_blocks_lie_against_kinds():
    """A row a block, a column a part and its input; of weights measured in parts the largest; the head is left out."""
    frame = block_frame(single())
    assert list(dict.fromkeys(frame["part"])) == ["qkv", "qkv in", "softmax", "fc1", "fc1 in"]
    assert frame["block"].unique().tolist() == ["blocks.0", "blocks.1", "blocks.2"]
    drawn = plot_blocks(frame).collections[0].get_array().reshape(3, 5)
    rows = single().set_index(["module", "tensor"])["divergence"]
    largest = max(rows["blocks.1.attn.qkv", "weight.query"], rows["blocks.1.attn.qkv", "weight.key"])
    assert drawn[1, 0] == pytest.approx(largest)
    assert drawn[2, 4] == pytest.approx(rows["blocks.2.mlp.fc1", "input"])


def test_groups_have_a_bar_a_bit_width():
    """Lengths are the KL, and the dashed line is that of everything."""
    rows = table()
    rows = rows[(rows["protocol"] == "leave_one_out") & rows["group"].str.startswith("kind")]
    ax = plot_groups(rows, everything=0.4)
    assert sorted(patch.get_width() for patch in ax.patches) == [0.0625] * 2 + [0.25] * 2
    assert any(np.allclose(line.get_xdata(), 0.4) for line in ax.lines)


def test_every_figure_that_the_rows_allow_is_drawn():
    """All of them from a whole table; without groups and attention only those of sites; nothing from no rows."""
    assert [stem for stem, _ in sensitivity_figures(table(), "m")] == list(STEMS)
    conv = single().assign(kind="conv")
    assert [stem for stem, _ in sensitivity_figures(conv, "m")] == list(STEMS[:4])
    assert list(sensitivity_figures(table().iloc[:0], "m")) == []


@pytest.mark.parametrize("blocks", [3, 25])
def test_labels_do_not_overlap(blocks):
    """At 19 and at 151 sites each label of the ranks has a line of its own."""
    figure = dict(sensitivity_figures(table(blocks), "m"))["sensitivity_ranks"]
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    tops = np.sort([box.y0 for box in boxes])
    assert np.diff(tops).min() > 0.8 * boxes[0].height
