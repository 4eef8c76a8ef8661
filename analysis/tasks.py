"""Ready-made tasks: how far an output is from the float network's, and what it is worth.

Each is short enough to be read as an example for one's own. Divergences are computed in float64 and are 0 for equal
outputs; a probe's gradient u has E[u u^T] equal to the Hessian of the divergence at equal outputs, so that half the
mean square of (gradient . error) predicts the divergence to second order (Martens, JMLR 2020, arXiv:1412.1193).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from analysis.task import Task
from quant.batches import forward as plain_forward
from quant.batches import inputs_and_targets, is_image_list, tensors
from quant.errors import InputError

_SUMS_TO_ONE = 1e-3


def classification(*, probabilities: bool = False) -> Task:
    """Classes that exclude each other: KL(reference || output) of the softmax, cross-entropy, top-1.

    Outputs are logits (samples, classes), or with `probabilities` the softmax of them; a dictionary or `ModelOutput`
    has them under `logits`. Targets are class indices (samples,), -1 where unknown; without targets loss and score are
    NaN. All in nats.
    """

    def logits(output: Any) -> Tensor:
        return _log_probabilities(_main(output, "logits"), probabilities)

    def divergence(output: Any, reference: Any) -> Tensor:
        return _kl(logits(reference), logits(output))

    def loss(output: Any, batch: Any) -> Tensor:
        x = logits(output)
        return _known_only(batch, x, lambda labels: F.cross_entropy(x, labels, reduction="none"))

    def score(output: Any, batch: Any) -> Tensor:
        x = _main(output, "logits")
        return _known_only(batch, x, lambda labels: (x.argmax(1) == labels).double())

    def check(output: Any, batch: Any) -> None:
        x = _main(output, "logits")
        why = _why_not_scores(x, batch, probabilities)
        if why:
            raise InputError(f"tasks.classification() does not fit: {why}.")
        _check_labels(_labels(batch, len(x)), x.shape[1])

    def probe(output: Any, generator: Generator) -> Tensor:
        x = _main(output, "logits")
        if probabilities:
            x = x.double().clamp_min(1e-30).log()
        return (x * _softmax_probe(x.detach(), generator, axis=1)).sum()

    return Task(name="classification", divergence=divergence, loss=loss, score=score, probe=probe, check=check)


def multilabel() -> Task:
    """Labels that do not exclude each other, also a single logit: sum of the KLs of the sigmoids; exact match.

    Outputs are logits (samples, labels) or (samples,), targets 0 or 1 of the same shape. Loss is binary cross-entropy
    summed over the labels, the score is the share of labels that are right. Class indices (samples,) beside several
    logits are no such targets: loss and score are NaN.
    """

    def logits(output: Any) -> Tensor:
        x = _main(output, "logits").double()
        return x.reshape(len(x), -1)

    def divergence(output: Any, reference: Any) -> Tensor:
        x, r = logits(output), logits(reference)
        p = r.sigmoid()
        kl = p * (F.logsigmoid(r) - F.logsigmoid(x)) + (1 - p) * (F.logsigmoid(-r) - F.logsigmoid(-x))
        return kl.sum(1).clamp_min(0)

    def targets(output: Any, batch: Any) -> Tensor | None:
        y = inputs_and_targets(batch)[1]
        x = logits(output)
        if y is None or (y.ndim == 1 and x.shape[1] > 1 and len(y) == len(x)):
            return None
        if not y.is_floating_point() and bool(((y < 0) | (y > 1)).any()):
            return None  # class indices
        if y.numel() != x.numel():
            raise InputError(
                f"tasks.multilabel() expects targets of the shape of the logits, {tuple(x.shape)}, "
                f"got {tuple(y.shape)}."
            )
        return y.to(x).reshape_as(x)

    def loss(output: Any, batch: Any) -> Tensor:
        x, y = logits(output), targets(output, batch)
        if y is None:
            return _nothing(x)
        return F.binary_cross_entropy_with_logits(x, y, reduction="none").sum(1)

    def score(output: Any, batch: Any) -> Tensor:
        x, y = logits(output), targets(output, batch)
        return _nothing(x) if y is None else ((x > 0) == (y > 0.5)).double().mean(1)

    def probe(output: Any, generator: Generator) -> Tensor:
        x = _main(output, "logits")
        p = x.detach().double().sigmoid()
        return (x * ((p * (1 - p)).sqrt() * _signs(p, generator)).to(x)).sum()

    return Task(name="multilabel", divergence=divergence, loss=loss, score=score, probe=probe)


def segmentation(ignore_index: int = 255) -> Task:
    """A class per pixel: KL of the softmax, mean over the pixels of an image; cross-entropy, pixel accuracy and mIoU.

    Outputs are logits (samples, classes, height, width), a dictionary's under `out`; targets (samples, height, width)
    class indices. Pixels of `ignore_index` count for nothing but the divergence. mIoU is over the classes that occur in
    targets or answers.
    """

    def logits(output: Any) -> Tensor:
        return _main(output, "out")

    def divergence(output: Any, reference: Any) -> Tensor:
        p, q = logits(reference).double().log_softmax(1), logits(output).double().log_softmax(1)
        return _kl(p, q).flatten(1).mean(1)

    def loss(output: Any, batch: Any) -> Tensor:
        x, mask = logits(output).double(), _mask(output, batch)
        if mask is None:
            return _nothing(x)
        per_pixel = F.cross_entropy(x, mask, reduction="none", ignore_index=ignore_index).flatten(1)
        return per_pixel.sum(1) / (mask != ignore_index).flatten(1).sum(1)

    def score(output: Any, batch: Any) -> Tensor:
        x, mask = logits(output), _mask(output, batch)
        if mask is None:
            return _nothing(x)
        counted = (mask != ignore_index).flatten(1)
        return ((x.argmax(1) == mask).flatten(1) & counted).sum(1).double() / counted.sum(1)

    def metric(outputs: list, batches: list) -> float:
        table = torch.zeros(1, 1, dtype=torch.float64)
        for output, batch in zip(outputs, batches, strict=True):
            x, mask = logits(output), _mask(output, batch)
            if mask is None:
                return math.nan
            classes, counted = x.shape[1], mask != ignore_index
            pairs = mask[counted] * classes + x.argmax(1)[counted]
            table = table + torch.bincount(pairs, minlength=classes**2).view(classes, classes).double()
        both = torch.diagonal(table)
        union = table.sum(0) + table.sum(1) - both
        return (both / union)[union > 0].mean().item()

    def probe(output: Any, generator: Generator) -> Tensor:
        x = logits(output)
        pixels = x[0, 0].numel()
        return (x * _softmax_probe(x.detach(), generator, axis=1) / pixels**0.5).sum()

    def check(output: Any, batch: Any) -> None:
        x = logits(output)
        if x.ndim < 3 or x.shape[1] < 2:
            raise InputError(
                f"tasks.segmentation() expects logits (samples, classes, height, width) of two classes or more, got "
                f"{tuple(x.shape)}. For a single channel choose tasks.multilabel() or tasks.regression()."
            )

    return Task(
        name="segmentation", divergence=divergence, loss=loss, score=score, metric=metric, probe=probe, check=check
    )


def _mask(output: Any, batch: Any) -> Tensor | None:
    mask = inputs_and_targets(batch)[1]
    if isinstance(mask, Mapping):
        mask = mask.get("masks", mask.get("mask"))
    if not isinstance(mask, Tensor):
        return None
    x = _main(output, "out")
    if mask.shape != (len(x), *x.shape[2:]):
        raise InputError(
            f"tasks.segmentation() expects a class index for each pixel, {(len(x), *x.shape[2:])}, got targets of "
            f"shape {tuple(mask.shape)}. Leave them out where there are none: loss, score and mIoU are NaN then."
        )
    return mask.long().to(x.device)


def regression() -> Task:
    """Numbers: squared error relative to the variance of the float network's outputs, mean over a sample's elements.

    Any tensors, (samples, channels, ...); the variance is that of each channel over all samples of the data and all
    positions, and that of the whole tensor where a channel has none. With targets of the same shape the loss is the
    squared error, the score its negative.
    """
    return _relative_regression(None)


def _relative_regression(variance: list[Tensor] | None) -> Task:
    def divergence(output: Any, reference: Any) -> Tensor:
        pairs = list(zip(_floats(output), _floats(reference), strict=True))
        scales = variance or [_variance([r]) for _, r in pairs]
        parts = [((x - r).square() / v.to(r)).flatten(1).mean(1) for (x, r), v in zip(pairs, scales, strict=True)]
        return torch.stack(parts).mean(0)

    def loss(output: Any, batch: Any) -> Tensor:
        x, y = next(iter(_floats(output))), inputs_and_targets(batch)[1]
        if not isinstance(y, Tensor) or y.numel() != x.numel():
            return _nothing(x)
        return (x - y.to(x).reshape_as(x)).square().flatten(1).mean(1)

    def prepare(references: Sequence[Any]) -> Task:
        by_tensor = zip(*map(_floats, references), strict=True)
        return _relative_regression([_variance(list(parts)) for parts in by_tensor])

    def probe(output: Any, generator: Generator) -> Tensor:
        found = [_by_channel(x) for x in tensors(output) if x.is_floating_point() and x.ndim]
        scales = variance or [_variance([x.detach().double()]) for x in found]
        weights = [(2 / (len(found) * x[0].numel() * v)).sqrt().to(x) for x, v in zip(found, scales, strict=True)]
        parts = [(x * _signs(x.detach(), generator) * w).sum() for x, w in zip(found, weights, strict=True)]
        return torch.stack(parts).sum()

    return Task(
        name="regression", divergence=divergence, loss=loss, score=lambda *both: -loss(*both), probe=probe,
        prepare=prepare if variance is None else None,
    )  # fmt: skip


def embedding() -> Task:
    """A vector for each sample: 1 - cosine of the angle to the float network's vector. Outputs are (samples, width)."""

    def vectors(output: Any) -> Tensor:
        x = _main(output, "pooler_output")
        return x.double().reshape(len(x), -1)

    def divergence(output: Any, reference: Any) -> Tensor:
        return (1 - F.cosine_similarity(vectors(output), vectors(reference), dim=1)).clamp_min(0)

    def probe(output: Any, generator: Generator) -> Tensor:
        x = _main(output, "pooler_output")
        r = vectors(output.detach() if isinstance(output, Tensor) else output).detach()
        norm = r.norm(dim=1, keepdim=True)
        unit, signs = r / norm, _signs(r, generator)
        tangent = (signs - unit * (unit * signs).sum(1, keepdim=True)) / norm  # the Hessian's root, (I - r r^T) / |r|
        return (x.reshape(len(x), -1) * tangent.to(x)).sum()

    return Task(name="embedding", divergence=divergence, probe=probe)


def detection(metric: Callable[[list, list], float] | None = None) -> Task:
    """Detectors: squared error of the raw head outputs relative to their variance, before boxes are matched or dropped.

    `forward` runs transform, backbone and head of torchvision's one-stage detectors (SSD, RetinaNet, FCOS); of other
    models the output itself must be raw tensors: give `dataclasses.replace(task, forward=...)`. `metric(outputs,
    batches)`, such as mAP, gets the same raw outputs.
    """

    def forward(model: nn.Module, batch: Any) -> Any:
        parts = [getattr(model, name, None) for name in ("transform", "backbone", "head")]
        if not all(callable(part) for part in parts):
            return plain_forward(model, batch)
        images, _ = inputs_and_targets(batch)
        transform, backbone, head = parts
        stacked, _ = transform(list(images) if is_image_list(images) else list(images.unbind(0)))  # type: ignore[misc]
        features = backbone(stacked.tensors)  # type: ignore[misc]
        return head(list(features.values()) if isinstance(features, Mapping) else [features])  # type: ignore[misc]

    base = regression()

    def check(output: Any, batch: Any) -> None:
        if not list(_floats(output)):
            raise InputError(
                "tasks.detection() found no raw tensors in the output. Give a Task with a `forward` that returns those "
                "of the head, before non-maximum suppression."
            )

    return Task(
        name="detection", forward=forward, divergence=base.divergence, metric=metric, probe=base.probe, check=check,
        prepare=lambda references: _with_forward(forward, metric, references),
    )  # fmt: skip


def _with_forward(forward: Callable, metric: Callable | None, references: Sequence[Any]) -> Task:
    fixed = regression().prepared(references)
    return Task(name="detection", forward=forward, divergence=fixed.divergence, metric=metric, probe=fixed.probe)


def language_modeling(ignore_index: int = -100) -> Task:
    """Next tokens: KL of each position's softmax, mean over the tokens; cross-entropy and accuracy of the next token.

    Outputs are logits (samples, tokens, vocabulary). Targets are token indices, `labels` of a dictionary, else the
    input tokens themselves; position t answers token t + 1. Targets of `ignore_index` are left out.
    """

    def logits(output: Any) -> Tensor:
        return _main(output, "logits")

    def divergence(output: Any, reference: Any) -> Tensor:
        p, q = logits(reference).double().log_softmax(-1), logits(output).double().log_softmax(-1)
        return _kl(p, q, axis=-1).mean(1)

    def shifted(output: Any, batch: Any) -> tuple[Tensor, Tensor]:
        inputs, targets = inputs_and_targets(batch)
        tokens = (
            targets if isinstance(targets, Tensor) else next(x for x in tensors(inputs) if not x.is_floating_point())
        )
        x = logits(output)
        return x[:, :-1], tokens[:, 1:].long().to(x.device)

    def loss(output: Any, batch: Any) -> Tensor:
        x, y = shifted(output, batch)
        each = F.cross_entropy(x.double().transpose(1, 2), y, reduction="none", ignore_index=ignore_index)
        return each.sum(1) / (y != ignore_index).sum(1)

    def score(output: Any, batch: Any) -> Tensor:
        x, y = shifted(output, batch)
        counted = y != ignore_index
        return ((x.argmax(-1) == y) & counted).sum(1).double() / counted.sum(1)

    def probe(output: Any, generator: Generator) -> Tensor:
        x = logits(output)
        return (x * _softmax_probe(x.detach(), generator, axis=-1) / x.shape[1] ** 0.5).sum()

    def check(output: Any, batch: Any) -> None:
        x = logits(output)
        if x.ndim != 3:
            raise InputError(
                f"tasks.language_modeling() expects logits (samples, tokens, vocabulary), got {tuple(x.shape)}."
            )

    return Task(name="language_modeling", divergence=divergence, loss=loss, score=score, probe=probe, check=check)


def why_not_classification(model: nn.Module, output: Any, batch: Any) -> str:
    """Why an output and its batch are not plainly those of an image classifier; empty where they are."""
    try:
        check_head(model)
        x = _main(output, "logits")
    except InputError as error:
        return str(error)
    why = _why_not_scores(x, batch, probabilities=False)
    if why:
        return why
    targets = inputs_and_targets(batch)[1]
    if targets is None:
        if declared_classes(model) == x.shape[1]:
            return ""
        name = type(model).__name__
        return f"the batch brings no class labels, and {name} does not say that it has {x.shape[1]} classes"
    if _labels(batch, len(x)) is None:
        shape = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        return f"the targets are {shape}, not one class index a sample"
    return ""


def classes_of(output: Any) -> int:
    """How many classes a classifier's output has: the columns of its logits."""
    return _main(output, "logits").shape[1]


def check_head(model: nn.Module) -> None:
    """Raise InputError for a network whose head was left out (timm's `num_classes=0`): its output is features."""
    if getattr(model, "num_classes", None) == 0:
        raise InputError(
            f"{type(model).__name__} has no head (num_classes=0): its output is features, not logits. Build it "
            "with its classes, or choose tasks.embedding()."
        )


def declared_classes(model: nn.Module) -> int | None:
    """How many classes the model says that it has: timm's `num_classes`, Transformers' labels, torchvision's heads."""
    count = getattr(model, "num_classes", None)
    if isinstance(count, int) and count > 0:
        return count
    config = getattr(model, "config", None)
    if "ForImageClassification" in type(model).__name__ and isinstance(getattr(config, "num_labels", None), int):
        return int(config.num_labels)  # type: ignore[union-attr]
    family = type(model).__module__
    if family.startswith("torchvision.models.") and family.count(".") == 2:  # not those of detection, segmentation, ...
        heads = [m for m in model.modules() if isinstance(m, nn.Linear)]
        return heads[-1].out_features if heads else None
    return None


def _why_not_scores(x: Tensor, batch: Any, probabilities: bool) -> str:
    if x.ndim != 2 or not x.is_floating_point():
        return f"the output has shape {tuple(x.shape)}, expected scores (samples, classes)"
    if x.shape[1] == 1:
        return "the output has a single column, whose softmax is always 1; tasks.multilabel() takes one logit"
    values = x.detach()
    if values.numel() > 1 and bool((values == values.flatten()[0]).all()):
        return (
            "every output is the same number, as of a head with zero weights; no quantization would change the answer: "
            "load trained weights"
        )
    within = bool(((values >= 0) & (values <= 1)).all())
    sums = values.sum(1)
    to_one = within and bool(((sums - 1).abs() < _SUMS_TO_ONE).all())
    if to_one and not probabilities:
        return (
            "the output rows are probabilities (they sum to 1, none is negative), not logits; "
            "tasks.classification(probabilities=True) takes them"
        )
    if probabilities and not to_one:
        return "the output rows do not sum to 1; without `probabilities=True` logits are expected"
    if within and not probabilities and len(values) * values.shape[1] > 2:
        return (
            "every output lies between 0 and 1, as after a sigmoid, not logits; return the values before it and choose "
            "tasks.multilabel()"
        )
    return ""


def _main(output: Any, key: str) -> Tensor:
    """The tensor that an output is about: itself, under `key` of a dictionary or attribute, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    found = output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)
    if isinstance(found, Tensor):
        return found
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    first = [x for x in tensors(output) if x.is_floating_point()]
    if len(first) == 1:
        return first[0]
    raise InputError(f"the output is a {type(output).__name__} without a tensor {key!r}")


def _labels(batch: Any, count: int) -> Tensor | None:
    """Class indices (samples,), -1 where unknown; None where the targets are no such thing."""
    y = inputs_and_targets(batch)[1]
    if not isinstance(y, Tensor) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        return None
    y = y.reshape(-1) if y.ndim == 2 and y.shape[1] == 1 else y
    return y.long() if y.ndim == 1 and len(y) == count and bool((y >= -1).all()) else None


def _check_labels(labels: Tensor | None, classes: int) -> None:
    """Raise InputError for a class index that the model cannot answer with."""
    if labels is not None and len(labels) and int(labels.max()) >= classes:
        raise InputError(f"label {int(labels.max())} is beyond the model's {classes} classes.")


def _known_only(batch: Any, x: Tensor, figure: Callable[[Tensor], Tensor]) -> Tensor:
    """`figure` of the class indices, NaN where they are unknown; InputError for one beyond the columns of `x`."""
    y = inputs_and_targets(batch)[1]
    labels = _labels(batch, len(y)) if isinstance(y, Tensor) else None
    if labels is None:
        from quant.batches import samples

        return torch.full((samples(batch),), math.nan, dtype=torch.float64)
    _check_labels(labels, x.shape[1])
    labels = labels.to(x.device)  # a batch on a GPU may have its labels on the CPU
    values = figure(labels.clamp(min=0))
    return torch.where(labels >= 0, values, torch.full_like(values, math.nan))


def _log_probabilities(x: Tensor, probabilities: bool) -> Tensor:
    return x.double().clamp_min(1e-30).log() if probabilities else x.double().log_softmax(1)


def _kl(log_p: Tensor, log_q: Tensor, axis: int = 1) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(axis).clamp_min(0)


def _softmax_probe(x: Tensor, generator: Generator, axis: int) -> Tensor:
    """U with E[u u^T] = diag(p) - p p^T along an axis: sqrt(p) v - p (sqrt(p) . v), v of random signs."""
    p = x.double().softmax(axis)
    root = p.sqrt() * _signs(p, generator)
    return (root - p * root.sum(axis, keepdim=True)).to(x)


def _signs(like: Tensor, generator: Generator) -> Tensor:
    return torch.randint(2, like.shape, generator=generator).to(like) * 2 - 1


def _floats(output: Any) -> list[Tensor]:
    """Every floating-point tensor of an output as (samples, channels, positions), float64."""
    return [_by_channel(x.double()) for x in tensors(output) if x.is_floating_point() and x.ndim]


def _by_channel(x: Tensor) -> Tensor:
    return x.reshape(len(x), x.shape[1] if x.ndim > 1 else 1, -1)


def _variance(parts: Sequence[Tensor]) -> Tensor:
    """Variance of each channel over samples and positions of all parts: (channels, 1); of all values where it is 0."""
    values = torch.cat(list(parts))
    each = values.var((0, 2), correction=0)
    whole = values.var(correction=0)
    floor = whole if whole > 0 else torch.ones_like(whole)
    return torch.where(each > 1e-12 * floor, each, floor)[:, None]


def _nothing(x: Tensor) -> Tensor:
    return torch.full((len(x),), math.nan, dtype=torch.float64)
