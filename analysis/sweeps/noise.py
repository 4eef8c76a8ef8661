"""Signal-to-quantization-noise ratio of a tensor, and of the output of the module that it belongs to."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quant.attention import closed_forward
from quant.products import first_tensor
from quant.quantizer import Quantizer


class Noise:
    """Signal and noise power of a tensor and its quantized form, summed in float64."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0
        self.seen = False

    def add(self, clean: Tensor, noisy: Tensor, signal: float | None = None) -> None:
        """Add one tensor and its noisy form, of the same shape; `signal` is the clean one's power where it is known."""
        self.seen = True
        self.signal += power(clean) if signal is None else signal
        self.noise += power(clean - noisy)

    @property
    def sqnr_db(self) -> float:
        """10 log10(E[x^2] / E[(x - x_q)^2]); inf where nothing was lost, NaN where there was no signal."""
        if self.signal == 0:
            return math.nan
        return math.inf if self.noise == 0 else 10 * math.log10(self.signal / self.noise)


def power(x: Tensor) -> float:
    """The sum of the squares, in float64."""
    return torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2


class MeasuredQuantizer:
    """A quantizer that adds up, in `tensor_noise`, what it does to its tensor."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer, self.tensor_noise = quantizer, Noise()

    def __call__(self, x: Tensor) -> Tensor:
        """`x` on the grid."""
        x_q = self.quantizer(x)
        self.tensor_noise.add(x, x_q)
        return x_q


class CleanOutputs:
    """Outputs of `module` on the clean batches, in their order, as many as fit into `room` bytes."""

    def __init__(self, module: str, room: int) -> None:
        self.module, self.room = module, room
        self._kept: list[tuple[Tensor, float]] = []  # each with its power
        self._full = False

    def get(self, place: int) -> tuple[Tensor, float] | None:
        """The output for the batch in this place, and its power; None where it was not kept."""
        return self._kept[place] if place < len(self._kept) else None

    def keep(self, place: int, output: Tensor, signal: float) -> None:
        """Keep the output of the next batch, and its power, unless there is no more room."""
        self.room -= output.numel() * output.element_size()
        self._full |= self.room < 0
        if place == len(self._kept) and not self._full:
            self._kept.append((output, signal))


@contextmanager
def output_noise(
    model: nn.Module, name: str, weight: nn.Parameter | None, outputs: CleanOutputs, parameter: str = "weight"
) -> Iterator[Noise]:
    """Compare each output of a module, its first tensor, with what it gives on the same, untouched input and `weight`.

    `parameter` is the weight's name in the module. The module's forward runs a second time, without hooks, where
    `outputs` has not kept what it gave. Its input must be the clean one: no earlier site is quantized, and the module
    is called once a batch.
    """
    module, noise = model.get_submodule(name), Noise()
    clean: list[tuple[Any, Any]] = []
    place = 0

    def keep(_module: nn.Module, args: Any, kwargs: Any) -> None:
        clean.append((args, kwargs))

    def compare(module: nn.Module, _args: Any, output: Any) -> None:
        nonlocal place
        args, kwargs = clean.pop()
        found = first_tensor(output)
        if found is None:
            return
        kept = outputs.get(place)
        if kept is None:
            expected = _on_clean_input(module, parameter, weight, args, kwargs)
            kept = expected, power(expected)
            outputs.keep(place, *kept)
        place += 1
        noise.add(kept[0], found[1], kept[1])

    before = module.register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
    after = module.register_forward_hook(compare)
    try:
        yield noise
    finally:
        before.remove()
        after.remove()


def _on_clean_input(module: nn.Module, name: str, weight: nn.Parameter | None, args: Any, kwargs: Any) -> Tensor:
    current = module._parameters.get(name)
    try:
        if weight is not None:
            module._parameters[name] = weight
        with torch._C.DisableTorchFunction():  # nothing that replaces tensors between modules acts here
            found = first_tensor(closed_forward(module, *args, **kwargs))
        assert found is not None  # it returned one before
        return found[1]
    finally:
        if weight is not None:
            module._parameters[name] = current
