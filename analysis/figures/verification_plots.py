"""Figures of a plan's verification: accuracy beside other plans, predicted against measured KL. A frame in, Axes out.

`table` has rows of verification.parquet, the plan itself first.
"""

import textwrap
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from analysis.planning.significance import NAMES, plan_names
from analysis.plots import PAGE, new_axes, plain, styled, tick_label

INTERVAL = 1.96  # standard errors: half a 95 % interval
_COLOURS = dict(zip(NAMES, (sns.color_palette("colorblind")[i] for i in (0, 4, 1, 2, 3, 7)), strict=True))
_MARKERS = dict(zip(NAMES, "oPs^vD", strict=True))


@styled()
def plot_accuracy(table: pd.DataFrame, *, floating: float | None = None, ax: Axes | None = None) -> Axes:
    """Top-1 of each plan with its 95 % interval, the best above; on the right how far the plan is ahead of it.

    The difference is paired over the images, so it can be sure where the intervals overlap. `floating` is the top-1
    in floating point, a line.
    """
    ax = new_axes(ax, (PAGE / 2, 2.4))
    shown = table.assign(name=plan_names(table)).dropna(subset=["top1"])
    shown = shown.sort_values("top1", ascending=False, kind="stable")
    for y, row in enumerate(shown.itertuples()):
        ax.errorbar(100 * row.top1, y, xerr=100 * INTERVAL * row.top1_se, capsize=2, elinewidth=0.8, **_look(row.plan))
    if floating is not None:
        ax.axvline(100 * floating, color="0.3", ls="--", lw=0.8, zorder=0)
        ax.annotate("float", (100 * floating, 1), xycoords=("data", "axes fraction"), xytext=(2, 2),
                    textcoords="offset points", ha="right", fontsize=7, color="0.3")  # fmt: skip
    ax.set_yticks(range(len(shown)), shown["name"])
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.set(xlabel="top-1 (%), bars 95 % interval")
    ax.grid(axis="x", color="0.9", linewidth=0.4)
    sns.despine(ax=ax, left=True)
    ax.tick_params(axis="y", length=0)
    beside = ax.twinx()
    beside.set_yticks(range(len(shown)), [_ahead(row) for row in shown.itertuples()])
    beside.set_ylim(ax.get_ylim())
    beside.tick_params(axis="y", length=0)
    beside.annotate("planned ahead\n± s.e. (points)", (1, 1), xycoords="axes fraction", xytext=(4, 2),
                    textcoords="offset points", fontsize=7)  # fmt: skip
    sns.despine(ax=beside, left=True)
    return ax


@styled()
def plot_prediction(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Measured KL of each plan, with its 95 % interval, against the sum over its sites; the line is equality.

    Logarithmic. A plan without prediction (a site was not measured) or without change is left out.
    """
    ax = new_axes(ax, (PAGE / 2, 2.4))
    shown = table[(table["predicted_kl"] > 0) & (table["measured_kl"] > 0)]
    sorts = dict.fromkeys(shown["plan"])
    ax.set(xscale="log", yscale="log", xlabel="predicted KL: sum over the sites (nats)", ylabel="measured KL (nats)")
    for row in shown.itertuples():
        half = min(INTERVAL * row.measured_kl_se, 0.99 * row.measured_kl)
        low_high = [[half], [INTERVAL * row.measured_kl_se]]
        ax.errorbar(row.predicted_kl, row.measured_kl, yerr=low_high, capsize=0, elinewidth=0.8, **_look(row.plan))
    if len(shown):
        both = shown[["predicted_kl", "measured_kl"]].to_numpy()
        ends = np.array([both.min() / 1.4, both.max() * 1.4])
        ax.plot(ends, ends, color="0.4", lw=0.6, ls="--", zorder=0)
        ax.set(xlim=ends, ylim=ends)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if ends[1] / ends[0] < 200 else (1,)))
            axis.set_major_formatter(lambda value, _: tick_label(value))
        ax.minorticks_off()
    handles = [Line2D([], [], **_look(kind)) for kind in sorts]
    ax.legend(handles, [NAMES.get(kind, kind) for kind in sorts], loc="lower right", handlelength=1)
    ax.grid(color="0.92", linewidth=0.4)
    sns.despine(ax=ax)
    return ax


@styled()
def verification_figure(table: pd.DataFrame, name: str, *, floating: float | None = None) -> Figure:
    """Accuracy, where there were labels, beside the KL predicted and measured; arguments as of `plot_accuracy`."""
    count = 2 if table["top1"].notna().any() else 1
    figure, axes = plt.subplots(1, count, figsize=(PAGE if count == 2 else PAGE / 2, 0.9 + 0.24 * max(len(table), 7)),
                                squeeze=False, layout="constrained")  # fmt: skip
    if count == 2:
        plot_accuracy(table, floating=floating, ax=axes[0, 0])
    plot_prediction(table, ax=axes[0, -1])
    title = f"{plain(name)}: the plan beside others within its budget, without training"
    figure.suptitle("\n".join(textwrap.wrap(title, 48 * count)), fontsize=9)
    return figure


def _look(kind: str) -> dict[str, Any]:
    """The marker of one sort of plan."""
    colour = _COLOURS.get(kind, _COLOURS["random"])
    return {"color": colour, "marker": _MARKERS.get(kind, "D"), "ms": 5 if kind == "planned" else 3.5, "ls": ""}


def _ahead(row: Any) -> str:
    """The paired difference of a row in points; nothing beside the plan itself."""
    if row.plan == "planned":
        return ""
    sign = "+" if row.planned_ahead >= 0 else "\N{MINUS SIGN}"
    return f"{sign}{100 * abs(row.planned_ahead):.1f} ± {100 * row.planned_ahead_se:.1f}"
