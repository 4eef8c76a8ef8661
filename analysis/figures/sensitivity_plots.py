"""Figures of a sweep: ranks with their bands, blocks by kind of tensor, groups of sites. A tidy frame in, Axes out."""

import math

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from analysis.plots import COLUMN, LABELS, PAGE, ROW_HEIGHT, new_axes, styled
from analysis.statistics.names import shorten, shorten_site

BLOCK_COLUMNS = ("qkv", "query", "key", "value", "softmax", "proj", "fc1", "fc2", "norm", "conv")


@styled()
def plot_costs(rows: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Each site's KL divergence with twice its standard error, the costliest on top.

    `rows` are single-site rows of sensitivity.parquet at one bit-width.

    >>> rows = {"module": ["conv", "head"], "tensor": "weight", "divergence": [0.1, 0.02], "divergence_se": 0.01}
    >>> ax = plot_costs(pd.DataFrame(rows))
    """
    ordered = _costliest_first(rows)
    ax = new_axes(ax, _size(len(rows)))
    labels = [
        f"{shorten_site(module, tensor)}{' (input)' if tensor == 'input' else ''}"
        for module, tensor in zip(ordered["module"], ordered["tensor"], strict=True)
    ]
    y = np.arange(len(ordered))
    floor = (
        float(ordered.loc[ordered["divergence"] > 0, "divergence"].min()) / 2
        if (ordered["divergence"] > 0).any()
        else 1e-6
    )
    kl = ordered["divergence"].clip(lower=floor).to_numpy()
    error = 2 * ordered["divergence_se"].fillna(0).to_numpy()
    ax.errorbar(kl, y, xerr=[np.minimum(error, kl - floor), error], fmt="o", ms=2, lw=0.6,
                color=sns.color_palette("colorblind")[0])  # fmt: skip
    ax.set(xscale="log", xlabel=f"{LABELS['kl']},\n± 2 s.e.", ylim=(len(y) - 0.3, -0.7))
    ax.set_yticks(y, labels, fontsize=6)
    ax.grid(axis="x", color="0.9", linewidth=0.4)
    sns.despine(ax=ax)
    return ax


@styled()
def plot_rank_bands(rows: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """The ranks of each site in 95 % of resampled images, in the order of `plot_costs`.

    Sites whose bands overlap cannot be separated.

    >>> rows = {"module": ["conv", "head"], "tensor": "weight", "divergence": [0.1, 0], "rank_low": 1, "rank_high": 2}
    >>> ax = plot_rank_bands(pd.DataFrame(rows))
    """
    ordered = _costliest_first(rows)
    ax = new_axes(ax, _size(len(rows)))
    y = np.arange(len(ordered))
    ax.hlines(y, ordered["rank_low"] - 0.4, ordered["rank_high"] + 0.4, color="0.35", lw=2)
    ax.set(xlim=(0, len(y) + 1), ylim=(len(y) - 0.3, -0.7), xlabel="rank in 95 % of\nresampled images", yticks=[])
    ax.grid(axis="x", color="0.9", linewidth=0.4)
    sns.despine(ax=ax, left=True)
    return ax


@styled()
def plot_blocks(frame: pd.DataFrame, *, value: str = "divergence", ax: Axes | None = None) -> Axes:
    """Heatmap of depth against kind of tensor, white where there is none; the largest where a cell has several.

    `frame` has block (in network order), part and `value`.
    """
    grid = frame.pivot_table(index="block", columns="part", values=value, aggfunc="max", sort=False)
    parts = list(dict.fromkeys(frame["part"]))
    grid = grid.reindex(columns=parts)
    ax = new_axes(ax, (0.9 + 0.42 * len(parts), 1.2 + 0.16 * max(len(grid), 4)))
    values = grid.to_numpy(dtype=np.float64)
    positive = values[np.isfinite(values) & (values > 0)]
    top = positive.max() if len(positive) else 1.0
    low = max(positive.min(), top / 1e4) if len(positive) else 0.1
    mesh = ax.pcolormesh(
        np.ma.masked_invalid(np.clip(values, low, None)), cmap="viridis", norm=LogNorm(low, max(top, low * 1.01)),
        edgecolors="white", linewidth=0.4,
    )  # fmt: skip
    ax.set_xticks(np.arange(len(parts)) + 0.5, parts, rotation=90, fontsize=6)
    ax.set_yticks(np.arange(len(grid)) + 0.5, [shorten(name) for name in grid.index], fontsize=6)
    ax.tick_params(length=0)
    ax.invert_yaxis()
    bar = ax.figure.colorbar(mesh, ax=ax, pad=0.02, aspect=30)
    bar.set_label(LABELS.get(value, value), fontsize=7)
    bar.outline.set_visible(False)
    sns.despine(ax=ax, left=True, bottom=True)
    return ax


@styled()
def plot_groups(rows: pd.DataFrame, *, everything: float = math.nan, ax: Axes | None = None) -> Axes:
    """Bars of the KL of groups, with twice its standard error, one for each bit-width; dashed: everything quantized.

    `rows` are group rows of one protocol, without the group `all`.

    >>> rows = {"group": ["mlp.fc1", "mlp.fc2"], "bit_width": 2, "divergence": [0.1, 0.2], "divergence_se": 0.01}
    >>> ax = plot_groups(pd.DataFrame(rows))
    """
    names = list(dict.fromkeys(rows["group"]))
    widths = sorted(rows["bit_width"].unique())
    ax = new_axes(ax, (PAGE / 2, 0.9 + (0.05 + 0.08 * len(widths)) * len(names)))
    shades = sns.color_palette("viridis_r", len(widths) + 1)[1:]
    thickness = 0.8 / len(widths)
    for i, (bits, shade) in enumerate(zip(widths, shades, strict=True)):
        each = rows[rows["bit_width"] == bits].set_index("group").reindex(names)
        y = np.arange(len(names)) + (i - (len(widths) - 1) / 2) * thickness
        ax.barh(y, each["divergence"], thickness, color=shade, label=f"{bits} bit", xerr=2 * each["divergence_se"],
                error_kw={"lw": 0.6})  # fmt: skip
    if math.isfinite(everything):
        ax.axvline(everything, color="0.3", ls="--", lw=0.8, label=f"everything, {widths[0]} bit")
    ax.set_yticks(np.arange(len(names)), [shorten(name.partition(":")[2]) for name in names])
    ax.invert_yaxis()
    ax.set(xlabel=f"{LABELS['kl']}, ± 2 s.e.")
    ax.set_xlim(left=0)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=min(4, len(widths) + 1), handlelength=1, borderaxespad=0.2)
    ax.grid(axis="x", color="0.9", linewidth=0.4)
    sns.despine(ax=ax)
    return ax


def _costliest_first(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.sort_values("divergence", ascending=False, kind="stable")


def _size(sites: int) -> tuple[float, float]:
    return COLUMN, 0.9 + ROW_HEIGHT * max(sites, 6)
