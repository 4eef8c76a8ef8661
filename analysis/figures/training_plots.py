"""Figures of trainings: a tidy frame and Axes in, Axes out, in the style of `plots`."""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, StrMethodFormatter

from analysis import plots

MARKERS, DASHES = "osD^vPX*", ("-", "--", "-.", ":")
LABELS = {"loss": "loss (nats)", "top1": "top-1 (%)"}


@plots.styled()
def plot_history(history: pd.DataFrame, *, value: str = "loss", ax: Axes | None = None) -> Axes:
    """One colour per training over steps: `loss` (nats) or `top1` (a fraction, drawn in percent).

    `history` has the columns training, step, split and `value`. Training batches are a thin line, validation is a line
    with markers; rows without the value are left out. The loss is logarithmic where it spans more than a factor of 10.

    >>> rows = {"training": "qat", "step": [1, 2, 3], "split": "train", "loss": [3.0, 2.0, 1.0]}
    >>> ax = plot_history(pd.DataFrame(rows))
    """
    ax = _axes(ax)
    shown = history.dropna(subset=[value])
    scale = 100.0 if value == "top1" else 1.0
    names = history["training"].unique().tolist()
    for i, name in enumerate(names):
        for split, rows in shown[shown["training"] == name].groupby("split", sort=False):
            look = {"linewidth": 0.5, "alpha": 0.6} if split == "train" else {"marker": _marker(i), "markersize": 3}
            ax.plot(rows["step"], scale * rows[value], color=_colour(i), ls=_dash(i), **look)
    if value == "loss" and len(shown) and shown[value].min() > 0 and shown[value].max() > 10 * shown[value].min():
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.6)))
    _finish(ax, LABELS.get(value, value))
    _legend(ax, names)
    return ax


@plots.styled()
def plot_terms(history: pd.DataFrame, terms: Sequence[str], *, gradients: bool = False, ax: Axes | None = None) -> Axes:
    """One line per term of the loss over steps, of one training's batches (rows of split `train`).

    With `gradients` the norms of their gradients, which say how hard each pulls, in place of their values. Logarithmic;
    zeros, as of a term that is not yet switched on, lie on a linear stretch at the bottom.
    """
    ax = _axes(ax)
    rows = history[history["split"] == "train"]
    columns = [f"grad_{term}" if gradients else term for term in terms]
    for i, column in enumerate(columns):
        measured = rows.dropna(subset=[column])
        marker = "." if gradients else None  # few points, which a line alone would hide
        ax.plot(measured["step"], measured[column], color=_colour(i), ls=_dash(i), linewidth=0.8, marker=marker, ms=3)
    _scale_terms(ax, rows[columns])
    _finish(ax, "gradient norm" if gradients else "part of the loss")
    _legend(ax, list(terms), markers=False)
    return ax


@plots.styled()
def plot_oscillation(
    shares: pd.DataFrame, *, value: str = "oscillating", names: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Share of oscillating weights over steps, in percent, one line per training.

    `shares` is that of `analysis.page.content.oscillation_frame`: training, step and `value`, a fraction. `names` are
    all trainings of the panels beside it, which have the same colours; those without rows get no line.

    >>> rows = {"training": "qat", "step": [1, 2, 3], "oscillating": [0.0, 0.1, 0.2]}
    >>> ax = plot_oscillation(pd.DataFrame(rows))
    """
    ax = _axes(ax)
    names = shares["training"].unique().tolist() if names is None else list(names)
    for i, name in enumerate(names):
        if not (shares["training"] == name).any():
            continue
        rows = shares[shares["training"] == name].dropna(subset=[value])
        ax.plot(rows["step"], 100 * rows[value], color=_colour(i), ls=_dash(i), marker=_marker(i), markersize=3)
    ax.set_ylim(bottom=0)
    _finish(ax, "oscillating weights (%)")
    _legend(ax, names)
    return ax


@plots.styled()
def training_figure(history: pd.DataFrame, shares: pd.DataFrame, name: str) -> Figure:
    """Loss, top-1 and, where it was tracked, the share of oscillating weights of a run's trainings, side by side."""
    names = history["training"].unique().tolist()
    count = 3 if len(shares) else 2
    figure, axes = plt.subplots(1, count, figsize=(plots.PAGE * (1.25 if count == 3 else 1), 2.6), layout="constrained")
    plot_history(history, value="loss", ax=axes[0])
    plot_history(history, value="top1", ax=axes[1])
    if len(shares):
        plot_oscillation(shares, names=names, ax=axes[2])
    for ax in axes:
        ax.get_legend().remove()
    figure.legend(_handles(len(names)), list(map(plots.plain, names)), ncols=4, loc="outside lower left", fontsize=7)
    figure.suptitle(f"{plots.plain(name)}: trainings (thin: batches; markers: validation)", fontsize=9)
    return figure


@plots.styled()
def terms_figure(history: pd.DataFrame, terms: Sequence[str], name: str, *, gradients: bool = False) -> Figure:
    """The terms of the loss, or the norms of their `gradients`, a panel a training; `history` has rows of all."""
    names = history["training"].unique().tolist()
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(plots.PAGE * columns / 3 + 1.4, 2.4 * rows + 0.3), layout="constrained", squeeze=False,
        sharey=True,
    )  # fmt: skip
    for ax, training in zip(axes.flat, names, strict=False):
        plot_terms(history[history["training"] == training], terms, gradients=gradients, ax=ax)
        ax.get_legend().remove()
        ax.set_title(plots.plain(training))
    columns_drawn = [f"grad_{term}" if gradients else term for term in terms]
    _scale_terms(axes.flat[0], history.loc[history["split"] == "train", columns_drawn])  # panels share it
    for ax in axes.flat[len(names) :]:
        ax.remove()
    for ax in axes[:, 1:].flat:
        ax.set_ylabel("")
    figure.legend(_handles(len(terms), markers=False), list(terms), ncols=4, loc="outside lower left", fontsize=7)
    what = "gradients of the terms over all weights" if gradients else "terms of the loss"
    figure.suptitle(f"{plots.plain(name)}: {what}", fontsize=9)
    return figure


def _axes(ax: Axes | None) -> Axes:
    return plt.subplots(figsize=(plots.COLUMN, 2.4), layout="constrained")[1] if ax is None else ax


def _colour(i: int) -> tuple[float, float, float]:
    palette = sns.color_palette("colorblind")
    return palette[i % len(palette)]


def _dash(i: int) -> str:
    return DASHES[i % len(DASHES)]


def _marker(i: int) -> str:
    return MARKERS[i % len(MARKERS)]


def _scale_terms(ax: Axes, values: pd.DataFrame) -> None:
    """Logarithmic down to the smallest positive value, or five decades; linear below, down to 0."""
    positive = values.where(values > 0)
    smallest, largest = positive.min().min(), positive.max().max()
    if smallest > 0:  # not NaN
        ax.set_yscale("symlog", linthresh=10.0 ** math.floor(math.log10(max(smallest, largest / 1e5))))


def _handles(count: int, *, markers: bool = True) -> list[Line2D]:
    return [
        Line2D([], [], color=_colour(i), ls=_dash(i), marker=_marker(i) if markers else "", markersize=3)
        for i in range(count)
    ]


def _finish(ax: Axes, label: str) -> None:
    ax.set(xlabel="step", ylabel=label)
    ax.grid(axis="y", color="0.9", linewidth=0.4)
    sns.despine(ax=ax)


def _legend(ax: Axes, names: list[str], *, markers: bool = True) -> None:
    ax.legend(_handles(len(names), markers=markers), list(map(plots.plain, names)), ncols=2, loc="lower left",
              bbox_to_anchor=(0, 1), borderaxespad=0.2)  # fmt: skip
