"""Inside attention: the operands of its two matrix products and its softmax, which no module holds.

timm computes attention in two ways. Fused, `scaled_dot_product_attention` gets query, key and value and shows nothing
of the softmax; explicit, a matrix product, a softmax and a second product follow each other. One TorchFunctionMode
sees both while a forward pass runs, and can replace what it sees.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

MATMULS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm)
SOFTMAXES = (F.softmax, torch.softmax, torch.Tensor.softmax)

Handler = Callable[[Tensor], Tensor | None]
"""Sees a tensor on its way; what it returns takes the tensor's place, None leaves it."""


@dataclass(frozen=True, kw_only=True)
class AttentionForm:
    """How one attention module computes: fused, or which of its matrix products make the scores and the result.

    `score_matmul` and `value_matmul` count the module's matrix products of two activations in one call; -1 if fused.
    """

    module: str
    fused: bool
    score_matmul: int = -1
    value_matmul: int = -1


class RunningModules:
    """The stack of attention modules whose forward is running, each with its count of matrix products so far."""

    def __init__(self) -> None:
        self.stack: list[tuple[str, list[int]]] = []

    @contextmanager
    def followed(self, model: nn.Module, names: Iterator[str] | list[str]) -> Iterator[None]:
        """Keep the stack while the block runs; hooks are removed on exit, also after an error."""
        handles = []

        def enter(name: str) -> Callable[..., None]:
            return lambda _module, _args: self.stack.append((name, [0]))

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            if self.stack:
                self.stack.pop()

        try:
            for name in names:
                module = model.get_submodule(name)
                handles.append(module.register_forward_pre_hook(enter(name)))
                handles.append(module.register_forward_hook(leave, always_call=True))
            yield
        finally:
            self.stack.clear()
            for handle in handles:
                handle.remove()


@contextmanager
def fused_where_offered(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Let modules with timm's `fused_attn` switch use the fused form, which hands over query before 1/sqrt(d)."""
    switched = [m for m in map(model.get_submodule, names) if getattr(m, "fused_attn", None) is False]
    try:
        for module in switched:
            module.fused_attn = True  # type: ignore[assignment]
        yield
    finally:
        for module in switched:
            module.fused_attn = False  # type: ignore[assignment]


class AttentionMode(TorchFunctionMode):
    """Calls handlers on query, key, value and attention of the running attention module.

    `handlers` maps a module's name to its handlers by tensor. Fused attention is computed by its formula, since the
    kernel has no softmax to show (Vaswani et al., NeurIPS 2017, arXiv:1706.03762).
    """

    def __init__(
        self, running: RunningModules, forms: Mapping[str, AttentionForm], handlers: Mapping[str, Mapping[str, Handler]]
    ) -> None:
        super().__init__()
        self.running, self.forms, self.handlers = running, forms, handlers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.running.stack:
            return func(*args, **kwargs)
        name, count = self.running.stack[-1]
        form, handlers = self.forms[name], self.handlers[name]
        if form.fused and func is F.scaled_dot_product_attention:
            return explicit_attention(handlers, *args, **kwargs)
        if form.fused:
            return func(*args, **kwargs)
        if func in MATMULS and is_product_of_activations(args):
            count[0] += 1
            if count[0] - 1 == form.score_matmul:
                key = _handled(handlers, "key", args[1].transpose(-2, -1)).transpose(-2, -1)
                return func(_handled(handlers, "query", args[0]), key)
            if count[0] - 1 == form.value_matmul:
                return func(args[0], _handled(handlers, "value", args[1]))
        result = func(*args, **kwargs)
        if func in SOFTMAXES and form.score_matmul < count[0] <= form.value_matmul:
            return _handled(handlers, "attention", result)
        return result


def is_product_of_activations(args: tuple[Any, ...]) -> bool:
    """Whether a matrix product's operands are two activations: stacks of matrices, neither a parameter."""
    return len(args) == 2 and all(
        isinstance(a, Tensor) and a.ndim >= 3 and not isinstance(a, nn.Parameter) for a in args
    )


def _handled(handlers: Mapping[str, Handler], tensor: str, x: Tensor) -> Tensor:
    handler = handlers.get(tensor)
    replaced = None if handler is None else handler(x)
    return x if replaced is None else replaced


def explicit_attention(
    handlers: Mapping[str, Handler],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention by its formula, softmax(query key^T / sqrt(d) + mask) value, through the handlers.

    Shapes: query (..., heads, queries, d), key and value (..., heads, keys, d). Arguments as torch's own function.
    """
    query, key, value = (_handled(handlers, name, x) for name, x in (("query", query), ("key", key), ("value", value)))
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), dim=-3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), dim=-3)
    scores = (query * (1 / math.sqrt(query.size(-1)) if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    attention = scores.softmax(dim=-1)
    if attn_mask is not None:  # a row that is masked altogether attends to nothing, as in torch's own function
        attention = attention.masked_fill(scores.isneginf().all(dim=-1, keepdim=True), 0.0)
    attention = _handled(handlers, "attention", attention)
    return F.dropout(attention, dropout_p, training=dropout_p > 0) @ value
