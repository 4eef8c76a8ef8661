"""A task: what the output of a network is worth, sample by sample."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Generator, Tensor, nn

from quant import batches
from quant.choices import TASKS
from quant.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Task:
    """Everything that depends on what the output of a network means.

    `forward(model, batch)` returns the output. `divergence(output, reference)` says how far an output is from that of
    the float network: (samples,), at least 0, and 0 for equal outputs; it needs no labels. `loss(output, batch)` and
    `score(output, batch)` are (samples,), a score being better the larger it is; NaN for samples without a label.
    `metric(outputs, batches)` is one number over the whole set, such as mIoU. `probe(output, generator)` is a scalar
    whose gradient at the output has the divergence's curvature as its second moment; `estimate_sensitivity` needs it.
    `samples(batch)` counts samples where that is not the leading dimension of the first tensor. `prepare(references)`
    returns the task to use once the outputs of the float network are known, where a divergence is relative to them.
    `check(output, batch)` raises InputError for an output that the task is not meant for.

    >>> import torch
    >>> task = Task(
    ...     forward=lambda model, batch: model(batch[0]),
    ...     divergence=lambda output, reference: (output - reference).abs().mean(1),
    ... )
    >>> task.divergence(torch.ones(2, 3), torch.zeros(2, 3))
    tensor([1., 1.])
    """

    name: str = "own"
    forward: Callable[[nn.Module, Any], Any] = batches.forward
    divergence: Callable[[Any, Any], Tensor]
    loss: Callable[[Any, Any], Tensor] | None = None
    score: Callable[[Any, Any], Tensor] | None = None
    metric: Callable[[list, list], float] | None = None
    probe: Callable[[Any, Generator], Tensor] | None = None
    samples: Callable[[Any], int] = batches.samples
    prepare: Callable[[Sequence[Any]], "Task"] | None = None
    check: Callable[[Any, Any], None] | None = None

    def prepared(self, references: Sequence[Any]) -> "Task":
        """The task with what it takes from the outputs of the float network."""
        return self if self.prepare is None else replace(self.prepare(references), prepare=None)


def fitting_task(
    task: Task | None, model: nn.Module, output: Any, batch: Any, *, forward: Callable[[nn.Module, Any], Any]
) -> Task:
    """`task`, or image classification where none is given and output and batch fit it.

    It fits where the output has two or more columns and the batch brings a class index a sample, or where the model
    itself says that it has so many classes. `forward` is how the output came about. InputError names the tasks to
    choose from.
    """
    from analysis import tasks

    if task is not None:
        if not isinstance(task, Task):
            raise InputError(
                f"`task` is a {type(task).__name__}; expected a Task, such as analysis.tasks.regression()."
            )
        if task.check is not None:
            task.check(output, batch)
        return task
    why_not = tasks.why_not_classification(model, output, batch)
    if why_not:
        raise InputError(
            f"no task was given, and image classification does not fit: {why_not}. Choose one of analysis.tasks: "
            f"{', '.join(f'{name}()' for name in TASKS)}, or write a Task, and pass it as `task=`."
        )
    chosen = tasks.classification()
    assert chosen.check is not None
    chosen.check(output, batch)
    return replace(chosen, forward=forward)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error over samples (sample standard deviation over sqrt(n)); NaN error for one sample."""
    if not len(values):
        return math.nan, math.nan
    error = values.std(correction=1).item() / len(values) ** 0.5 if len(values) > 1 else math.nan
    return values.mean().item(), error
