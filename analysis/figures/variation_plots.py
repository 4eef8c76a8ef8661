"""Figures of how tensors vary: over depth, among heads, by kind, among channels. A tidy frame in, Axes out."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from analysis.plots import COLUMN, LABELS, PAGE, leave_room, new_axes, plain, styled
from analysis.statistics.names import shorten
from quant.site import ATTENTION_TENSORS
from quant.sites import KINDS

Colour = str | tuple[float, float, float]
Style = tuple[Colour, str, str, bool]
_BLUE, _ORANGE, _GREEN, _RED, _PINK, _TAN, *_, _SKY = sns.color_palette("colorblind")
_WINE = "#882255"  # of Paul Tol's muted palette: distinguished from these with impaired colour vision too
# kind -> colour, marker, dash, filled: no two kinds share colour and marker, nor marker, dash and filling (in grey).
# Kinds that stand alone in a network have no line.
KIND_STYLES: dict[str, Style] = {
    "conv": (_BLUE, "o", "-", True),
    "conv.depthwise": (_ORANGE, "s", "--", True),
    "conv.pointwise": (_GREEN, "D", "-.", True),
    "attn.qkv": (_TAN, "o", "-", False),
    "attn.query": (_WINE, "^", "-", False),
    "attn.key": (_SKY, "v", "--", False),
    "attn.value": (_PINK, "D", ":", False),
    "attn.proj": (_GREEN, "s", "-.", False),
    "mlp.fc1": (_ORANGE, "P", "--", True),
    "mlp.fc2": (_RED, "X", "-", True),
    "patch_embed": ("0.25", ">", "", True),
    "downsample": ("0.25", "d", "", True),
    "head": ("0.25", "*", "", True),
    "other": ("0.5", ".", "", True),
}
TENSOR_STYLES = {tensor: KIND_STYLES[f"attn.{tensor}"] for tensor in ("query", "key", "value")}
TENSOR_STYLES["attention"] = (_RED, "X", "-.", True)
FLOOR, TOP = 1e-6, 10.0  # of the densities that a ridge shows, per standard deviation
STEPS = 100  # of the figure of channels, at most
RIDGE = 0.86  # height of a full ridge where the next one starts at 1


@styled()
def plot_variation_by_depth(
    frame: pd.DataFrame, *, value: str = "abs_mean", model: str | None = None, ax: Axes | None = None
) -> Axes:
    """One line per kind of layer over relative depth (0 the first layer, 1 the last), for one of the models of `frame`.

    `frame` is that of `variation_frames.depth_frame`; `model` may be left out where it holds one. The scale suits all
    models of the frame: logarithmic where all values are positive; zeros among positive values lie on a linear stretch
    at the bottom. A model without such figures gets the words "not measured".
    """
    ax = new_axes(ax, (COLUMN, 2.4))
    rows = _of_model(frame, model).dropna(subset=[value])
    if rows.empty:
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", va="center", color="0.4")
    for kind, group in rows.groupby("kind", sort=False):
        _line(ax, group["relative_depth"], group[value], KIND_STYLES[str(kind)])
    _scale(ax, frame[value].dropna())
    ax.set(xlabel="relative depth", ylabel=LABELS.get(value, value), xlim=(-0.04, 1.04))
    ax.grid(axis="y", color="0.9", linewidth=0.4)
    sns.despine(ax=ax)
    return ax


@styled()
def plot_head_std(frame: pd.DataFrame, *, tensor: str, model: str | None = None, ax: Axes | None = None) -> Axes:
    """The standard deviation of each head of one tensor as a point, those of a layer joined, over the layers.

    `frame` is that of `variation_frames.head_frame`; `tensor` is query, key, value or attention.
    """
    ax = new_axes(ax, (COLUMN, 1.6))
    shown = frame[frame["tensor"] == tensor]
    colour, marker, _, _ = TENSOR_STYLES[tensor]
    for _, group in _of_model(shown, model).groupby("layer", sort=True):
        ax.plot(group["layer"], group["std"], color=colour, marker=marker, markersize=2.5, markeredgewidth=0.4,
                markerfacecolor="none", linewidth=0.6, clip_on=False)  # fmt: skip
    _scale(ax, shown["std"].dropna())
    ax.set(xlabel="attention layer", ylabel=f"{tensor}:\nstd of each head")
    ax.grid(axis="y", color="0.9", linewidth=0.4)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    sns.despine(ax=ax)
    return ax


@styled()
def plot_head_spread(frame: pd.DataFrame, *, model: str | None = None, ax: Axes | None = None) -> Axes:
    """How much the heads of a layer differ in standard deviation, a line for query, key, value and attention each.

    `frame` is that of `variation_frames.head_frame`, its `head_std_cv` the same for all heads of a tensor.
    """
    ax = new_axes(ax, (COLUMN, 1.6))
    sites = frame.drop_duplicates(["model", "module", "tensor"]).dropna(subset=["head_std_cv"])
    rows = _of_model(sites, model)
    for tensor, style in TENSOR_STYLES.items():
        group = rows[rows["tensor"] == tensor]
        if not group.empty:
            _line(ax, group["layer"], group["head_std_cv"], style)
    _scale(ax, sites["head_std_cv"])
    ax.set(xlabel="attention layer", ylabel="spread of heads:\ncv of their std")
    ax.grid(axis="y", color="0.9", linewidth=0.4)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    sns.despine(ax=ax)
    return ax


@styled()
def plot_ridges(frame: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Densities of standardised values, a ridge for each kind and run, attention's operands last; dashed: a Gaussian.

    `frame` is that of `variation_frames.distribution_frame`. The height of a ridge is the logarithm of the density,
    from `FLOOR` to `TOP` per standard deviation, so that tails show; points are the ends of the outermost bins that
    hold a value, however rare. Across, the scale is linear within 4 standard deviations and logarithmic beyond.
    """
    models = frame["model"].drop_duplicates().tolist()
    ax = new_axes(ax, ridges_size(frame))
    colours = sns.color_palette("colorblind")
    place, names, titles, reach = 0.0, [], [], 4.0
    kinds = dict(iter(frame.groupby(["tensor", "kind"], sort=False)))
    for tensor, kind in sorted(kinds, key=lambda key: (key[0] in ATTENTION_TENSORS, KINDS.index(key[1]))):
        start = place
        for model, rows in kinds[tensor, kind].groupby("model", sort=False):
            edges = np.append(rows["left"], rows["right"].iloc[-1])
            base = np.full(len(edges), place + 1)
            outline, normal = (place + 1 - RIDGE * _height(rows[name]) for name in ("density", "gaussian"))
            ax.fill_between(edges, np.append(outline, outline[-1]), base, step="post", linewidth=0.5, edgecolor="0.2",
                            facecolor=(*colours[models.index(model) % len(colours)][:3], 0.6))  # fmt: skip
            ax.step(edges, np.append(normal, normal[-1]), where="post", color="black", linewidth=0.5, ls=(0, (3, 2)))
            names.append((place + 0.75, f"{plain(str(model))} ({rows['tensors'].iloc[0]})"))
            met = rows.loc[rows["density"] > 0]
            ends = [met["left"].iloc[0], met["right"].iloc[-1]]
            ax.scatter(ends, [place + 1] * 2, s=5, color="black", linewidths=0, zorder=3)
            reach = max(reach, -ends[0], ends[1])
            place += 1
        titles.append(((start + place) / 2, kind if tensor in ("weight", "input") else tensor))
        place += 0.25
    ax.set_ylim(place, -0.1)
    ax.set_xscale("symlog", linthresh=4, linscale=1.5)
    ax.set_xlim(-reach * 1.1, reach * 1.1)
    ticks = [tick for tick in (2, 4, 10, 30, 100, 300, 1000, 3000, 10_000) if tick <= reach * 1.1]
    ax.xaxis.set(major_locator=FixedLocator([*(-tick for tick in ticks[::-1]), 0, *ticks]), minor_locator=NullLocator())
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.set_yticks([at for at, _ in titles], [title for _, title in titles])
    beside = ax.secondary_yaxis("right")
    beside.set_yticks([at for at, _ in names], [name for _, name in names], fontsize=6)
    for axis in (ax, beside):
        axis.tick_params(axis="y", length=0)
    beside.spines["right"].set_visible(False)
    ax.set_xlabel("value - mean of its tensor (in std of the tensor, log beyond 4)")
    ax.grid(axis="x", color="0.9", linewidth=0.4)
    sns.despine(ax=ax, left=True)
    return ax


def ridges_size(frame: pd.DataFrame) -> tuple[float, float]:
    """Width and height in inches of the ridges of `frame`, every one of them labelled."""
    kinds = frame.groupby(["tensor", "kind"]).ngroups
    return PAGE, 0.75 + 0.29 * (frame.groupby(["tensor", "kind", "model"]).ngroups + 0.25 * kinds)


@styled()
def plot_channels(
    frame: pd.DataFrame, *, tensor: str = "input", model: str | None = None, ax: Axes | None = None
) -> Axes:
    """The range of every channel of one layer's `weight` or `input`, the widest first, readable at thousands.

    Light: minimum to maximum; dark: mean plus and minus one standard deviation, no farther than the range; dashed: plus
    and minus the largest magnitude of the median channel. Beyond `STEPS` channels neighbours share a step: light their
    outermost range, dark the medians of its two ends. The scale is linear up to the dashes and logarithmic beyond where
    the widest channel has more than five times that, else linear throughout. The widest three are named, with a point
    at their largest magnitude. `frame` is that of `variation_frames.channel_frame`.
    """
    ax = new_axes(ax, (COLUMN, 1.8))
    rows = _of_model(frame[frame["tensor"].str.startswith(tensor)], model).sort_values("rank")
    if rows.empty:
        ax.set_axis_off()
        ax.text(0.5, 0.5, f"{tensor} not measured", transform=ax.transAxes, ha="center", color="0.4")
        return ax
    first = rows.iloc[0]
    together = math.ceil(len(rows) / STEPS)  # bars of less than a few pixels would be stripes of chance
    std_ends = {"from": (rows["mean"] - rows["std"]).clip(rows["min"], rows["max"]),
                "to": (rows["mean"] + rows["std"]).clip(rows["min"], rows["max"])}  # fmt: skip
    steps = rows.assign(**std_ends).groupby((rows["rank"] - 1) // together)
    edges = np.append(steps["rank"].min() - 0.5, len(rows) + 0.5)

    def band(low: pd.Series, high: pd.Series, colour: Colour) -> None:
        ax.fill_between(edges, np.append(low, low.iloc[-1]), np.append(high, high.iloc[-1]), step="post", color=colour,
                        linewidth=0)  # fmt: skip

    band(steps["min"].min(), steps["max"].max(), _SKY)
    band(steps["from"].median(), steps["to"].median(), _BLUE)
    widest_rows = rows.head(3)
    ends = widest_rows["max"].where(widest_rows["max"] >= -widest_rows["min"], widest_rows["min"])
    ax.plot(widest_rows["rank"], ends, "o", color="0.15", markersize=2, markeredgewidth=0, clip_on=False)
    ax.axhline(0, color="0.4", linewidth=0.4)
    typical, widest = float(first["median_abs_max"]), max(-float(first["min"]), float(first["max"]))
    low, high = float(rows["min"].min()), float(rows["max"].max())
    pad = 0.05 * (high - low)
    for level in (-typical, typical):
        if low - pad < level < high + pad:  # one that lies outside would only take room
            ax.axhline(level, color="black", linewidth=0.6, ls=(0, (4, 2)))
    logarithmic = 0 < typical < widest / 5
    if logarithmic:
        ax.set_yscale("symlog", linthresh=typical, linscale=1.0)
        ax.yaxis.set(major_locator=FixedLocator(_ticks_beyond(typical, low, high)), minor_locator=NullLocator())
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:.2g}"))
    leave_room(ax, low, high)
    named = [f"{row['index']}" if row["tensor"] == tensor else f"{row['tensor'].partition('.')[2]} {row['index']}"
             for _, row in widest_rows.iterrows()]  # fmt: skip
    ratio = f", widest / median {widest / typical:.3g}" if typical > 0 else ""
    ax.set_title(f"{shorten(first['module'])}\n{tensor}{ratio}", loc="left", fontsize=7)
    zeros = int(((rows["min"] == 0) & (rows["max"] == 0)).sum())
    notes = (f"{len(rows)} channels, widest first: {', '.join(named)}",
             f"{zeros} channel{'s' if zeros > 1 else ''} always 0" if zeros else "",
             f"a step: range of {together} channels, median of mean ± std" if together > 1 else "")  # fmt: skip
    ax.set_xlabel("\n".join(filter(None, notes)), fontsize=7)
    ax.set_xlim(0.5 - 0.01 * len(rows), len(rows) * 1.01 + 0.5)
    ax.set_xticks([mark for mark in MaxNLocator(integer=True).tick_values(1, len(rows)) if 1 <= mark <= len(rows)])
    ax.set_ylabel("value" + (", log\nbeyond the dashes" if logarithmic else ""))
    sns.despine(ax=ax)
    return ax


def kind_handles(frame: pd.DataFrame) -> tuple[list[Line2D], list[str]]:
    """Handles and labels of a legend of the kinds in a frame of `plot_variation_by_depth`."""
    kinds = [kind for kind in KIND_STYLES if (frame["kind"] == kind).any()]
    return [_handle(KIND_STYLES[kind]) for kind in kinds], kinds


def tensor_handles() -> tuple[list[Line2D], list[str]]:
    """Handles and labels of a legend of the tensors inside attention."""
    return [_handle(style) for style in TENSOR_STYLES.values()], list(TENSOR_STYLES)


def _of_model(frame: pd.DataFrame, model: str | None) -> pd.DataFrame:
    if model is not None:
        return frame[frame["model"] == model]
    models = frame["model"].unique().tolist()
    if len(models) > 1:
        raise ValueError(f"The frame holds {len(models)} models: choose one of {', '.join(map(str, models))}.")
    return frame


def _line(ax: Axes, x: Sequence[float], y: Sequence[float], style: Style) -> None:
    handle = _handle(style)
    handle.set(data=(x, y), clip_on=False, zorder=3)  # a marker on the axis stays whole
    ax.add_line(handle)
    ax.update_datalim(np.column_stack([x, y]))
    ax.autoscale_view()


def _handle(style: Style) -> Line2D:
    colour, marker, dash, filled = style
    return Line2D(
        [], [], color=colour, marker=marker, ls=dash or "none", linewidth=0.7, markersize=3.2, markeredgewidth=0.6,
        markerfacecolor=colour if filled else "white",
    )  # fmt: skip


def _scale(ax: Axes, values: pd.Series) -> None:
    """Logarithmic for positive values beyond a factor of 3; linear about 0 where there are zeros or signs."""
    if values.empty:
        return
    smallest, largest = values[values > 0].min(), values.abs().max()
    if (values > 0).all() and largest > 3 * smallest:
        ax.set_yscale("log")
        steps = (1, 2, 3, 5, 7) if largest < 10 * smallest else (1, 2, 5) if largest < 50 * smallest else (1,)
        ax.yaxis.set_major_locator(LogLocator(subs=steps))
        if smallest >= 1e-3:  # below, powers of ten are shorter
            ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    elif (values == 0).any() and (values >= 0).all() and largest > 0:
        ax.set_yscale("symlog", linthresh=10.0 ** math.floor(math.log10(smallest)))
        leave_room(ax, 0, largest, below=0)  # a share is never below 0
    elif largest > 10:
        ax.set_yscale("symlog", linthresh=1)
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    elif largest == 0:
        ax.set_ylim(0, 1)
    ax.yaxis.set_minor_locator(NullLocator())


def _ticks_beyond(typical: float, low: float, high: float) -> list[float]:
    """Ticks of a symmetric scale that is linear up to `typical`: it, 0, and round values beyond."""
    first, last = math.floor(math.log10(typical)), math.floor(math.log10(max(high, -low)))
    steps, every = (1, 2, 5) if last - first < 2 else (1,), math.ceil((last - first + 1) / 5)
    round_values = (step * 10.0**k for k in range(first, last + 1, every) for step in steps)
    marks = [typical, *(mark for mark in round_values if mark > 2 * typical)]
    return [tick for tick in (*(-mark for mark in reversed(marks)), 0.0, *marks) if low <= tick <= high]


def _height(density: pd.Series) -> np.ndarray:
    """0 at `FLOOR` and below, 1 at `TOP` and above, logarithmic between."""
    shown = np.log10(density.to_numpy(np.float64).clip(FLOOR, TOP))
    return (shown - math.log10(FLOOR)) / (math.log10(TOP) - math.log10(FLOOR))
