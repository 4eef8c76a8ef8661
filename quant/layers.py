"""Quantized layers: a layer becomes a dynamic subclass of its own class, so that its forward stays as written.

The property `weight` (`in_proj_weight` of torch's own attention) returns the fake-quantized `_parameters["weight"]`,
the latent weight that the optimizer trains. Convolutions that pad in their own way, and code that uses a layer's weight
without calling it, work unchanged; the keys of the state dict stay, those of the quantizers are added. Where such code
multiplies by the weight of a layer that is never called (BEiT, EVA and SwinV2 write F.linear(x, self.qkv.weight)), the
module that does so runs under a function mode, which quantizes the input.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quant.errors import InputError
from quant.mixed_classes import Mixed, mix_in_, take_out_
from quant.multihead import multi_head_attention
from quant.products import LAYER_FUNCTIONS
from quant.quantizer import LSQQuantizer

Rows = tuple[int, int] | None
"""The rows of a fused weight that one quantizer owns; None where it owns the whole weight."""


class _LayerFunctions(TorchFunctionMode):
    """Quantizes what is multiplied with the weight of a layer that nobody calls, so that no hook sees its input."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return multi_head_attention(*args, **kwargs)  # by linears
        if func is torch.narrow and hasattr(args[0], _OF_INPUT):  # rows for one of several inputs
            rows = func(*args, **kwargs)
            setattr(rows, _OF_INPUT, getattr(args[0], _OF_INPUT))
            return rows
        if func in LAYER_FUNCTIONS:
            quantizer = getattr(args[1] if len(args) > 1 else kwargs["weight"], _OF_INPUT, None)
            if quantizer is not None and args:
                args = (quantizer(args[0]), *args[1:])
            elif quantizer is not None:
                kwargs = {**kwargs, "input": quantizer(kwargs["input"])}
        return func(*args, **kwargs)


_OF_INPUT = "input_quantizer"  # an attribute of the tensor that such a layer hands out as its weight


class _WeightUser(Mixed):
    """A module that multiplies by the weights of layers without calling them."""

    prefix = "Using"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward; inputs that meet weights of quantized layers are quantized."""
        with _LayerFunctions():
            return super().forward(*args, **kwargs)


class _QuantizedLayer(Mixed):
    """What `quantize_layer_` adds to a layer's class."""

    prefix = "Quantized"

    weight_quantizers: nn.ModuleDict  # by tensor: `weight`, or `query`, `key`, `value` of a fused weight
    weight_rows: Any  # tensor -> Rows
    weight_parameters: Any  # tensor -> the parameter's name, where that is not `weight`
    input_quantizer: LSQQuantizer | None
    called: bool  # or its weight is used without it

    @property
    def weight(self) -> Any:
        """The fake-quantized weight; the latent one is in `_parameters`."""
        return self._quantized_parameter("weight")

    @property
    def in_proj_weight(self) -> Any:
        """The same of torch's own attention."""
        return self._quantized_parameter("in_proj_weight")

    @property
    def q_proj_weight(self) -> Any:
        """The same of torch's own attention over inputs of different widths."""
        return self._quantized_parameter("q_proj_weight")

    @property
    def k_proj_weight(self) -> Any:
        """As `q_proj_weight`."""
        return self._quantized_parameter("k_proj_weight")

    @property
    def v_proj_weight(self) -> Any:
        """As `q_proj_weight`."""
        return self._quantized_parameter("v_proj_weight")

    def _quantized_parameter(self, name: str) -> Any:
        if name not in self._parameters:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        latent = self._parameters[name]
        if latent is None or name not in {"weight", *self.weight_parameters.values()}:
            return latent
        weight = self._fake_quantized(name, latent)
        if not self.called and self.input_quantizer is not None:
            weight = weight.view_as(weight)  # a tensor of its own, where the weight itself is not quantized
            setattr(weight, _OF_INPUT, self.input_quantizer)
        return weight

    def _fake_quantized(self, name: str, latent: Tensor) -> Tensor:
        pieces, end = [], 0
        for tensor, quantizer in self.weight_quantizers.items():
            if self.weight_parameters.get(tensor, "weight") != name:
                continue
            rows = self.weight_rows[tensor]
            if rows is None:
                return quantizer(latent)
            pieces += [latent[end : rows[0]], quantizer(latent[slice(*rows)])]
            end = rows[1]
        return torch.cat([*pieces, latent[end:]]) if pieces else latent

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, on the quantized input: its first argument, by whatever name."""
        if self.called and self.input_quantizer is not None:
            if args:
                args = (self.input_quantizer(args[0]), *args[1:])
            else:
                name, x = next(iter(kwargs.items()))
                kwargs = {**kwargs, name: self.input_quantizer(x)}
        return super().forward(*args, **kwargs)


class _QuantizedByName(_QuantizedLayer):
    """The same of a module that calls its weight otherwise, as code that gives torch's own attention its parameters."""

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("weight_parameters", {}).values():
            return self._quantized_parameter(name)
        return super().__getattr__(name)


def quantize_layer_(
    module: nn.Module,
    weights: Mapping[str, tuple[Rows, LSQQuantizer]],
    input_quantizer: LSQQuantizer | None,
    *,
    user: nn.Module | None = None,
    parameters: Mapping[str, str] | None = None,
) -> None:
    """Quantize a layer's weight and input from now on, until `restore_layer_`.

    `weights` has the quantizer of each part of the weight, by name, with its rows; empty where it stays in floating
    point. `user` is given for a layer that is never called: the module whose forward multiplies by its weight, with one
    of `LAYER_FUNCTIONS`. `parameters` names the parameter that holds each part, where that is not `weight`.
    """
    layer: Any = module
    ordered = sorted(weights.items(), key=lambda item: item[1][0] or (0, 0))
    layer.weight_quantizers = nn.ModuleDict({tensor: quantizer for tensor, (_, quantizer) in ordered})
    layer.weight_rows = {tensor: rows for tensor, (rows, _) in ordered}
    layer.input_quantizer, layer.called = input_quantizer, user is None
    layer.weight_parameters = dict(parameters or {})
    by_name = any(name not in vars(_QuantizedLayer) for name in layer.weight_parameters.values())
    mix_in_(module, _QuantizedByName if by_name else _QuantizedLayer)
    if user is not None and not isinstance(user, _WeightUser):
        mix_in_(user, _WeightUser)


def share_quantizer_(
    module: nn.Module,
    tensor: str,
    weight: tuple[Rows, LSQQuantizer],
    parameter: str,
    *,
    user: nn.Module | None,
) -> None:
    """Quantize a weight that belongs to another layer in this module too, by that layer's quantizer.

    The quantizer is no submodule here: its scale is in the state dict once. `parameter` is the weight's name in this
    module.
    """
    layer: Any = module
    if is_quantized(module) and parameter not in vars(_QuantizedLayer) and not isinstance(module, _QuantizedByName):
        raise InputError(
            f"{type(module).__name__} has a planned weight as its parameter {parameter!r} beside another one. Leave "
            "the layer that shares it out with `exclude`."
        )
    if not is_quantized(module):
        quantize_layer_(module, {}, None, user=user, parameters={tensor: parameter})
    shared = dict(layer.weight_quantizers.items())
    layer._modules.pop("weight_quantizers", None)
    layer.weight_quantizers = {**shared, tensor: weight[1]}
    layer.weight_rows[tensor], layer.weight_parameters[tensor] = weight[0], parameter


def restore_layer_(module: nn.Module) -> None:
    """Undo `quantize_layer_`, for a layer or the user of one; the latent weight is the layer's weight again."""
    if isinstance(module, _QuantizedLayer):
        del module.weight_quantizers, module.weight_rows, module.weight_parameters
        del module.input_quantizer, module.called
        for mixin in (_QuantizedLayer, _QuantizedByName):
            take_out_(module, mixin)
    take_out_(module, _WeightUser)


def is_quantized(module: nn.Module) -> bool:
    """Whether `quantize_layer_` was called on the module."""
    return isinstance(module, _QuantizedLayer)


def weight_parts(module: nn.Module) -> Iterator[tuple[str, Tensor, LSQQuantizer]]:
    """(tensor, latent weight, quantizer) of each quantized part of a quantized layer's own weight."""
    assert isinstance(module, _QuantizedLayer)
    own: Any = module._modules.get("weight_quantizers") or {}  # not those of a weight that another layer owns
    for tensor, quantizer in own.items():
        rows = module.weight_rows[tensor]
        latent = module._parameters[module.weight_parameters.get(tensor, "weight")]
        assert latent is not None
        assert isinstance(quantizer, LSQQuantizer)
        yield tensor, latent if rows is None else latent[slice(*rows)], quantizer
