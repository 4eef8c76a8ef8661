"""torch's own attention, `F.multi_head_attention_forward` and `nn.MultiheadAttention`, written in functions of torch.

torch computes it in one function, or in one kernel (the fast path), in which nothing can be seen or quantized. Written
as linears and `scaled_dot_product_attention` it is attention like any other to the TorchFunctionModes of this package.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Let `nn.MultiheadAttention` and `nn.TransformerEncoder` call their layers while the block runs."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def leave_fast_path_(model: nn.Module) -> None:
    """Let every `nn.TransformerEncoder` and its layers call the modules in them, until `return_to_fast_path_`."""
    for module in model.modules():
        for class_, name, value in _SWITCHES:
            if isinstance(module, class_) and "fast_path" not in vars(module) and hasattr(module, name):
                vars(module)["fast_path"] = getattr(module, name)
                setattr(module, name, value)


def return_to_fast_path_(model: nn.Module) -> None:
    """Undo `leave_fast_path_`."""
    for module in model.modules():
        for class_, name, _ in _SWITCHES:
            if isinstance(module, class_) and "fast_path" in vars(module):
                setattr(module, name, vars(module).pop("fast_path"))


_SWITCHES = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
"""What torch looks at before it takes the fast path, and the value with which it does not."""


def attention_and_weights(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """softmax(query key^T / sqrt(d) + mask) value, and the softmax, which `scaled_dot_product_attention` keeps.

    Shapes: query (batch, heads, queries, d), key and value (batch, heads, keys, d); `attn_mask`, a float mask that is
    added, (batch or 1, heads or 1, queries or 1, keys). A TorchFunctionMode sees the call as one of torch's functions.
    """
    if has_torch_function((query, key, value)):
        return handle_torch_function(
            attention_and_weights, (query, key, value), query, key, value, attn_mask=attn_mask, dropout_p=dropout_p
        )
    flat = query.shape[0] * query.shape[1]
    q, k, v = (x.reshape(flat, *x.shape[2:]) for x in (query, key, value))
    scaled = q * math.sqrt(1.0 / float(q.shape[-1]))
    if attn_mask is None:
        scores = torch.bmm(scaled, k.mT)
    else:
        mask = attn_mask[0] if attn_mask.shape[:2] == (1, 1) else attn_mask.reshape(flat, *attn_mask.shape[2:])
        scores = torch.baddbmm(mask, scaled, k.mT)
    weights = F.dropout(scores.softmax(dim=-1), dropout_p, training=dropout_p > 0)
    return torch.bmm(weights, v).view_as(query[..., : v.shape[-1]]), weights.view(*query.shape[:2], *weights.shape[1:])


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`F.multi_head_attention_forward`, with its arguments and results, through functions that can be observed.

    Shapes: query (queries, batch, embedding) or without batch, key and value (keys, batch, width). The projections are
    `F.linear` of (batch, tokens, width), one for each different tensor among query, key and value; the rest is
    `scaled_dot_product_attention`, or `attention_and_weights` where the weights are asked for.
    """
    batched = query.ndim == 3
    # The batch comes first from here on, as in other attention; the same tensor stays the same.
    turned = {id(x): x.transpose(0, 1) if batched else x.unsqueeze(0) for x in (query, key, value)}
    query, key, value = (turned[id(x)] for x in (query, key, value))
    key_padding_mask = key_padding_mask if batched or key_padding_mask is None else key_padding_mask.unsqueeze(0)
    batch, queries, width = query.shape
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    if is_causal and key_padding_mask is None and not need_weights:
        attn_mask = None  # `is_causal` says it all
    else:
        is_causal = is_causal and key_padding_mask is None
    mask, padding = _added(attn_mask, query), _added(key_padding_mask, query)
    if use_separate_proj_weight:
        assert q_proj_weight is not None
        assert k_proj_weight is not None
        assert v_proj_weight is not None
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        weights = (q_proj_weight, k_proj_weight, v_proj_weight)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    else:
        assert in_proj_weight is not None
        q, k, v = _projected(query, key, value, in_proj_weight, in_proj_bias)
    added = 0
    if bias_k is not None and bias_v is not None:
        k, v = (torch.cat([x, b.expand(batch, 1, -1)], dim=1) for x, b in ((k, bias_k), (v, bias_v)))
        added = 1
    size = width // num_heads
    q, k, v = (
        x.unflatten(-1, (num_heads, size)).transpose(1, 2)
        if static is None
        else static.view(batch, num_heads, static.shape[1], size)
        for x, static in ((q, None), (k, static_k), (v, static_v))
    )
    if add_zero_attn:
        k, v = (torch.cat([x, x.new_zeros(batch, num_heads, 1, size)], dim=2) for x in (k, v))
        added += 1
    merged = _merged(mask, padding, batch, num_heads, added)
    p = dropout_p if training else 0.0
    attention = None
    if need_weights:
        out, attention = attention_and_weights(q, k, v, attn_mask=merged, dropout_p=p)
    else:
        out = F.scaled_dot_product_attention(q, k, v, merged, p, is_causal)
    out = F.linear(out.transpose(1, 2).reshape(batch, queries, width), out_proj_weight, out_proj_bias)
    if attention is not None and average_attn_weights:
        attention = attention.mean(dim=1)
    if batched:
        return out.transpose(0, 1), attention
    return out.squeeze(0), None if attention is None else attention.squeeze(0)


def _added(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask as what is added to the scores: -inf where a boolean one says True."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))


def _merged(mask: Tensor | None, padding: Tensor | None, batch: int, heads: int, added: int) -> Tensor | None:
    """Both masks as one that broadcasts to (batch, heads, queries, keys), with `added` keys more."""
    if mask is not None:
        mask = F.pad(mask, (0, added)) if added else mask
        mask = mask[None, None] if mask.ndim == 2 else mask.view(batch, heads, *mask.shape[1:])
    if padding is None:
        return mask
    padding = (F.pad(padding, (0, added)) if added else padding)[:, None, None]
    padding = padding.expand(-1, heads, -1, -1)
    return padding if mask is None else mask + padding


def _projected(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value through their rows of the fused weight, one linear for each different tensor."""
    width = query.shape[-1]
    if query is key and key is value:
        q, k, v = F.linear(query, weight, bias).chunk(3, dim=-1)
        return q, k, v

    def rows(first: int, count: int) -> tuple[Tensor, Tensor | None]:
        part = torch.narrow(weight, 0, first * width, count * width)
        return part, None if bias is None else torch.narrow(bias, 0, first * width, count * width)

    q = F.linear(query, *rows(0, 1))
    if key is value:
        k, v = F.linear(key, *rows(1, 2)).chunk(2, dim=-1)
        return q, k, v
    return q, F.linear(key, *rows(1, 1)), F.linear(value, *rows(2, 1))
