"""Figures: a tidy frame in, Axes out; nothing is computed or saved here. Sizes in inches fit a paper's columns."""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap, Normalize, SymLogNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from analysis.statistics.names import shorten, shorten_site
from quant.choices import ALLOWED_BIT_WIDTHS
from quant.site import ATTENTION_TENSORS, WEIGHT_TENSORS

COLUMN, PAGE = 3.3, 6.8  # inches: widths of one column and of a page
STYLE: dict[Any, Any] = {
    "font.size": 7, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "legend.fontsize": 7, "legend.frameon": False, "axes.linewidth": 0.6, "lines.linewidth": 1.0,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "hatch.linewidth": 0.4, "axes.axisbelow": True,
}  # fmt: skip
TENSOR_CLASSES = {"weight": WEIGHT_TENSORS, "input": ("input",), "attention": ATTENTION_TENSORS}
LABELS = {
    "delta_loss": "loss increase (nats)",
    "delta_top1": "top-1 change (points)",
    "kl": "KL of the logits (nats)",
    "divergence": "divergence",
    "logit_nmse": "logit error (share of power)",
    "sqnr_db": "SQNR of the tensor (dB)",
    "sqnr_output_db": "SQNR of the output (dB)",
    "abs_mean": "absolute mean",
    "std": "standard deviation",
    "excess_kurtosis": "excess kurtosis (0: Gaussian)",
    "outlier_fraction": "share beyond 6 std",
    "abs_max_over_std": "largest magnitude (std)",
    "channel_range_ratio": "largest / median channel range",
    "channel_std_cv": "variation of channel std",
    "head_std_cv": "variation of head std",
}
MODULES_A_ROW = 54  # of a page: so many names stand beside each other
ROW_HEIGHT, LETTER_WIDTH = 0.105, 0.05  # inches: a line of 6 pt text with its gap; one letter of it
BIT_SHADES = {1: 0.0, 2: 0.12, 3: 0.36, 4: 0.56, 5: 0.66, 6: 0.74, 7: 0.8, 8: 0.88, 16: 1.0}  # far apart below 5 bit


@contextmanager
def styled() -> Iterator[None]:
    """The style of all figures, while a function draws.

    The first figure of a notebook loads its backend, which turns `interactive` on: that stays, or later figures would
    not be shown.
    """
    with mpl.rc_context(STYLE):
        yield
        interactive = mpl.rcParams["interactive"]
    mpl.rcParams["interactive"] = interactive


def heatmap_size(rows: int) -> tuple[float, float]:
    """Width and height in inches of a heatmap of `rows` sites, every one of them labelled."""
    return COLUMN, 1.2 + ROW_HEIGHT * max(rows, 4)


@styled()
def plot_sensitivity_heatmap(
    sensitivity: pd.DataFrame,
    *,
    value: str = "delta_loss",
    tensors: str | None = None,
    largest: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """One row per site in network order, one column per bit-width; colour is `value` on a symmetric-log scale.

    `sensitivity` has one row per (module, tensor, bit_width): choose the protocol and the BatchNorm treatment before.
    `tensors` keeps one of `TENSOR_CLASSES`. Changes (`delta_...`) have a diverging scale about 0. Cells that were not
    measured are hatched; those within two standard errors (column `..._se`) of 0 are faded. `largest` is the
    magnitude at the end of the colour scale, for panels that are read side by side; by default the largest cell's.

    >>> rows = {"module": ["conv", "head"], "tensor": "weight", "bit_width": 2, "order": [0, 1], "divergence": [0.1, 0]}
    >>> ax = plot_sensitivity_heatmap(pd.DataFrame(rows), value="divergence")
    """
    table = _of_class(sensitivity, tensors)
    if table.duplicated(["module", "tensor", "bit_width"]).any():
        raise ValueError("Several rows for one (module, tensor, bit_width): choose one protocol and treatment first.")
    grid = table.pivot(index=["order", "module", "tensor"], columns="bit_width", values=value).sort_index()
    ax = new_axes(ax, heatmap_size(len(grid)))
    cells = np.ma.masked_invalid(grid.to_numpy(dtype=np.float64))
    signed = value.startswith("delta_") or (cells.count() and cells.min() < 0)
    if largest is None:
        largest = float(np.abs(cells).max()) if cells.count() else 0.0
    limit = _round_up(largest)
    decibels = value.endswith("_db")  # a logarithm already
    norm: Normalize = SymLogNorm(limit / 1000, vmin=-limit if signed else 0, vmax=limit, base=10)
    if decibels:
        norm, signed = Normalize(min(0.0, float(cells.min())) if cells.count() else 0.0, limit), False
    mesh = ax.pcolormesh(cells, norm=norm, cmap="RdBu_r" if signed else "viridis", edgecolors="white", linewidth=0.3)
    unsure = _within_noise(table, value, grid)
    if unsure.any():  # white over the colour: what is not told from 0 must not look like a finding
        ax.pcolormesh(np.ma.masked_where(~unsure, unsure), cmap=ListedColormap(["white"]), alpha=0.7)
    ax.patch.set(facecolor="0.92", edgecolor="0.6", hatch="//////")
    ax.set_xticks(np.arange(grid.shape[1]) + 0.5, [str(bits) for bits in grid.columns])
    labels = [shorten_site(module, tensor) for _, module, tensor in grid.index]
    ax.set_yticks(np.arange(len(grid)) + 0.5, labels, fontsize=6)
    ax.tick_params(length=0)
    ax.invert_yaxis()
    ax.set(
        xlabel=(f"bits ({tensors})" if tensors else "bits") + ("\nfaded: within 2 s.e. of 0" if unsure.any() else "")
    )
    ax.set_ylabel("")
    sns.despine(ax=ax, left=True, bottom=True)
    height = ax.bbox.height / ax.figure.dpi
    bar = ax.figure.colorbar(
        mesh, cax=ax.inset_axes((0, 1 + 0.08 / height, 1, 0.09 / height)), orientation="horizontal"
    )
    steps = (limit / 2, limit) if decibels else (limit / 100, limit)
    ticks = sorted([0.0, *steps, *(-step for step in steps if signed)])
    bar.set_ticks(ticks, labels=[tick_label(tick) for tick in ticks], fontsize=6)
    bar.ax.minorticks_off()
    bar.ax.xaxis.set_ticks_position("top")
    note = ", symmetric log scale" if signed else ""
    bar.ax.set_title(LABELS.get(value, value) + note, fontsize=7)
    bar.outline.set_visible(False)
    return ax


def _within_noise(table: pd.DataFrame, value: str, grid: pd.DataFrame) -> np.ndarray:
    """Which cells of `grid` lie within two standard errors of 0; none where no error was measured."""
    if f"{value}_se" not in table:
        return np.zeros(grid.shape, dtype=bool)
    errors = table.pivot(index=["order", "module", "tensor"], columns="bit_width", values=f"{value}_se").sort_index()
    return np.abs(grid.to_numpy(dtype=np.float64)) < 2 * errors.to_numpy(dtype=np.float64)


@styled()
def plot_distribution(stats: pd.DataFrame, *, tensor: str = "weight", ax: Axes | None = None) -> Axes:
    """Where the values of each site lie, in units of its own standard deviation about its mean, in network order.

    For each site: the band of quantiles 0.01 to 0.99 (dark) and 0.0001 to 0.9999 (light), the median, and min and max
    as points. `stats` has rows of stats.parquet; `tensor` is one of `TENSOR_CLASSES` or `output`. The scale is linear
    within 4 std and logarithmic beyond.

    >>> import torch
    >>> from analysis import measure_stats
    >>> ax = plot_distribution(measure_stats(torch.nn.Conv2d(3, 4, 3), [torch.randn(4, 3, 8, 8)]).table)
    """
    sites = _of_class(stats, tensor).sort_values("order", kind="stable")
    sites = sites[sites["std"] > 0]
    labels = [shorten_site(module, role) for module, role in zip(sites["module"], sites["tensor"], strict=True)]
    ax = new_axes(ax, (PAGE, 2.4 + LETTER_WIDTH * max(map(len, labels), default=1)))
    x = np.arange(len(sites))
    scaled = {name: ((sites[name] - sites["mean"]) / sites["std"]).to_numpy() for name in
              ("q0001", "q01", "q50", "q99", "q9999", "min", "max")}  # fmt: skip
    dark, light, point = sns.color_palette("colorblind")[0], sns.color_palette("colorblind")[9], "0.25"
    width = 0.8 if len(sites) < 60 else 1.0
    ax.bar(x, scaled["q9999"] - scaled["q0001"], width, scaled["q0001"], color=light, label="0.01 % to 99.99 %")
    ax.bar(x, scaled["q99"] - scaled["q01"], width, scaled["q01"], color=dark, label="1 % to 99 %")
    outline = [withStroke(linewidth=1.8, foreground="white")]  # or it would vanish on a bar's edge, or in the dark bar
    ax.hlines(scaled["q50"], x - width / 2, x + width / 2, color="black", linewidth=0.8, path_effects=outline)
    size = 6 if len(sites) < 60 else 2.5
    ax.scatter(x, scaled["max"], s=size, color=point, linewidths=0, label="min, max")
    ax.scatter(x, scaled["min"], s=size, color=point, linewidths=0)
    ax.axhline(0, color="0.5", linewidth=0.4, zorder=0)
    reach = max((float(np.abs(scaled[name]).max()) for name in ("min", "max")), default=4.0) if len(sites) else 4.0
    if reach > 10:
        ax.set_yscale("symlog", linthresh=4, linscale=1.2)
        low = float(scaled["min"].min())
        marks = [mark for mark in (2, 4, 10, 30, 100, 300, 1000, 3000, 10_000) if mark <= max(reach, 4)]
        ticks = [-mark for mark in reversed(marks) if mark <= max(-low, 2)] + [0, *marks]
        ax.set_yticks(ticks, [tick_label(tick) for tick in ticks])
        ax.minorticks_off()
    if len(sites):
        leave_room(ax, float(scaled["min"].min()), float(scaled["max"].max()))
    _label_sites(ax, labels)
    logarithmic = ", log beyond 4" if reach > 10 else ""
    ax.set(ylabel=f"{tensor} - mean (in std{logarithmic})")
    ax.grid(axis="y", color="0.9", linewidth=0.4)
    handles = [Patch(color=light), Patch(color=dark), Line2D([], [], color="black", linewidth=0.8),
               Line2D([], [], color=point, marker="o", markersize=2.5, ls="")]  # fmt: skip
    names = ["0.01 % to 99.99 %", "1 % to 99 %", "median", "min, max"]
    ax.legend(handles, names, ncols=4, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, handlelength=1)
    sns.despine(ax=ax)
    return ax


@styled()
def plot_bits(plan_frame: pd.DataFrame, *, legend: Collection[int] | None = None, ax: Axes | None = None) -> Axes:
    """Bits of each site of a plan: modules in network order across, tensors down, colour and digit are the bit-width.

    `plan_frame` is `plan.table`, in network order, or a frame of module, tensor, bit_width and order. Sites that are
    not in the plan are left white. `legend` names the bit-widths to explain, by default those that are there.

    >>> plan = pd.DataFrame({"module": ["conv", "head"], "tensor": "weight", "bit_width": [4, 8], "order": [0, 1]})
    >>> ax = plot_bits(plan)
    """
    if plan_frame.empty:
        raise ValueError("The plan names no site: there is nothing to draw.")
    sites = plan_frame.sort_values("order", kind="stable") if "order" in plan_frame else plan_frame
    modules = sites["module"].unique().tolist()
    tensors = [t for t in (*WEIGHT_TENSORS, "input", *ATTENTION_TENSORS) if (sites["tensor"] == t).any()]
    labels = [shorten(module) for module in modules]
    ax = new_axes(ax, (PAGE, bits_height(plan_frame)))
    grid = sites.pivot(index="tensor", columns="module", values="bit_width").reindex(index=tensors, columns=modules)
    used = [bits for bits in ALLOWED_BIT_WIDTHS if (sites["bit_width"] == bits).any()]
    palette = [_shade(bits) for bits in used]
    position = grid.map(lambda bits: used.index(int(bits)) if bits == bits else np.nan).to_numpy(dtype=np.float64)
    norm = BoundaryNorm(np.arange(len(used) + 1) - 0.5, len(used))
    ax.pcolormesh(
        np.ma.masked_invalid(position), cmap=ListedColormap(palette), norm=norm, edgecolors="white",
        linewidth=0.4 if len(modules) < 100 else 0.1,
    )  # fmt: skip
    if len(modules) <= 60:
        for row, column in np.argwhere(np.isfinite(position)):
            index = int(position[row, column])
            # The green of 3 bit looks dark and is not: as bright as the eye sees it, black stands out better there.
            brightness = float(np.dot(np.power(palette[index], 2.2), (0.2126, 0.7152, 0.0722)))
            ax.text(column + 0.5, row + 0.5, f"{used[index]}", ha="center", va="center", fontsize=6,
                    color="black" if brightness > 0.25 else "white")  # fmt: skip
    ax.set_yticks(np.arange(len(tensors)) + 0.5, tensors)
    ax.invert_yaxis()
    _label_sites(ax, labels, offset=0.5)
    ax.tick_params(length=0)
    named = sorted(used if legend is None else legend)
    if named:
        ax.legend([Patch(color=_shade(bits)) for bits in named], [f"{bits} bit" for bits in named], ncols=len(named),
                  loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, handlelength=1)  # fmt: skip
    sns.despine(ax=ax, left=True, bottom=True)
    return ax


def bits_height(plan_frame: pd.DataFrame) -> float:
    """Height in inches of `plot_bits`: a line for each tensor, and room for the longest name."""
    longest = plan_frame["module"].map(shorten).str.len().max()
    return 0.8 + 0.18 * plan_frame["tensor"].nunique() + LETTER_WIDTH * longest


def _shade(bits: int) -> tuple[float, float, float]:
    """The colour of a bit-width, the same in every figure."""
    red, green, blue, _ = mpl.colormaps["viridis_r"](BIT_SHADES[bits])
    return red, green, blue


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, ... times a power of ten; 1 for 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next((step * power for step in (1, 2, 5) if value <= step * power), 10 * power)


def new_axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The axes given, or those of a new figure of this width and height in inches."""
    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def leave_room(ax: Axes, low: float, high: float, *, below: float = 0.06, above: float = 0.06) -> None:
    """Limit y to [low, high] and these shares of its length on the paper, so that no point is cut.

    Where both are the same, nothing changes. What matplotlib leaves by itself is not seen on a symmetric-log axis.
    """
    if not low < high:
        return
    scale = ax.yaxis.get_transform()
    bottom, top = scale.transform([low, high])
    ends = scale.inverted().transform([bottom - below * (top - bottom), top + above * (top - bottom)])
    ax.set_ylim(float(ends[0]), float(ends[1]))


def _of_class(frame: pd.DataFrame, name: str | None) -> pd.DataFrame:
    if name is None:
        return frame
    return frame[frame["tensor"].isin(TENSOR_CLASSES.get(name, (name,)))]


def _label_sites(ax: Axes, labels: list[str], *, offset: float = 0.0) -> None:
    """Name the sites along x; where they are too many for the width, one in two, three, ..."""
    room = ax.figure.bbox.width / ax.figure.dpi * 0.9 / ROW_HEIGHT
    every = math.ceil(len(labels) / room) if labels else 1
    at = np.arange(0, len(labels), every)
    ax.set_xticks(at + offset, [labels[i] for i in at], rotation=90, fontsize=6)
    ax.set_xlim(offset - 0.6, len(labels) - 0.4 + offset) if offset == 0 else ax.set_xlim(0, max(len(labels), 1))
    ax.set_xlabel("module, in network order" + (f" (one in {every} is named)" if every > 1 else ""))


def tick_label(value: float) -> str:
    """A number as matplotlib writes it itself, with a minus sign and not a hyphen."""
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")


def plain(name: str) -> str:
    """A name of the user's for a figure: matplotlib would read what stands between two $ as a formula."""
    return name.replace("$", r"\$")
