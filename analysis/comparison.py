"""Several models side by side: a table with a sentence of reading, and the frames that the figures draw."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from analysis.variation import layer_sites
from quant.errors import InputError

Run = tuple[str, pd.DataFrame, Mapping]  # name, frame of stats.parquet, contents of variation.json

# measure -> what its value is, `{tensor}` being weights or input activations
MEASURES = {
    "modules": "Convolutions and linears whose {tensor} were measured",
    "sdam": "Distance between modules of the mean magnitude of {tensor}, in the tensor's unit,",
    "cv": "Variation between modules of the mean magnitude of {tensor}, relative to its mean,",
    "log_abs_mean_std": "Variation between modules of the mean magnitude of {tensor}, as a ratio (natural logarithm),",
    "excess_kurtosis_median": "Heaviness of the tails of {tensor} in the typical module (0 is a Gaussian)",
    "excess_kurtosis_iqr": "Difference between modules in the heaviness of the tails of {tensor}",
    "channel_range_ratio_median": "Range of the widest channel of {tensor} over the median channel's, typical module,",
    "channel_range_ratio_iqr": "Difference between modules in the ratio of channel ranges of {tensor}",
    "outlier_fraction_max": "Share of {tensor} beyond 6 standard deviations in the worst module",
}
DEPTH_COLUMNS = (
    "abs_mean", "std", "excess_kurtosis", "outlier_fraction", "abs_max_over_std", "channel_range_ratio",
    "channel_std_cv", "head_std_cv",
)  # fmt: skip


def compare(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per tensor and measure: `tensor`, `measure`, one column per model, and `reading`, a plain sentence.

    The measures are those of `variation`. Raises InputError for two runs of one name.
    """
    names = [name for name, _, _ in runs]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise InputError(f"two runs are named {doubled[0]!r}; each needs a name of its own to be told apart.")
    rows = []
    for tensor in ("weight", "input"):
        for measure in MEASURES:
            values = {name: figures[tensor][measure] for name, _, figures in runs}
            numbers = {name: float("nan") if value is None else float(value) for name, value in values.items()}
            rows.append(
                {"tensor": tensor, "measure": measure, **numbers, "reading": _reading(tensor, measure, numbers)}
            )
    return pd.DataFrame(rows, columns=["tensor", "measure", *names, "reading"])


def depth_frame(runs: Sequence[Run], *, tensor: str = "weight") -> pd.DataFrame:
    """One row per convolution or linear of every run, for lines over depth.

    Columns: model, module, tensor, relative_depth (0 the first, 1 the last) and `DEPTH_COLUMNS`, each in the unit of
    stats.parquet. Parts of a fused weight are rows of their own, one after the other.
    """
    frames = []
    for name, stats, _ in runs:
        sites = layer_sites(stats, tensor).sort_values("order", kind="stable")
        if sites.empty:  # a run of weights only has no activations
            continue
        depth = np.arange(len(sites)) / max(len(sites) - 1, 1)
        frames.append(sites[["module", "tensor", *DEPTH_COLUMNS]].assign(model=name, relative_depth=depth))
    columns = ["model", "module", "tensor", "relative_depth", *DEPTH_COLUMNS]
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


def bits_frame(plan_sites: pd.DataFrame, stats: pd.DataFrame) -> pd.DataFrame:
    """The sites of a plan in network order: module, tensor, bit_width, kind, order.

    `plan_sites` has module, tensor and bit_width; kind and order come from `stats`.
    """
    known = stats[["module", "tensor", "kind", "order"]]
    joined = plan_sites[["module", "tensor", "bit_width"]].merge(known, on=["module", "tensor"], how="left")
    return joined.sort_values("order", kind="stable", ignore_index=True)


def _reading(tensor: str, measure: str, numbers: Mapping[str, float]) -> str:
    """Which model has the largest value, and how many times the next one's where a ratio makes sense."""
    what = MEASURES[measure].format(tensor="weights" if tensor == "weight" else "input activations")
    if measure == "modules":
        return f"{what}."
    ranked = sorted(((value, name) for name, value in numbers.items() if value == value), reverse=True)
    if not ranked:
        return "Not measured in any of the runs."
    (largest, name), *others = ranked
    if not others:
        return f"Measured in {name} alone."
    second, next_name = others[0]
    if largest == second:
        return f"{what} is the same in {name} and {next_name}."
    ratio = f": {largest / second:.3g} times {next_name}" if second > 0 else f", followed by {next_name}"
    return f"{what} is largest in {name}{ratio}."
