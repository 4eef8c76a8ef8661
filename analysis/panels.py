"""The figures of a run: panels of `plots` put together, one Figure each; saving is the caller's."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from analysis import plots

DEPTH_VALUES = ("abs_mean", "std", "excess_kurtosis", "outlier_fraction", "channel_range_ratio", "channel_std_cv")


@mpl.rc_context(plots.STYLE)
def distribution_figure(stats: pd.DataFrame, name: str) -> Figure:
    """Quantile bands of weights, inputs and attention tensors, in network order; one panel each that was measured."""
    tensors = _classes(stats)
    longest = stats["module"].map(plots.shorten).str.len().max()
    height = 2.0 + plots.LETTER_WIDTH * longest
    figure, axes = plt.subplots(len(tensors), 1, figsize=(plots.PAGE, height * len(tensors)), squeeze=False,
                                layout="constrained")  # fmt: skip
    for tensor, ax in zip(tensors, axes[:, 0], strict=True):
        plots.plot_distribution(stats, tensor=tensor, ax=ax)
    figure.suptitle(f"{name}: distribution of each tensor", fontsize=9)
    return figure


@mpl.rc_context(plots.STYLE)
def sensitivity_figure(rows: pd.DataFrame, name: str, *, value: str) -> Figure:
    """Heatmaps of site by bit-width for weights, inputs and attention tensors, side by side.

    `rows` has one row per (module, tensor, bit_width).
    """
    tensors = _classes(rows)
    counts = [rows[rows["tensor"].isin(plots.TENSOR_CLASSES[t])].groupby(["module", "tensor"]).ngroups for t in tensors]
    width, height = plots.heatmap_size(max(counts))
    figure, axes = plt.subplots(1, len(tensors), figsize=(width * len(tensors), height), squeeze=False,
                                layout="constrained")  # fmt: skip
    for tensor, ax in zip(tensors, axes[0], strict=True):
        plots.plot_sensitivity_heatmap(rows, value=value, tensors=tensor, ax=ax)
    figure.suptitle(f"{name}: one site quantized at a time", fontsize=9)
    return figure


@mpl.rc_context(plots.STYLE)
def depth_figure(frame: pd.DataFrame, tensor: str) -> Figure:
    """Six measures of several models against relative depth; `frame` is that of `comparison.depth_frame`."""
    figure, axes = plt.subplots(3, 2, figsize=(plots.PAGE, 6.6), layout="constrained", sharex=True)
    for value, ax in zip(DEPTH_VALUES, axes.flat, strict=True):
        plots.plot_variation_by_depth(frame, value=value, ax=ax)
        legend = ax.get_legend()
        if legend is not None and ax is not axes.flat[0]:
            legend.remove()
        if ax not in axes[-1]:
            ax.set_xlabel("")
    figure.suptitle("weights" if tensor == "weight" else "inputs", fontsize=9)
    return figure


@mpl.rc_context(plots.STYLE)
def bits_figure(frame: pd.DataFrame, name: str) -> Figure:
    """Bits of every planned site in network order; `frame` is that of `comparison.bits_frame`."""
    ax = plots.plot_bits(frame)
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.suptitle(f"{name}: bits by site", fontsize=9)
    return figure


def _classes(frame: pd.DataFrame) -> list[str]:
    return [name for name, tensors in plots.TENSOR_CLASSES.items() if frame["tensor"].isin(tensors).any()]
