"""Plans, uniform bits, trained models and the float network on the same data, sample by sample."""

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from analysis.allocation import plan_model
from analysis.cost import cost_table
from analysis.measure import kept, network, placed, read, suitable_task
from analysis.memory import reuse_freed_memory
from analysis.planning import accounting
from analysis.planning.uniform import parse_uniform
from analysis.scoring import Scores, checked_output, divergences, jackknife, jackknife_error, scores, warn_of_labels
from analysis.task import Task, mean_and_error
from analysis.training.calibration import calibrated, running_quantized
from quant.batches import OnDevice, first_batch, inputs_and_targets, mapped, take, tensors
from quant.bit_plan import BitPlan, PlanTotals
from quant.choices import Estimator, Layout
from quant.errors import InputError
from quant.network import Network, unchanged

FIGURES = ("loss", "score", "divergence", "metric")
COLUMNS = (
    "plan", "weight_bits", "activation_bits", "size_bytes", "activation_bytes", "bitops", "samples",
    *(name for figure in FIGURES for name in (figure, f"{figure}_se")),
    *(name for figure in FIGURES for name in (f"{figure}_difference", f"{figure}_difference_se")), "task", "note",
)  # fmt: skip
"""A difference is to the first quantized entry, paired over samples."""

Entry = BitPlan | str | nn.Module | None


def evaluate(
    model: Network | nn.Module,
    data: Iterable[Any],
    plans: Mapping[str, Entry],
    *,
    calibration: Iterable[Any] | None = None,
    task: Task | None = None,
    layout: Layout = "paper",
    estimator: Estimator = "mse",
    batchnorm: str = "re_estimate",
    progress: bool = False,
    device: torch.device | str | None = None,
) -> pd.DataFrame:
    """One row per entry of `plans`: cost, loss, score, divergence from the float network and metric, on `data`.

    An entry is None (the float network), a `BitPlan`, uniform bits such as "w4a8" in `layout`, or a model of its own
    (one that was trained with a plan). Plans are calibrated without training: scales of `estimator`, and with BatchNorm
    the statistics of the quantized network (`batchnorm`: re_estimate or stored), on `calibration`, batches that should
    not be those of `data`; without it the first batches of `data` serve, with a warning. `data` must come in the same
    order each time it is iterated. Columns COLUMNS: means over samples with standard errors, a metric over the whole
    set with its jackknife error; `*_difference` is the entry minus the first quantized one, paired over samples; bits
    are means over planned elements (32 in floating point), costs are those of one sample.

    Raises InputError for a plan of another network, for data in another order, and where no task fits.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    >>> data = [(torch.randn(8, 3, 8, 8), torch.randint(3, (8,)))]
    >>> table = evaluate(net, data, {"float": None, "uniform": "w4a8"}, calibration=data)
    >>> table["divergence"].tolist()[0], table["weight_bits"].tolist()[0]
    (0.0, 32.0)
    """
    reuse_freed_memory()
    if not isinstance(plans, Mapping) or not plans:
        raise InputError("`plans` must name at least one entry: a BitPlan, uniform bits such as 'w4a8', or None.")
    for name, entry in plans.items():
        if isinstance(entry, str):
            parse_uniform(entry)  # wrong ones are told before anything runs
        elif not (entry is None or isinstance(entry, (BitPlan, nn.Module))):
            raise InputError(f"`plans` has a {type(entry).__name__} under {name!r}; expected a BitPlan, uniform bits "
                             "such as \'w4a8\', a model, or None.")  # fmt: skip
    net = network(model, data, task)
    with placed(net, device):
        task = suitable_task(net, [to_first(net, data)], task)
        calibrating = _Calibration(net, data, calibration, task, progress)
        reference = _Pass(net, data, task, progress).run(net.model, "float")
        warn_of_labels(task, Scores(torch.cat(reference.loss), torch.cat(reference.score)), reference.outputs[0])
        task = task.prepared(reference.outputs)
        rows, paired = [], None
        for name, entry in plans.items():
            with _running(net, entry, calibrating, task, layout, estimator, batchnorm) as (running, totals, note):
                figures = reference if entry is None else _Pass(net, data, task, progress).run(running, name, reference)
            row = {"plan": name, **_costs(totals, net), "task": task.name, "note": note, **_figures(figures, task)}
            if entry is not None:
                paired = paired or figures
            rows.append((row, figures))
    table = [{**row, **_differences(figures, paired, task)} for row, figures in rows]
    return pd.DataFrame(table, columns=list(COLUMNS))


def to_first(net: Network, data: Iterable[Any]) -> Any:
    """The first batch on the model's device."""
    return mapped(first_batch(data), lambda x: x.to(net.device))


@dataclass
class _Calibration:
    """The batches that set scales, read when they are first needed."""

    net: Network
    data: Iterable[Any]
    given: Iterable[Any] | None
    task: Task
    progress: bool
    batches: Sequence[Any] = ()

    def get(self) -> Sequence[Any]:
        """All batches, moved when used; without a data set of their own the first 256 samples of `data`."""
        if not self.batches and self.given is not None:
            self.batches = kept(self.net, self.given, self.task, self.progress)
        elif not self.batches:
            warnings.warn("no `calibration` was given: scales come from the first samples of `data` itself, so that "
                          "its figures are slightly optimistic.", UserWarning, stacklevel=5)  # fmt: skip
            count, found = 0, list[Any]()
            for batch in read(self.net, self.data, self.task, "calibration", self.progress, move=False):
                found.append(take(batch, 0, 256 - count) if self.task.samples(batch) > 256 - count else batch)
                count += self.task.samples(batch)
                if count >= 256:
                    break
            self.batches = OnDevice(found, self.net.device)
        return self.batches


class _Pass:
    """One pass over the data: figures of each sample, and what the metric needs."""

    def __init__(self, net: Network, data: Iterable[Any], task: Task, progress: bool) -> None:
        self.net, self.data, self.task, self.progress = net, data, task, progress
        self.loss, self.score, self.divergence = list[Tensor](), list[Tensor](), list[Tensor]()
        self.outputs: list[Any] = []  # of the float network, or where there is a metric
        self.digests: list[str] = []
        self.metric: list[float] = []

    def run(self, model: nn.Module, what: str, reference: "_Pass | None" = None) -> "_Pass":
        """Every batch through `model`; compared with `reference`, the float network."""
        task, kept_batches, seen = self.task, list[Any](), 0
        with torch.no_grad():
            for place, batch in enumerate(read(self.net, self.data, task, what, self.progress)):
                self._same_as_before(batch, place, reference)
                count = task.samples(batch)
                output = checked_output(task.forward(model, batch), count, seen=seen)
                figures = scores(task, [output], [batch])
                self.loss.append(figures.loss)
                self.score.append(figures.score)
                if reference is not None:
                    self.divergence.append(divergences(task, [output], [reference.outputs[place]], [batch]))
                else:
                    self.divergence.append(torch.zeros(count, dtype=torch.float64))
                if reference is None or task.metric is not None:
                    self.outputs.append(output)
                if task.metric is not None:
                    kept_batches.append(mapped(batch, Tensor.cpu))
                seen += count
        if task.metric is not None:
            self.metric = jackknife(task, self.outputs, kept_batches)
        if reference is not None and len(self.digests) != len(reference.digests):
            raise InputError("`data` gave another number of batches than before; it must give the same each time.")
        return self

    def _same_as_before(self, batch: Any, place: int, reference: "_Pass | None") -> None:
        """Raise InputError where the batch is not the one that the float network saw in this place."""
        first = next(tensors(inputs_and_targets(batch)[0]))
        digest = hashlib.sha256(first.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.digests.append(digest.hexdigest())
        if reference is not None and self.digests[place : place + 1] != reference.digests[place : place + 1]:
            raise InputError(
                "`data` comes in another order, or changed, each time it is iterated: figures would not be paired. Use "
                "shuffle=False, and no random augmentation."
            )


@contextmanager
def _running(
    net: Network,
    entry: Entry,
    calibration: _Calibration,
    task: Task,
    layout: Layout,
    estimator: Estimator,
    batchnorm: str,
) -> Iterator[tuple[nn.Module, PlanTotals | None, str]]:
    """The model that runs for an entry, what the entry costs (None where that is not known), and a note."""
    if isinstance(entry, nn.Module):
        with unchanged(entry):
            yield entry, None, "a model of its own: its costs are not known here"
        return
    if entry is None:
        yield net.model, accounting.totals((), cost_table(net.infos, net.trace.unplanned), net.stored), ""
        return
    made = calibrated(
        net, entry, calibration.get(), model=plan_model(net), stored=net.stored, layout=layout,
        estimator=estimator, forward=task.forward,
    )  # fmt: skip
    with running_quantized(net, made, batchnorm, task.forward) if made else nullcontext():
        yield net.model, accounting.totals(made.plan.sites, cost_table(net.infos, net.trace.unplanned), net.stored), ""


def _costs(totals: PlanTotals | None, net: Network) -> dict[str, Any]:
    if totals is None:
        return {}
    costs = {name: value for name, value in asdict(totals).items() if name in COLUMNS}
    for name in ("weight_bits", "activation_bits"):
        costs[name] = float(accounting.FLOAT_BITS) if costs[name] is None else costs[name]
    return costs


def _figures(figures: _Pass, task: Task) -> dict[str, Any]:
    row: dict[str, Any] = {"samples": sum(map(len, figures.loss))}
    for name in ("loss", "score", "divergence"):
        values = torch.cat(getattr(figures, name))
        row[name], row[f"{name}_se"] = mean_and_error(values[~values.isnan()])
    if figures.metric:
        row["metric"], row["metric_se"] = figures.metric[0], jackknife_error(figures.metric)
    return row


def _differences(figures: _Pass, first: _Pass | None, task: Task) -> dict[str, Any]:
    """What an entry has more than the first quantized one, paired over samples."""
    if first is None:
        return {}
    row: dict[str, Any] = {}
    for name in ("loss", "score", "divergence"):
        values = torch.cat(getattr(figures, name)) - torch.cat(getattr(first, name))
        row[f"{name}_difference"], row[f"{name}_difference_se"] = mean_and_error(values[~values.isnan()])
    if figures.metric:
        paired = [a - b for a, b in zip(figures.metric, first.metric, strict=True)]
        row["metric_difference"], row["metric_difference_se"] = paired[0], jackknife_error(paired)
    return row
