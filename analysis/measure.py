"""Measurements of a live network: statistics, sensitivity, and sensitivity estimated from gradients."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from analysis import tasks
from analysis.estimate import estimated_rows
from analysis.memory import reuse_freed_memory
from analysis.results import Sensitivity, Stats
from analysis.runs import Run
from analysis.sensitivity import SweepConfig, images_table, row_key, sensitivity_table, sweep_keys
from analysis.sweeps.sweep import CACHE_MIB
from analysis.sweeps.sweep_rows import informative_first, measured_rows, unmeasured_row, within
from analysis.task import Task, fitting_task
from analysis.tensor_stats import collect_stats
from quant.batches import OnDevice, checked_data, first_batch, to_device
from quant.choices import ALLOWED_BIT_WIDTHS, Estimator, Granularity, Grouping, Protocol
from quant.errors import InputError, first_line
from quant.network import Network, unchanged
from quant.site import SiteInfo
from quant.sites import KINDS, TENSOR_GROUPS, check_plain_weights, select_sites

if TYPE_CHECKING:
    import pandas as pd

BITS = (2, 3, 4, 8)
SITES = ("weight", "input", "attention")


def measure_stats(
    model: nn.Module | Network,
    data: Iterable[Any] | None = None,
    *,
    task: Task | None = None,
    run: Run | str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
    device: torch.device | str | None = None,
) -> Stats:
    """Moments, quantiles, outliers and channel ranges of every weight, input, output and attention tensor.

    `data` is an iterable of batches, read once; with a `Network` it may be left out for the weights alone. Activations
    are streamed, so memory does not grow with the data; the model is left bit for bit as it was. Figures are in the
    unit of the tensors; `excess_kurtosis` is 0 for a Gaussian, outlier fractions count values beyond 3 and 6 standard
    deviations (`RunningStats` states the errors). `task` matters only for how the model is called.

    `run` is a folder that gets stats, channels and histograms (Parquet), variation.json and a figure. A call that was
    interrupted resumes there, one that was finished is read back; other weights or data are an error, or with
    `overwrite` start from scratch.

    Raises InputError for data that can be read only once, and for NaN or Inf, with the first site and sample.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    >>> stats = measure_stats(net, [torch.randn(8, 3, 8, 8)])
    >>> stats.table.query("tensor == 'input'")["module"].tolist()
    ['0', '3']
    """
    reuse_freed_memory()
    if data is None and not isinstance(model, Network):
        raise InputError("`data` is needed to trace a plain module. Give batches, or a Network for its weights alone.")
    net = network(model, data, task)
    sites = [info for info in net.infos if not info.excluded]
    with placed(net, device):
        if run is not None:
            from analysis.session.live import live_session
            from analysis.session.processes import Processes
            from analysis.steps.stats_step import measure_stats_in, read_stats

            calling = task or replace(tasks.classification(), forward=net.forward, samples=net.samples)
            session = live_session(net, calling, run, data, overwrite=overwrite, progress=progress)
            measure_stats_in(session, Processes())
            return read_stats(session.run, net.name)
        batches = None if data is None else read(net, data, task, "statistics", progress)
        tables = collect_stats(net, sites, batches, None if task is None else task.forward)
    return Stats(name=net.name, table=tables.stats, channels=tables.channels, histograms=tables.histograms)


def measure_sensitivity(
    model: nn.Module | Network,
    data: Iterable[Any],
    *,
    bits: Sequence[int] = BITS,
    sites: Sequence[str] = SITES,
    task: Task | None = None,
    protocol: Protocol = "single",
    groups: Grouping | None = None,
    granularity: Granularity | None = None,
    estimator: Estimator = "mse",
    batchnorm: str = "re_estimate",
    cache_mib: int = CACHE_MIB,
    time_limit: float | None = None,
    run: Run | str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
    device: torch.device | str | None = None,
) -> Sensitivity:
    """What the output loses when one site is quantized at a time and all else stays in floating point.

    `sites` selects by tensor (weight, input, attention, or query, key, value, softmax), by kind, or by shell patterns
    over module names; selectors of one sort add up, those of different sorts restrict each other. `bits` are of 1 to 8
    and 16. `protocol="leave_one_out"` quantizes everything but the site; `groups` (kind, block, stage, module) takes
    sites together. With BatchNorm each row is measured with the statistics of the quantized network (`batchnorm`:
    re_estimate; stored keeps the model's own, both measures both). Scales are those of `estimator` (mse, minmax,
    percentile) on the same batches. All batches stay in memory where they are, and about `cache_mib` MiB of activations
    on the model's device, so that each row starts at the quantized layer. `time_limit` (seconds) stops at the end of a
    row, the fewest bits first: what is missing is NaN with a note.

    `run` is a folder that gets sensitivity, sensitivity_images and cost (Parquet) with figures. Each row is kept there
    when it is measured, and never measured twice; other weights, data or tasks are an error, or with `overwrite` start
    from scratch.

    The divergence is the task's (in classification the KL of the softmax, in nats); `_se` columns are standard errors
    over samples, paired with the float network. The model is left bit for bit as it was, also after an interrupt.

    Raises InputError for unknown bits or sites, where no task is given and none fits, and for outputs with NaN or Inf.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    >>> data = [(torch.randn(8, 3, 8, 8), torch.randint(3, (8,)))]
    >>> sens = measure_sensitivity(net, data, bits=(2, 4), sites=("weight",))
    >>> len(sens.table), bool((sens.table["divergence"] > 0).all())
    (4, True)
    """
    reuse_freed_memory()
    config = SweepConfig(
        bit_widths=checked_bits(bits), estimator=estimator, granularity=granularity, batchnorm=batchnorm,
        protocol=protocol, groups=groups,
    )  # fmt: skip
    net = network(model, data, task)
    chosen = chosen_sites(net, sites)
    with placed(net, device):
        batches = kept(net, data, task, progress)
        task = suitable_task(net, batches, task)
        keys: Sequence[Mapping[str, Any]] = sweep_keys(net.model, chosen, config, blocks=net.blocks)
        if not keys:
            raise InputError("every group holds all the sites: nothing would be quantized. Choose other `groups`.")
        if time_limit is not None:
            keys = informative_first(keys)
        if run is None:
            with tqdm(total=len(keys), desc="sensitivity", unit="row", disable=not progress) as bar:
                rows = []
                for row in within(
                    measured_rows(net, chosen, batches, keys, task=task, cache_mib=cache_mib), time_limit
                ):
                    rows.append(row)
                    bar.update()
        else:
            from analysis.session.live import live_session
            from analysis.session.processes import Processes
            from analysis.steps.sensitivity_step import kept_rows, measure_sensitivity_in

            session = live_session(net, task, run, batches, overwrite=overwrite, progress=progress, whole=True)
            there = kept_rows(session, keys)
            rows = there if there is not None else measure_sensitivity_in(
                session, chosen, config, Processes(), batches=batches, cache_mib=cache_mib, time_limit=time_limit,
            )[0]  # fmt: skip
    done = {row_key(row) for row in rows}
    reason = f"not measured: the time limit of {time_limit} s was reached"
    rows += [unmeasured_row(net, chosen, key, task, reason) for key in keys if row_key(key) not in done]
    return Sensitivity(name=net.name, table=sensitivity_table(rows), per_sample=images_table(rows), network=net)


def estimate_sensitivity(
    model: nn.Module | Network,
    data: Iterable[Any],
    *,
    bits: Sequence[int] = BITS,
    sites: Sequence[str] = SITES,
    task: Task | None = None,
    granularity: Granularity | None = None,
    estimator: Estimator = "mse",
    run: Run | str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
    device: torch.device | str | None = None,
) -> Sensitivity:
    """Sensitivities predicted from gradients: the columns of `measure_sensitivity`, for the cost of one backward pass.

    The divergence is 1/2 (gradient . error)^2 of the task's probe, mean over samples, which is the divergence to second
    order (Martens, JMLR 2020, arXiv:1412.1193; FIT: Zandonati et al. 2022, arXiv:2210.08502). BatchNorm keeps its
    stored statistics, so that the ranking is less sure where it would be re-estimated. Sites without a gradient of each
    sample, and columns that only a measurement has, are NaN; `source` names the estimator. `products` of the result
    let `plan_bits(interactions=True)` count how the errors of two sites act together. Arguments are those of
    `measure_sensitivity`; a `run` folder takes either measured or estimated sensitivities.

    Raises InputError for a task without `probe`, and for a network that cannot be differentiated.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    >>> data = [(torch.randn(8, 3, 8, 8), torch.randint(3, (8,)))]
    >>> estimate_sensitivity(net, data, bits=(4,)).table["source"].unique().tolist()
    ['fisher']
    """
    reuse_freed_memory()
    widths = checked_bits(bits)
    net = network(model, data, task)
    chosen = chosen_sites(net, sites)
    with placed(net, device):
        batches = kept(net, data, task, progress)
        task = suitable_task(net, batches, task)

        def estimate() -> "tuple[list[dict[str, Any]], pd.DataFrame]":
            try:
                return estimated_rows(
                    net, chosen, batches, widths, task=task, estimator=estimator, granularity=granularity
                )
            except (MemoryError, RuntimeError) as error:  # the model is the user's: not every one can be differentiated
                raise InputError(
                    f"no sensitivity can be estimated: {first_line(error)}. Measure it instead: measure_sensitivity."
                ) from error

        if run is None:
            rows, products = estimate()
        else:
            from analysis.session.live import live_session
            from analysis.steps.estimate_step import estimate_sensitivity_in

            session = live_session(net, task, run, batches, overwrite=overwrite, progress=progress, whole=True)
            config = SweepConfig(bit_widths=widths, estimator=estimator, granularity=granularity, batchnorm="stored")
            keys = sweep_keys(net.model, chosen, config)
            rows, products = estimate_sensitivity_in(session, keys, estimate)
    return Sensitivity(
        name=net.name, table=sensitivity_table(rows), per_sample=images_table(rows), products=products, network=net
    )


def network(model: nn.Module | Network, data: Iterable[Any] | None, task: Task | None) -> Network:
    """The network itself, or that of a plain module, traced on the first batch by the task's forward pass."""
    if isinstance(model, Network):
        return model
    forward, samples = (None, None) if task is None else (task.forward, task.samples)
    return Network(model, first_batch(data), forward=forward, samples=samples)


@contextmanager
def placed(net: Network, device: torch.device | str | None) -> Iterator[None]:
    """The model on `device` (None: where it is), in evaluation mode; afterwards where and as it was."""
    home = net.device
    try:
        if device is not None:
            try:
                if torch.device(device) != home:
                    net.model.to(device)
            except Exception as error:  # torch raises by device: RuntimeError, AssertionError, NotImplementedError
                raise InputError(f"device {str(device)!r} cannot be used: {first_line(error)}.") from error
        with unchanged(net.model):
            yield
    finally:
        if net.device != home:
            net.model.to(home)


def read(
    net: Network, data: Iterable[Any], task: Task | None, what: str, progress: bool, *, move: bool = True
) -> Iterator[Any]:
    """The batches of `data` one by one, with a progress bar that counts samples; `move`d to the model's device."""
    samples = net.samples if task is None else task.samples
    found = False
    with tqdm(desc=what, unit="sample", disable=not progress) as bar:
        for batch in checked_data(data):
            found = True
            yield to_device(batch, net.device) if move else batch
            bar.update(samples(batch))
    if not found:
        raise InputError("`data` holds no batch. Give at least one.")


def kept(net: Network, data: Iterable[Any], task: Task | None, progress: bool) -> Sequence[Any]:
    """All batches, kept where they are for the whole measurement; each is moved to the model's device when used."""
    return OnDevice(list(read(net, data, task, "data", progress, move=False)), net.device)


def suitable_task(net: Network, batches: Sequence[Any], task: Task | None) -> Task:
    """The task given, or the default where it fits the first batch and its output."""
    forward = net.forward if task is None else task.forward
    with torch.no_grad():
        output = forward(net.model, batches[0])
    return fitting_task(task, net.model, output, batches[0], forward=forward)


def checked_bits(bits: Sequence[int] | int) -> tuple[int, ...]:
    """The bit-widths, rising, each once; InputError for one that is not allowed."""
    widths = (bits,) if isinstance(bits, int) else tuple(bits)
    wrong = [width for width in widths if width not in ALLOWED_BIT_WIDTHS or isinstance(width, bool)]
    if wrong or not widths:
        allowed = ", ".join(map(str, ALLOWED_BIT_WIDTHS))
        raise InputError(f"`bits` has {repr(wrong[0]) if wrong else 'no value'}; choose from {allowed}.")
    return tuple(sorted(set(widths)))


def chosen_sites(net: Network, selectors: Sequence[str] | str) -> list[SiteInfo]:
    """The sites that can be quantized and that `selectors` choose: tensors, kinds, and patterns over module names."""
    names = (selectors,) if isinstance(selectors, str) else tuple(selectors)
    tensors = [name for name in names if name in TENSOR_GROUPS]
    kinds = [name for name in names if name in KINDS and name not in tensors]
    patterns = [name for name in names if name not in tensors and name not in kinds]
    modules = [name for name, _ in net.model.named_modules()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise InputError(
                f"`sites` has {pattern!r}, which is no tensor ({', '.join(TENSOR_GROUPS)}), no kind, and matches no "
                f"module; modules are named such as {', '.join(name for name in modules[1:4])}."
            )
    found = [
        info
        for info in select_sites(net.infos, tensors or SITES)
        if (not kinds or info.kind in kinds)
        and (not patterns or any(fnmatchcase(info.site.module, pattern) for pattern in patterns))
    ]
    if not found:
        check_plain_weights(net.model, net.infos)
        raise InputError(f"no site of {net.name} is chosen by `sites`={list(names)}; net.sites lists all.")
    return found
