"""The figures of a run: panels of `plots` put together, one Figure each, and saved as PNG to look at, SVG to print."""

import io
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from analysis import plots
from analysis.files import write_bytes

FORMATS: dict[str, dict] = {"png": {"dpi": 200}, "svg": {"metadata": {"Date": None}}}
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
    figure.suptitle(f"{plots.plain(name)}: distribution of each tensor", fontsize=9)
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
    images, batchnorm = int(rows["images"].iloc[0]), set(rows["batchnorm"])
    treatment = {"re_estimated": ", BatchNorm re-estimated", "stored": ", BatchNorm as stored"}
    note = treatment.get(next(iter(batchnorm)), "") if len(batchnorm) == 1 else ""
    figure.suptitle(f"{plots.plain(name)}: one site quantized at a time, {images} images{note}", fontsize=9)
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
    figure.suptitle(f"{'weights' if tensor == 'weight' else 'inputs'} of convolutions and linears by depth", fontsize=9)
    return figure


@mpl.rc_context(plots.STYLE)
def bits_figure(frame: pd.DataFrame, name: str) -> Figure:
    """Bits of every planned site in network order; `frame` is that of `comparison.bits_frame`."""
    ax = plots.plot_bits(frame)
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.suptitle(f"{plots.plain(name)}: bits by site", fontsize=9)
    return figure


def figure_files(name: str) -> tuple[str, ...]:
    """The names under which `save_figure` keeps a figure."""
    return tuple(f"{name}.{suffix}" for suffix in FORMATS)


def save_figure(figure: Figure, path: Path) -> None:
    """Write `path`.png (200 dots an inch) and `path`.svg, each whole or not at all, and close the figure.

    The same figure gives the same bytes each time.
    """
    for suffix, options in FORMATS.items():
        buffer = io.BytesIO()
        with mpl.rc_context({"svg.hashsalt": path.name}):
            figure.savefig(buffer, format=suffix, **options)
        write_bytes(path.with_name(f"{path.name}.{suffix}"), buffer.getvalue())
    plt.close(figure)


def _classes(frame: pd.DataFrame) -> list[str]:
    return [name for name, tensors in plots.TENSOR_CLASSES.items() if frame["tensor"].isin(tensors).any()]
