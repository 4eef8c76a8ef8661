"""The training loop of a quantized network."""

import difflib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2, list_optimizers  # type: ignore[attr-defined]  # timm exports them
from timm.scheduler.scheduler_factory import create_scheduler_v2
from torch import Tensor, nn

from quant.batchnorm import batchnorms
from quant.checkpoints import last_step, load_checkpoint, save_checkpoint
from quant.config import QATConfig
from quant.distill import distillation_loss
from quant.errors import InputError
from quant.functional import to_groups
from quant.oscillation import OscillationTracker
from quant.prepare import latent_weights
from quant.quantizer import LSQQuantizer
from quant.regularizers import cosine_ramp, dampening_loss, kurtosis_loss, oscillation_bin_loss
from quant.site import Site
from quant.step_batches import StepBatches

LOW_BITS = 4
"""Sites above it oscillate too little to matter, and bin regularization harms them at 8 bit."""
LARGEST_LOSS = 1e3
"""Cross-entropy or distillation above it, in nats, is a divergence: chance is the logarithm of the classes."""
_SCHEDULES = {"cosine": "cosine", "linear": "poly", "constant": "step"}  # timm's names, at a decay rate of 1

Weights = dict[Site, tuple[Tensor, LSQQuantizer]]


class StepReport(NamedTuple):
    """What one optimizer step leaves to be written: rows of history.parquet and of oscillation.parquet, mostly none."""

    step: int
    history: list[dict[str, Any]]
    oscillation: list[dict[str, Any]]


class DivergedError(InputError):
    """The loss left all bounds; the weights before the step are still in the model."""


def train_qat(
    model: nn.Module,
    teacher: nn.Module | None,
    *,
    config: QATConfig,
    images: int,
    load: Callable[[StepBatches], Iterable[tuple[Tensor, Tensor]]],
    validate: Callable[[nn.Module], dict[str, float]],
    accelerator: Accelerator,
    checkpoints: Path,
) -> Iterator[StepReport]:
    """Train `model` in place, from `quant.prepare.prepare_qat_` or in floating point; yields a report a step.

    `images` is how many there are to train on, `load` gives the batches (images, labels) of a sampler of them,
    `validate` gives `loss` and `top1` of the network as it stands. `teacher` gives the logits to be distilled. Where
    `checkpoints` holds one the training goes on from there, to the same weights on the CPU as if it had not stopped.
    Raises DivergedError where the loss does, before the step that would spoil the weights.
    """
    total = total_steps(config, images)
    if config.optimizer not in list_optimizers():
        near = ", ".join(map(str, difflib.get_close_matches(config.optimizer, list_optimizers(), n=3, cutoff=0.0)))
        raise InputError(f"timm has no optimizer {config.optimizer!r}. The nearest: {near}. Change it by --set.")
    _refuse_single_images(model, config.batch_size // accelerator.num_processes)
    set_seed(config.seed, device_specific=True)
    weights = latent_weights(model)
    low = {site: part for site, part in weights.items() if part[1].scheme.bit_width <= LOW_BITS}
    tracker = OscillationTracker({site: w.numel() for site, (w, _) in low.items()}, window=config.oscillation_window)
    tracker.to(accelerator.device)
    optimizer = create_optimizer_v2(_parameter_groups(model, config), opt=config.optimizer, lr=config.learning_rate)
    schedule, _ = create_scheduler_v2(
        optimizer, sched=_SCHEDULES[config.schedule], decay_rate=1.0, warmup_epochs=round(config.warmup * total),
        num_epochs=total + 1,  # in steps; one more, or the last of them would have a rate of 0
        warmup_lr=0.0, step_on_epochs=False, updates_per_epoch=1,
    )  # fmt: skip
    trained, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(tracker)
    quantizers = [module for module in model.modules() if isinstance(module, LSQQuantizer)]
    every_weight = [p for p in model.parameters() if p.ndim > 1]
    first, started = last_step(checkpoints), time.monotonic()
    per_epoch = images // config.batch_size
    if first:
        load_checkpoint(accelerator, checkpoints, first)
    else:
        tracker.update(_codes(low), 0)
        row = {"step": 0, "epoch": 0, "images": 0, "split": "val", "seconds": 0.0, **validate(model)}
        yield StepReport(0, [row], tracker.rows(0))
    batches = StepBatches(
        images, batch_size=config.batch_size, steps=total, seed=config.seed, first_step=first,
        rank=accelerator.process_index, world=accelerator.num_processes,
    )  # fmt: skip
    bf16 = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=config.precision == "bf16")
    trained.train()
    for step, (x, labels) in enumerate(load(batches), start=first + 1):
        x, labels = x.to(accelerator.device), labels.to(accelerator.device)
        schedule.step_update(step)
        with bf16:
            logits = trained(x)
            with torch.no_grad():
                taught = None if teacher is None or not config.kd_weight else teacher(x).float()
        ramp = cosine_ramp(step / total, config.ramp_start)
        terms = _terms(logits.float(), labels, taught, weights, low, config, ramp)
        loss = torch.stack(list(terms.values())).sum()
        norms = _gradient_norms(terms, every_weight) if _due(step, total, config.gradient_norms_every) else {}
        optimizer.zero_grad()
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(trained.parameters(), config.clip_grad_norm or math.inf)
        _refuse_divergence(step, terms, norm, checkpoints)
        optimizer.step()
        for quantizer in quantizers:
            quantizer.clamp_scale_()
        tracker.update(_codes(low), step)

        place = {"step": step, "epoch": (step - 1) // per_epoch, "images": step * config.batch_size}
        rows = []
        logged = _due(step, total, config.log_every)
        if logged or norms:
            figures = {"loss": loss, **terms, "top1": (logits.argmax(dim=1) == labels).float().mean()}
            means = accelerator.reduce(torch.stack(list(figures.values())).detach(), reduction="mean").tolist()
            rows.append(
                {**place, "split": "train", "lr": optimizer.param_groups[0]["lr"], "seconds": time.monotonic() - started,
                 **dict(zip(figures, means, strict=True)), **norms}
            )  # fmt: skip
        if step % per_epoch == 0 or step == total:
            rows.append({**place, "split": "val", "seconds": time.monotonic() - started, **validate(model)})
            trained.train()
        yield StepReport(step, rows, tracker.rows(step) if logged else [])
        if step % config.checkpoint_every == 0 and step < total:
            save_checkpoint(accelerator, checkpoints, step)
    model.eval()


def total_steps(config: QATConfig, images: int) -> int:
    """Optimizer steps of a training on so many images; InputError where they make no batch."""
    if config.batch_size > images:
        raise InputError(f"batch_size={config.batch_size}, but there are {images} images to train on. Lower it.")
    return config.steps or config.epochs * (images // config.batch_size)


def _due(step: int, total: int, every: int) -> bool:
    return step % every == 0 or step in (1, total)


def _parameter_groups(model: nn.Module, config: QATConfig) -> list[dict[str, Any]]:
    """Weights with decay; biases and norms without; scales and offsets without, at a rate of their own."""
    scales = {id(p) for m in model.modules() if isinstance(m, LSQQuantizer) for p in m.parameters()}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in scales]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if id(p) in scales], "weight_decay": 0.0,
         "lr": config.scale_learning_rate},
    ]  # fmt: skip
    return [group for group in groups if group["params"]]


def _terms(
    logits: Tensor,
    labels: Tensor,
    taught: Tensor | None,
    weights: Weights,
    low: Weights,
    config: QATConfig,
    ramp: float,
) -> dict[str, Tensor]:
    """The weighted terms of the loss by name: their sum is what is minimised; those of weight 0 are left out."""
    terms = {}
    if config.task_weight:
        terms["task"] = config.task_weight * F.cross_entropy(logits, labels)
    if config.kd_weight and taught is not None:
        terms["kd"] = config.kd_weight * distillation_loss(logits, taught, temperature=config.kd_temperature)
    grids = [
        (to_groups(w, q.axis, q.groups), q.scale, q.offset, q.scheme.bit_width, q.scheme.signed)
        for w, q in low.values()
    ]
    if config.obr_weight and grids:
        parts = [oscillation_bin_loss(*grid) for grid in grids]
        terms["obr_distance"] = config.obr_weight * ramp * torch.stack([part.distance for part in parts]).sum()
        terms["obr_variance"] = config.obr_weight * ramp * torch.stack([part.variance for part in parts]).sum()
    if config.dampening_weight and grids:
        terms["dampening"] = config.dampening_weight * ramp * torch.stack([dampening_loss(*g) for g in grids]).sum()
    if config.kurtosis_weight and weights:
        terms["kurtosis"] = config.kurtosis_weight * kurtosis_loss([w for w, _ in weights.values()])
    return terms


def _gradient_norms(terms: dict[str, Tensor], parameters: list[nn.Parameter]) -> dict[str, float]:
    """The norm of each term's own gradient over the weights, as `grad_NAME`; the two parts of OBR are one term."""
    joined: dict[str, Tensor] = {}
    for name, term in terms.items():
        short = name.partition("_")[0]
        joined[short] = joined[short] + term if short in joined else term
    norms = {}
    for name, term in joined.items():
        gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        squares = [g.square().sum() for g in gradients if g is not None]
        norms[f"grad_{name}"] = torch.stack(squares).sum().sqrt().item() if squares else 0.0
    return norms


@torch.no_grad()
def _codes(weights: Weights) -> dict[Site, Tensor]:
    """The integer codes of the latent weights, flat."""
    return {site: quantizer.codes(weight).flatten() for site, (weight, quantizer) in weights.items()}


def _refuse_divergence(step: int, terms: dict[str, Tensor], norm: Tensor, checkpoints: Path) -> None:
    """Raise DivergedError before a step that would spoil the weights; the norm is the same in all processes."""
    large = [name for name in ("task", "kd") if name in terms and not terms[name].item() <= LARGEST_LOSS]
    if not large and torch.isfinite(norm):
        return
    what = f"the term {large[0]} is {terms[large[0]].item():.4g}" if large else f"the gradient's norm is {norm:.4g}"
    kept = last_step(checkpoints)
    kept_words = f"The checkpoint of step {kept} is kept in {checkpoints}" if kept else "No checkpoint was written yet"
    raise DivergedError(
        f"The training diverged at step {step}: {what}. {kept_words}. "
        "Lower learning_rate or scale_learning_rate (--set) and start anew with --overwrite."
    )


def _refuse_single_images(model: nn.Module, batch: int) -> None:
    if batch < 2 and batchnorms(model):
        raise InputError(
            "BatchNorm cannot be trained on one image at a time, got a batch of 1 a process. Raise batch_size (--set)."
        )
