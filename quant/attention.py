"""Inside attention: the operands of its two matrix products and its softmax, which no module holds.

timm computes attention in two ways. Fused, `scaled_dot_product_attention` gets query, key and value and shows nothing
of the softmax; explicit, a matrix product, a softmax and a second product follow each other. One TorchFunctionMode
sees both while a module's forward runs, and can replace what it sees. torch's own `multi_head_attention_forward` and
products by einsum are written as these first (`quant.rewrites`).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quant.mixed_classes import Mixed, class_without, mix_in_, take_out_
from quant.multihead import attention_and_weights, without_fast_path
from quant.rewrites import rewritten

MATMULS = (
    torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm
)  # fmt: skip
SOFTMAXES = (F.softmax, torch.softmax, torch.Tensor.softmax, torch.special.softmax)
FUSED = (F.scaled_dot_product_attention, attention_and_weights)
"""What gets query, key and value, and shows nothing of the softmax."""

Handler = Callable[[Tensor], Tensor | None]
"""Sees a tensor on its way; what it returns takes the tensor's place, None leaves it."""


@dataclass(frozen=True, kw_only=True)
class AttentionForm:
    """How one attention module computes: fused, or which of its matrix products and softmaxes are attention's.

    Places count the matrix products of two activations, or the softmaxes, that run in one call of the module, those of
    its submodules included. There may be several of each: cascaded attention computes head after head.
    """

    module: str
    fused: bool
    scores: frozenset[int] = frozenset()  # products query key^T
    softmaxes: frozenset[int] = frozenset()
    values: frozenset[int] = frozenset()  # products attention value
    values_first: frozenset[int] = frozenset()  # products value^T attention^T, of networks with channels before tokens


@contextmanager
def fused_where_offered(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let modules with timm's `fused_attn` switch use the fused form, which hands over query before 1/sqrt(d)."""
    switched = _switched_off(modules)
    try:
        for module in switched:
            module.fused_attn = True
        yield
    finally:
        for module in switched:
            module.fused_attn = False


def _switched_off(modules: Iterable[nn.Module]) -> list[Any]:
    return [module for module in modules if getattr(module, "fused_attn", None) is False]


class AttentionMode(TorchFunctionMode):
    """Calls handlers on query, key, value and attention while ONE call of an attention module runs.

    Fused attention is computed by its formula, since the kernel has no softmax to show (Vaswani et al., NeurIPS 2017,
    arXiv:1706.03762). Matrix products and softmaxes are counted, to know those of the form. Handlers get query
    (..., queries, d), key (..., keys, d), value (..., keys, d') and attention (..., queries, keys).
    """

    def __init__(self, form: AttentionForm, handlers: Mapping[str, Handler]) -> None:
        super().__init__()
        self.form, self.handlers, self.products, self.softmaxes = form, handlers, 0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = rewritten(func, args, kwargs)
        if formula is not None:
            with self:
                return formula()
        form, handlers = self.form, self.handlers
        if form.fused and handlers:
            if func is attention_and_weights:
                return _explicit(handlers, *args, **kwargs)
            if func is F.scaled_dot_product_attention:
                return explicit_attention(handlers, *args, **kwargs)
        elif func in SOFTMAXES:
            self.softmaxes += 1
            if self.softmaxes - 1 in form.softmaxes:
                return _handled(handlers, "attention", func(*args, **kwargs))
        elif func in MATMULS and is_product_of_activations(args):
            self.products += 1
            place, (left, right) = self.products - 1, args
            if place in form.scores:
                key = _handled(handlers, "key", right.transpose(-2, -1))  # not mT, which exporters do not know
                return func(_handled(handlers, "query", left), key.transpose(-2, -1))
            if place in form.values:
                return func(left, _handled(handlers, "value", right))
            if place in form.values_first:
                return func(_handled(handlers, "value", left.transpose(-2, -1)).transpose(-2, -1), right)
        return func(*args, **kwargs)


class _OpenedAttention(Mixed):
    """What `open_attention_` adds to an attention module's class: its forward runs under an AttentionMode."""

    prefix = "Opened"

    attention_form: Any  # AttentionForm; Any, as nn.Module's attributes are tensors and modules to a type checker
    attention_handlers: Any  # list of mappings from tensor to handler; the one opened last sees a tensor first
    attention_switched: Any  # list of the modules, itself or inside it, whose `fused_attn` was switched on

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        handlers: dict[str, Handler] = {}
        for opened in reversed(self.attention_handlers):
            for tensor, handler in opened.items():
                handlers[tensor] = _in_turn(handlers[tensor], handler) if tensor in handlers else handler
        with AttentionMode(self.attention_form, handlers):
            if not isinstance(self, nn.MultiheadAttention):
                return super().forward(*args, **kwargs)
            with without_fast_path():
                return super().forward(*args, **kwargs)


def open_attention_(module: nn.Module, form: AttentionForm, handlers: Mapping[str, Handler] | nn.ModuleDict) -> None:
    """Let handlers (by tensor) see, and replace, what flows inside the attention module, until `close_attention_`.

    The module becomes a dynamic subclass of its own class, whose forward stays as written. timm's `fused_attn` switch
    is set where there is one, for the fused form hands over query before 1/sqrt(d). A module may be opened again.
    """
    opened: Any = module  # to a type checker, nn.Module's attributes are tensors and modules
    if not isinstance(module, _OpenedAttention):
        mix_in_(module, _OpenedAttention)
        opened.attention_form, opened.attention_handlers = form, []
        opened.attention_switched = _switched_off(module.modules()) if form.fused else []
        for switched in opened.attention_switched:
            switched.fused_attn = True
    opened.attention_handlers.append(handlers)


def close_attention_(module: nn.Module) -> None:
    """Undo the last `open_attention_` of the module."""
    assert isinstance(module, _OpenedAttention)
    module.attention_handlers.pop()
    if module.attention_handlers:
        return
    for switched in module.attention_switched:
        switched.fused_attn = False
    del module.attention_form, module.attention_handlers, module.attention_switched
    take_out_(module, _OpenedAttention)


def closed_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the module returns when nothing inside its attention is replaced; without hooks."""
    return class_without(module, _OpenedAttention).forward(module, *args, **kwargs)


def _in_turn(first: Handler, second: Handler) -> Handler:
    def both(x: Tensor) -> Tensor | None:
        replaced = first(x)
        again = second(x if replaced is None else replaced)
        return replaced if again is None else again

    return both


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
    return _explicit(handlers, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)[0]


def _explicit(
    handlers: Mapping[str, Handler],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """The result of `explicit_attention`, and the attention that value was multiplied by."""
    query, key, value = (_handled(handlers, name, x) for name, x in (("query", query), ("key", key), ("value", value)))
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), dim=-3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), dim=-3)
    scores = (query * (1 / math.sqrt(query.size(-1)) if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    # In place where it changes neither shape nor dtype: scores are the largest tensors of the pass.
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores.masked_fill_(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        same = attn_mask.dtype == scores.dtype and attn_mask.ndim <= scores.ndim
        scores = scores.add_(attn_mask) if same else scores + attn_mask
    if attn_mask is None:
        attention = scores.softmax(dim=-1)
    else:  # a row that is masked altogether attends to nothing, as in torch's own function, and has no gradient
        empty = (scores == float("-inf")).all(dim=-1, keepdim=True)
        attention = scores.masked_fill_(empty, 0.0).softmax(dim=-1)
        del scores
        attention = attention.masked_fill(empty, 0.0)
    attention = _handled(handlers, "attention", attention)
    attention = F.dropout(attention, dropout_p, training=dropout_p > 0)
    return attention @ value, attention
