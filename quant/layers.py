"""Quantized layers: a layer becomes a dynamic subclass of its own class, so that its forward stays as written.

The property `weight` returns the fake-quantized `_parameters["weight"]`, the latent weight that the optimizer trains.
Convolutions that pad in their own way, and code that uses a layer's weight without calling it, work unchanged;
the keys of the state dict stay, those of the quantizers are added.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from quant.quantizer import LSQQuantizer

Rows = tuple[int, int] | None
"""The rows of a fused weight that one quantizer owns; None where it owns the whole weight."""


class _QuantizedLayer(nn.Module):
    """What `quantize_layer_` adds to a layer's class."""

    weight_quantizers: nn.ModuleDict  # by tensor: `weight`, or `query`, `key`, `value` of a fused weight
    weight_rows: Any  # tensor -> Rows
    input_quantizer: LSQQuantizer | None

    @property
    def weight(self) -> Tensor:
        """The fake-quantized weight; the latent one is in `_parameters`."""
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

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, on the quantized input."""
        return super().forward(x if self.input_quantizer is None else self.input_quantizer(x), *args, **kwargs)


def quantize_layer_(
    module: nn.Module, weights: Mapping[str, tuple[Rows, LSQQuantizer]], input_quantizer: LSQQuantizer | None
) -> None:
    """Quantize a layer's weight and input from now on, until `restore_layer_`.

    `weights` has the quantizer of each part of the weight, by name, with its rows; empty where it stays in floating
    point.
    """
    layer: Any = module
    original: Any = type(module)
    ordered = sorted(weights.items(), key=lambda item: item[1][0] or (0, 0))
    layer.weight_quantizers = nn.ModuleDict({tensor: quantizer for tensor, (_, quantizer) in ordered})
    layer.weight_rows = {tensor: rows for tensor, (rows, _) in ordered}
    layer.input_quantizer = input_quantizer
    layer.__class__ = _quantized_class(original)


def restore_layer_(module: nn.Module) -> None:
    """Undo `quantize_layer_`; the latent weight is the layer's weight again."""
    assert isinstance(module, _QuantizedLayer)
    del module.weight_quantizers, module.weight_rows, module.input_quantizer
    module.__class__ = type(module).__bases__[1]


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


@cache
def _quantized_class(original: Any) -> Any:
    return type(f"Quantized{original.__name__}", (_QuantizedLayer, original), {"__module__": original.__module__})
