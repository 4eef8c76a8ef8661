"""Several models side by side: a table of how much their modules vary, with a sentence of reading a row."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from analysis.statistics.variation_frames import Measured
from quant.errors import InputError

COLUMNS = ("tensor", "measure", "reading")  # of the table, besides one a run
# measure -> what its value is, `{tensor}` being weights or input activations
MEASURES = {
    "modules": "Convolutions and linears whose {tensor} were measured",
    "sdam": "Standard deviation over the modules of the mean magnitude of {tensor}",
    "cv": "The same relative to the mean over the modules, of {tensor}",
    "cv_low": "Lower end of the 95 % bootstrap interval of cv, the modules resampled, of {tensor}",
    "cv_high": "Upper end of that interval, of {tensor}",
    "log_abs_mean_std": "Standard deviation over the modules of the logarithm of the mean magnitude of {tensor}",
    "excess_kurtosis_median": "Heaviness of the tails of {tensor} in the typical module (0 is a Gaussian)",
    "excess_kurtosis_iqr": "Difference between modules in the heaviness of the tails of {tensor}",
    "channel_range_ratio_median": "Magnitude of the widest channel of {tensor} over the median one's, typical module",
    "channel_range_ratio_iqr": "Difference between modules in that ratio of channels of {tensor}",
    "outlier_fraction_max": "Share of {tensor} beyond 6 standard deviations in the worst module",
}


class Compared(NamedTuple):
    """One of the runs of a comparison: its tables, and the figures that `variation` makes of its statistics."""

    measured: Measured
    figures: Mapping[str, Any]


def compare(runs: Sequence[Compared]) -> pd.DataFrame:
    """One row per tensor and measure: `tensor`, `measure`, one column per model, and `reading`, a plain sentence.

    The measures are those of `variation`. Raises InputError for two runs of one name.
    """
    names = [run.measured.name for run in runs]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise InputError(f"two runs are named {doubled[0]!r}; each needs a name of its own to be distinguished.")
    rows = []
    for tensor in ("weight", "input"):
        for measure in MEASURES:
            values = {run.measured.name: run.figures[tensor][measure] for run in runs}
            numbers = {name: float("nan") if value is None else float(value) for name, value in values.items()}
            rows.append(
                {"tensor": tensor, "measure": measure, **numbers, "reading": _reading(tensor, measure, numbers)}
            )
    return pd.DataFrame(rows, columns=[*COLUMNS[:2], *names, COLUMNS[2]])


def _reading(tensor: str, measure: str, numbers: Mapping[str, float]) -> str:
    """Which model has the largest value, and how many times the next one's where a ratio makes sense."""
    what = MEASURES[measure].format(tensor="weights" if tensor == "weight" else "input activations")
    if measure in ("modules", "cv_low", "cv_high"):
        return f"{what}."
    ranked = sorted(((value, name) for name, value in numbers.items() if value == value), reverse=True)
    if not ranked:
        return "Not measured in any of the runs."
    (largest, name), *others = ranked
    if not others:
        return f"Measured in {name} alone."
    second, next_name = others[0]
    if largest == second:
        return f"{what}: the same in {name} and {next_name}."
    ratio = f", {largest / second:.3g} times {next_name}" if second > 0 else f", then {next_name}"
    return f"{what}: largest in {name}{ratio}."
