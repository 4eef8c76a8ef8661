"""Statistics of weights and activations: one row a site, streamed over any number of images."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from analysis.running_stats import NonFiniteError, RunningStats, stats_of
from quant.errors import InputError
from quant.functional import to_groups
from quant.intercept import intercept
from quant.prepare import weight_of
from quant.site import Site, SiteInfo
from quant.trace import Trace

STATS_COLUMNS = (
    "model", "module", "kind", "order", "tensor", "shape", "numel", "count", "mean", "std", "abs_mean", "min", "max",
    "skewness", "excess_kurtosis", "abs_max_over_std", "outlier_fraction_3", "outlier_fraction", "q0001", "q001", "q01",
    "q50", "q99", "q999", "q9999", "channel_range_ratio", "channel_std_cv", "head_std_cv", "note",
)  # fmt: skip


class StatsTables(NamedTuple):
    """The frames of stats.parquet, channels.parquet and histograms.parquet, rows in network order."""

    stats: pd.DataFrame
    channels: pd.DataFrame
    histograms: pd.DataFrame


def collect_stats(
    model: nn.Module,
    trace: Trace,
    sites: Sequence[SiteInfo],
    batches: Iterable[Tensor] | None,
    *,
    name: str,
) -> StatsTables:
    """Moments, extremes, outliers and quantiles of every weight, and of every activation over `batches` of images.

    Weights are measured exactly in float64, activations by `RunningStats` (its docstring states the error of each
    figure). Without batches the activations are left out. Query, key, value and attention are grouped by head, all else
    by channel. Raises InputError at the first activation with NaN or Inf.
    """
    measured: dict[Site, RunningStats] = {}
    for info in sites:
        if info.site.is_weight and info.numel:
            weight = weight_of(model, info)
            try:
                measured[info.site] = stats_of(weight, *_axis_and_groups(info))
            except NonFiniteError as error:
                raise InputError(
                    f"the weight of {info.site.module} holds NaN or Inf; look for another file."
                ) from error
    if batches is not None:
        running = {info.site: RunningStats(_axis_and_groups(info)[1]) for info in sites if not info.site.is_weight}
        handlers = {info.site: _updater(running[info.site], info) for info in sites if info.site in running}
        with torch.inference_mode(), intercept(model, trace, handlers):
            for images in batches:
                model(images)
        measured.update({site: stats for site, stats in running.items() if stats.count})
    return _tables(sites, measured, name, with_activations=batches is not None, trace=trace)


def _axis_and_groups(info: SiteInfo) -> tuple[int, int]:
    """Heads for the sites inside attention, else channels."""
    if info.site.is_attention:
        return (info.head_axis, info.heads) if info.heads else (0, 1)
    return (info.channel_axis, info.channels) if info.channels else (0, 1)


def _updater(stats: RunningStats, info: SiteInfo) -> Callable[[Tensor], None]:
    axis, groups = _axis_and_groups(info)

    def update(x: Tensor) -> None:
        try:
            stats.update(to_groups(x, axis, groups))
        except NonFiniteError as error:
            raise InputError(
                f"{info.site} holds NaN or Inf on these images ({error}); "
                "no earlier site does: look at this module's weights and at the images."
            ) from error

    return update


def _tables(
    sites: Sequence[SiteInfo], measured: dict[Site, RunningStats], name: str, *, with_activations: bool, trace: Trace
) -> StatsTables:
    rows: list[dict[str, Any]] = []
    channels: list[dict[str, Any]] = []
    histograms: list[dict[str, Any]] = []
    for info in sites:
        stats = measured.get(info.site)
        identity: dict[str, Any] = {"module": info.site.module, "tensor": info.site.tensor}
        notes = [info.note]
        if stats is None and not with_activations and not info.site.is_weight:
            continue
        row = {**identity, "model": name, "kind": info.kind, "order": info.order, "shape": list(info.shape),
               "numel": info.numel}  # fmt: skip
        if stats is None:
            rows.append({**row, "count": 0, "note": _join(notes, "not executed on these images")})
            continue
        row.update(stats.row())
        notes.append(str(row.pop("note", "") or ""))
        by_head = info.site.is_attention and info.heads > 0
        grouped = stats.groups > 1
        row["channel_range_ratio"] = stats.range_ratio() if grouped and not by_head else float("nan")
        row["channel_std_cv"] = stats.std_cv() if grouped and not by_head else float("nan")
        row["head_std_cv"] = _head_std_cv(info, stats)
        calls = trace.calls.get(info.site.module, 1)
        if calls > 1 and not info.site.is_weight and not info.note:
            notes.append(f"called {calls} times in one forward pass: over all calls")
        rows.append({**row, "note": _join(notes)})
        if grouped:
            axis = "head" if by_head else "channel"
            channels.extend({**identity, "axis": axis, **group} for group in stats.group_rows())
        histograms.extend(
            {**identity, "left": left, "right": right, "count": count} for left, right, count in stats.histogram_rows()
        )
    return StatsTables(
        pd.DataFrame(rows, columns=list(STATS_COLUMNS)),
        pd.DataFrame(
            channels,
            columns=["module", "tensor", "axis", "index", "mean", "std", "min", "max", "abs_mean", "excess_kurtosis"],
        ),
        pd.DataFrame(histograms, columns=["module", "tensor", "left", "right", "count"]),
    )


def _head_std_cv(info: SiteInfo, stats: RunningStats) -> float:
    """Spread of the heads' standard deviations over their mean; NaN where a tensor has no heads."""
    if info.site.is_attention and info.heads > 1:
        return stats.std_cv()
    return float("nan")


def _join(notes: Sequence[str], *more: str) -> str:
    return "; ".join(note for note in (*notes, *more) if note)
