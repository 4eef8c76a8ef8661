"""Outputs of a network over a fixed list of batches, and figures that compare two sets of outputs sample by sample."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from analysis.task import Task, mean_and_error
from analysis.tasks import classes_of
from quant.batches import mapped, tensors
from quant.errors import InputError

_GROUPS = 10  # of the jackknife: each leaves a tenth of the batches out


def outputs_of(run: Callable[[Any], Any], batches: Sequence[Any], task: Task) -> list[Any]:
    """What `run` returns for each batch, floating-point tensors as float32 on the CPU.

    Raises InputError where an output holds NaN or Inf, or has not one row for each sample.
    """
    outputs: list[Any] = []
    seen = 0
    with torch.inference_mode():
        for batch in batches:
            outputs.append(checked_output(run(batch), task.samples(batch), seen=seen))
            seen += task.samples(batch)
    return outputs


def checked_output(output: Any, samples: int, *, seen: int) -> Any:
    """The output on the CPU in float32; InputError where it holds NaN or Inf. `seen` samples came before."""
    for x in tensors(output):
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            where = f"samples {seen} to {seen + samples - 1}"
            if x.ndim and len(x) == samples:
                rows = ~torch.isfinite(x).flatten(1).all(1) if x.ndim > 1 else ~torch.isfinite(x)
                where = f"sample {seen + int(rows.nonzero()[0])}"
            raise InputError(f"the output for {where} holds NaN or Inf. `measure_stats` says where they arise.")
    return mapped(output, lambda x: x.detach().float().cpu() if x.is_floating_point() else x.detach().cpu())


class Scores(NamedTuple):
    """Figures of single samples, (samples,) float64 each; NaN where the task or the labels have none."""

    loss: Tensor
    score: Tensor


def scores(task: Task, outputs: Sequence[Any], batches: Sequence[Any]) -> Scores:
    """Loss and score of each sample."""
    return Scores(*(_each(getattr(task, name), outputs, batches, task) for name in ("loss", "score")))


def _each(
    figure: Callable[[Any, Any], Tensor] | None, outputs: Sequence[Any], batches: Sequence[Any], task: Task
) -> Tensor:
    counts = [task.samples(batch) for batch in batches]
    if figure is None:
        return torch.full((sum(counts),), math.nan, dtype=torch.float64)
    parts = []
    for output, batch, count in zip(outputs, batches, counts, strict=True):
        values = figure(output, mapped(batch, Tensor.cpu)).double().cpu()
        if values.shape != (count,):
            raise InputError(
                f"task {task.name!r}: a loss or score of shape {tuple(values.shape)} for {count} samples; expected "
                f"({count},), one value a sample."
            )
        parts.append(values)
    return torch.cat(parts)


def divergences(task: Task, outputs: Sequence[Any], references: Sequence[Any], batches: Sequence[Any]) -> Tensor:
    """The divergence of each sample from its reference, (samples,) float64; InputError where it is no such thing."""
    parts = []
    for output, reference, batch in zip(outputs, references, batches, strict=True):
        values = task.divergence(output, reference).double().cpu()
        count = task.samples(batch)
        if values.shape != (count,):
            raise InputError(
                f"task {task.name!r}: a divergence of shape {tuple(values.shape)} for {count} samples; expected "
                f"({count},), one value a sample."
            )
        if not bool(((values >= -1e-6) & values.isfinite()).all()):
            worst = values[~((values >= -1e-6) & values.isfinite())][0].item()
            raise InputError(f"task {task.name!r}: a divergence of {worst:g}; expected finite values of at least 0.")
        parts.append(values)
    return torch.cat(parts)


def check_divergence(task: Task, references: Sequence[Any], batches: Sequence[Any]) -> None:
    """Raise InputError where the divergence of the float network's outputs from themselves is not 0."""
    own = divergences(task, references[:1], references[:1], batches[:1])
    if bool((own.abs() > 1e-6).any()):
        raise InputError(
            f"task {task.name!r}: the divergence of an output from itself is {own.abs().max().item():g}; expected 0."
        )


def label_doubts(loss: float, accuracy: float, samples: int, classes: int) -> str:
    """What makes the labels of a float classifier doubtful, from its mean loss and accuracy; empty where nothing does.

    That is a loss above log(classes) + 2, where guessing has log(classes), or an accuracy more than three standard
    errors below that of guessing.
    """
    guess = 1 / classes
    if loss > math.log(classes) + 2:
        found = f"a loss of {loss:.2f}, where guessing among {classes} classes has {math.log(classes):.2f}"
    elif accuracy < guess - 3 * (guess * (1 - guess) / samples) ** 0.5:
        found = f"an accuracy of {accuracy:.1%}, below the {guess:.1%} of guessing"
    else:
        return ""
    return f"the float network has {found}: labels (order of the classes) or preprocessing (mean, std, size) are wrong."


class Compared(NamedTuple):
    """Of single samples, (samples,) float64: divergence, and growth of the loss (NaN without a label)."""

    divergence: Tensor
    delta_loss: Tensor


class Reference(NamedTuple):
    """The outputs of the float network over the batches, and what the task makes of them."""

    outputs: Sequence[Any]
    scores: Scores
    metric: Sequence[float]  # over all batches, then with each group of the jackknife left out


def reference_of(task: Task, outputs: Sequence[Any], batches: Sequence[Any]) -> Reference:
    """The figures of the float network that outputs are compared with; warns where its labels are doubtful."""
    found = scores(task, outputs, batches)
    warn_of_labels(task, found, outputs[0])
    return Reference(outputs, found, jackknife(task, outputs, batches))


def warn_of_labels(task: Task, found: Scores, output: Any) -> None:
    """Warn where the scores of the float network say that its labels are wrong; `output` is that of one batch."""
    known = ~found.loss.isnan()
    if task.name == "classification" and bool(known.any()):
        loss, accuracy = found.loss[known].mean().item(), found.score[known].mean().item()
        doubts = label_doubts(loss, accuracy, int(known.sum()), classes_of(output))
        if doubts:
            warnings.warn(doubts, UserWarning, stacklevel=2)


def jackknife(task: Task, outputs: Sequence[Any], batches: Sequence[Any]) -> list[float]:
    """The metric over the whole set, and over the set without each of at most ten groups of batches; else empty."""
    if task.metric is None:
        return []
    on_cpu = [mapped(batch, Tensor.cpu) for batch in batches]
    groups = min(_GROUPS, len(batches))
    values = [float(task.metric(list(outputs), on_cpu))]
    for left_out in range(groups if groups > 1 else 0):
        kept = [i for i in range(len(batches)) if i % groups != left_out]
        values.append(float(task.metric([outputs[i] for i in kept], [on_cpu[i] for i in kept])))
    return values


def jackknife_error(values: Sequence[float]) -> float:
    """The standard error of a metric, or of a difference of two, from `jackknife`; NaN from a single batch."""
    left_out = torch.tensor(list(values[1:]), dtype=torch.float64)
    if len(left_out) < 2:
        return math.nan
    return ((len(left_out) - 1) / len(left_out) * (left_out - left_out.mean()).square().sum()).sqrt().item()


def compare(
    task: Task, outputs: Sequence[Any], reference: Reference, batches: Sequence[Any]
) -> tuple[dict[str, Any], Compared]:
    """What changed against the reference, with standard errors of the paired differences of the samples.

    `delta_loss`, `delta_score` and `delta_metric` keep their sign; `score_se` is the error of `delta_score`,
    `metric_se` that of `delta_metric` by jackknife over groups of batches. `logit_nmse` is the squared error of all
    floating-point outputs over the reference's power. In classification `kl`, `top1` and their errors repeat
    divergence and score.
    """
    now = scores(task, outputs, batches)
    delta_loss = now.loss - reference.scores.loss
    divergence = divergences(task, outputs, reference.outputs, batches)
    figures: dict[str, Any] = {"task": task.name, "images": len(divergence)}
    figures["divergence"], figures["divergence_se"] = mean_and_error(divergence)
    figures["loss"] = now.loss.mean().item()
    figures["delta_loss"], figures["delta_loss_se"] = mean_and_error(delta_loss)
    figures["score"] = now.score.mean().item()
    figures["delta_score"], figures["score_se"] = mean_and_error(now.score - reference.scores.score)
    changed = jackknife(task, outputs, batches)
    differences = [a - b for a, b in zip(changed, reference.metric, strict=True)]
    figures["metric"] = changed[0] if changed else math.nan
    figures["delta_metric"] = differences[0] if changed else math.nan
    figures["metric_se"] = jackknife_error(differences) if changed else math.nan
    error = signal = 0.0
    for output, clean in zip(outputs, reference.outputs, strict=True):
        for x, r in zip(tensors(output), tensors(clean), strict=True):
            if x.is_floating_point():
                error += (x.double() - r.double()).square().sum().item()
                signal += r.double().square().sum().item()
    figures["logit_nmse"] = error / signal if signal else math.nan
    same = task.name == "classification"
    for name, of in (("kl", "divergence"), ("kl_se", "divergence_se"), ("top1", "score"), ("delta_top1", "delta_score"),
                     ("top1_se", "score_se")):  # fmt: skip
        figures[name] = figures[of] if same else math.nan
    return figures, Compared(divergence, delta_loss)
