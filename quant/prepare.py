"""A network becomes its quantized self, ready to be trained, and comes back: `prepare_qat_` and `restore_float_`."""

from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import Tensor, nn

from quant import batches
from quant.batchnorm import batchnorms, reestimate_batchnorm_
from quant.bit_plan import BitPlan
from quant.calibrate import calibrate, check_planned
from quant.choices import ESTIMATORS, Estimator, GradientScale
from quant.errors import InputError
from quant.insertion import attach_quantizers_, detach_quantizers_, is_prepared
from quant.network import Network, unchanged
from quant.quantizer import LSQQuantizer


def prepare_qat_(
    net: Network | nn.Module,
    plan: BitPlan,
    calibration_data: Iterable[Any],
    *,
    estimator: Estimator = "mse",
    gradient_scale: GradientScale = "lsq",
    compiled: bool = False,
    reestimate_batchnorm: bool = True,
) -> nn.Module:
    """Quantize the planned sites of a model from now on, in place, and return the model.

    `net` is a `Network`, or a model, which is then traced on the first batch. Each planned site gets a learned scale a
    group, which starts where `estimator` (mse, minmax or percentile) puts it: weights by their values, activations by
    batches of `calibration_data`, an iterable that can be iterated more than once; a few hundred samples are enough.
    Layers stay instances of their own class, and the keys of the state dict stay: `weight` is the latent weight that
    the optimizer trains, quantized wherever it is used. `gradient_scale` is how gradients of weight scales are
    normalized: "lsq" (Esser et al., ICLR 2020, arXiv:1902.08153) or "module" (Huang et al., TMLR 2024,
    arXiv:2307.00331). `compiled` computes the quantizers through torch.compile: faster after a minute of compiling.

    Where there is BatchNorm its statistics are taken again from the calibration data through the quantized network;
    `reestimate_batchnorm=False` leaves them. One batch then runs through the network and proves that every planned site
    is executed as planned.

    Raises InputError for a model that is prepared already, a plan that is empty, names sites the network does not have
    or an axis that they do not have, and where a planned site is not executed as planned; the model is then as it was,
    bit for bit. `restore_float_` undoes it.

    >>> import analysis as qv
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    >>> data = [(torch.randn(16, 3, 8, 8), torch.arange(16) % 2)]
    >>> net = Network(model, data)
    >>> plan = qv.plan_bits(net, qv.estimate_sensitivity(net, data), like="w4a4")
    >>> isinstance(prepare_qat_(net, plan, data)[0], nn.Conv2d)
    True
    """
    _check_choice(estimator, "estimator", ESTIMATORS)
    _check_choice(gradient_scale, "gradient_scale", get_args(GradientScale))
    if not isinstance(plan, BitPlan):
        raise InputError(
            f"`plan` is a {type(plan).__name__}; expected a BitPlan, as plan_bits returns it and BitPlan.load reads it."
        )
    model = net.model if isinstance(net, Network) else net
    if isinstance(model, nn.Module) and is_prepared(model):
        raise InputError(
            "the model is prepared for training already. Train it as it is, or undo it first: restore_float_(model)."
        )
    data = batches.checked_data(calibration_data)
    net = net if isinstance(net, Network) else Network(net, batches.first_batch(data))
    check_planned(net, plan.sites, "`plan`")
    model = net.model
    with unchanged(model):
        quantizers = calibrate(net, plan.sites, data, estimator=estimator, forward=lambda _model, batch: net(batch))
        attach_quantizers_(net, quantizers, gradient_scale=gradient_scale, compiled=compiled)
        if reestimate_batchnorm:
            try:
                _reestimate_(model, data, net)
            except BaseException:
                detach_quantizers_(model)
                raise
    for module in model.modules():
        if isinstance(module, LSQQuantizer):
            module.train(model.training)
    return model


def restore_float_(model: nn.Module) -> None:
    """Undo `prepare_qat_`: layers of their own classes, with the latent weights, and no quantizer in the state dict.

    BatchNorm gets back the statistics from before `prepare_qat_`, unless they were updated since, by training or by
    loading: those are then the model's. Without training in between the model is what it was, bit for bit. A model that
    is not prepared stays as it is.

    >>> model = nn.Linear(2, 3)
    >>> restore_float_(model)
    >>> type(model).__name__
    'Linear'
    """
    detach_quantizers_(model)
    for module in batchnorms(model):
        kept = module.__dict__.pop(_KEPT, None)
        if kept is not None and _same(_statistics(module), kept["reestimated"]):
            _set_(module, kept["float"])


_KEPT = "statistics_before_qat"  # a plain attribute: state_dict keys stay


def _reestimate_(model: nn.Module, data: Iterable[Any], forward: Any) -> None:
    """Re-estimate BatchNorm's statistics, and keep those from before beside them; as before after an error."""
    layers = batchnorms(model)
    before = [_statistics(module) for module in layers]
    try:
        try:
            reestimate_batchnorm_(model, data, forward)
        except InputError as error:
            raise InputError(f"{error} Or prepare with reestimate_batchnorm=False.") from error
        for module, statistics in zip(layers, before, strict=True):
            module.__dict__[_KEPT] = {"float": statistics, "reestimated": _statistics(module)}
    except BaseException:
        for module, statistics in zip(layers, before, strict=True):
            module.__dict__.pop(_KEPT, None)
            _set_(module, statistics)
        raise


def _statistics(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in module.named_buffers(recurse=False)}


def _set_(module: nn.Module, statistics: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in statistics.items():
            module.get_buffer(name).copy_(value)


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether statistics are equal, wherever the model was moved to since."""
    return first.keys() == second.keys() and all(torch.equal(x, second[name].to(x)) for name, x in first.items())


def _check_choice(value: str, name: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"`{name}` is {value!r}; choose from {', '.join(known)}.")
