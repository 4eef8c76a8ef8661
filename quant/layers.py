"""Quantized layers: a layer becomes a dynamic subclass of its own class, so that its forward stays as written.

The property `weight` returns the fake-quantized `_parameters["weight"]`, the latent weight that the optimizer trains.
Convolutions that pad in their own way, and code that uses a layer's weight without calling it, work unchanged;
the keys of the state dict stay, those of the quantizers are added. Where such code multiplies by the weight of a layer
that is never called (BEiT, EVA and SwinV2 write F.linear(x, self.qkv.weight)), the weight itself quantizes its input.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quant.mixed_classes import Mixed, mix_in_, take_out_
from quant.quantizer import LSQQuantizer
from quant.trace import LAYER_FUNCTIONS

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
        if func in LAYER_FUNCTIONS:
            named = dict(zip(("input", "weight"), args, strict=False)) | kwargs
            x, weight = named.pop("input"), named.pop("weight")
            if isinstance(weight, cls):  # not where it is the input of another weight
                with torch._C.DisableTorchFunctionSubclass():
                    plain = weight.as_subclass(Tensor)
                return func(weight.input_quantizer(x), plain, *args[2:], **named)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


class _QuantizedLayer(Mixed):
    """What `quantize_layer_` adds to a layer's class."""

    prefix = "Quantized"

    weight_quantizers: nn.ModuleDict  # by tensor: `weight`, or `query`, `key`, `value` of a fused weight
    weight_rows: Any  # tensor -> Rows
    input_quantizer: LSQQuantizer | None
    called: bool  # or its weight is used without it

    @property
    def weight(self) -> Tensor:
        """The fake-quantized weight; the latent one is in `_parameters`."""
        weight = self._fake_quantized()
        if self.called or self.input_quantizer is None:
            return weight
        quantizing = weight.as_subclass(_QuantizingWeight)
        quantizing.input_quantizer = self.input_quantizer
        return quantizing

    def _fake_quantized(self) -> Tensor:
        latent = self._parameters["weight"]
        assert latent is not None
        pieces, end = [], 0
        for tensor, quantizer in self.weight_quantizers.items():
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


def quantize_layer_(
    module: nn.Module,
    weights: Mapping[str, tuple[Rows, LSQQuantizer]],
    input_quantizer: LSQQuantizer | None,
    *,
    called: bool = True,
) -> None:
    """Quantize a layer's weight and input from now on, until `restore_layer_`.

    `weights` has the quantizer of each part of the weight, by name, with its rows; empty where it stays in floating
    point. `called` is False for a layer whose weight is used by one of `LAYER_FUNCTIONS` outside its own forward.
    """
    layer: Any = module
    ordered = sorted(weights.items(), key=lambda item: item[1][0] or (0, 0))
    layer.weight_quantizers = nn.ModuleDict({tensor: quantizer for tensor, (_, quantizer) in ordered})
    layer.weight_rows = {tensor: rows for tensor, (rows, _) in ordered}
    layer.input_quantizer, layer.called = input_quantizer, called
    mix_in_(module, _QuantizedLayer)


def restore_layer_(module: nn.Module) -> None:
    """Undo `quantize_layer_`; the latent weight is the layer's weight again."""
    assert isinstance(module, _QuantizedLayer)
    del module.weight_quantizers, module.weight_rows, module.input_quantizer, module.called
    take_out_(module)


def is_quantized(module: nn.Module) -> bool:
    """Whether `quantize_layer_` was called on the module."""
    return isinstance(module, _QuantizedLayer)


def weight_parts(module: nn.Module) -> Iterator[tuple[str, Tensor, LSQQuantizer]]:
    """(tensor, latent weight, quantizer) of each quantized part of a quantized layer's weight."""
    assert isinstance(module, _QuantizedLayer)
    latent = module._parameters["weight"]
    assert latent is not None
    for tensor, quantizer in module.weight_quantizers.items():
        rows = module.weight_rows[tensor]
        assert isinstance(quantizer, LSQQuantizer)
        yield tensor, latent if rows is None else latent[slice(*rows)], quantizer
