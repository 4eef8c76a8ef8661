"""What `qvw sensitivity` prints: the sites that cost most, and how far that can be trusted."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.sensitivity import ROW_KEY, row_key
from analysis.sweeps.groups import EVERYTHING
from analysis.sweeps.rank_bands import images_to_separate
from analysis.terminal.console import as_text


def sensitivity_summary(table: pd.DataFrame, rows: Sequence[dict]) -> str:
    """The most sensitive sites, or groups, at the lowest bit-width of `rows`, of the table that holds them.

    `rows` have their `image_divergence` besides the columns of the table.
    """
    chosen = {row_key(row) for row in rows}
    table = table[[row_key(row) in chosen for row in table[list(ROW_KEY)].to_dict("records")]]
    treatment = "re_estimated" if (table["batchnorm"] == "re_estimated").any() else table["batchnorm"].iloc[0]
    table = table[(table["batchnorm"] == treatment) & (table["bit_width"] == table["bit_width"].min())]
    out = table["protocol"] == "leave_one_out"
    everything = table[(table["group"] == EVERYTHING) & ~out]
    table = table[out] if out.any() else table
    worst = table.nsmallest(8, "divergence") if out.any() else table.nlargest(8, "divergence")
    names = ["group"] if (table["group"] != "").all() else ["module", "tensor"]
    columns = [
        *names,
        "delta_loss",
        "delta_loss_se",
        "delta_top1",
        "divergence",
        "divergence_se",
        "rank_low",
        "rank_high",
    ]
    bits = int(table["bit_width"].iloc[0])
    text = f"Most sensitive at {bits} bits"
    if out.any():
        text = f"What helps most when it is left in floating point, all else at {bits} bits"
    task = table["task"].iloc[0]
    what = "KL of the logits" if task == "classification" else f"divergence of {task}"
    shown = worst[columns].dropna(axis=1, how="all")
    text += f" ({what}, ranks in 95 % of resampled images):\n{as_text(shown)}"
    if len(everything):
        text += f"\nEverything at {bits} bits: {what.split()[0]} {everything['divergence'].iloc[0]:.3g}."
    return "\n".join([text, *_doubts(rows, table)])


def _doubts(rows: Sequence[dict], table: pd.DataFrame) -> list[str]:
    """What a reader must know before the ranks are used."""
    doubts = []
    if (table["images"] < 2).any():
        doubts.append("One image has no standard error, and its ranks have no band: measure more.")
    if (table["divergence"] == 0).all():
        doubts.append("Every change is 0: are residual branches zero-initialised (timm: zero_init_last)?")
    elif (table["delta_loss"].abs() < 2 * table["delta_loss_se"]).all():
        doubts.append(
            "No change of the loss is larger than twice its standard error: use the divergence, or more images."
        )
    shown = {tuple(key) for key in table[list(ROW_KEY)].itertuples(index=False)}
    values = [
        row["image_divergence"] for row in rows if row_key(row) in shown and row.get("image_divergence") is not None
    ]
    if len(values) > 2 and (table["divergence"] != 0).any():
        costs = np.array(values, dtype=np.float64)
        left_out = (table["protocol"] == "leave_one_out").all()  # there the least are the first
        needed, have = images_to_separate(-costs if left_out else costs), len(values[0])
        if needed > have:
            first = f"The first {min(10, len(values))} cannot all be separated with {have} images"
            enough = f"about {needed:,.0f} would do" if needed < 1e6 else "more hardly help: some are as good as equal"
            doubts.append(f"{first}; {enough}.")
    return doubts
