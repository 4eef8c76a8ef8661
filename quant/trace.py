"""What runs in one forward pass: which sites, in which order, of what shape, and how attention is computed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from quant import batches
from quant.attention import MATMULS, SOFTMAXES, AttentionForm, fused_where_offered, is_product_of_activations
from quant.attention_search import (
    NO_SCORES,
    CallFrame,
    Product,
    SoftmaxResult,
    equal_parts_by_head,
    why_not_attention,
)  # fmt: skip
from quant.site import Site

LAYER_FUNCTIONS = (F.linear, F.conv1d, F.conv2d, F.conv3d)
"""What a layer's weight is used by where the layer itself is not called; input and weight come first."""


@dataclass(kw_only=True)
class Trace:
    """One forward pass of `images` images.

    `shapes` has every site that was executed (inputs, outputs, and on attention modules query, key, value,
    attention), in order of execution, with the shape of its first call; `other_shapes` those of later calls that
    differ; `elements` counts the elements of all calls; `notes` says what else is to be known of a site.
    `macs` are the multiply-accumulates of query x key, at `query`, and of attention x value, at `attention`.
    `unobserved` are the modules that multiply an activation by a softmax's result where no attention is handed over,
    each with the reason. `functional` are layers whose weight is used without calling them; `qkv_parts` maps a fused
    qkv linear to the rows of its query, key and value, found by comparing its output with the operands. `same` maps
    the input of a layer to the earlier one that is the very same tensor, as of the two branches of a residual block.
    """

    images: int
    shapes: dict[Site, tuple[int, ...]] = field(default_factory=dict)
    other_shapes: dict[Site, set[tuple[int, ...]]] = field(default_factory=dict)
    elements: dict[Site, int] = field(default_factory=dict)
    macs: dict[Site, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    attention: dict[str, AttentionForm] = field(default_factory=dict)
    unobserved: dict[str, str] = field(default_factory=dict)
    functional: set[str] = field(default_factory=set)
    qkv_parts: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    notes: dict[Site, str] = field(default_factory=dict)
    same: dict[Site, Site] = field(default_factory=dict)


class _Probe(TorchFunctionMode):
    """Follows products and softmaxes through all that keeps the number of elements: scaling, masks, views, mixed heads.

    `origins` says of which products and softmaxes a tensor is made, for as long as the tensor lives.
    """

    def __init__(self, trace: Trace, model: nn.Module) -> None:
        super().__init__()
        self.trace = trace
        self.frames: list[CallFrame] = []
        self.forms: dict[str, AttentionForm] = {}
        self.origins: Any = WeakTensorKeyDictionary()
        self.readers: Any = WeakTensorKeyDictionary()
        self.weights: dict[int, list[str]] = {}
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                self.weights.setdefault(id(module._parameters.get("weight")), []).append(name)
        self.weights.pop(id(None), None)
        self.layers = {name for names in self.weights.values() for name in names}

    def enter(self, frame: CallFrame) -> None:
        self.frames.append(frame)
        self.trace.calls[frame.name] = self.trace.calls.get(frame.name, 0) + 1

    def leave(self) -> None:
        form = self.frames.pop().form()
        before = self.forms.setdefault(form.module, form)
        if form == before:
            return
        self.forms[form.module] = form if form.fused else before
        if form.values or form.values_first or before.values or before.values_first:
            self.trace.unobserved[form.module] = "its calls compute attention in different ways"

    def owner(self) -> CallFrame | None:
        """The innermost running module that owns parameters: the softmax of a bare `nn.Softmax` is its parent's."""
        return next((frame for frame in reversed(self.frames) if frame.owns_parameters), None)

    def record(self, module: str, tensor: str, x: Any) -> None:
        found = first_tensor(x)
        if found is not None:
            self.record_shape(module, tensor, tuple(found[1].shape))
            if tensor == "input" and module in self.layers:
                self._note_reader(Site(module, tensor), found[1])
            if found[0] is not None:
                returned = f"the first tensor of a {type(x).__name__} of {len(x)}"
                self.trace.notes[Site(module, tensor)] = returned

    def _note_reader(self, site: Site, x: Tensor) -> None:
        first, version = self.readers.get(x, (site, x._version))
        if version != x._version:  # changed in place since
            first = site
        self.readers[x] = (first, x._version)
        if first != site:
            self.trace.same[site] = first

    def record_shape(self, module: str, tensor: str, shape: tuple[int, ...]) -> None:
        site = Site(module, tensor)
        if self.trace.shapes.setdefault(site, shape) != shape:
            self.trace.other_shapes.setdefault(site, set()).add(shape)
        self.trace.elements[site] = self.trace.elements.get(site, 0) + prod(shape)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in LAYER_FUNCTIONS:
            self._layer(_argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight"), result)
        elif isinstance(result, (Tensor, tuple)):
            self._note_weights(func, (*args, *kwargs.values()))
        owner = self.owner()
        if owner is None:
            return result
        if func is F.scaled_dot_product_attention:
            self._fused(owner, *(_argument(args, kwargs, i, name) for i, name in enumerate(("query", "key", "value"))))
        elif func in SOFTMAXES:
            x, axis = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "dim")
            self._softmax(owner, x, result, over_last_axis=axis in (-1, x.ndim - 1))
        elif func in MATMULS and is_product_of_activations(args):
            self._product(owner, args[0], args[1], result)
        elif func in MATMULS:
            self._refuse(args, "its matrix products are over the whole batch")
        elif func is torch.einsum:
            self._refuse(args, "its matrix products are written by einsum")
        elif func is F.multi_head_attention_forward:
            self.trace.unobserved[owner.name] = "torch computes it in one function, multi_head_attention_forward"
        elif isinstance(result, Tensor) and len(self.origins):
            self._pass_on((*args, *kwargs.values()), result)
        return result

    def _origins(self, x: Any) -> list[Product | SoftmaxResult]:
        return self.origins.get(x, []) if isinstance(x, Tensor) and len(self.origins) else []

    def _pass_on(self, args: tuple[Any, ...], result: Tensor) -> None:
        found = dict.fromkeys(origin for x in args for origin in self._origins(x) if x.numel() == result.numel())
        if found:
            self.origins[result] = list(found)

    def _layer(self, x: Tensor, weight: Tensor, result: Tensor) -> None:
        """A linear or convolution: called, unless its own module is not running."""
        names = self.weights.get(id(weight), [])
        if not names:
            return
        running = [frame.name for frame in self.frames if frame.name in names]
        name = running[-1] if running else names[0]
        if not running:
            self.trace.functional.add(name)
            self.trace.calls[name] = self.trace.calls.get(name, 0) + 1
            self.record(name, "input", x)
            self.record(name, "output", result)
        for frame in self.frames:
            if frame.name != name:
                frame.linears[name] = result if weight.ndim == 2 else result.movedim(1, -1)  # channels last

    def _note_weights(self, func: Any, args: tuple[Any, ...]) -> None:
        """Say which layers give their weight to another function than a layer's own, without running."""
        for names in (self.weights[id(x)] for x in args if id(x) in self.weights):
            if not any(frame.name in names for frame in self.frames):
                note = f"used by {getattr(func, '__name__', func)} without being called: its weight only"
                self.trace.notes.setdefault(Site(names[0], "weight"), note)

    def _fused(self, frame: CallFrame, query: Tensor, key: Tensor, value: Tensor) -> None:
        frame.fused = True
        attention = (*query.shape[:-1], key.shape[-2])
        for tensor, x in (("query", query), ("key", key), ("value", value)):
            self.record(frame.name, tensor, x)
        self.record_shape(frame.name, "attention", attention)
        self._count(frame, "query", prod(attention) * query.shape[-1])
        self._count(frame, "attention", prod(attention) * value.shape[-1])
        self._find_parts(frame, query, key, value)

    def _softmax(self, owner: CallFrame, x: Tensor, result: Tensor, *, over_last_axis: bool) -> None:
        scores = [o for o in self._origins(x) if isinstance(o, Product) and o.frame in self.frames]
        frame = scores[0].frame if scores else owner
        if x.ndim >= 2:
            self.origins[result] = [SoftmaxResult(frame, frame.softmaxes, result, over_last_axis, scores)]
        for running in self.frames:
            running.softmaxes += 1

    def _refuse(self, args: tuple[Any, ...], reason: str) -> None:
        """Say why a softmax's result that is in a product of another kind is no site."""
        for softmax in (o for x in args for o in self._origins(x) if isinstance(o, SoftmaxResult)):
            self.trace.unobserved[softmax.frame.name] = reason

    def _product(self, owner: CallFrame, left: Tensor, right: Tensor, result: Tensor) -> None:
        first = not any(isinstance(o, SoftmaxResult) for o in self._origins(left))
        weights, value = (right.mT, left.mT) if first else (left, right)
        softmaxes = [o for o in self._origins(right if first else left) if isinstance(o, SoftmaxResult)]
        proper = [s for s in softmaxes if s.scores]  # a map of positions may be mixed in, as in ConViT
        reasons = (why_not_attention(softmax, weights, self.frames) for softmax in proper or softmaxes)
        reason = next(filter(None, reasons), "")
        if reason:
            self.trace.unobserved[(proper or softmaxes)[0].frame.name] = reason
        else:
            for softmax in proper:
                self._attend(softmax, weights, value, result, value_first=first)
        self.origins[result] = [Product(owner, owner.products, left, right)]
        for running in self.frames:
            running.products += 1

    def _attend(
        self, softmax: SoftmaxResult, weights: Tensor, value: Tensor, result: Tensor, *, value_first: bool
    ) -> None:
        frame, scores, attention = softmax.frame, softmax.scores[0], softmax.result
        query, key = scores.left, scores.right.mT
        if frame.is_new("scores", scores.place):
            self.record(frame.name, "query", query)
            self.record(frame.name, "key", key)
            self._count(frame, "query", attention.numel() * query.shape[-1])
        if frame.is_new("values_first" if value_first else "values", frame.products):
            self.record(frame.name, "value", value)
            self._count(frame, "attention", result.numel() * weights.shape[-1])
        if frame.is_new("softmaxes", softmax.place):
            self.record(frame.name, "attention", attention)
        if weights.shape != attention.shape or not torch.equal(weights, attention):
            note = "changed between the softmax and the product with value (heads mixed, or a gate)"
            if weights.numel() != attention.numel() or not torch.equal(weights.reshape_as(attention), attention):
                self.trace.notes[Site(frame.name, "attention")] = note
        self._find_parts(frame, query, key, value)

    def _count(self, frame: CallFrame, tensor: str, macs: int) -> None:
        site = Site(frame.name, tensor)
        self.trace.macs[site] = self.trace.macs.get(site, 0) + macs

    def _find_parts(self, frame: CallFrame, query: Tensor, key: Tensor, value: Tensor) -> None:
        for name, output in frame.linears.items():
            parts = equal_parts_by_head(output, query, key, value)
            if parts:
                self.trace.qkv_parts[name] = parts

    def finish(self) -> None:
        """Keep the attention that can be observed; the rest gets its reason and no sites."""
        attention = {n: form for n, form in self.forms.items() if form.fused or form.values or form.values_first}
        for name, form in attention.items():
            inside = [
                other for other in attention if other != name and f"{other}.".startswith(f"{name}." if name else "")
            ]
            if inside:
                self.trace.unobserved[name] = f"another attention is inside it, {inside[0]}"
            elif form.fused and (form.values or form.values_first):
                self.trace.unobserved[name] = "it computes attention both fused and by its formula"
            elif self.trace.unobserved.get(name) == NO_SCORES:  # a pooling beside an attention that is known
                del self.trace.unobserved[name]
        self.trace.attention = {n: form for n, form in attention.items() if n not in self.trace.unobserved}
        for site in [s for s in self.trace.shapes if s.is_attention and s.module in self.trace.unobserved]:
            for table in (
                self.trace.shapes,
                self.trace.other_shapes,
                self.trace.elements,
                self.trace.macs,
                self.trace.notes,
            ):
                table.pop(site, None)


def _argument(args: Any, kwargs: Any, place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def first_tensor(x: Any) -> tuple[Any, Tensor] | None:
    """The key and the first tensor of a tuple, list or dictionary; the key is None for a tensor; None without one."""
    if isinstance(x, Tensor):
        return None, x
    items = x.items() if isinstance(x, Mapping) else enumerate(x) if isinstance(x, (tuple, list)) else ()
    return next(((key, value) for key, value in items if isinstance(value, Tensor)), None)


def trace_forward(
    model: nn.Module,
    batch: Any,
    forward: Callable[[nn.Module, Any], Any] = batches.forward,
    samples: Callable[[Any], int] = batches.samples,
) -> Trace:
    """What one forward pass of `batch` executes; the model is left as it was."""
    trace = Trace(images=samples(batch))
    probe = _Probe(trace, model)
    handles = []

    def enter(name: str, owns_parameters: bool) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            probe.enter(CallFrame(name, owns_parameters))
            probe.record(name, "input", args[0] if args else next(iter(kwargs.values()), None))

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            probe.leave()
            probe.record(name, "output", output)

        return hook

    try:
        for name, module in model.named_modules():
            owns = next(module.parameters(), None) is not None
            handles.append(module.register_forward_pre_hook(enter(name, owns), with_kwargs=True))
            handles.append(module.register_forward_hook(leave(name)))
        with torch.no_grad(), fused_where_offered(list(model.modules())), probe:
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    probe.finish()
    return trace
