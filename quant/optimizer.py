"""The optimizer of a training and its learning rates: timm's, with groups of parameters that differ in both."""

import difflib
import math
from collections.abc import Callable
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers  # type: ignore[attr-defined]  # timm exports them
from timm.scheduler.scheduler_factory import create_scheduler_v2
from torch import nn

from quant.config import QATConfig
from quant.errors import InputError
from quant.quantizer import LSQQuantizer

_SCHEDULES = {"cosine": "cosine", "linear": "poly", "constant": "step"}  # timm's names, at a decay rate of 1


def make_optimizer(
    model: nn.Module, config: QATConfig, total: int
) -> tuple[torch.optim.Optimizer, Callable[[int], None]]:
    """The optimizer, and what sets the learning rates of a step, 1 to `total`."""
    if config.optimizer not in list_optimizers():
        near = ", ".join(map(str, difflib.get_close_matches(config.optimizer, list_optimizers(), n=3, cutoff=0.0)))
        raise InputError(f"timm has no optimizer {config.optimizer!r}. The nearest: {near}. Change it by --set.")
    optimizer = create_optimizer_v2(parameter_groups(model, config), opt=config.optimizer, lr=config.learning_rate)
    warmup = min(round(config.warmup * total), total - 1)
    schedule, _ = create_scheduler_v2(
        optimizer, sched=_SCHEDULES[config.schedule], decay_rate=1.0, warmup_epochs=warmup, warmup_prefix=True,
        num_epochs=total + 1 - warmup,  # in steps; one more, or the last of them would have a rate of 0
        warmup_lr=0.0, step_on_epochs=False, updates_per_epoch=1,
    )  # fmt: skip
    assert schedule is not None
    return optimizer, schedule.step_update


def parameter_groups(model: nn.Module, config: QATConfig) -> list[dict[str, Any]]:
    """Groups for an optimizer: weights with decay, what must not decay, and scales with offsets by their size.

    What decays is called `weight`, has more than one dimension, and is not excepted by the model (`no_weight_decay`):
    no biases, norms, position embeddings, class tokens, tables of relative positions. Frozen parameters are left out.
    An Adam step is about the learning rate, whatever the gradient: one rate for all scales would be a step of a
    thousandth for some and a multiple for others, so each gets a share of its start, rounded to a power of two.
    """
    scales: dict[int, list[nn.Parameter]] = {}
    for quantizer in (m for m in model.modules() if isinstance(m, LSQQuantizer)):
        scales.setdefault(round(math.log2(quantizer.initial_scale)), []).extend(quantizer.parameters())
    learned = {id(p) for group in scales.values() for p in group}
    excepted = set(model.no_weight_decay()) if callable(getattr(model, "no_weight_decay", None)) else set()  # type: ignore[operator]
    own = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in learned]
    decayed = [p for n, p in own if p.ndim > 1 and n.rpartition(".")[2] == "weight" and n not in excepted]
    kept = {id(p) for p in decayed}
    if not own:
        raise InputError("every parameter of the model is frozen: there is nothing to train.")
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [p for _, p in own if id(p) not in kept], "weight_decay": 0.0},
        *({"params": group, "weight_decay": 0.0, "lr": config.scale_learning_rate * 2.0**size}
          for size, group in sorted(scales.items())),
    ]  # fmt: skip
    return [group for group in groups if group["params"]]
