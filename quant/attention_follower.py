"""Follows products and softmaxes through a forward pass, to find those that are attention."""

from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from quant.attention_search import (
    NO_SCORES,
    CallFrame,
    MatrixProduct,
    SoftmaxResult,
    equal_parts_by_head,
    why_not_attention,
)  # fmt: skip
from quant.products import Product
from quant.recorder import Recorder
from quant.site import Site

if TYPE_CHECKING:
    from quant.trace import Trace


class AttentionFollower(Recorder):
    """Follows products and softmaxes through all that keeps the number of elements: scaling, masks, views, mixed heads.

    `origins` says of which products and softmaxes a tensor is made, for as long as the tensor lives.
    """

    def __init__(self, trace: "Trace", layers: set[str]) -> None:
        super().__init__(trace, layers)
        self.origins: Any = WeakTensorKeyDictionary()

    def _origins(self, x: Any) -> list[MatrixProduct | SoftmaxResult]:
        return self.origins.get(x, []) if isinstance(x, Tensor) and len(self.origins) else []

    def _pass_on(self, args: tuple[Any, ...], result: Tensor) -> None:
        found = dict.fromkeys(origin for x in args for origin in self._origins(x) if x.numel() == result.numel())
        if found:
            self.origins[result] = list(found)

    def _fused(self, frame: CallFrame, query: Tensor, key: Tensor, value: Tensor) -> None:
        frame.fused = True
        attention = (*query.shape[:-1], key.shape[-2])
        for tensor, x in (("query", query), ("key", key), ("value", value)):
            self.record(frame.name, tensor, x)
        self.record_shape(frame.name, "attention", attention)
        samples = self.trace.samples_in(attention)
        self.count(frame.name, "query", prod(attention) * query.shape[-1] // samples)
        self.count(frame.name, "attention", prod(attention) * value.shape[-1] // samples)
        self._find_parts(frame, query, key, value)

    def _softmax(self, owner: CallFrame, x: Tensor, result: Tensor, *, over_last_axis: bool) -> None:
        scores = [o for o in self._origins(x) if isinstance(o, MatrixProduct) and o.frame in self.frames]
        frame = scores[0].frame if scores else owner
        if x.ndim >= 2:
            self.origins[result] = [SoftmaxResult(frame, frame.softmaxes, result, over_last_axis, scores)]
        for running in self.frames:
            running.softmaxes += 1

    def _refuse(self, args: tuple[Any, ...], reason: str) -> None:
        """Say why a softmax's result that is in a product of another kind is no site."""
        for softmax in (o for x in args for o in self._origins(x) if isinstance(o, SoftmaxResult)):
            self.trace.unobserved[softmax.frame.name] = reason

    def _product(self, owner: CallFrame, left: Tensor, right: Tensor, result: Tensor, product: Product) -> None:
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
                self._attend(softmax, weights, value, product, value_first=first)
        self.origins[result] = [MatrixProduct(owner, owner.products, left, right, product)]
        for running in self.frames:
            running.products += 1

    def _attend(
        self, softmax: SoftmaxResult, weights: Tensor, value: Tensor, product: Product, *, value_first: bool
    ) -> None:
        frame, scores, attention = softmax.frame, softmax.scores[0], softmax.result
        query, key = scores.left, scores.right.mT
        if frame.is_new("scores", scores.place):
            self.record(frame.name, "query", query)
            self.record(frame.name, "key", key)
            self._claim(frame.name, "query", scores.product)
        if frame.is_new("values_first" if value_first else "values", frame.products):
            self.record(frame.name, "value", value)
            self._claim(frame.name, "attention", product)
        if frame.is_new("softmaxes", softmax.place):
            self.record(frame.name, "attention", attention)
        if weights.shape != attention.shape or not torch.equal(weights, attention):
            note = "changed between the softmax and the product with value (heads mixed, or a gate)"
            if weights.numel() != attention.numel() or not torch.equal(weights.reshape_as(attention), attention):
                self.trace.notes[Site(frame.name, "attention")] = note
        self._find_parts(frame, query, key, value)

    def _claim(self, module: str, tensor: str, product: Product) -> None:
        if product in self.products:
            self.products.remove(product)
            self.count(module, tensor, product.macs)

    def _find_parts(self, frame: CallFrame, query: Tensor, key: Tensor, value: Tensor) -> None:
        for name, output in frame.linears.items():
            parts = equal_parts_by_head(output, query, key, value)
            if parts:
                self.trace.qkv_parts[name] = parts

    def _finish_attention(self) -> None:
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
            macs = self.trace.macs.pop(site, 0)
            if macs:
                self.trace.unplanned[site.module] = self.trace.unplanned.get(site.module, 0) + macs
            for table in (self.trace.shapes, self.trace.other_shapes, self.trace.elements, self.trace.notes):
                table.pop(site, None)
