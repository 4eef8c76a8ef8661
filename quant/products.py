"""Products that a forward pass executes: which functions make them, and the multiply-accumulates of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from quant.attention import MATMULS

TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
LAYER_FUNCTIONS = (F.linear, F.conv1d, F.conv2d, F.conv3d, *TRANSPOSED)
"""What a layer's weight is used by where the layer itself is not called; input and weight come first."""
RECURRENT = {
    torch.lstm: "an LSTM", torch.gru: "a GRU", torch.rnn_tanh: "an RNN", torch.rnn_relu: "an RNN",
    torch.lstm_cell: "an LSTM cell", torch.gru_cell: "a GRU cell", torch.rnn_tanh_cell: "an RNN cell",
    torch.rnn_relu_cell: "an RNN cell",
}  # fmt: skip


class MacCounter(TorchDispatchMode):
    """Adds up, in `macs`, the multiply-accumulates of the operators that torch's own flop counter knows."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        flops = flop_registry.get(func._overloadpacket)
        if flops is not None:
            self.macs += flops(*args, **kwargs, out_val=result) // 2
        return result


@dataclass(eq=False)
class Product:
    """A product that no site has claimed yet: the module that executes it, and the parameters that take part in it."""

    module: str
    function: Any
    macs: int  # of one sample
    parameters: tuple[str, ...]

    @property
    def reason(self) -> str:
        """Why it stays in floating point."""
        name = str(getattr(self.function, "__name__", self.function)).strip("_")
        if self.function in RECURRENT:
            return f"{RECURRENT[self.function]} multiplies inside one kernel; its weights stay in floating point"
        if self.function is F.embedding_bag:
            return "an embedding bag adds rows of its table in one kernel; the table stays in floating point"
        if self.parameters:
            several = f" and {len(self.parameters) - 1} more" if len(self.parameters) > 1 else ""
            return (
                f"{name} multiplies by {self.parameters[0]}{several}, which no linear or convolution calls; it stays "
                "in floating point"
            )
        return f"{name} multiplies activations outside attention that is known; they stay in floating point"


def layer_macs(func: Any, x: Tensor, weight: Tensor, result: Tensor) -> int:
    """Of a linear or convolution: each element of the result, of the input where transposed, meets a row of weights."""
    return (x if func in TRANSPOSED else result).numel() * (weight.numel() // max(1, weight.shape[0]))


def kernel_macs(func: Any, args: tuple[Any, ...], result: Any) -> int | None:
    """Multiply-accumulates of functions that torch's counter does not know; None for functions that multiply nothing.

    A recurrent layer multiplies each of its matrices once a step.
    """
    if func in RECURRENT:
        given = [w for a in args[1:] if isinstance(a, (list, tuple)) for w in a] + [a for a in args if _is_tensor(a)]
        matrices = {id(w): w.numel() for w in given if _is_tensor(w) and w.ndim == 2 and w is not args[0]}
        steps = args[0].numel() // args[0].shape[-1]
        return steps * sum(n for i, n in matrices.items() if i not in _states(args))
    if func is F.bilinear:
        return result.numel() * (args[2].numel() // args[2].shape[0])
    if func is F.embedding_bag:
        return 0
    if func in MATMULS and all(map(_is_tensor, args)) and result.is_floating_point():
        return result.numel() * args[0].shape[-1]
    return None


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _states(args: tuple[Any, ...]) -> set[int]:
    """Hidden states, which are no weights, of an unbatched or single-step call."""
    first = args[1]
    return {id(x) for x in (first if isinstance(first, (list, tuple)) else (first,))}


def first_tensor(x: Any) -> tuple[Any, Tensor] | None:
    """The key and the first tensor of a tuple, list or dictionary; the key is None for a tensor; None without one."""
    if isinstance(x, Tensor):
        return None, x
    items = x.items() if isinstance(x, Mapping) else enumerate(x) if isinstance(x, (tuple, list)) else ()
    return next(((key, value) for key, value in items if isinstance(value, Tensor)), None)
