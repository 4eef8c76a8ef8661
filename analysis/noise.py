"""Signal-to-quantization-noise ratio of a tensor, and of the output of the module that it belongs to."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quant.attention import closed_forward
from quant.quantizer import Quantizer


class Noise:
    """Signal and noise power of a tensor and its quantized form, summed in float64."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0
        self.seen = False

    def add(self, clean: Tensor, noisy: Tensor) -> None:
        """Add one tensor and its noisy form, of the same shape."""
        self.seen = True
        self.signal += torch.linalg.vector_norm(clean, dtype=torch.float64).item() ** 2
        self.noise += torch.linalg.vector_norm(clean - noisy, dtype=torch.float64).item() ** 2

    @property
    def sqnr_db(self) -> float:
        """10 log10(E[x^2] / E[(x - x_q)^2]); inf where nothing was lost, NaN where there was no signal."""
        if self.signal == 0:
            return math.nan
        return math.inf if self.noise == 0 else 10 * math.log10(self.signal / self.noise)


class MeasuredQuantizer:
    """A quantizer that adds up, in `tensor_noise`, what it does to its tensor."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer, self.tensor_noise = quantizer, Noise()

    def __call__(self, x: Tensor) -> Tensor:
        """`x` on the grid."""
        x_q = self.quantizer(x)
        self.tensor_noise.add(x, x_q)
        return x_q


@contextmanager
def output_noise(model: nn.Module, name: str, weight: nn.Parameter | None) -> Iterator[Noise]:
    """Compare each output of a module with what it gives on the same, untouched input and `weight`.

    The module's forward runs a second time, without hooks. Its input must be the clean one: no earlier site is
    quantized, and the module is called once.
    """
    module, noise = model.get_submodule(name), Noise()
    clean: list[tuple[Any, Any]] = []

    def keep(_module: nn.Module, args: Any, kwargs: Any) -> None:
        clean.append((args, kwargs))

    def compare(module: nn.Module, _args: Any, output: Any) -> None:
        args, kwargs = clean.pop()
        if not isinstance(output, Tensor):
            return
        current = module._parameters.get("weight")
        try:
            if weight is not None:
                module._parameters["weight"] = weight
            noise.add(closed_forward(module, *args, **kwargs), output)
        finally:
            if weight is not None:
                module._parameters["weight"] = current

    before = module.register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
    after = module.register_forward_hook(compare)
    try:
        yield noise
    finally:
        before.remove()
        after.remove()
