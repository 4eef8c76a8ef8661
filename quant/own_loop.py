"""What a training loop of one's own takes from here: after each optimizer step, beside the loss, and to look at."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quant.errors import InputError
from quant.insertion import latent_weights
from quant.loss_terms import low_bit, regularization_terms
from quant.oscillation import OscillationTracker
from quant.quantizer import LSQQuantizer, ScaleWatch
from quant.site import Site

if TYPE_CHECKING:
    import pandas as pd


class Attachment:
    """What `attach_` returns; `remove()` undoes it."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, watch: ScaleWatch) -> None:
        self.model, self.watch = model, watch
        self.watch.attached += 1
        self._hook: Any = optimizer.register_step_post_hook(self._after_step)

    def remove(self) -> None:
        """Let scales move as the optimizer will, and count no more; a second call does nothing."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            self.watch.attached -= 1

    def _after_step(self, *_: Any) -> None:
        quantizers = _quantizers(self.model)
        if not quantizers:  # restore_float_ was called
            self.remove()
            return
        for quantizer in quantizers:
            quantizer.clamp_scale_()
        watch = self.watch
        watch.step += 1
        codes = _codes(self.model)
        if codes.keys() == watch.tracker.sizes.keys():  # not after layers were replaced
            watch.tracker.to(_device(self.model)).update(codes, watch.step)


def attach_(optimizer: torch.optim.Optimizer, model: nn.Module) -> Attachment:
    """Look after a prepared model in a training loop: call it once, before the first step.

    After each step of `optimizer` every scale is held above 1e-3 of its start (a scale of 0 would lose all codes, and
    no gradient leads back), and reversals of the integer codes of weights of at most 4 bits are counted for
    `oscillation_table`. Steps that a `GradScaler` skips do not count. `model` may be wrapped (by
    DistributedDataParallel, torch.compile), `optimizer` too (by Accelerate, Lightning). A second call for the same
    optimizer and model replaces the first. What it returns has `remove()`; `restore_float_` makes it end by itself.

    Raises InputError for a model that is not prepared, and for an optimizer that holds none of its scales: one made
    before `prepare_qat_`.

    >>> import analysis as qv
    >>> model, data = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), [(torch.randn(8, 4), torch.arange(8) % 2)]
    >>> plan = qv.plan_bits(model, qv.estimate_sensitivity(model, data), like="w4a4", layout="strict")
    >>> model = qv.prepare_qat_(model, plan, data)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    >>> attachment = attach_(optimizer, model)
    >>> attachment.remove()
    """
    model = unwrapped(model)
    quantizers = _quantizers(model)
    if not quantizers:
        raise InputError("the model is not prepared for training: call prepare_qat_(net, plan, data) before attach_.")
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):  # Accelerate's and Lightning's
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(f"`optimizer` is a {type(optimizer).__name__}; expected a torch.optim.Optimizer.")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    learned = [q.scale for q in quantizers if q.scale.requires_grad]
    if learned and not any(id(scale) in held for scale in learned):
        raise InputError(
            f"the optimizer holds none of the model's {len(learned)} scales: it would not train them. Make it after "
            "prepare_qat_, from parameter_groups(model)."
        )
    watch = _watch(quantizers)
    for hook in list(optimizer._optimizer_step_post_hooks.values()):
        earlier = getattr(hook, "__self__", None)
        if isinstance(earlier, Attachment) and earlier.watch is watch:
            earlier.remove()
    codes = _codes(model)
    sizes = {site: x.numel() for site, x in codes.items()}
    if watch.tracker is None or watch.tracker.sizes != sizes:
        watch.tracker, watch.step = OscillationTracker(sizes).to(_device(model)), 0
        watch.tracker.update(codes, 0)
    return Attachment(optimizer, model, watch)


def oscillation_table(model: nn.Module) -> "pd.DataFrame":
    """Which weights of a prepared model oscillate: one row per weight tensor of at most 4 bits, in the model's order.

    Columns: module, tensor, bit_width, weights (how many), steps (that were counted), oscillating (share of weights
    whose code went back and forth at least twice in the last 200 steps), oscillating_ema (share whose running frequency
    of reversals is above 0.005; Nagel et al., ICML 2022, arXiv:2203.11086), note. Shares are NaN, with a note, where
    nothing was counted: without `attach_`, and before the first step. Raises InputError for a model that is not
    prepared.

    >>> import analysis as qv
    >>> model, data = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), [(torch.randn(8, 4), torch.arange(8) % 2)]
    >>> plan = qv.plan_bits(model, qv.estimate_sensitivity(model, data), like="w4a4", layout="strict")
    >>> model = qv.prepare_qat_(model, plan, data)
    >>> oscillation_table(model)[["module", "weights", "note"]].values.tolist()
    [['0', 32, 'attach_ was not called'], ['1', 16, 'attach_ was not called']]
    """
    import pandas as pd

    model = unwrapped(model)
    quantizers = _quantizers(model)
    if not quantizers:
        raise InputError("the model is not prepared for training: no weight of it can oscillate.")
    watch, weights = _watch(quantizers), low_bit(latent_weights(model))
    counted: dict[Site, dict[str, Any]] = {}
    if watch.tracker is not None and watch.step:
        rows = watch.tracker.rows(watch.step)
        counted = dict(zip(weights, rows, strict=True)) if len(rows) == len(weights) else {}
    note = "" if counted else "attach_ was not called" if watch.tracker is None else "no step was counted"
    missing = {"oscillating": float("nan"), "oscillating_ema": float("nan")}
    table = [
        {
            "module": site.module, "tensor": site.tensor, "bit_width": quantizer.scheme.bit_width,
            "weights": weight.numel(), "steps": watch.step if counted else 0,
            **{name: counted.get(site, missing)[name] for name in missing}, "note": note,
        }
        for site, (weight, quantizer) in weights.items()
    ]  # fmt: skip
    return pd.DataFrame(
        table, columns=["module", "tensor", "bit_width", "weights", "steps", "oscillating", "oscillating_ema", "note"]
    )


def regularization(
    model: nn.Module,
    *,
    obr: float = 0.0,
    dampening: float = 0.0,
    kurtosis: float = 0.0,
    progress: float = 1.0,
    ramp_start: float = 0.25,
) -> Tensor:
    """The weights' part of the loss, a scalar to be added to it; 0 where all terms are off.

    obr         oscillation-aware bins (Huang et al., TMLR 2024, arXiv:2307.00331): squared distances to the grid and
                variances within bins, summed over weights of at most 4 bits
    dampening   squared distances to the grid (Nagel et al., ICML 2022, arXiv:2203.11086), summed over the same weights
    kurtosis    (kurtosis - 1.8)^2, mean over quantized weight tensors (Chmiel et al., NeurIPS 2020, arXiv:2002.07686)

    Each is multiplied by its argument. The first two are sums over weights, so that 1e-3 pulls equally in networks of
    every size; they rise by half a cosine from 0 at `progress` = `ramp_start` to their full weight at 1, `progress`
    being the share of the training that is done. Raises InputError for a model that is not prepared, and for negative
    weights.

    >>> import analysis as qv
    >>> model, data = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), [(torch.randn(8, 4), torch.arange(8) % 2)]
    >>> plan = qv.plan_bits(model, qv.estimate_sensitivity(model, data), like="w4a4", layout="strict")
    >>> model = qv.prepare_qat_(model, plan, data)
    >>> loss = torch.tensor(1.0) + regularization(model, obr=1e-3, progress=0.5)
    >>> loss.requires_grad, regularization(model).item()
    (True, 0.0)
    """
    terms = {"obr": obr, "dampening": dampening, "kurtosis": kurtosis}
    for name, weight in terms.items():
        if not 0 <= weight < float("inf"):
            raise InputError(f"`{name}` is {weight}; expected a number from 0 on, by which the term is multiplied.")
    if not 0 <= ramp_start < 1:
        raise InputError(f"`ramp_start` is {ramp_start}; expected a share of the training below 1.")
    model = unwrapped(model)
    if not any(terms.values()):
        return torch.zeros((), device=_device(model))
    if not _quantizers(model):
        raise InputError("the model is not prepared for training: its weights have no grid to be drawn to.")
    found = regularization_terms(latent_weights(model), **terms, progress=progress, ramp_start=ramp_start)
    return torch.stack(list(found.values())).sum() if found else torch.zeros((), device=_device(model))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and what torch.compile returns."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _quantizers(model: nn.Module) -> list[LSQQuantizer]:
    return [module for module in model.modules() if isinstance(module, LSQQuantizer)]


def _watch(quantizers: list[LSQQuantizer]) -> ScaleWatch:
    """The watch that the quantizers of a model share; parts that were prepared one by one share one from now on."""
    first = quantizers[0].watch
    for quantizer in quantizers[1:]:
        quantizer.watch = first
    return first


@torch.no_grad()
def _codes(model: nn.Module) -> dict[Site, Tensor]:
    """The integer codes of the latent weights that can oscillate, flat."""
    weights = low_bit(latent_weights(model))
    return {site: quantizer.codes(weight).flatten() for site, (weight, quantizer) in weights.items()}


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
