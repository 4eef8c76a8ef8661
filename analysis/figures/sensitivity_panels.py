"""The figures of a sweep, each with its name: what `qvw sensitivity` writes."""

import re
from collections.abc import Iterator

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import plots
from analysis.figures.panels import sensitivity_figure
from analysis.figures.sensitivity_plots import BLOCK_COLUMNS, plot_blocks, plot_costs, plot_groups, plot_rank_bands
from analysis.sensitivity import group_rows, preferred_rows
from quant.choices import Protocol

STEMS = (
    "sensitivity", "sensitivity_loss", "sensitivity_sqnr", "sensitivity_ranks", "sensitivity_blocks",
    "sensitivity_groups", "sensitivity_left_out",
)  # fmt: skip
_PARTS = {"attn.qkv": "qkv", "attn.query": "query", "attn.key": "key", "attn.value": "value", "attn.softmax": "softmax",
          "attn.proj": "proj", "mlp.fc1": "fc1", "mlp.fc2": "fc2"}  # fmt: skip


def sensitivity_figures(table: pd.DataFrame, name: str) -> Iterator[tuple[str, Figure]]:
    """Name and figure of everything that the rows of sensitivity.parquet can show."""
    single = preferred_rows(table)
    if len(single):
        yield "sensitivity", sensitivity_figure(single, name, value="divergence")  # what plans and ranks go by
        if single["delta_loss"].notna().any():
            yield "sensitivity_loss", sensitivity_figure(single, name, value="delta_loss")
        if single["sqnr_db"].notna().any():
            yield "sensitivity_sqnr", sensitivity_figure(single, name, value="sqnr_db")
        bits = int(single["bit_width"].min())
        lowest = single[single["bit_width"] == bits]
        yield "sensitivity_ranks", _ranks_figure(lowest, f"{name}: one site at {bits} bits")
        frame = block_frame(lowest)
        if frame["block"].nunique() > 1 and frame["part"].isin(("qkv", "fc1", "query")).any():
            yield "sensitivity_blocks", _titled(plot_blocks(frame), f"{name}: one site in a block at {bits} bits")
    protocols: tuple[tuple[Protocol, str, str], ...] = (
        ("single", "sensitivity_groups", "one group quantized, all else in floating point"),
        ("leave_one_out", "sensitivity_left_out", "everything quantized but one group"),
    )
    for protocol, stem, what in protocols:
        rows, everything = group_rows(table, protocol)
        if len(rows):
            yield stem, _groups_figure(rows, everything, f"{name}: {what}")


def block_frame(rows: pd.DataFrame) -> pd.DataFrame:
    """Block, part and kl of every site inside a block of a transformer: weights, or a tensor of attention.

    A part's weight and its input are two columns; `qkv` weights that are measured in parts count as one, the largest.
    """
    found = []
    for row in rows.itertuples():
        block = re.match(r"(.*?\b(?:blocks|layers|stages)(?:\.\d+)(?:\.blocks\.\d+)?)\.", f"{row.module}.")
        part = _PARTS.get(str(row.kind))
        if block is None or part is None:
            continue
        suffix = " in" if row.tensor == "input" else ""
        found.append({"block": block[1], "part": f"{part}{suffix}", "divergence": row.divergence})
    frame = pd.DataFrame(found, columns=["block", "part", "divergence"])
    order = {f"{part}{suffix}": i for i, (part, suffix) in
             enumerate((p, s) for p in BLOCK_COLUMNS for s in ("", " in"))}  # fmt: skip
    return frame.assign(place=frame["part"].map(order)).sort_values("place", kind="stable").drop(columns="place")


@plots.styled()
def _ranks_figure(rows: pd.DataFrame, title: str) -> Figure:
    """What each site costs, and how sure its rank is, side by side."""
    height = 0.9 + plots.ROW_HEIGHT * max(len(rows), 6)
    figure, (costs, bands) = plt.subplots(1, 2, figsize=(plots.PAGE * 0.8, height), layout="constrained",
                                          width_ratios=(2, 1))  # fmt: skip
    plot_costs(rows, ax=costs)
    plot_rank_bands(rows, ax=bands)
    figure.suptitle(plots.plain(title), fontsize=9)
    return figure


@plots.styled()
def _groups_figure(rows: pd.DataFrame, everything: pd.DataFrame, title: str) -> Figure:
    """A panel for each way of grouping."""
    ways = rows["group"].str.partition(":")[0]
    kinds = list(dict.fromkeys(ways))
    widths = rows["bit_width"].nunique()
    heights = [0.6 + (0.06 + 0.09 * widths) * rows.loc[ways == way, "group"].nunique() for way in kinds]
    figure, axes = plt.subplots(len(kinds), 1, figsize=(plots.PAGE * 0.7, 0.5 + sum(heights)), squeeze=False,
                                layout="constrained", height_ratios=heights)  # fmt: skip
    low = rows["bit_width"].min()
    at_low = everything.loc[everything["bit_width"] == low, "divergence"]
    whole = float(at_low.iloc[0]) if len(at_low) else float("nan")
    if not rows["protocol"].eq("leave_one_out").all():
        whole = float("nan")
    for way, ax in zip(kinds, axes[:, 0], strict=True):
        plot_groups(rows[ways == way], everything=whole, ax=ax)
        ax.set_ylabel(f"by {way}")
    figure.suptitle(plots.plain(title), fontsize=9)
    return figure


def _titled(ax: Axes, title: str) -> Figure:
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.suptitle(plots.plain(title), fontsize=9)
    return figure
