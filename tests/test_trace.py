"""Inside attention: what is seen equals what timm computes, and nothing is left behind."""

from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from quant.attention import explicit_attention
from quant.intercept import intercept
from quant.site import Site
from quant.trace import trace_forward

VIT = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)
SWIN = dict(img_size=32, patch_size=4, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4))
SMALL = {
    "vit_tiny_patch16_224": VIT,
    "swin_tiny_patch4_window7_224": SWIN,
    "swinv2_tiny_window8_256": SWIN,
    "beit_base_patch16_224": VIT,
    "eva02_tiny_patch14_224": VIT,
}  # fmt: skip


def small(name):
    """A small model of a family, in evaluation mode, with weights of its own size."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **SMALL[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # SwinV2 starts its residual branches at zero
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture(params=sorted(SMALL))
def model(request):
    """A small model of each family with softmax attention that we name."""
    return small(request.param)


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_every_attention_module_shows_its_four_tensors(model):
    """Query, key, value and attention are seen once each, with the traced shapes, and rows of softmax sum to 1."""
    trace = trace_forward(model, IMAGES)
    blocks = [n for n, m in model.named_modules() if n.endswith(".attn")]
    assert sorted(trace.attention) == sorted(blocks)
    seen = {}
    sites = [Site(name, t) for name in blocks for t in ("query", "key", "value", "attention")]

    def keep(site):
        def handler(x):
            assert site not in seen
            seen[site] = x.clone()

        return handler

    with torch.no_grad(), intercept(model, trace, {site: keep(site) for site in sites}):
        model(IMAGES)
    assert {s: tuple(x.shape) for s, x in seen.items()} == {s: trace.shapes[s] for s in sites}
    for site in sites:
        if site.tensor == "attention":
            torch.testing.assert_close(seen[site].sum(dim=-1), torch.ones(seen[site].shape[:-1]))


def test_handlers_that_leave_their_tensor_leave_the_logits(model):
    """Attention by its formula agrees with the model's own form to float32 rounding, and the model is as before."""
    trace = trace_forward(model, IMAGES)
    with torch.no_grad():
        before = model(IMAGES)
        with intercept(model, trace, {site: lambda x: None for site in trace.shapes}):
            during = model(IMAGES)
        after = model(IMAGES)
    torch.testing.assert_close(during, before, atol=1e-5, rtol=1e-5)
    assert torch.equal(before, after)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_replaced_tensor_reaches_the_result(model):
    """Zeroing the value operand of one attention changes the logits; zeroing what it returns is the same."""
    trace = trace_forward(model, IMAGES)
    name = next(iter(trace.attention))
    with torch.no_grad():
        plain = model(IMAGES)
        for tensor in ("query", "key", "value", "attention"):
            with intercept(model, trace, {Site(name, tensor): torch.zeros_like}):
                assert not torch.equal(model(IMAGES), plain), tensor


def test_query_is_what_scaled_dot_product_attention_gets():
    """Swin's explicit path scales query before the product; the site holds it before 1/sqrt(d), as qkv gives it."""
    model = small("swin_tiny_patch4_window7_224")
    trace = trace_forward(model, IMAGES)
    attention = model.layers[0].blocks[0].attn
    kept = {}
    with torch.no_grad(), intercept(
        model, trace,
        {Site("layers.0.blocks.0.attn", "query"): lambda x: kept.update(query=x.clone()),
         Site("layers.0.blocks.0.attn.qkv", "output"): lambda x: kept.update(qkv=x.clone())},
    ):  # fmt: skip
        model(IMAGES)
    windows, tokens, _ = kept["qkv"].shape
    expected = kept["qkv"].reshape(windows, tokens, 3, attention.num_heads, -1)[:, :, 0].transpose(1, 2)
    assert torch.equal(kept["query"], expected)
    assert attention.fused_attn is False


def test_rows_of_a_fused_qkv_are_found_by_comparing_values(model):
    """Each family's qkv is three equal parts by head, and says so without being told."""
    trace = trace_forward(model, IMAGES)
    assert set(trace.qkv_parts) == {f"{name}.qkv" for name in trace.attention}
    for parts in trace.qkv_parts.values():
        assert [parts[k][1] - parts[k][0] for k in ("query", "key", "value")] == [parts["query"][1]] * 3


def test_another_qkv_order_is_not_mistaken_for_it():
    """Rows ordered (head, 3, d) keep one weight site: a wrong split would mix query with value."""

    class HeadFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, x):
            batch, tokens, _ = x.shape
            q, k, v = self.qkv(x).reshape(batch, tokens, 4, 3, 4).permute(3, 0, 2, 1, 4)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, 16)

    torch.manual_seed(0)
    model = nn.Sequential(HeadFirst())
    trace = trace_forward(model, torch.randn(2, 5, 16))
    assert list(trace.attention) == ["0"]
    assert trace.qkv_parts == {}


def test_linears_that_are_never_called_are_seen(model):
    """BEiT, EVA and SwinV2 use F.linear(x, self.qkv.weight): input and output are handed over all the same."""
    trace = trace_forward(model, IMAGES)
    expected = isinstance(model, (timm.models.beit.Beit, timm.models.SwinTransformerV2, timm.models.eva.Eva))
    assert bool(trace.functional) == expected
    for name in trace.functional:
        with torch.no_grad():
            plain = model(IMAGES)
            with intercept(model, trace, {Site(name, "input"): torch.zeros_like}):
                assert not torch.equal(model(IMAGES), plain)


def test_hooks_are_gone_after_an_error():
    """An exception in a handler leaves no hook, no mode and no switched attention behind."""
    model = small("swin_tiny_patch4_window7_224")
    trace = trace_forward(model, IMAGES)

    def fail(_x):
        raise RuntimeError("stop here")

    with torch.no_grad():
        plain = model(IMAGES)
        sites = {site: fail for site in trace.shapes if site.tensor in ("value", "output")}
        with pytest.raises(RuntimeError, match="stop here"), intercept(model, trace, sites):
            model(IMAGES)
        assert torch.equal(model(IMAGES), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.layers[0].blocks[0].attn.fused_attn is False


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_row_that_is_masked_altogether_attends_to_nothing(kind):
    """Value 0 and finite gradients, as torch's own function gives them."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[1] = False
    if kind == "float":
        mask = torch.zeros(5, 5, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    leaves = [torch.randn(1, 2, 5, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    results = []
    for attend in (partial(explicit_attention, {}), F.scaled_dot_product_attention):
        q, k, v = (x.clone().requires_grad_() for x in leaves)
        out = attend(q, k, v, attn_mask=mask)
        out.square().sum().backward()
        results.append((out.detach(), q.grad, k.grad, v.grad))
    assert (results[0][0][:, :, 1] == 0).all()
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torch.nan_to_num(torchs))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_explicit_attention_equals_torchs(causal, mask):
    """The formula agrees with scaled_dot_product_attention for masks, causality, scale and grouped queries."""
    if causal and mask:
        pytest.skip("torch itself refuses a mask together with is_causal")
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 4, 7, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(2, 2, 7, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    attn_mask = None
    if mask == "bool":
        attn_mask = torch.rand(7, 7, generator=generator) > 0.3
        attn_mask.fill_diagonal_(True)
    elif mask == "float":
        attn_mask = torch.randn(7, 7, generator=generator, dtype=torch.float64)
    arguments = dict(attn_mask=attn_mask, is_causal=causal, scale=0.3, enable_gqa=True)
    expected = F.scaled_dot_product_attention(q, k, v, **arguments)
    torch.testing.assert_close(explicit_attention({}, q, k, v, **arguments), expected)
