"""Groups of parameters that differ in learning rate and decay; and the optimizer and schedule of a training, timm's."""

import difflib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from quant.config import QATConfig
from quant.errors import InputError
from quant.quantizer import LSQQuantizer

_SCHEDULES = {"cosine": "cosine", "linear": "poly", "constant": "step"}  # timm's names, at a decay rate of 1


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float = 2e-4,
    scale_learning_rate: float | None = None,
    weight_decay: float = 1e-4,
) -> list[dict[str, Any]]:
    """Groups for an optimizer, each with `name`, `lr` and `weight_decay`: weights, what must not decay, and scales.

    What decays is called `weight`, has more than one dimension, and is not excepted by the model (`no_weight_decay`):
    no biases, norms, position embeddings, class tokens, tables of relative positions. Frozen parameters are left out.

    An Adam step is about the learning rate, whatever the gradient: one rate for all scales would be a step of a
    thousandth for some and a multiple for others. With `scale_learning_rate=None` each scale therefore gets a rate of
    1e-2 of its own start, rounded to a power of two: one group a power, named `scales 2^-6`. A number is the rate
    itself, in the unit of the scales, the same for all scales and offsets.

    Raises InputError where every parameter is frozen, and for rates that are not above 0.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    >>> [(group["name"], len(group["params"]), group["weight_decay"]) for group in parameter_groups(model)]
    [('weights', 1, 0.0001), ('no decay', 3, 0.0)]
    """
    rates = {"learning_rate": learning_rate, "scale_learning_rate": scale_learning_rate}
    for name, rate in rates.items():
        if rate is not None and not 0 < rate < math.inf:
            raise InputError(f"`{name}` is {rate}; expected a number above 0.")
    if not 0 <= weight_decay < math.inf:
        raise InputError(f"`weight_decay` is {weight_decay}; expected a number from 0 on.")
    if scale_learning_rate is None:
        return _groups(model, learning_rate, weight_decay, share=_SHARE)
    return _groups(model, learning_rate, weight_decay, rate=scale_learning_rate)


_SHARE = 1e-2  # of a scale's start, that an optimizer step may move it by


def _groups(
    model: nn.Module, learning_rate: float, weight_decay: float, *, share: float = 0.0, rate: float | None = None
) -> list[dict[str, Any]]:
    """The groups; scales learn at `share` of their start, or all at `rate`."""
    scales: dict[int, list[nn.Parameter]] = {}
    learned: set[int] = set()
    for quantizer in (m for m in model.modules() if isinstance(m, LSQQuantizer)):
        size = round(math.log2(quantizer.initial_scale)) if rate is None else 0
        scales.setdefault(size, []).extend(p for p in quantizer.parameters() if p.requires_grad)
        learned.update(map(id, quantizer.parameters()))
    excepted = set(model.no_weight_decay()) if callable(getattr(model, "no_weight_decay", None)) else set()  # type: ignore[operator]
    own = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in learned]
    decayed = [p for n, p in own if p.ndim > 1 and n.rpartition(".")[2] == "weight" and n not in excepted]
    kept = {id(p) for p in decayed}
    if not own:
        raise InputError("every parameter of the model is frozen: there is nothing to train.")
    groups: list[dict[str, Any]] = [
        {"name": "weights", "params": decayed, "lr": learning_rate, "weight_decay": weight_decay},
        {"name": "no decay", "params": [p for _, p in own if id(p) not in kept], "lr": learning_rate,
         "weight_decay": 0.0},
        *({"name": "scales" if rate else f"scales 2^{size}", "params": group,
           "lr": rate or share * 2.0**size, "weight_decay": 0.0} for size, group in sorted(scales.items())),
    ]  # fmt: skip
    return [group for group in groups if group["params"]]


def make_optimizer(
    model: nn.Module, config: QATConfig, total: int
) -> tuple[torch.optim.Optimizer, Callable[[int], None]]:
    """The optimizer, and what sets the learning rates of a step, 1 to `total`."""
    # Importing timm takes seconds, which a loop of one's own need not wait.
    from timm.optim import create_optimizer_v2, list_optimizers  # type: ignore[attr-defined]  # timm exports them
    from timm.scheduler.scheduler_factory import create_scheduler_v2

    if config.optimizer not in list_optimizers():
        near = ", ".join(map(str, difflib.get_close_matches(config.optimizer, list_optimizers(), n=3, cutoff=0.0)))
        raise InputError(f"timm has no optimizer {config.optimizer!r}. The nearest: {near}. Change `optimizer`.")
    groups = _groups(model, config.learning_rate, config.weight_decay, share=config.scale_learning_rate)
    optimizer = create_optimizer_v2(groups, opt=config.optimizer, lr=config.learning_rate)
    warmup = min(round(config.warmup * total), total - 1)
    schedule, _ = create_scheduler_v2(
        optimizer, sched=_SCHEDULES[config.schedule], decay_rate=1.0, warmup_epochs=warmup, warmup_prefix=True,
        num_epochs=total + 1 - warmup,  # in steps; one more, or the last of them would have a rate of 0
        warmup_lr=0.0, step_on_epochs=False, updates_per_epoch=1,
    )  # fmt: skip
    assert schedule is not None
    return optimizer, schedule.step_update
