"""The training loop of a quantized network."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from quant.batches import to_device
from quant.batchnorm import batchnorms, reestimate_batchnorm_
from quant.checkpoints import last_step, load_checkpoint_, save_checkpoint
from quant.config import QATConfig
from quant.errors import InputError
from quant.insertion import latent_weights
from quant.loss_terms import TERMS, Weights, gradient_norms, image_terms, low_bit, weight_terms
from quant.optimizer import make_optimizer
from quant.oscillation import OscillationTracker, edge_rows
from quant.quantizer import LSQQuantizer
from quant.site import Site
from quant.step_batches import StepBatches

LARGEST_LOSS = 1e3
"""Cross-entropy or distillation above it, in nats, is a divergence: chance is the logarithm of the classes."""


SETTING_OF = {"obr_distance": "obr_weight", "obr_variance": "obr_weight", "dampening": "dampening_weight",
              "kurtosis": "kurtosis_weight"}  # fmt: skip
"""The weight of each term that depends on the weights alone."""


class StepReport(NamedTuple):
    """What one optimizer step leaves to be written: rows of history, oscillation and bins.parquet, mostly none."""

    step: int
    history: list[dict[str, Any]]
    oscillation: list[dict[str, Any]]
    bins: list[dict[str, Any]]


class DivergedError(InputError):
    """The loss left all bounds; the weights before the step are still in the model."""


class Answers(Protocol):
    """What a batch is worth to a training: its parts, the weighted terms of the loss, and figures beside them."""

    def parts(self, batch: Any, count: int) -> list[Any]:
        """The batch, on the device, in at most `count` parts that go through the network one after another."""

    def terms(self, trained: nn.Module, part: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The terms of one part by name, weighted, and figures of it, such as the share answered right."""


class ImageAnswers:
    """Batches of (images, labels), or (images, labels, a teacher's probabilities); a teacher gives logits."""

    def __init__(self, teacher: nn.Module | None, config: QATConfig) -> None:
        self.teacher, self.config = teacher, config

    def parts(self, batch: Any, count: int) -> list[Any]:
        """The batch in `count` parts."""
        return list(zip(*(tensor.chunk(count) for tensor in batch), strict=True))

    def terms(self, trained: nn.Module, part: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Cross-entropy and distillation, and the share of images that is answered right."""
        x, labels, *stored = part
        logits = trained(x)
        with torch.no_grad():
            answered = None if self.teacher is None or not self.config.kd_weight else self.teacher(x).float()
        with torch.autocast(x.device.type, enabled=False):
            terms = image_terms(logits.float(), labels, answered, self.config, stored[0] if stored else None)
        return terms, {"top1": (logits.argmax(dim=1) == labels).float().mean()}


def train_images(
    model: nn.Module,
    teacher: nn.Module | None,
    *,
    config: QATConfig,
    images: int,
    load: Callable[[StepBatches], Iterable[tuple[Tensor, ...]]],
    validate: Callable[[nn.Module], dict[str, float]],
    calibration: Sequence[Any],
    accelerator: Accelerator,
    checkpoints: Path,
) -> Iterator[StepReport]:
    """`run_training` on a data set of images, drawn by `StepBatches`, shared by the processes that torchrun started.

    `images` is how many there are to train on, `load` gives the batches (images, labels) of a sampler of them, or where
    a teacher was asked before (images, labels, its probabilities); `config.crops_per_image` rows for each image drawn.
    `teacher` gives the logits to be distilled.
    """
    total = total_steps(config, images, accelerator.num_processes)
    _refuse_single_images(model, config.batch_size // (accelerator.num_processes * config.accumulate))

    def batches(first: int) -> Iterable[Any]:
        sampler = StepBatches(
            images, batch_size=config.batch_size // config.crops_per_image, steps=total, seed=config.seed,
            first_step=first, rank=accelerator.process_index, world=accelerator.num_processes,
        )  # fmt: skip
        return load(sampler)

    yield from run_training(
        model, ImageAnswers(teacher, config), config=config, total=total, per_epoch=images // config.batch_size,
        batches=batches, images_at=lambda step: step * config.batch_size, validate=validate, calibration=calibration,
        accelerator=accelerator, checkpoints=checkpoints,
    )  # fmt: skip


def run_training(
    model: nn.Module,
    answers: Answers,
    *,
    config: QATConfig,
    total: int,
    per_epoch: int,
    batches: Callable[[int], Iterable[Any]],
    images_at: Callable[[int], int],
    validate: Callable[[nn.Module], dict[str, float]],
    calibration: Iterable[Any],
    accelerator: Accelerator,
    checkpoints: Path | None,
    forward: Callable[[Any], Any] | None = None,
) -> Iterator[StepReport]:
    """Train `model` in place for `total` steps, prepared or in floating point; yields a report a step.

    `batches(first)` gives those after step `first`, `images_at(step)` how many samples they held, `answers` what they
    are worth. `validate` gives figures of the network as it stands, none for no validation; `calibration` are batches
    from which BatchNorm takes its statistics after the last step, run by `forward`. Where `checkpoints` holds one the
    training resumes there, to the same weights on the CPU as if it had not stopped. Raises DivergedError where the loss
    diverges, before the step that would corrupt the weights.
    """
    set_seed(config.seed, device_specific=True)
    optimizer, set_rates = make_optimizer(model, config, total)
    trained, optimizer = accelerator.prepare(model, optimizer)
    device = next(model.parameters()).device
    weights = latent_weights(model)
    tracker = OscillationTracker(
        {site: w.numel() for site, (w, _) in low_bit(weights).items()}, window=config.oscillation_window
    ).to(device)
    quantizers = [module for module in model.modules() if isinstance(module, LSQQuantizer)]
    for quantizer in quantizers:
        quantizer.watch.attached += 1  # scales are clamped below: looking whether they are would wait for a GPU
    multiplied = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    state: dict[str, Any] = {"model": model, "tracker": tracker, "optimizer": optimizer, "accelerator": accelerator}
    first, started = 0 if checkpoints is None else last_step(checkpoints), time.monotonic()
    if first >= total:
        raise InputError(
            f"{checkpoints} holds a checkpoint of step {first}, beyond the {total} steps of this training."
        )
    if first and checkpoints is not None:
        started -= load_checkpoint_(checkpoints, first, **state)
    else:
        tracker.update(_codes(weights), 0)
        before = validate(model)
        row = {"step": 0, "epoch": 0, "images": 0, "split": "val", "seconds": 0.0, **before}
        yield StepReport(0, [row] if before else [], tracker.rows(0), edge_rows(low_bit(weights), 0))
    mean = partial(accelerator.reduce, reduction="mean")
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
    trained.train()
    for step, batch in enumerate(batches(first), start=first + 1):
        parts = answers.parts(to_device(batch, device), config.accumulate)
        set_rates(step)
        optimizer.zero_grad()
        figures: dict[str, Tensor] = {}
        norms: dict[str, float] = {}
        with_norms = _due(step, total, config.gradient_norms_every)
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            with nullcontext() if last else accelerator.no_sync(trained):  # processes add up their gradients once
                with bf16:
                    terms, beside = answers.terms(trained, part)
                shares = {name: term / len(parts) for name, term in terms.items()}
                if last:
                    of_weights = weight_terms(weights, config, step / total)
                    norms = gradient_norms(terms | of_weights, multiplied, mean) if with_norms else {}
                    shares |= of_weights
                loss = torch.stack(list(shares.values())).sum()
                accelerator.backward(loss)
            shares |= {"loss": loss, **{name: figure / len(parts) for name, figure in beside.items()}}
            figures |= {name: figures.get(name, 0) + share.detach() for name, share in shares.items()}
        figures["norm"] = accelerator.clip_grad_norm_(trained.parameters(), config.clip_grad_norm or math.inf)
        means = mean(torch.stack(list(figures.values()))).tolist()
        measured = dict(zip(figures, means, strict=True))
        _refuse_divergence(step, measured, norms, config, checkpoints)
        del measured["norm"]
        optimizer.step()
        for quantizer in quantizers:
            quantizer.clamp_scale_()
        tracker.update(_codes(weights), step)

        place = {"step": step, "epoch": (step - 1) // per_epoch, "images": images_at(step)}
        rows, logged = [], with_norms or _due(step, total, config.log_every)
        if logged:
            rate = optimizer.param_groups[0]["lr"]
            seconds = time.monotonic() - started
            rows.append({**place, "split": "train", "lr": rate, "seconds": seconds, **measured, **norms})
        if step % per_epoch == 0 or step == total:
            if step == total and config.reestimate_batchnorm:
                reestimate_batchnorm_(model.eval(), calibration, forward)
            figures_now = validate(model)
            if figures_now:
                rows.append({**place, "split": "val", "seconds": time.monotonic() - started, **figures_now})
            trained.train()
        bins = edge_rows(low_bit(weights), step) if step in binned_steps(total) else []
        yield StepReport(step, rows, tracker.rows(step) if logged else [], bins)
        if checkpoints is not None and step % config.checkpoint_every == 0 and step < total:
            save_checkpoint(checkpoints, step, seconds=time.monotonic() - started, **state)
    model.eval()


def total_steps(config: QATConfig, images: int, processes: int = 1) -> int:
    """Optimizer steps of a training on so many images; InputError where they make no batch."""
    if config.batch_size > images:
        raise InputError(f"batch_size={config.batch_size}, but there are {images} images to train on. Lower it.")
    crops, parts = config.crops_per_image, config.accumulate
    if config.batch_size % (crops * processes * parts):
        whole = "".join(f", {name}={count}" for name, count in (("crops_per_image", crops), ("accumulate", parts))
                        if count > 1)  # fmt: skip
        raise InputError(
            f"batch_size={config.batch_size} cannot be shared equally by {processes} processes{whole}: it must be a "
            f"multiple of {crops * processes * parts}. Change `batch_size`."
        )
    return config.steps or config.epochs * (images // config.batch_size)


def logged_steps(config: QATConfig, total: int, last: int) -> list[int]:
    """The steps up to `last`, of `total`, that leave a row of the split `train`."""
    return [
        step
        for step in range(1, min(total, last) + 1)
        if _due(step, total, config.log_every) or _due(step, total, config.gradient_norms_every)
    ]


def binned_steps(total: int) -> tuple[int, ...]:
    """The steps after which the places of latent weights in their bins are kept: before, halfway, and at the end."""
    return (0, total // 2, total)


def _due(step: int, total: int, every: int) -> bool:
    return step % every == 0 or step in (1, total)


@torch.no_grad()
def _codes(weights: Weights) -> dict[Site, Tensor]:
    """The integer codes of the latent weights that can oscillate, flat."""
    return {site: quantizer.codes(weight).flatten() for site, (weight, quantizer) in low_bit(weights).items()}


def _refuse_divergence(
    step: int, measured: dict[str, float], norms: dict[str, float], config: QATConfig, checkpoints: Path | None
) -> None:
    """Raise DivergedError before a step that would corrupt the weights; the figures are the same in all processes."""
    softened = config.kd_weight * max(1.0, config.kd_temperature**2)  # by which both distillation terms grow
    bounds = {"task": config.task_weight * LARGEST_LOSS, "kd": softened * LARGEST_LOSS, "soft": softened * LARGEST_LOSS}
    terms = [name for name in TERMS if name in measured]
    large = [name for name in terms if not measured[name] <= bounds.get(name, sys.float_info.max)]
    if not large and math.isfinite(measured["norm"]):
        return
    steep = [name for name in terms if not math.isfinite(norms.get(f"grad_{name}", 0.0))]
    cause = next(iter(large or steep), "")
    if large:
        what = f"the term {cause} is {measured[cause]:.4g}"
    else:
        what = f"the gradient{f' of the term {cause}' if cause else ''} is {measured['norm']:.4g}"
    kept = 0 if checkpoints is None else last_step(checkpoints)
    kept_words = f"The checkpoint of step {kept} is kept in {checkpoints}" if kept else "No checkpoint was written yet"
    raise DivergedError(
        f"The training diverged at step {step}: {what}. {kept_words}. {_advice(step, cause, config)}; then start from "
        "scratch."
    )


def _advice(step: int, cause: str, config: QATConfig) -> str:
    """What to change after a divergence in the term `cause`, "" where that is not known."""
    if cause in SETTING_OF:
        return f"Lower `{SETTING_OF[cause]}`"
    look = "look at the images (mean and deviation) and the weights: measure_stats names the first site with NaN or Inf"
    fp32 = ", or try `precision`=fp32" if config.precision == "bf16" else ""
    if step == 1:
        if cause in ("kd", "soft"):
            look = f"look at the teacher and `kd_temperature`{'' if config.task_weight else ', or ' + look}"
        return f"It is the first step, so no learning rate is at fault: {look}{fp32}"
    usual = QATConfig()
    high = ["learning_rate"] if config.learning_rate >= usual.learning_rate else []
    of_scales = config.scale_learning_rate
    if of_scales > usual.scale_learning_rate or (high and of_scales == usual.scale_learning_rate):
        high.append("scale_learning_rate")
    if high:
        return f"Lower {' or '.join(f'`{name}`' for name in high)}{fp32}"
    clip = "" if config.clip_grad_norm else " `clip_grad_norm`=1 or"
    return (
        f"learning_rate={config.learning_rate:g} is below its default, {usual.learning_rate:g}, already: try{clip} a "
        f"larger `batch_size`{fp32}, or {look}"
    )


def _refuse_single_images(model: nn.Module, batch: int) -> None:
    if batch < 2 and batchnorms(model):
        raise InputError(
            "BatchNorm cannot be trained on one image at a time, got a batch of 1 a process. Raise `batch_size`."
        )
