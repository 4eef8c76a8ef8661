"""How the tensors of several runs vary: the frames that figures draw, over depth, heads, densities and channels."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import ndtr

from analysis.runs import Run
from analysis.statistics.names import shorten
from analysis.variation import layer_sites, usable
from quant.errors import InputError
from quant.site import ATTENTION_TENSORS

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
    channels: pd.DataFrame | None = None
    histograms: pd.DataFrame | None = None

    @classmethod
    def read(cls, run: Run, name: str, stats: pd.DataFrame) -> "Measured":
        """The tables beside `stats` in the folder of `run`; InputError for one that cannot be read."""

        def table(file: str, columns: Sequence[str]) -> pd.DataFrame | None:
            return run.read_table(file, columns) if (run.path / f"{file}.parquet").exists() else None

        channels, histograms = table("channels", CHANNEL_COLUMNS), table("histograms", HISTOGRAM_COLUMNS)
        return cls(name=name, stats=stats, channels=channels, histograms=histograms)

    def lacking(self) -> list[str]:
        """The files that are missing, by name."""
        tables = {"channels.parquet": self.channels, "histograms.parquet": self.histograms}
        return [name for name, table in tables.items() if table is None]


def depth_frame(runs: Sequence[Measured], *, tensor: str = "weight") -> pd.DataFrame:
    """One row per convolution or linear of every run, for lines over depth.

    Columns: model, module, tensor, kind, relative_depth (0 the first, 1 the last) and `DEPTH_COLUMNS`, each in the unit
    of stats.parquet. Parts of a fused weight are rows of their own, one after the other; their kind is that of the
    part, attn.query, attn.key or attn.value, so that a line over depth is of one sort of tensor.
    """
    frames = []
    for run in runs:
        sites = layer_sites(run.stats, tensor).sort_values("order", kind="stable")
        if sites.empty:  # a run of weights only has no activations
            continue
        depth = np.arange(len(sites)) / max(len(sites) - 1, 1)
        parts = sites["tensor"].str.removeprefix("weight.")
        kinds = sites["kind"].where(~parts.isin(("query", "key", "value")), "attn." + parts)
        kept = sites[["module", "tensor", *DEPTH_COLUMNS]]
        frames.append(kept.assign(model=run.name, kind=kinds, relative_depth=depth))
    columns = ["model", "module", "tensor", "kind", "relative_depth", *DEPTH_COLUMNS]
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


def head_frame(runs: Sequence[Measured]) -> pd.DataFrame:
    """One row per head of every query, key, value and attention tensor; empty where no run observed attention.

    Columns: model, module, tensor, layer (0 the first attention of the network), head, std (of the head's values, in
    the tensor's unit) and head_std_cv (standard deviation of the heads' std over their mean). An attention of one head
    has no rows, and counts as a layer.
    """
    columns = ["model", "module", "tensor", "layer", "head", "std", "head_std_cv"]
    frames = []
    for run in runs:
        if run.channels is None:
            continue
        heads = run.channels[run.channels["axis"] == "head"].rename(columns={"index": "head"})
        sites = run.stats[run.stats["tensor"].isin(ATTENTION_TENSORS)].sort_values("order", kind="stable")
        sites = sites.assign(layer=pd.factorize(sites["module"])[0])
        rows = heads.merge(sites[["module", "tensor", "order", "layer", "head_std_cv"]], on=["module", "tensor"])
        if not rows.empty:
            rows = rows.sort_values(["order", "head"], kind="stable")
            frames.append(rows.assign(model=run.name)[columns])
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

    The layer is that of the largest channel range ratio of its weight or its input, whichever is larger, among those
    whose name, in full or as `names.shorten` makes it, matches one of the shell `patterns`, or among all. Columns:
    model, module, tensor, index (of the channel), rank (1 the widest, for weight and for input; the parts of a fused
    weight are ranked together), mean, std, min, max (in the tensor's unit), median_abs_max (the largest magnitude of
    the median channel). Runs without a layer that matches are left out; raises InputError for a pattern that matches
    none in any run.
    """
    for pattern in patterns:
        known = [_layers(run.stats)["module"].unique().tolist() for run in runs]
        if not any(_matches(name, [pattern]) for names in known for name in names):
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


def _layers(stats: pd.DataFrame) -> pd.DataFrame:
    """The rows of weights and of inputs of convolutions and linears, in network order."""
    sites = pd.concat([layer_sites(stats, "weight"), layer_sites(stats, "input")])
    return sites.sort_values("order", kind="stable", ignore_index=True)


def _matches(module: str, patterns: Sequence[str]) -> bool:
    """Whether one of the shell patterns is met by the full or by the short name of a module."""
    return any(fnmatchcase(name, pattern) for name in (module, shorten(module)) for pattern in patterns)


def _most_uneven(stats: pd.DataFrame, patterns: Sequence[str]) -> str | None:
    """The layer of the largest channel range ratio among those that match; None where there is none."""
    layers = _layers(stats)
    if patterns:
        layers = layers[[_matches(name, patterns) for name in layers["module"]]]
    if layers.empty:
        return None
    ratios = layers["channel_range_ratio"].astype(float).fillna(0.0)  # NaN: a single channel, or most of them all zero
    return str(layers.loc[ratios.idxmax(), "module"])


def _pooled_sites(stats: pd.DataFrame, tensor: str) -> pd.DataFrame:
    """The tensors of `distribution_frame`, `role` being weight, input, query, ..."""
    sites = layer_sites(stats, tensor)
    if tensor == "input":
        sites = pd.concat([sites, stats[stats["tensor"].isin(ATTENTION_TENSORS) & usable(stats)]])
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
