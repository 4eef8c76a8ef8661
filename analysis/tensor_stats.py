"""Statistics of weights and activations: one row a site, streamed over any number of images."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from analysis.running_stats import RunningStats, stats_of
from analysis.statistics.float_histogram import FloatHistogram
from analysis.statistics.moments import NonFiniteError
from analysis.statistics.shared_tensors import SharedTensors
from quant.batches import inputs_and_targets, take, tensors
from quant.errors import InputError
from quant.insertion import weight_of
from quant.intercept import intercept
from quant.network import Forward, Network
from quant.site import Site, SiteInfo

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
    net: Network,
    sites: Sequence[SiteInfo],
    data: Iterable[Any] | None,
    forward: Forward | None = None,
) -> StatsTables:
    """Moments, extremes, outliers and quantiles of every weight, and of every activation over the batches `data`.

    Without data the activations are left out. Raises InputError at the first tensor with NaN or Inf. Weights,
    activations and tables can be had one by one from the three functions that this one calls.
    """
    measured = measure_weights(net.model, sites)
    if data is not None:
        running = start_activations(sites)
        measure_activations(net, sites, numbered(data, net.samples), running, forward)
        measured |= running
    return stats_tables(net, sites, measured, with_activations=data is not None)


def measure_weights(model: nn.Module, sites: Sequence[SiteInfo]) -> dict[Site, RunningStats]:
    """Statistics of every weight, exact in float64. Raises InputError at the first one with NaN or Inf."""
    measured: dict[Site, RunningStats] = {}
    for info in sites:
        if info.site.is_weight and info.numel:
            try:
                measured[info.site] = stats_of(weight_of(model, info), *_axis_and_groups(info))
            except NonFiniteError as error:
                raise InputError(
                    f"the weight of {info.site.module} holds NaN or Inf ({error}). Look for another file of weights."
                ) from error
    return measured


def start_activations(sites: Sequence[SiteInfo]) -> dict[Site, RunningStats]:
    """Statistics of every activation, of which nothing was seen yet.

    Query, key, value and attention are grouped by head, all else by channel.
    """
    return {info.site: RunningStats(_axis_and_groups(info)[1]) for info in sites if not info.site.is_weight}


def measure_activations(
    net: Network,
    sites: Sequence[SiteInfo],
    data: Iterable[tuple[Any, Sequence[str]]],
    running: Mapping[Site, RunningStats],
    forward: Forward | None = None,
) -> None:
    """Add to `running` every activation over pairs of a batch and its samples' names; `RunningStats` states the errors.

    Raises InputError where the network makes NaN or Inf, with the first site that holds them and the sample.
    """
    shared = SharedTensors()
    handlers = {info.site: _updater(running[info.site], info, shared) for info in sites if info.site in running}
    run = partial(forward or net.forward, net.model)
    current: tuple[Any, Sequence[str]] = None, ()
    try:
        with (
            torch.no_grad(),
            intercept(net, handlers),
        ):  # `shared` needs what inference_mode leaves out
            for current in data:
                shared.forget()
                if not _is_finite(run(current[0])):
                    raise _NonFiniteActivation(None, "")
    except _NonFiniteActivation as error:
        raise InputError(_where(net, run, error.site, error.reason, *current)) from error


def centres_of(running: Mapping[Site, RunningStats]) -> dict[Site, float]:
    """The centre of each histogram that has one: that of the first batch."""
    return {site: stats.histogram.centre for site, stats in running.items() if stats.histogram is not None}


def take_centres_(running: Mapping[Site, RunningStats], centres: Mapping[Site, float]) -> None:
    """Let histograms that have seen nothing use the centres of others, with which they then merge exactly."""
    for site, centre in centres.items():
        running[site].histogram = FloatHistogram(centre)


def numbered(data: Iterable[Any], samples: Callable[[Any], int]) -> Iterator[tuple[Any, list[str]]]:
    """The batches with the numbers of their samples, from 0."""
    first = 0
    for batch in data:
        count = samples(batch)
        yield batch, [f"number {i}" for i in range(first, first + count)]
        first += count


def _axis_and_groups(info: SiteInfo) -> tuple[int, int]:
    """Heads for the sites inside attention, else channels."""
    if info.site.is_attention:
        return (info.head_axis, info.heads) if info.heads else (0, 1)
    return (info.channel_axis, info.channels) if info.channels else (0, 1)


class _NonFiniteActivation(Exception):
    """An activation holds NaN or Inf; `site` is None where only the model's output does."""

    def __init__(self, site: Site | None, reason: str) -> None:
        super().__init__(reason)
        self.site, self.reason = site, reason


def _updater(stats: RunningStats, info: SiteInfo, shared: SharedTensors) -> Callable[[Tensor], None]:
    axis, groups = _axis_and_groups(info)

    def update(x: Tensor) -> None:
        if not x.is_floating_point():
            stats.reason = f"holds {str(x.dtype).removeprefix('torch.')}, no real numbers"
            return
        if x.numel() == 0:
            return
        split, parts = axis, groups
        if stats.groups > 1 and not info.site.is_attention and x.shape[axis] != groups:
            if stats.count:
                raise InputError(
                    f"{info.site} has {x.shape[axis]} channels, {groups} before; leave it out with `exclude`."
                )
            stats.groups, stats.reason = 1, "channels pooled: their number grows with that of the images"
        if stats.groups == 1:
            split, parts = 0, 1
        try:
            shared.update(stats, x, split, parts)
        except NonFiniteError as error:
            raise _NonFiniteActivation(info.site, str(error).rstrip(".")) from error

    return update


def _where(
    net: Network, run: Callable[[Any], Any], site: Site | None, reason: str, batch: Any, names: Sequence[str]
) -> str:
    """What is told of NaN or Inf at `site`, or where None in the model's output alone, and the image they come with.

    The samples of the batch run one by one. No site before `site` holds any: handlers are called in order of execution.
    """
    single = [take(batch, i, i + 1) for i in range(len(names))]
    wrong = [i for i, one in enumerate(single) if not _runs_finite(net, run, site, one)]
    spoiled = next((names[i] for i in wrong if not _is_finite(inputs_and_targets(single[i])[0])), None)
    if spoiled is not None:
        return (
            f"the image {spoiled} itself holds NaN or Inf when it comes to the network. "
            "Replace it, or check the preprocessing."
        )
    look = "Look at that image, and at"
    if not wrong:  # sums of a batch may be taken in another order than those of one image, and overflow
        on = f"a batch of images, {names[0]} to {names[-1]}"
        look = "Look at"
    elif len(wrong) == 1:
        on = f"the image {names[wrong[0]]}"
    elif len(wrong) < len(names):
        on = f"the image {names[wrong[0]]} and {len(wrong) - 1} more of its batch of {len(names)}"
        look = "Look at those images, and at"
    else:
        on = f"the image {names[0]} and all others of its batch of {len(names)}"
        look = "Look at the weights of"
    if site is None:
        return f"the network's output holds NaN or Inf on {on}, but no site does. {look} the end of its forward."
    return f"{site} holds NaN or Inf ({reason}) on {on}; no site before it does. {look} {site.module}."


def _runs_finite(net: Network, run: Callable[[Any], Any], site: Site | None, sample: Any) -> bool:
    """Whether a forward pass of one sample leaves the site, or where None the model's output, without NaN and Inf."""
    seen: list[bool] = []
    look = {} if site is None else {site: lambda x: seen.append(_is_finite(x))}
    with torch.inference_mode(), intercept(net, look):
        output = run(sample)
    return all(seen) if site is not None else _is_finite(output)


def _is_finite(output: object) -> bool:
    """Whether no tensor in what a model returned holds NaN or Inf."""
    return all(bool(x.isfinite().all()) for x in tensors(output))


def stats_tables(
    net: Network,
    sites: Sequence[SiteInfo],
    measured: Mapping[Site, RunningStats],
    *,
    with_activations: bool,
) -> StatsTables:
    """The tables of what was measured; with activations, a site that never ran has a row too."""
    rows: list[dict[str, Any]] = []
    channels: list[dict[str, Any]] = []
    histograms: list[dict[str, Any]] = []
    for info in sites:
        stats = measured.get(info.site)
        reason = "" if stats is None else stats.reason
        stats = stats if stats is not None and stats.count else None
        identity: dict[str, Any] = {"module": info.site.module, "tensor": info.site.tensor}
        notes = [info.note]
        if stats is None and not with_activations and not info.site.is_weight:
            continue
        row = {**identity, "model": net.name, "kind": info.kind, "order": info.order, "shape": list(info.shape),
               "numel": info.numel}  # fmt: skip
        if stats is None:
            why = "" if info.site.is_weight else reason or "not executed on these images"  # a weight's note says why
            rows.append({**row, "count": 0, "note": _join(notes, why)})
            continue
        row.update(stats.row())
        notes.append(str(row.pop("note", "") or ""))
        by_head = info.site.is_attention and info.heads > 0
        grouped = stats.groups > 1
        row["channel_range_ratio"] = stats.range_ratio() if grouped and not by_head else float("nan")
        row["channel_std_cv"] = stats.std_cv() if grouped and not by_head else float("nan")
        row["head_std_cv"] = _head_std_cv(info, stats)
        calls = net.trace.calls.get(info.site.module, 1)
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
