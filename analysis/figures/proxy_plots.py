"""Figure of the proxies: each score against the measured sensitivity. A tidy frame in, Axes out."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray

from analysis.plots import LABELS, PAGE, TENSOR_CLASSES, new_axes, plain, styled, tick_label
from analysis.sweeps.proxy_correlation import SITE_KEY
from quant.choices import PROXIES

NAMES = {
    "fisher": "Fisher along the error (nats)",
    "fit": "FIT",
    "output_gradient": "output gradient",
    "hessian_trace": "Hessian trace",
    "noise": "noise / signal of the tensor",
    "stats_range": "noise predicted by the range",
    "stats_kurtosis": "excess kurtosis",
    "stats_outliers": "share beyond 6 std",
}
COLOURS = dict(zip(TENSOR_CLASSES, sns.color_palette("colorblind")[:3], strict=True))
MARKERS = dict(zip(TENSOR_CLASSES, "o^s", strict=True))


@styled()
def plot_proxy(frame: pd.DataFrame, *, proxy: str, ax: Axes | None = None) -> Axes:
    """A score against the measured KL of each site, a colour and shape for each class of tensor.

    `frame` has tensor, divergence and score, one row a site. Logarithmic scales; a score that can be negative has
    one that is linear about 0. For `fisher`, which predicts the KL itself, the line of equality.
    """
    ax = new_axes(ax, (PAGE / 4, PAGE / 4))
    frame = frame[(frame["divergence"] > 0) & frame["score"].notna()]
    for name, tensors in TENSOR_CLASSES.items():
        rows = frame[frame["tensor"].isin(tensors)]
        ax.scatter(rows["score"], rows["divergence"], s=7, marker=MARKERS[name], color=COLOURS[name], linewidths=0,
                   alpha=0.8, label=name)  # fmt: skip
    ax.set_yscale("log")
    _scale(ax, frame["score"].to_numpy(dtype=np.float64))
    if proxy == "fisher" and len(frame):
        ends = [frame["divergence"].min(), frame["divergence"].max()]
        ax.plot(ends, ends, color="0.4", lw=0.6, ls="--", zorder=0)
    ax.set(xlabel=NAMES.get(proxy, proxy), ylabel=LABELS["divergence"])
    ax.grid(color="0.92", linewidth=0.4)
    sns.despine(ax=ax)
    return ax


def _scale(ax: Axes, scores: NDArray[np.float64]) -> None:
    """A logarithmic axis below for scores of more than half a decade, with three decades about 0 for both signs."""
    largest = float(np.abs(scores).max(initial=0))
    if largest == 0:
        return
    if scores.min() > 0:
        if largest / scores.min() > 3:
            ax.set_xscale("log")
        return
    top = 10.0 ** math.floor(math.log10(largest))
    ax.set_xscale("symlog", linthresh=top / 1000)
    ticks = [value for value in (-top, -top / 100, 0.0, top / 100, top) if value >= 0 or scores.min() < 0]
    ax.set_xticks(ticks, [tick_label(value) for value in ticks], fontsize=6)
    ax.xaxis.set_minor_locator(NullLocator())


@styled()
def proxies_figure(proxies: pd.DataFrame, measured: pd.DataFrame, correlation: pd.DataFrame, name: str) -> Figure:
    """A panel for each proxy at the lowest measured bit-width, with its rank correlation."""
    bits = int(measured["bit_width"].min()) if len(measured) else int(proxies["bit_width"].min())
    joined = proxies.merge(measured[[*SITE_KEY, "divergence"]], on=SITE_KEY)
    joined = joined[joined["bit_width"] == bits]
    shown = [proxy for proxy in PROXIES if (joined["proxy"] == proxy).any()]
    columns = 4
    rows = max(1, math.ceil(len(shown) / columns))
    figure, axes = plt.subplots(rows, columns, figsize=(PAGE, 0.5 + 1.75 * rows), squeeze=False, sharey=True,
                                layout="constrained")  # fmt: skip
    known = correlation[(correlation["bit_width"] == bits) & (correlation["tensors"] == "all")].set_index("proxy")
    for proxy, ax in zip(shown, axes.flat, strict=False):
        plot_proxy(joined[joined["proxy"] == proxy], proxy=proxy, ax=ax)
        if proxy in known.index:
            ax.set_title(f"Spearman {known.loc[proxy, 'spearman']:.2f}", fontsize=7)
    for ax in axes.flat[len(shown) :]:
        ax.axis("off")
    for ax in axes[:, 1:].flat:
        ax.set_ylabel("")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.suptitle(f"{plain(name)}: proxies against one site quantized at {bits} bits", fontsize=9)
    return figure
