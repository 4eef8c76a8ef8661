"""Figures of the Pareto front: what each budget buys, its knee, and uniform bits beside it. A frame in, Axes out."""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from analysis.planning.budget_kinds import BUDGET_KINDS, budget_words
from analysis.planning.frontier import knee
from analysis.plots import LABELS, PAGE, leave_room, new_axes, plain, styled, tick_label
from quant.bit_plan import PlanBudget

TITLE_LETTERS = 96  # of 9 pt across a page
_GAP = 0.01  # a smaller one is thinner than the line


@styled()
def plot_pareto(
    front: pd.DataFrame,
    *,
    kind: str,
    uniform: pd.DataFrame | None = None,
    objective: str = "delta_loss",
    ax: Axes | None = None,
) -> Axes:
    """Predicted loss against one cost: solved plans as points, the knee ringed, uniform bits as crosses.

    `front` and `uniform` are those of `pareto_front` and `uniform_points`; rows of other kinds are left out.
    `objective` names what the scores are (a key of LABELS). The scale is logarithmic where all losses are above 0,
    else linear near 0 and logarithmic beyond; the knee is that of linear axes all the same, and the legend says so.
    The lower bound is dashed where a gap is wider than 1 %.

    >>> rows = {"budget_kind": "weight_bits", "weight_bits": [2, 3, 4], "objective": [1.0, 0.3, 0.1], "gap": 0.0}
    >>> rows |= {"budget": [2, 3, 4], "lower_bound": [1.0, 0.3, 0.1]}
    >>> ax = plot_pareto(pd.DataFrame(rows), kind="weight_bits")
    """
    label, unit = BUDGET_KINDS[kind].label, BUDGET_KINDS[kind].unit
    curve = front[front["budget_kind"] == kind]
    if curve.empty:
        raise ValueError(f"The front has no row of {kind}: there is nothing to draw.")
    ax = new_axes(ax, (PAGE / 2, 2.4))
    ours, other = sns.color_palette("colorblind")[0], sns.color_palette("colorblind")[1]
    spent, loss = curve[kind].to_numpy() / unit, curve["objective"].to_numpy()
    end = curve["budget"].iloc[-1] / unit  # what more budget buys beyond the last plan: nothing
    ax.plot([*spent, max(spent[-1], end)], [*loss, loss[-1]], color=ours)
    ax.plot(spent, loss, "o", ms=2.5, color=ours, label="best plan")
    shown = [loss]
    if (curve["gap"] > _GAP).any():
        ax.plot(spent, curve["lower_bound"], color=ours, ls="--", lw=0.7, label="lower bound")
        shown.append(curve["lower_bound"].to_numpy())
    if uniform is not None and (uniform["budget_kind"] == kind).any():
        points = uniform[uniform["budget_kind"] == kind]
        x, y = points[kind].to_numpy() / unit, points["objective"].to_numpy()
        ax.plot(x, y, "x", ms=4, mew=1, color=other, label="uniform bits")
        for bits, *at in zip(points["bit_width"], x, y, strict=True):
            ax.annotate(f"{bits}", (at[0], at[1]), xytext=(3, 3), textcoords="offset points", fontsize=6, color=other)
        shown.append(y)
    values = np.concatenate(shown)
    _scale_loss(ax, values)
    note = "" if ax.get_yscale() == "linear" else " (on linear axes)"
    for _, row in knee(curve).iterrows():
        place = row[kind] / unit, row["objective"]
        ax.plot(*place, "o", ms=7, mfc="none", mec="black", mew=0.8, label=f"knee at {row['budget'] / unit:.4g}{note}")
    leave_room(ax, float(values.min()), float(values.max()), below=0.08, above=0.1)
    ax.margins(x=0.06)
    ax.set(xlabel=label, ylabel=f"predicted {LABELS.get(objective, objective)}")
    ax.grid(axis="y", color="0.9", linewidth=0.4)
    ax.legend(loc="upper right", handlelength=1)
    sns.despine(ax=ax)
    return ax


@styled()
def pareto_figure(
    front: pd.DataFrame,
    name: str,
    *,
    uniform: pd.DataFrame | None = None,
    objective: str = "delta_loss",
    budget: PlanBudget | None = None,
) -> Figure:
    """A panel for each kind of budget in `front`, two a row; arguments as of `plot_pareto`.

    `budget` is that of the plan, which stays in force but for the cost that a panel varies; the title names it.
    """
    kinds = list(dict.fromkeys(front["budget_kind"]))
    rows, columns = -(-len(kinds) // 2), min(len(kinds), 2)
    figure, axes = plt.subplots(rows, columns, figsize=(PAGE * columns / 2, 0.4 + 2.2 * rows), squeeze=False,
                                layout="constrained")  # fmt: skip
    for kind, ax in zip(kinds, axes.flat, strict=False):
        plot_pareto(front, kind=kind, uniform=uniform, objective=objective, ax=ax)
    for ax in axes.flat[len(kinds) :]:
        ax.remove()
    held = "" if budget is None else budget_words(budget)
    also = f", the others kept: {held}" if held else ""
    title = f"{plain(name)}: the best plan for each budget{also}"
    figure.suptitle("\n".join(textwrap.wrap(title, TITLE_LETTERS * columns // 2)), fontsize=9)
    return figure


def _scale_loss(ax: Axes, values: np.ndarray) -> None:
    """Logarithmic where all is above 0; about 0, linear up to a hundredth of the largest; linear if nothing is."""
    low, high = float(values.min()), float(values.max())
    if low > 0:
        ax.set_yscale("log")
        # Over few decades their powers alone would leave the axis nearly bare.
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 50 else (1,)))
    elif high > 0:
        linear = max(-low, high) / 100
        ax.set_yscale("symlog", linthresh=linear)
        powers = 10.0 ** np.arange(np.ceil(np.log10(linear)), np.ceil(np.log10(linear)) + 3)
        ax.set_yticks([0.0, *powers[powers <= high], *(-powers[powers <= -low])])
        ax.axhline(0, color="0.5", linewidth=0.4, zorder=0)
    ax.yaxis.set_major_formatter(lambda value, _: tick_label(value))
    ax.minorticks_off()
