"""Figures of oscillating weights: a tidy frame of `oscillation_frames` in, Axes out, in the style of `plots`."""

from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.figures.variation_plots import KIND_STYLES
from analysis.plots import COLUMN, PAGE, heatmap_size, new_axes, plain, styled
from analysis.statistics.names import shorten
from analysis.training.oscillation_frames import ALL

LABELS = {
    "oscillating": "oscillating weights (%)",
    "oscillating_ema": "weights of high reversal rate (%)",
}


@styled()
def plot_kind_shares(frame: pd.DataFrame, *, value: str = "oscillating", ax: Axes | None = None) -> Axes:
    """Share of oscillating weights over steps, in percent: a line for each kind of layer, a thick black one for all.

    `frame` is that of `oscillation_frames.kind_shares`.
    """
    ax = new_axes(ax, (COLUMN, 2.6))
    handles, names = [], []
    for kind in (ALL, *(kind for kind in KIND_STYLES if (frame["kind"] == kind).any())):
        rows = frame[frame["kind"] == kind].dropna(subset=[value])
        colour, marker, dash, filled = KIND_STYLES.get(kind, ("black", "", "-", True))
        look: dict[str, Any] = {
            "color": colour, "ls": dash or "-", "linewidth": 1.8 if kind == ALL else 0.8, "marker": marker or "none",
            "markersize": 3.2, "markeredgewidth": 0.6, "markerfacecolor": colour if filled else "white",
        }  # fmt: skip
        ax.plot(rows["step"], 100 * rows[value], markevery=max(1, len(rows) // 6), **look)
        handles.append(Line2D([], [], **look))
        names.append("all weights" if kind == ALL else kind)
    ax.set_ylim(bottom=0)
    ax.set(xlabel="step", ylabel=LABELS[value])
    ax.grid(axis="y", color="0.9", linewidth=0.4)
    ax.legend(handles, names, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    sns.despine(ax=ax)
    return ax


@styled()
def plot_edges(densities: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Where latent weights lie around the edges of their bins, a line for each step that was kept, the last one dark.

    `densities` is that of `oscillation_frames.edge_densities`. Weights that oscillate gather at the edge, 0; those that
    bin regularization holds at the centres, -0.5 and 0.5.
    """
    ax = new_axes(ax, (COLUMN, 2.6))
    steps = sorted(densities["step"].unique().tolist())
    for i, step in enumerate(steps):
        rows = densities[densities["step"] == step].sort_values("position")
        half = (rows["position"].iloc[1] - rows["position"].iloc[0]) / 2
        edges = np.append(rows["position"] - half, rows["position"].iloc[-1] + half)
        shade = mpl.colormaps["viridis_r"](0.25 + 0.75 * i / max(1, len(steps) - 1))
        dash = (":", "--", "-")[i % 3]
        ax.stairs(rows["density"], edges, baseline=None, color=shade, linewidth=1.2, ls=dash, label=f"step {step}")
    ax.axvline(0, color="0.5", linewidth=0.6, zorder=0)
    ax.axhline(1, color="0.8", linewidth=0.6, zorder=0)
    ax.set_xlim(-0.5, 0.5)
    low, high = ax.get_ylim()
    ax.set_ylim(max(0, min(low, 0.9)), max(high, 1.1))  # chance alone must not fill the panel
    ax.set_xticks([-0.5, -0.25, 0, 0.25, 0.5], ["-0.5\ncentre", "-0.25", "0\nedge", "0.25", "0.5\ncentre"])
    ax.set(xlabel="weight - nearest edge (steps of the quantizer)", ylabel="density (1: even spread)")
    ax.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    sns.despine(ax=ax)
    return ax


@styled()
def plot_oscillation_map(frame: pd.DataFrame, *, value: str = "oscillating", ax: Axes | None = None) -> Axes:
    """One row per module in network order, a cell from each logged step to the next; colour is the share in percent.

    `frame` is that of `oscillation_frames.module_shares`. A cell ends at the step of which its share is told.
    """
    grid = frame.pivot(index="module", columns="step", values=value).loc[frame["module"].unique()].sort_index(axis=1)
    ax = new_axes(ax, heatmap_size(len(grid)))
    cells = np.ma.masked_invalid(100 * grid.to_numpy(dtype=np.float64))
    largest = float(cells.max()) if cells.count() else 0.0
    edges = [0, *grid.columns]
    mesh = ax.pcolormesh(edges, np.arange(len(grid) + 1), cells, cmap="viridis", vmin=0, vmax=largest or 1.0)
    ax.patch.set(facecolor="0.92", edgecolor="0.6", hatch="//////")
    ax.set_yticks(np.arange(len(grid)) + 0.5, [shorten(module) for module in grid.index], fontsize=6)
    ax.tick_params(axis="y", length=0)
    ax.invert_yaxis()
    ax.set(xlabel="step", ylabel="")
    sns.despine(ax=ax, left=True, bottom=True)
    height = ax.bbox.height / ax.figure.dpi
    place = ax.inset_axes((0, 1 + 0.08 / height, 1, 0.09 / height))
    bar = ax.figure.colorbar(mesh, cax=place, orientation="horizontal")
    bar.ax.tick_params(labelsize=6)
    bar.ax.xaxis.set_ticks_position("top")
    bar.ax.set_title(LABELS[value], fontsize=7)
    bar.outline.set_visible(False)
    return ax


@styled()
def oscillation_figure(kinds: pd.DataFrame, modules: pd.DataFrame, densities: pd.DataFrame, name: str) -> Figure:
    """Of one training: shares over steps by kind, weights around the edges below, the map of modules beside both.

    Frames of `oscillation_frames`; `densities` may be empty, where no places in the bins were kept.
    """
    height = max(5.2, heatmap_size(modules["module"].nunique())[1])
    figure, axes = plt.subplot_mosaic(
        [["kinds", "map"], ["edges", "map"]], figsize=(PAGE, height), layout="constrained",
    )  # fmt: skip
    plot_kind_shares(kinds, ax=axes["kinds"])
    plot_oscillation_map(modules, ax=axes["map"])
    if len(densities):
        plot_edges(densities, ax=axes["edges"])
    else:
        axes["edges"].remove()
    figure.suptitle(f"{plain(name)}: oscillation of weights of at most 4 bits", fontsize=9)
    return figure
