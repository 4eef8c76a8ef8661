"""How much a network's modules vary: one figure per model for weights and for input activations."""

import numpy as np
import pandas as pd

from analysis.statistics.bootstrap import cv_interval

SPREADS = ("excess_kurtosis", "channel_range_ratio")
OUTSIDE_LAYERS = ("norm", "block", "attn.softmax")  # kinds that are no convolution or linear
LEFT_OUT = ("constant", "degenerate", "not observed", "not executed", "never executed")  # notes that start so: unusable


def variation(stats: pd.DataFrame) -> dict:
    """The contents of variation.json: how the modules of one network differ, for `weight` and for `input`.

    `stats` is the frame of stats.parquet of one model. Over the convolutions and linears whose note is not one of
    `LEFT_OUT`; the parts of a fused qkv weight are joined to one module by the mean over all their elements. For each
    of the two tensors, in the unit of the tensor where there is one:

    - modules: how many; sdam: the population standard deviation over the modules of AM_m = ||x_m||_1 / |x_m| (Huang
      et al., TMLR 2024, arXiv:2307.00331); abs_mean: the mean of AM_m; cv: sdam / abs_mean, free of scale, with
      cv_low and cv_high, its 95 % bootstrap interval over the modules;
    - log_abs_mean_mean, log_abs_mean_std: of the natural logarithm of AM_m;
    - excess_kurtosis_median, _iqr, channel_range_ratio_median, _iqr: over the sites (query, key, value apart);
    - outlier_fraction_max and outlier_fraction_max_site, `module:tensor`: the largest fraction beyond 6 std.

    None stands for what could not be measured: JSON has no NaN.
    """
    models = stats["model"].unique().tolist()
    if len(models) > 1:
        raise ValueError(f"Expected the statistics of one model, got those of {', '.join(map(str, models))}.")
    return {
        "model": models[0] if models else None,
        "over": "modules",
        "population": True,
        "weight": _figures(layer_sites(stats, "weight")),
        "input": _figures(layer_sites(stats, "input")),
    }


def layer_sites(stats: pd.DataFrame, tensor: str) -> pd.DataFrame:
    """Rows of convolutions and linears with usable figures, for `weight` (parts of a fused one too) or `input`."""
    role = stats["tensor"].str.startswith("weight") if tensor == "weight" else stats["tensor"] == tensor
    layers = ~stats["kind"].isin(OUTSIDE_LAYERS)
    return stats[role & layers & usable(stats) & stats["abs_mean"].notna()]


def usable(stats: pd.DataFrame) -> pd.Series:
    """True for each row that no part of its note leaves out; a note's parts are joined by "; " and may name modules."""
    notes = stats["note"].fillna("")
    known = [not any(part.startswith(LEFT_OUT) for part in note.split("; ")) for note in notes]
    return pd.Series(known, index=stats.index, dtype=bool)


def module_abs_means(sites: pd.DataFrame) -> pd.Series:
    """AM_m of each module, in network order: the mean magnitude over the elements of all its rows in `sites`."""
    total = (sites["abs_mean"] * sites["numel"]).groupby(sites["module"], sort=False).sum()
    return total / sites["numel"].groupby(sites["module"], sort=False).sum()


def _figures(sites: pd.DataFrame) -> dict[str, float | int | str | None]:
    abs_means = module_abs_means(sites).to_numpy(dtype=np.float64)
    figures: dict[str, float | int | str | None] = {"modules": len(abs_means)}
    logs = np.log(abs_means[abs_means > 0])
    figures["sdam"] = _number(abs_means.std()) if len(abs_means) else None
    figures["abs_mean"] = _number(abs_means.mean()) if len(abs_means) else None
    low, high = cv_interval(abs_means)
    figures["cv_low"], figures["cv_high"] = _number(low), _number(high)
    figures["cv"] = _number(abs_means.std() / abs_means.mean()) if len(logs) else None
    figures["log_abs_mean_mean"] = _number(logs.mean()) if len(logs) else None
    figures["log_abs_mean_std"] = _number(logs.std()) if len(logs) else None
    for column in SPREADS:
        low, median, high = sites[column].astype(float).quantile([0.25, 0.5, 0.75])
        figures[f"{column}_median"], figures[f"{column}_iqr"] = _number(median), _number(high - low)
    fractions = sites["outlier_fraction"].dropna()
    worst = sites.loc[fractions.idxmax()] if len(fractions) else None
    figures["outlier_fraction_max"] = None if worst is None else _number(worst["outlier_fraction"])
    figures["outlier_fraction_max_site"] = None if worst is None else f"{worst['module']}:{worst['tensor']}"
    return figures


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
