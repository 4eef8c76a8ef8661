"""Frames and figures of oscillating weights: shares by kind and module, places in the bins."""

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from analysis.figures.oscillation_plots import oscillation_figure, plot_edges, plot_kind_shares, plot_oscillation_map
from analysis.storage.columns import BINS_COLUMNS, OSCILLATION_COLUMNS
from analysis.training.oscillation_frames import edge_densities, kind_shares, module_shares
from quant.oscillation import POSITIONS

# module, tensor, kind, weights, share at the last step
SITES = [
    ("blocks.0.attn.qkv", "weight.query", "attn.qkv", 30, 0.1),
    ("blocks.0.attn.qkv", "weight.key", "attn.qkv", 10, 0.5),
    ("blocks.0.mlp.fc1", "weight", "mlp.fc1", 60, 0.0),
    ("blocks.1.mlp.fc1", "weight", "mlp.fc1", 20, 0.4),
]
CENTRES = [(part + 0.5) / POSITIONS - 0.5 for part in range(POSITIONS)]


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def oscillation(steps=(0, 1, 10, 20), sites=SITES):
    """Rows of oscillation.parquet whose shares rise with the step."""
    rows = [
        (step, module, tensor, weights, share * step / 20, share * step / 40)
        for step in steps
        for module, tensor, _, weights, share in sites
    ]
    return pd.DataFrame(rows, columns=list(OSCILLATION_COLUMNS))


def bins(steps=(0, 10, 20), sites=SITES):
    """Rows of bins.parquet: even at first, later gathered in the two middle parts, with as many weights each time."""
    rows = []
    for step in steps:
        for module, tensor, kind, _, _ in sites:
            counts = [POSITIONS // 2 * (part in (POSITIONS // 2 - 1, POSITIONS // 2)) if step else 1 for part in
                      range(POSITIONS)]  # fmt: skip
            rows += [(step, module, tensor, kind, *pair) for pair in zip(CENTRES, counts, strict=True)]
    return pd.DataFrame(rows, columns=list(BINS_COLUMNS))


def test_shares_of_kinds_are_over_their_weights():
    """A large tensor counts more: (30 * 0.1 + 10 * 0.5) / 40 of qkv; all weights are those of all kinds."""
    frame = kind_shares(oscillation(), bins()).query("step == 20").set_index("kind")
    assert frame.index.tolist() == ["all", "attn.qkv", "mlp.fc1"]
    assert frame["oscillating"].tolist() == pytest.approx([16 / 120, 0.2, 0.1])
    assert frame["oscillating_ema"].tolist() == pytest.approx([8 / 120, 0.1, 0.05])
    assert frame["weights"].tolist() == [120, 40, 80]


def test_modules_are_in_network_order_with_their_parts_together():
    """One row a module and step; step 0, before any training, is left out."""
    frame = module_shares(oscillation())
    assert frame["module"].unique().tolist() == ["blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]
    assert sorted(frame["step"].unique()) == [1, 10, 20]
    assert frame[frame["step"] == 20]["oscillating"].tolist() == pytest.approx([0.2, 0.0, 0.4])


def test_densities_are_1_where_weights_are_spread_evenly():
    """And integrate to 1 at every step, however many weights are inside; without any a step is left out."""
    table = bins()
    table.loc[table["step"] == 10, "weights"] = 0
    frame = edge_densities(table)
    assert frame["step"].unique().tolist() == [0, 20]
    assert (frame[frame["step"] == 0]["density"] == 1).all()
    assert frame[frame["step"] == 20].set_index("position")["density"].loc[CENTRES[POSITIONS // 2]] == POSITIONS / 2
    assert frame.groupby("step")["density"].mean().tolist() == pytest.approx([1, 1])


def test_a_line_for_all_weights_and_for_each_kind():
    """In percent, over steps, the names in the legend; kinds that are not there have no line."""
    ax = plot_kind_shares(kind_shares(oscillation(), bins()))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["all weights", "attn.qkv", "mlp.fc1"]
    for line, last in zip(ax.lines, (100 * 16 / 120, 20, 10), strict=True):
        assert line.get_xdata().tolist() == [0, 1, 10, 20]
        assert line.get_ydata()[-1] == pytest.approx(last)
    assert ax.get_ylabel() == "oscillating weights (%)"


def test_every_kept_step_has_its_density():
    """Stairs over the whole bin, from centre to centre, with the edge in the middle."""
    frame = edge_densities(bins())
    ax = plot_edges(frame)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["step 0", "step 10", "step 20"]
    for stairs, step in zip(ax.patches, (0, 10, 20), strict=True):
        values, edges, _ = stairs.get_data()
        assert values.tolist() == frame[frame["step"] == step]["density"].tolist()
        assert edges == pytest.approx(np.linspace(-0.5, 0.5, POSITIONS + 1))


def test_the_map_has_a_cell_for_every_module_and_logged_step():
    """Modules downwards in network order; a cell ends at its step; the scale ends at the largest share, in percent."""
    ax = plot_oscillation_map(module_shares(oscillation()))
    mesh = ax.collections[0]
    assert mesh.get_array().shape == (3, 3)
    assert mesh.get_array()[:, -1].tolist() == pytest.approx([20, 0, 40])
    assert mesh.get_coordinates()[0, :, 0].tolist() == [0, 1, 10, 20]
    assert mesh.get_clim() == (0, pytest.approx(40))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b0.attn.qkv", "b0.mlp.fc1", "b1.mlp.fc1"]
    assert ax.yaxis_inverted()


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("modules", [1, 53])
def test_figures_of_few_and_many_modules_overlap_nothing(modules, share):
    """From one module to 53, where nothing oscillates too: names of modules keep apart, and so do the panels."""
    sites = [(f"layers.{i // 12}.blocks.{i % 12}.mlp.fc1", "weight", "mlp.fc1", 10, share) for i in range(modules)]
    table, places = oscillation(steps=(0, 1, *range(10, 110, 10)), sites=sites), bins(sites=sites)
    figure = oscillation_figure(kind_shares(table, places), module_shares(table), edge_densities(places), "net")
    figure.canvas.draw()
    labels = [label.get_window_extent() for label in figure.axes[1].get_yticklabels()]
    assert len(labels) == modules
    assert all(upper.y0 > lower.y1 - 2 for upper, lower in pairwise(labels))
    boxes = [ax.get_tightbbox() for ax in figure.axes]
    assert len(boxes) == 3
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[i + 1 :])


def test_without_places_the_other_panels_are_drawn():
    """All weights clipped, as in a 1-bit network that diverged: two panels."""
    empty = edge_densities(bins().assign(weights=0))
    assert empty.empty
    figure = oscillation_figure(kind_shares(oscillation(), bins()), module_shares(oscillation()), empty, "net")
    assert len(figure.axes) == 2
