"""Several models side by side: a table with a sentence of reading, and the frames that the figures draw."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import ndtr

from analysis import runs as run_folders
from analysis.variation import LEFT_OUT, layer_sites
from quant.errors import InputError
from quant.site import ATTENTION_TENSORS

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
CHANNEL_COLUMNS = ("module", "tensor", "axis", "index", "mean", "std", "min", "max")
HISTOGRAM_COLUMNS = ("module", "tensor", "left", "right", "count")
LINEAR_REACH, LINEAR_STEP, BINS_PER_OCTAVE = 4, 0.25, 4  # of `distribution_frame`: no finer than the stored histograms


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The tables of one run's statistics; None stands for one that its folder does not hold."""

    name: str
    stats: pd.DataFrame
    channels: pd.DataFrame | None
    histograms: pd.DataFrame | None

    @classmethod
    def read(cls, run: run_folders.Run, name: str, stats: pd.DataFrame) -> "Measured":
        """The tables beside `stats` in the folder of `run`; InputError for one that cannot be read."""

        def table(file: str, columns: Sequence[str]) -> pd.DataFrame | None:
            return run.read_table(file, columns) if (run.path / f"{file}.parquet").exists() else None

        channels, histograms = table("channels", CHANNEL_COLUMNS), table("histograms", HISTOGRAM_COLUMNS)
        return cls(name=name, stats=stats, channels=channels, histograms=histograms)

    def lacking(self) -> list[str]:
        """The files that are missing, by name."""
        tables = {"channels.parquet": self.channels, "histograms.parquet": self.histograms}
        return [name for name, table in tables.items() if table is None]


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

    Columns: model, module, tensor, kind, relative_depth (0 the first, 1 the last) and `DEPTH_COLUMNS`, each in the unit
    of stats.parquet. Parts of a fused weight are rows of their own, one after the other; their kind is that of the
    part, attn.query, attn.key or attn.value, so that a line over depth is of one sort of tensor.
    """
    frames = []
    for name, stats, _ in runs:
        sites = layer_sites(stats, tensor).sort_values("order", kind="stable")
        if sites.empty:  # a run of weights only has no activations
            continue
        depth = np.arange(len(sites)) / max(len(sites) - 1, 1)
        parts = sites["tensor"].str.removeprefix("weight.")
        kinds = sites["kind"].where(~parts.isin(("query", "key", "value")), "attn." + parts)
        kept = sites[["module", "tensor", *DEPTH_COLUMNS]]
        frames.append(kept.assign(model=name, kind=kinds, relative_depth=depth))
    columns = ["model", "module", "tensor", "kind", "relative_depth", *DEPTH_COLUMNS]
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


def head_frame(runs: Sequence[Measured]) -> pd.DataFrame:
    """One row per head of every query, key, value and attention tensor; empty where no run observed attention.

    Columns: model, module, tensor, layer (0 the first attention of the network), head, std (of the head's values, in
    the tensor's unit) and head_std_cv (standard deviation of the heads' std over their mean).
    """
    columns = ["model", "module", "tensor", "layer", "head", "std", "head_std_cv"]
    frames = []
    for run in runs:
        if run.channels is None:
            continue
        heads = run.channels[run.channels["axis"] == "head"].rename(columns={"index": "head"})
        sites = run.stats.loc[run.stats["tensor"].isin(ATTENTION_TENSORS), ["module", "tensor", "order", "head_std_cv"]]
        rows = heads.merge(sites, on=["module", "tensor"]).sort_values(["order", "head"], kind="stable")
        if not rows.empty:
            frames.append(rows.assign(model=run.name, layer=pd.factorize(rows["module"])[0])[columns])
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


def distribution_frame(runs: Sequence[Measured], *, tensor: str = "weight") -> pd.DataFrame:
    """Densities of standardised values by kind: one row per bin, kind of layer and run; empty without histograms.

    `tensor` is `weight`, or `input`, to which the operands inside attention are added. Every tensor is standardised by
    its own mean and standard deviation; the tensors of one kind are pooled so that each counts alike, however many
    values it has. Constant tensors, and those whose note tells not to use their figures, are left out. Columns: model,
    kind, tensor, tensors (how many are pooled), left, right (the bin, in standard deviations), density (per standard
    deviation; sums to 1 over the bins times their widths), gaussian (the same of a Gaussian).

    The bins are the same for all: 0.25 wide within 4 standard deviations, 4 an octave beyond. The stored histograms
    are spread over them as if values lay evenly inside a stored bin.
    """
    chosen = [(run, _pooled_sites(run.stats, tensor)) for run in runs if run.histograms is not None]
    reach = max((_reach(sites) for _, sites in chosen if not sites.empty), default=0.0)
    edges = _edges(reach)
    widths = np.diff(edges)
    frames = []
    for run, sites in chosen:
        assert run.histograms is not None
        histograms = dict(list(run.histograms.groupby(["module", "tensor"], sort=False)))
        known = [key in histograms for key in zip(sites["module"], sites["tensor"], strict=True)]
        for (kind, role), group in sites[np.array(known, dtype=bool)].groupby(["kind", "role"], sort=False):
            shares = [_shares(histograms[site.module, site.tensor], site, edges) for site in group.itertuples()]
            densities = {"density": np.mean(shares, axis=0) / widths, "gaussian": np.diff(ndtr(edges)) / widths}
            frame = pd.DataFrame({"left": edges[:-1], "right": edges[1:], **densities})
            frames.append(frame.assign(model=run.name, kind=kind, tensor=role, tensors=len(group)))
    columns = ["model", "kind", "tensor", "tensors", "left", "right", "density", "gaussian"]
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


def channel_frame(runs: Sequence[Measured], patterns: Sequence[str] = ()) -> pd.DataFrame:
    """One row per channel of the weight and of the input of one layer a run, the widest channel first.

    The layer is that of the largest channel range ratio of its input (of its weight in a run of weights only), among
    those whose name matches one of the shell `patterns`, or among all. Columns: model, module, tensor, index (of the
    channel), rank (1 the widest, for weight and for input; the parts of a fused weight are ranked together), mean, std,
    min, max (in the tensor's unit), median_abs_max (the largest magnitude of the median channel). Runs without a layer
    that matches are left out; raises InputError for a pattern that matches none in any run.
    """
    for pattern in patterns:
        known = [_layers(run.stats)["module"].unique().tolist() for run in runs]
        if not any(fnmatchcase(name, pattern) for names in known for name in names):
            examples = ", ".join(name for names in known for name in [*names[:2], *names[-1:]])
            raise InputError(f"--module {pattern!r} matches no layer; they are named such as {examples}.")
    frames = []
    for run in runs:
        module = _most_uneven(run.stats, patterns)
        if run.channels is None or module is None:
            continue
        own = run.channels[(run.channels["module"] == module) & (run.channels["axis"] == "channel")]
        for role in ("weight", "input"):
            rows = own[own["tensor"].str.startswith(role)]
            if rows.empty:
                continue
            reach = np.maximum(-rows["min"], rows["max"])
            rows = rows.assign(
                model=run.name, median_abs_max=reach.median(), rank=reach.rank(ascending=False, method="first")
            )
            frames.append(rows.sort_values("rank").astype({"rank": int}))
    columns = ["model", "module", "tensor", "index", "rank", "mean", "std", "min", "max", "median_abs_max"]
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


def _layers(stats: pd.DataFrame) -> pd.DataFrame:
    """The rows of inputs of convolutions and linears; of their weights in a run of weights only."""
    inputs = layer_sites(stats, "input")
    return layer_sites(stats, "weight") if inputs.empty else inputs


def _most_uneven(stats: pd.DataFrame, patterns: Sequence[str]) -> str | None:
    """The layer of the largest channel range ratio among those that match; None where there is none."""
    layers = _layers(stats)
    if patterns:
        layers = layers[[any(fnmatchcase(name, pattern) for pattern in patterns) for name in layers["module"]]]
    if layers.empty:
        return None
    ratios = layers["channel_range_ratio"].astype(float).fillna(0.0)  # NaN: a single channel, or most of them all zero
    return str(layers.loc[ratios.idxmax(), "module"])


def _pooled_sites(stats: pd.DataFrame, tensor: str) -> pd.DataFrame:
    """The tensors of `distribution_frame`, `role` being weight, input, query, ..."""
    sites = layer_sites(stats, tensor)
    if tensor == "input":
        left_out = stats["note"].fillna("").str.contains("|".join(LEFT_OUT))
        sites = pd.concat([sites, stats[stats["tensor"].isin(ATTENTION_TENSORS) & ~left_out]])
    return sites[sites["std"] > 0].assign(role=lambda f: f["tensor"].str.replace(r"\..*", "", regex=True))


def _reach(sites: pd.DataFrame) -> float:
    """The largest distance of any value from its tensor's mean, in standard deviations."""
    distance = np.maximum(sites["max"] - sites["mean"], sites["mean"] - sites["min"]) / sites["std"]
    return float(distance.max())


def _edges(reach: float) -> np.ndarray:
    """Bin edges that cover [-reach, reach]: even within `LINEAR_REACH`, even in the logarithm beyond."""
    octaves = max(1, int(np.ceil(np.log2(max(reach, 1.0) * (1 + 1e-9) / LINEAR_REACH))))
    outer = LINEAR_REACH * 2.0 ** (np.arange(1, octaves * BINS_PER_OCTAVE + 1) / BINS_PER_OCTAVE)
    inner = np.arange(-LINEAR_REACH, LINEAR_REACH + LINEAR_STEP, LINEAR_STEP)
    return np.concatenate([-outer[::-1], inner, outer])


def _shares(histogram: pd.DataFrame, site: Any, edges: np.ndarray) -> np.ndarray:
    """The share of a tensor's values in each bin of its standardised values; `site` is its row of stats.parquet.

    Interpolates the distribution function between the edges of the stored bins; one without width (ReLU's zeros lie
    on it) is a step.
    """
    ends = histogram[["left", "right"]].to_numpy(np.float64).clip(site.min, site.max)
    above = np.cumsum(histogram["count"].to_numpy(np.float64))
    below = np.concatenate([[0.0], above[:-1]])
    knots = ((ends - site.mean) / site.std).ravel()
    return np.diff(np.interp(edges, knots, np.column_stack([below, above]).ravel() / above[-1]))
