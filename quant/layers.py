"""Quantized layers: a layer becomes a dynamic subclass of its own class, so that its forward stays as written.

The property `weight` (`in_proj_weight` of torch's own attention) returns the fake-quantized `_parameters["weight"]`,
the latent weight that the optimizer trains. Convolutions that pad in their own way, and code that uses a layer's weight
without calling it, work unchanged; the keys of the state dict stay, those of the quantizers are added. Where such code
multiplies by the weight of a layer that is never called (BEiT, EVA and SwinV2 write F.linear(x, self.qkv.weight)), the
weight itself quantizes its input.
"""

from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.multihead import multi_head_attention
from quant.products import LAYER_FUNCTIONS
from quant.quantizer import LSQQuantizer

Rows = tuple[int, int] | None
"""The rows of a fused weight that one quantizer owns; None where it owns the whole weight."""


class _QuantizingWeight(Tensor):
    """A weight that quantizes what it is multiplied with: of a layer that nobody calls, so that no hook sees its input.

    It lives from the layer's `weight` to the function that takes it; what any function makes of it is a plain tensor.
    """

    input_quantizer: LSQQuantizer

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return multi_head_attention(*args, **kwargs)  # by linears
        if func is torch.narrow and isinstance(args[0], cls):  # rows for one of several inputs
            with torch._C.DisableTorchFunctionSubclass():
                rows = func(*args, **kwargs).as_subclass(cls)
            rows.input_quantizer = args[0].input_quantizer
            return rows
        if func in LAYER_FUNCTIONS:
            named = dict(zip(("input", "weight"), args, strict=False)) | kwargs
            x, weight = named.pop("input"), named.pop("weight")
            if isinstance(weight, cls):  # not where it is the input of another weight
                with torch._C.DisableTorchFunctionSubclass():
                    plain = weight.as_subclass(Tensor)
                return func(weight.input_quantizer(x), plain, *args[2:], **named)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


class _QuantizedLayer(nn.Module):
    """What `quantize_layer_` adds to a layer's class."""

    weight_quantizers: nn.ModuleDict  # by tensor: `weight`, or `query`, `key`, `value` of a fused weight
    weight_rows: Any  # tensor -> Rows
    weight_parameters: Any  # tensor -> the parameter's name, where that is not `weight`
    input_quantizer: LSQQuantizer | None
    called: bool  # or its weight is used without it

    def quantized_parameter(self, name: str) -> Tensor:
        """A parameter, fake-quantized; the latent one is in `_parameters`."""
        weight = self._fake_quantized(name)
        if self.called or self.input_quantizer is None:
            return weight
        quantizing = weight.as_subclass(_QuantizingWeight)
        quantizing.input_quantizer = self.input_quantizer
        return quantizing

    def _fake_quantized(self, name: str) -> Tensor:
        latent = self._parameters[name]
        assert latent is not None
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

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, on the quantized input."""
        if self.called and self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return super().forward(x, *args, **kwargs)


def quantize_layer_(
    module: nn.Module,
    weights: Mapping[str, tuple[Rows, LSQQuantizer]],
    input_quantizer: LSQQuantizer | None,
    *,
    called: bool = True,
    parameters: Mapping[str, str] | None = None,
) -> None:
    """Quantize a layer's weight and input from now on, until `restore_layer_`.

    `weights` has the quantizer of each part of the weight, by name, with its rows; empty where it stays in floating
    point. `called` is False for a layer whose weight is used by one of `LAYER_FUNCTIONS` outside its own forward.
    `parameters` names the parameter that holds each part, where that is not `weight`.
    """
    layer: Any = module
    original: Any = type(module)
    ordered = sorted(weights.items(), key=lambda item: item[1][0] or (0, 0))
    layer.weight_quantizers = nn.ModuleDict({tensor: quantizer for tensor, (_, quantizer) in ordered})
    layer.weight_rows = {tensor: rows for tensor, (rows, _) in ordered}
    layer.input_quantizer, layer.called = input_quantizer, called
    layer.weight_parameters = dict(parameters or {})
    layer.__class__ = _quantized_class(original, tuple(sorted({"weight", *layer.weight_parameters.values()})))


def share_quantizer_(
    module: nn.Module, tensor: str, weight: tuple[Rows, LSQQuantizer], parameter: str, *, called: bool
) -> None:
    """Quantize a weight that belongs to another layer in this module too, by that layer's quantizer.

    The quantizer is no submodule here: its scale is in the state dict once.
    """
    layer: Any = module
    if not is_quantized(module):
        quantize_layer_(module, {}, None, called=called, parameters={tensor: parameter})
    shared = dict(layer.weight_quantizers.items())
    layer._modules.pop("weight_quantizers", None)
    layer.weight_quantizers = {**shared, tensor: weight[1]}
    layer.weight_rows[tensor], layer.weight_parameters[tensor] = weight[0], parameter


def restore_layer_(module: nn.Module) -> None:
    """Undo `quantize_layer_`; the latent weight is the layer's weight again."""
    assert isinstance(module, _QuantizedLayer)
    del module.weight_quantizers, module.weight_rows, module.input_quantizer, module.called, module.weight_parameters
    module.__class__ = type(module).__bases__[1]


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


@cache
def _quantized_class(original: Any, parameters: tuple[str, ...]) -> Any:
    own = {name: property(partial(_QuantizedLayer.quantized_parameter, name=name)) for name in parameters}
    members = {"__module__": original.__module__, **own}
    return type(f"Quantized{original.__name__}", (_QuantizedLayer, original), members)
