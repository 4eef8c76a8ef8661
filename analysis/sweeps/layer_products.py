"""Products of one layer beside the network: its input with another weight, and the gradient of its weight."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.attention import closed_forward
from quant.trace import Trace


def parameter_met(module: str, trace: Trace) -> str:
    """The name of the parameter that the module's input meets."""
    return next((parameter for parameter, _ in trace.in_proj.get(module, {}).values()), "weight")


def _applied(layer: nn.Module, parameter: str, x: Tensor) -> Tensor:
    """What the layer gives for `x`, without its bias where torch's own attention projects."""
    if parameter != "weight":
        return F.linear(x, layer._parameters[parameter])  # type: ignore[arg-type]  # it has one
    return closed_forward(layer, x)


def product(layer: nn.Module, parameter: str, weight: Tensor, x: Tensor) -> Tensor:
    """What the layer gives for `x` with another weight and no bias."""
    bias = layer._parameters.get("bias")
    try:
        if bias is not None:
            layer._parameters["bias"] = None
        with _weight_of(layer, parameter, weight):
            return _applied(layer, parameter, x)
    finally:
        if bias is not None:
            layer._parameters["bias"] = bias


def weight_gradients(
    layer: nn.Module, parameter: str, x: Sequence[Tensor], gradient: Sequence[Tensor]
) -> Iterator[Tensor]:
    """The gradient of the layer's weight from each part of its input and the gradient of that part's output."""
    weight = layer.get_parameter(parameter).detach().requires_grad_()
    with _weight_of(layer, parameter, weight):
        for x_part, gradient_part in zip(x, gradient, strict=True):
            with torch.enable_grad():
                y = _applied(layer, parameter, x_part)
            yield torch.autograd.grad(y, weight, gradient_part)[0]


@contextmanager
def _weight_of(layer: nn.Module, parameter: str, weight: Tensor) -> Iterator[None]:
    own = layer._parameters[parameter]
    layer._parameters[parameter] = weight  # type: ignore[assignment]  # a plain tensor serves as well
    try:
        yield
    finally:
        layer._parameters[parameter] = own
