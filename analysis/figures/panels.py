"""The figures of a run: panels of `plots` put together, one Figure each, and saved as PNG to look at, SVG to print."""

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import plots
from analysis.figures import variation_plots as variation_plots
from analysis.statistics.names import shorten
from analysis.storage.files import write_bytes
from quant.site import ATTENTION_TENSORS

FORMATS: dict[str, dict] = {"png": {"dpi": 200}, "svg": {"metadata": {"Date": None}}}
DEPTH_VALUES = ("abs_mean", "std", "excess_kurtosis", "outlier_fraction", "channel_range_ratio", "channel_std_cv")


@plots.styled()
def distribution_figure(stats: pd.DataFrame, name: str) -> Figure:
    """Quantile bands of weights, inputs and attention tensors, in network order; one panel each that was measured."""
    tensors = _classes(stats)
    longest = stats["module"].map(shorten).str.len().max()
    height = 2.0 + plots.LETTER_WIDTH * longest
    figure, axes = plt.subplots(len(tensors), 1, figsize=(plots.PAGE, height * len(tensors)), squeeze=False,
                                layout="constrained")  # fmt: skip
    for tensor, ax in zip(tensors, axes[:, 0], strict=True):
        plots.plot_distribution(stats, tensor=tensor, ax=ax)
    figure.suptitle(f"{plots.plain(name)}: distribution of each tensor", fontsize=9)
    return figure


@plots.styled()
def sensitivity_figure(rows: pd.DataFrame, name: str, *, value: str) -> Figure:
    """Heatmaps of site by bit-width for weights, inputs and attention tensors, side by side on one colour scale.

    `rows` has one row per (module, tensor, bit_width).
    """
    if value == "divergence" and "task" in rows and (rows["task"] == "classification").all():
        value = "kl"  # the same number, by its name
    tensors = _classes(rows)
    counts = [rows[rows["tensor"].isin(plots.TENSOR_CLASSES[t])].groupby(["module", "tensor"]).ngroups for t in tensors]
    width, height = plots.heatmap_size(max(counts))
    finite = rows[value].abs()[np.isfinite(rows[value])]
    largest = float(finite.max()) if len(finite) else None
    figure, axes = plt.subplots(1, len(tensors), figsize=(width * len(tensors), height), squeeze=False,
                                layout="constrained")  # fmt: skip
    for tensor, ax in zip(tensors, axes[0], strict=True):
        plots.plot_sensitivity_heatmap(rows, value=value, tensors=tensor, largest=largest, ax=ax)
    images, batchnorm = int(rows["images"].iloc[0]), set(rows["batchnorm"])
    treatment = {"re_estimated": ", BatchNorm re-estimated", "stored": ", BatchNorm as stored"}
    note = treatment.get(next(iter(batchnorm)), "") if len(batchnorm) == 1 else ""
    figure.suptitle(f"{plots.plain(name)}: one site quantized at a time, {images} images{note}", fontsize=9)
    return figure


@plots.styled()
def depth_figure(frame: pd.DataFrame, tensor: str, models: Sequence[str] = ()) -> Figure:
    """Six measures against relative depth, one below the other, a column a run, lines by kind of layer.

    `frame` is that of `variation_frames.depth_frame`. `models` names the runs, those of `frame` by default; one that
    has no such tensor keeps its column, empty.
    """
    models = list(dict.fromkeys(models or frame["model"]))
    figure, axes = _columns(models, len(DEPTH_VALUES), 1.15, sharex=True)
    for value, row in zip(DEPTH_VALUES, axes, strict=True):
        for model, ax in zip(models, row, strict=True):
            variation_plots.plot_variation_by_depth(frame, value=value, model=model, ax=ax)
            lines = ax.get_ylabel().replace(" (", "\n(").splitlines()
            ax.set_ylabel("\n".join(part for line in lines for part in textwrap.wrap(line, 22)), fontsize=7)
    _label_outer(axes, models)
    what = "Weights" if tensor == "weight" else "Inputs"
    figure.suptitle(
        f"{what} of convolutions and linears by depth (0 the first layer, 1 the last), a line for each kind of layer",
        fontsize=9,
    )
    figure.legend(*variation_plots.kind_handles(frame), loc="outside lower center", ncols=6, columnspacing=1.2)
    return figure


@plots.styled()
def heads_figure(frame: pd.DataFrame) -> Figure:
    """Spread of the heads over the attention layers above the heads' own standard deviations, a column a run.

    `frame` is that of `variation_frames.head_frame`.
    """
    models = frame["model"].drop_duplicates().tolist()
    tensors = [tensor for tensor in ATTENTION_TENSORS if (frame["tensor"] == tensor).any()]
    figure, axes = _columns(models, 1 + len(tensors), 1.1, sharex="col")
    for j, model in enumerate(models):
        variation_plots.plot_head_spread(frame, model=model, ax=axes[0, j])
        for tensor, ax in zip(tensors, axes[1:, j], strict=True):
            variation_plots.plot_head_std(frame, tensor=tensor, model=model, ax=ax)
    _label_outer(axes, models)
    figure.suptitle(
        "Heads of each attention layer: how much their standard deviations differ (top), and each of them", fontsize=9
    )
    figure.legend(*variation_plots.tensor_handles(), loc="outside lower center", ncols=4)
    return figure


@plots.styled()
def ridges_figure(frame: pd.DataFrame, tensor: str) -> Figure:
    """Densities of standardised values by kind and run; `frame` is that of `variation_frames.distribution_frame`."""
    ax = variation_plots.plot_ridges(frame)
    figure = ax.get_figure(root=True)
    assert figure is not None
    what = "Weights" if tensor == "weight" else "Activations"
    low, high = (f"$10^{{{math.log10(value):.0f}}}$" for value in (variation_plots.FLOOR, variation_plots.TOP))
    figure.suptitle(
        f"{what} by kind of layer: density on a logarithmic scale from {low} to {high} per std;\n"
        "dashed a Gaussian, points the extremes; (n) tensors pooled, each standardised by itself, all counting alike",
        fontsize=8,
    )
    return figure


@plots.styled()
def channels_figure(frame: pd.DataFrame, patterns: Sequence[str] = ()) -> Figure:
    """Ranges of all channels of one layer a run, its weight beside its input, a row a run.

    `frame` is that of `variation_frames.channel_frame` with these `patterns`.
    """
    models = frame["model"].drop_duplicates().tolist()
    figure, axes = plt.subplots(len(models), 2, figsize=(plots.PAGE, 0.5 + 1.9 * len(models)), squeeze=False,
                                layout="constrained")  # fmt: skip
    for model, row in zip(models, axes, strict=True):
        for tensor, ax in zip(("weight", "input"), row, strict=True):
            variation_plots.plot_channels(frame, tensor=tensor, model=model, ax=ax)
        row[0].set_ylabel(f"{plots.plain(model)}\n{row[0].get_ylabel()}", linespacing=1.5)
    among = f", among those that match {' or '.join(map(plots.plain, patterns))}" if patterns else ""
    rule = f"Channels of the one layer a run whose weight or input has the widest channel against the median{among}"
    legend = "light minimum to maximum, dark mean ± std, points the widest three, dashed reach of the median channel"
    figure.suptitle("\n".join([*textwrap.wrap(rule, 110), legend]), fontsize=8)
    return figure


@plots.styled()
def bits_figure(frame: pd.DataFrame, name: str, *, budget: str = "") -> Figure:
    """Bits of every planned site in network order, as many rows as name every module; `frame` as of `plot_bits`.

    `budget` is what the plan may cost in words, such as `3 mean weight bits`, for the title.
    """
    frame = frame.sort_values("order", kind="stable")
    place = pd.factorize(frame["module"])[0]
    rows = math.ceil((place.max() + 1) / plots.MODULES_A_ROW)
    a_row = math.ceil((place.max() + 1) / rows)
    parts = [part for _, part in frame.groupby(place // a_row)]
    figure, axes = plt.subplots(
        len(parts),
        1,
        figsize=(plots.PAGE, sum(map(plots.bits_height, parts))),
        squeeze=False,
        layout="constrained",
        height_ratios=[part["tensor"].nunique() for part in parts],  # lines of one height
    )
    for i, (part, ax) in enumerate(zip(parts, axes[:, 0], strict=True)):
        plots.plot_bits(part, legend=sorted(set(frame["bit_width"])) if i == 0 else (), ax=ax)
        ax.set_xlim(0, a_row)  # cells of one width, also in a last row that is not full
        if i < len(parts) - 1:
            ax.set_xlabel("")
    title = f"{plots.plain(name)}: bits by site" + (f", budget {budget}" if budget else "")
    figure.suptitle("\n".join(textwrap.wrap(title, 96)), fontsize=9)
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


def _columns(models: Sequence[str], rows: int, height: float, *, sharex: bool | Literal["col"]) -> tuple[Figure, Any]:
    """A figure with a column a run and its axes; all of a row share the scale. Wider than a page beyond four runs."""
    width = max(plots.PAGE, 1.6 * len(models))
    return plt.subplots(
        rows,
        len(models),
        figsize=(width, 0.9 + height * rows),
        squeeze=False,
        layout="constrained",
        sharex=sharex,
        sharey="row",
    )


def _label_outer(axes: Any, models: Sequence[str]) -> None:
    """The runs' names above, the measures on the left, depth below."""
    for model, ax in zip(models, axes[0], strict=True):
        ax.set_title(plots.plain(model), fontsize=7)
    for ax in axes.flat:
        ax.label_outer()
