"""What runs in one forward pass: which sites, in which order, of what shape, and how attention is computed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quant.attention import MATMULS, SOFTMAXES, AttentionForm, fused_where_offered, is_product_of_activations
from quant.site import Site


@dataclass(kw_only=True)
class Trace:
    """One forward pass of `images` images.

    `shapes` has every site that was executed (inputs, outputs, and on attention modules query, key, value,
    attention), in order of execution, with the shape of its first call; `elements` counts those of all its calls.
    `functional` are linears whose weight is used without calling them; `qkv_parts` maps a fused qkv linear to the rows
    of its query, key and value, found by comparing its output with the operands.
    """

    images: int
    shapes: dict[Site, tuple[int, ...]] = field(default_factory=dict)
    elements: dict[Site, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    attention: dict[str, AttentionForm] = field(default_factory=dict)
    functional: set[str] = field(default_factory=set)
    qkv_parts: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)


@dataclass
class _Frame:
    """A module whose forward is running, and what its own attention did so far."""

    name: str
    owns_parameters: bool
    products: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    linears: dict[str, Tensor] = field(default_factory=dict)
    softmax: tuple[Tensor, Tensor] | None = None
    softmax_after: int = 0
    attended: bool = False


class _Probe(TorchFunctionMode):
    def __init__(self, trace: Trace, model: nn.Module) -> None:
        super().__init__()
        self.trace = trace
        self.frames: list[_Frame] = []
        self.weights = {id(m.weight): name for name, m in model.named_modules() if isinstance(m, nn.Linear)}

    def owner(self) -> _Frame | None:
        """The innermost running module that owns parameters: the softmax of a bare `nn.Softmax` is its parent's."""
        return next((frame for frame in reversed(self.frames) if frame.owns_parameters), None)

    def record(self, module: str, tensor: str, x: Any) -> None:
        if isinstance(x, Tensor):
            self.record_shape(module, tensor, tuple(x.shape))

    def record_shape(self, module: str, tensor: str, shape: tuple[int, ...]) -> None:
        site = Site(module, tensor)
        self.trace.shapes.setdefault(site, shape)
        self.trace.elements[site] = self.trace.elements.get(site, 0) + prod(shape)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        frame = self.owner()
        if func is F.linear:
            return self._linear(func, args, kwargs)
        if frame is None:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._fused(frame, func, args, kwargs)
        result = func(*args, **kwargs)
        if func in MATMULS and is_product_of_activations(args):
            self._product(frame, args, result)
        elif func in SOFTMAXES and frame.products and args[0].shape == frame.products[-1][2].shape:
            frame.softmax, frame.softmax_after = (frame.products[-1][0], result), len(frame.products)
        return result

    def _linear(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        x = args[0] if args else kwargs["input"]
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        result = func(*args, **kwargs)
        name = self.weights.get(id(weight))
        if name is None:
            return result
        running = any(frame.name == name for frame in self.frames)
        if not running:
            self.trace.functional.add(name)
            self.trace.calls[name] = self.trace.calls.get(name, 0) + 1
            self.record(name, "input", x)
            self.record(name, "output", result)
        for frame in self.frames:
            if frame.name != name:
                frame.linears[name] = result
        return result

    def _fused(self, frame: _Frame, func: Any, args: Any, kwargs: Any) -> Tensor:
        operands = [args[i] if i < len(args) else kwargs[n] for i, n in enumerate(("query", "key", "value"))]
        query, key, value = operands
        self.trace.attention.setdefault(frame.name, AttentionForm(module=frame.name, fused=True))
        self._record_attention(frame, query, key, value, (*query.shape[:-1], key.shape[-2]))
        return func(*args, **kwargs)

    def _product(self, frame: _Frame, args: Any, result: Tensor) -> None:
        frame.products.append((args[0], args[1], result))
        if frame.softmax is None or args[0].shape != frame.softmax[1].shape or frame.attended:
            return
        frame.attended = True
        score, value_index = frame.softmax_after - 1, len(frame.products) - 1
        self.trace.attention.setdefault(
            frame.name, AttentionForm(module=frame.name, fused=False, score_matmul=score, value_matmul=value_index)
        )
        query, key_transposed, _ = frame.products[score]
        self._record_attention(frame, query, key_transposed.transpose(-2, -1), args[1], tuple(args[0].shape))

    def _record_attention(
        self, frame: _Frame, query: Tensor, key: Tensor, value: Tensor, attention: tuple[int, ...]
    ) -> None:
        for tensor, x in (("query", query), ("key", key), ("value", value)):
            self.record(frame.name, tensor, x)
        self.record_shape(frame.name, "attention", attention)
        for name, output in frame.linears.items():
            parts = _equal_parts_by_head(output, query, key, value)
            if parts:
                self.trace.qkv_parts[name] = parts


def _equal_parts_by_head(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor
) -> dict[str, tuple[int, int]] | None:
    """Rows of query, key, value where `output` (batch, tokens, 3 heads d) holds `value` as its last third, by head.

    Query and key may have been normalised or rotated since, so they are only checked not to have changed places.
    """
    if value.ndim != 4:
        return None
    batch, heads, tokens, d = value.shape
    width = heads * d
    if output.shape[-1] != 3 * width or output.numel() != batch * tokens * 3 * width:
        return None
    thirds = output.reshape(batch, tokens, 3, heads, d).permute(2, 0, 3, 1, 4)
    if not torch.equal(thirds[2], value) or torch.equal(thirds[0], key) or torch.equal(thirds[1], query):
        return None
    return {"query": (0, width), "key": (width, 2 * width), "value": (2 * width, 3 * width)}


def trace_forward(model: nn.Module, images: Tensor) -> Trace:
    """What one forward pass of `images` (batch, channels, height, width) executes; the model is left as it was."""
    trace = Trace(images=len(images))
    probe = _Probe(trace, model)
    handles = []

    def enter(name: str, owns_parameters: bool) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            probe.frames.append(_Frame(name, owns_parameters))
            trace.calls[name] = trace.calls.get(name, 0) + 1
            probe.record(name, "input", args[0] if args else next(iter(kwargs.values()), None))

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            probe.frames.pop()
            probe.record(name, "output", output)

        return hook

    names = [name for name, _ in model.named_modules()]
    try:
        for name, module in model.named_modules():
            owns = next(module.parameters(), None) is not None
            handles.append(module.register_forward_pre_hook(enter(name, owns), with_kwargs=True))
            handles.append(module.register_forward_hook(leave(name)))
        with torch.no_grad(), fused_where_offered(model, names), probe:
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return trace
