"""The figure of an ablation: accuracy and oscillation of each arm, a dot a seed. Frames in, Axes out."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.plots import PAGE, new_axes, plain, styled

_ROW = 0.2  # inches an arm
LABELS = {"top1": "top-1 (%)", "oscillating": "oscillating weights (%)"}


@styled()
def plot_arms(results: pd.DataFrame, summary: pd.DataFrame, *, value: str = "top1", ax: Axes | None = None) -> Axes:
    """One row an arm, in the order of `summary`: a dot a seed, the mean as a bar, its 95 % interval as a line.

    `results` and `summary` are the rows of one network, as of `ablation.results_frame` and `ablation.summarized`;
    `value` is `top1`, where a cross shows the calibrated network before its training, or `oscillating`.
    """
    ax = new_axes(ax, (PAGE / 2, 0.6 + _ROW * len(summary)))
    colour, start = sns.color_palette("colorblind")[0], sns.color_palette("colorblind")[1]
    column = "top1_last" if value == "top1" else value
    for y, arm in enumerate(summary.itertuples()):
        own = results[results["arm"] == arm.arm]
        if value == "top1":
            ax.plot([100 * arm.top1_low, 100 * arm.top1_high], [y, y], color=colour, linewidth=0.8)
            ax.plot(100 * own["top1_start"], np.full(len(own), y), "x", color=start, markersize=3.5,
                    label="before training" if y == 0 else None)  # fmt: skip
        ax.plot(100 * own[column], np.full(len(own), y), "o", color=colour, markersize=2.5, alpha=0.7,
                label="a seed, after it" if y == 0 else None)  # fmt: skip
        ax.plot([100 * own[column].mean()], [y], "|", color="black", markersize=8, label="mean" if y == 0 else None)
    ax.set_yticks(range(len(summary)), summary["title"])
    ax.set_ylim(len(summary) - 0.4, -0.6)
    ax.set_xlabel(LABELS[value])
    ax.grid(axis="x", color="0.9", linewidth=0.4)
    if value != "top1":
        ax.set_xlim(left=0)
    sns.despine(ax=ax)
    return ax


@styled()
def ablation_figure(results: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """A row of panels a network: accuracy, and the share of oscillating weights."""
    subjects = list(dict.fromkeys(summary["subject"]))
    heights = [1 + int((summary["subject"] == name).sum()) for name in subjects]
    figure, axes = plt.subplots(len(subjects), 2, figsize=(PAGE, 0.7 + sum(0.35 + _ROW * h for h in heights)),
                                squeeze=False, layout="constrained", sharey="row", height_ratios=heights)  # fmt: skip
    for row, name in zip(axes, subjects, strict=True):
        parts = results[results["subject"] == name], summary[summary["subject"] == name]
        for ax, value in zip(row, ("top1", "oscillating"), strict=True):
            plot_arms(*parts, value=value, ax=ax)
        row[0].set_title(plain(name), loc="left")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return figure
