"""What one forward pass shows: attention as timm computes it, layers that nobody calls, and nothing left behind."""

import math
from collections import namedtuple
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import SelectiveKernel
from timm.layers.lambda_layer import LambdaLayer
from timm.models.volo import OutlookAttention
from torch import nn

from quant.attention import explicit_attention
from quant.intercept import intercept
from quant.site import ATTENTION_TENSORS, Site
from quant.trace import trace_forward
from tests.networks import net_of

Pair = namedtuple("Pair", "a b")
VIT = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)
SWIN = dict(img_size=32, patch_size=4, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4))
SMALL = {
    "vit_tiny_patch16_224": VIT,
    "swin_tiny_patch4_window7_224": SWIN,
    "swinv2_tiny_window8_256": SWIN,
    "beit_base_patch16_224": VIT,
    "eva02_tiny_patch14_224": VIT,
}  # fmt: skip
# Each computes attention in a way of its own; the numbers are of its modules with attention.
FORMS = {
    "cait_xxs24_224": (2, dict(img_size=32, patch_size=8, embed_dim=32, depth=1, depth_token_only=1, num_heads=4)),
    "convit_tiny": (2, dict(img_size=32, patch_size=8, embed_dim=8, depth=2, num_heads=4, local_up_to_layer=1)),
    "crossvit_tiny_240": (4, dict(img_size=32, embed_dim=(32, 32), depth=((1, 1, 0),), num_heads=(2, 2),
                                  img_scale=(1.0, 1.0), patch_size=(8, 16))),
    "efficientvit_m0": (3, dict(img_size=64, embed_dim=(16, 16, 16), depth=(1, 1, 1), num_heads=(2, 2, 2),
                                key_dim=(4, 4, 4))),
    "hiera_tiny_224": (4, dict(img_size=64, embed_dim=16, num_heads=1, stages=(1, 1, 1, 1))),
    "levit_128s": (5, dict(img_size=64, embed_dim=(32, 32, 32), depth=(1, 1, 1), num_heads=(2, 2, 2), key_dim=8)),
    "levit_conv_128s": (5, dict(img_size=64, embed_dim=(32, 32, 32), depth=(1, 1, 1), num_heads=(2, 2, 2), key_dim=8)),
    "swinv2_cr_tiny_224": (2, dict(img_size=32, embed_dim=16, depths=(1, 1), num_heads=(2, 2), window_size=4)),
    "test_coatnet": (3, dict(img_size=64)),
    "tnt_s_legacy_patch16_224": (2, dict(img_size=32, depth=1)),
    "twins_svt_small": (5, dict(img_size=64, embed_dims=(16, 16, 16, 16), depths=(2, 1, 1, 1), num_heads=(2, 2, 2, 2))),
    "vit_dlittle_patch16_reg1_gap_256": (1, dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=4)),
    "xcit_nano_12_p8_224": (2, dict(img_size=32, embed_dim=32, depth=1, cls_attn_layers=1, num_heads=4)),
}  # fmt: skip


def small(name):
    """A small model of a family, in evaluation mode, with weights of its own size."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **(SMALL[name] if name in SMALL else FORMS[name][1])).eval()
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

    with torch.no_grad(), intercept(net_of(model, trace), {site: keep(site) for site in sites}):
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
        with intercept(net_of(model, trace), {site: lambda x: None for site in trace.shapes}):
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
            with intercept(net_of(model, trace), {Site(name, tensor): torch.zeros_like}):
                assert not torch.equal(model(IMAGES), plain), tensor


def test_query_is_what_scaled_dot_product_attention_gets():
    """Swin's explicit path scales query before the product; the site holds it before 1/sqrt(d), as qkv gives it."""
    model = small("swin_tiny_patch4_window7_224")
    trace = trace_forward(model, IMAGES)
    attention = model.layers[0].blocks[0].attn
    kept = {}
    with torch.no_grad(), intercept(net_of(model, trace),
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


@pytest.mark.parametrize("name", sorted(FORMS))
def test_every_form_of_attention_is_seen(name):
    """Heads one after the other, heads mixed, channels for tokens, value to the left: all four tensors, all values.

    They fit together, rows of the softmax sum to 1, left alone they leave the logits, and each of them reaches these.
    """
    model, count = small(name), FORMS[name][0]
    images = torch.randn(2, 3, FORMS[name][1]["img_size"], FORMS[name][1]["img_size"])
    trace = trace_forward(model, images)
    assert len(trace.attention) == count
    assert not trace.unobserved
    seen = {site: [] for site in trace.shapes if site.is_attention}
    with torch.no_grad():
        plain = model(images)
        with intercept(
            net_of(model, trace), {site: (lambda x, site=site: seen[site].append(x.clone())) for site in seen}
        ):
            torch.testing.assert_close(model(images), plain, atol=1e-4, rtol=1e-4)
    for site, tensors in seen.items():
        assert tuple(tensors[0].shape) == trace.shapes[site]
        assert sum(x.numel() for x in tensors) == trace.elements[site]
    for module in trace.attention:
        for query, key, value, attention in zip(*(seen[Site(module, t)] for t in ATTENTION_TENSORS), strict=True):
            assert query.shape[-1] == key.shape[-1]
            assert attention.shape[-2:] == (query.shape[-2], key.shape[-2])
            assert value.shape[-2] == key.shape[-2]
            torch.testing.assert_close(attention.sum(dim=-1), torch.ones(attention.shape[:-1]))
    first = next(iter(trace.attention))
    for tensor in ATTENTION_TENSORS:
        with torch.no_grad(), intercept(net_of(model, trace), {Site(first, tensor): lambda x: x.flip(-1)}):
            assert not torch.equal(model(images), plain), tensor


def test_cascaded_heads_are_all_seen():
    """EfficientViT computes head after head in one call: two heads, so twice the elements of one."""
    trace = trace_forward(small("efficientvit_m0"), torch.randn(1, 3, 64, 64))
    module, form = next(iter(trace.attention.items()))
    assert (form.scores, form.softmaxes, form.values_first) == ({0, 2}, {0, 1}, {1, 3})
    assert trace.elements[Site(module, "query")] == 2 * math.prod(trace.shapes[Site(module, "query")])


def test_mixed_heads_are_told():
    """CaiT's softmax is not what is multiplied by value: a linear mixes its heads first."""
    trace = trace_forward(small("cait_xxs24_224"), IMAGES)
    noted = {site.module for site, note in trace.notes.items() if "heads mixed" in note}
    assert noted == {"blocks.0.attn"}


class _Attention(nn.Module):
    """Query, key and value of one linear; `attend` says what becomes of them, `calls` how often it was called."""

    def __init__(self, attend, inner=None):
        super().__init__()
        self.qkv, self.attend, self.inner, self.calls = nn.Linear(8, 24), attend, inner, 0

    def forward(self, x):
        self.calls += 1
        return self.attend(self, *self.qkv(x).chunk(3, dim=-1))


def _plain(_module, q, k, v):
    return (q @ k.mT).softmax(-1) @ v


def _sum_of_scores(_module, q, k, v):
    return (q @ k.mT + k @ q.mT).softmax(-1) @ v


def _einsum(_module, q, k, v):
    return torch.einsum("bij,bjc->bc", (q @ k.mT).softmax(-1), v)


def _over_queries(_module, q, k, v):
    return (q @ k.mT).softmax(-1).mT @ v


def _linear(_module, q, k, v):
    return q @ (k.softmax(dim=-2).mT @ v)


def _alternating(module, q, k, v):
    return _plain(module, q, k, v) if module.calls % 2 else _plain(module, q + k @ (k.mT @ v), k, v)


def _nested(module, q, k, v):
    return module.inner(_plain(module, q, k, v))


@pytest.mark.parametrize(
    ("model", "shape", "reasons"),
    [
        (_Attention(_sum_of_scores), (2, 5, 8), {"": "a sum of several matrix products"}),
        (_Attention(_einsum), (2, 5, 8), {"": "written by einsum"}),
        (_Attention(_plain), (5, 8), {"": "over the whole batch"}),
        (_Attention(_over_queries), (2, 5, 8), {"": "not over the keys"}),
        (_Attention(_linear), (2, 5, 8), {"": "not of a product of query and key"}),
        (_Attention(_nested, _Attention(_plain)), (2, 5, 8), {"": "another attention is inside it, inner"}),
        (nn.Sequential(*[_Attention(_alternating)] * 2), (2, 5, 8), {"0": "in different ways"}),
        (OutlookAttention(8, 2), (1, 4, 4, 8), {"": "not of a product of query and key"}),
        (LambdaLayer(8, feat_size=(4, 4), num_heads=2, dim_head=4), (1, 8, 4, 4),
         {"": "not of a product of query and key"}),
    ],
    ids=["sum", "einsum", "batch", "queries", "linear", "nested", "alternating", "outlook", "lambda"],
)  # fmt: skip
def test_attention_of_an_unknown_form_has_no_sites_and_a_reason(model, shape, reasons):
    """A figure of something else would be worse than none."""
    trace = trace_forward(model.eval(), torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    assert trace.unobserved.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in trace.unobserved[name]
        assert name not in trace.attention
        assert not any(site.is_attention and site.module == name for site in trace.shapes)


def test_a_softmax_over_branches_is_no_attention():
    """A selective kernel chooses among its branches: no product follows, so there is nothing to say."""
    trace = trace_forward(SelectiveKernel(32).eval(), torch.randn(2, 32, 8, 8))
    assert not trace.attention
    assert not trace.unobserved


def test_the_switch_of_fused_attention_may_lie_in_a_submodule():
    """Attention belongs to the module that owns parameters, though a child of it holds timm's `fused_attn`."""

    class Inner(nn.Module):
        fused_attn = False

        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v) if self.fused_attn else (q @ k.mT).softmax(-1) @ v

    model, seen = _Attention(lambda module, q, k, v: module.inner(q, k, v), Inner()), []
    x = torch.randn(2, 5, 8)
    trace = trace_forward(model, x)
    assert trace.attention[""].fused
    with torch.no_grad(), intercept(net_of(model, trace), {Site("", "attention"): lambda x: seen.append(x)}):
        model(x)
    assert len(seen) == 1
    assert model.inner.fused_attn is False


def test_functional_convolutions_are_seen():
    """A convolution whose weight is used without calling it has its input and output handed over."""

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return F.conv2d(x, self.conv.weight, self.conv.bias)

    model = Functional()
    trace = trace_forward(model, IMAGES)
    assert trace.functional == {"conv"}
    assert trace.shapes[Site("conv", "output")] == (2, 4, 30, 30)
    with torch.no_grad(), intercept(net_of(model, trace), {Site("conv", "input"): torch.zeros_like}):
        torch.testing.assert_close(model(IMAGES), model.conv.bias[:, None, None].expand(2, 4, 30, 30))


def test_layers_that_share_a_weight_are_each_called():
    """The weight of the one is that of the other: neither is used without being called."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    trace = trace_forward(model, torch.randn(2, 4))
    assert trace.functional == set()
    assert trace.calls == {"": 1, "0": 1, "1": 1}


@pytest.mark.parametrize("kind", [tuple, list, lambda pair: dict(zip("ab", pair, strict=True)), Pair._make])
def test_of_several_tensors_returned_the_first_is_seen(kind):
    """A tuple, list, dictionary or named tuple passes on in its own type, whatever takes its first tensor's place."""

    class Several(nn.Module):
        def forward(self, x):
            return kind([x, x + 1])

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.several, self.layer = Several(), nn.Identity()

        def forward(self, x):
            result = self.several(x)
            assert type(result) is type(kind([x, x]))
            first, second = result.values() if isinstance(result, dict) else result
            return self.layer(first + 2 * second)

    model, x = Reader(), torch.randn(2, 3)
    trace = trace_forward(model, x)
    site = Site("several", "output")
    assert trace.shapes[site] == (2, 3)
    assert "the first tensor of a" in trace.notes[site]
    with intercept(net_of(model, trace), {site: torch.zeros_like}):
        torch.testing.assert_close(model(x), 2 * (x + 1))


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
            with intercept(net_of(model, trace), {Site(name, "input"): torch.zeros_like}):
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
        with pytest.raises(RuntimeError, match="stop here"), intercept(net_of(model, trace), sites):
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


def test_inputs_that_are_the_very_same_tensor_are_found():
    """Both branches of a residual block read one tensor; a copy, or the tensor changed in place since, is another."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in range(4))

        def forward(self, x):
            x = x.clone()
            y = self.a(x) + self.b(x) + self.c(x.clone())
            x.relu_()
            return y + self.d(x)

    found = trace_forward(Branches().eval(), torch.rand(1, 3, 4, 4)).same
    assert found == {Site("b", "input"): Site("a", "input")}
    resnet = trace_forward(timm.create_model("resnet18").eval(), torch.rand(1, 3, 64, 64)).same
    assert resnet == {Site(f"layer{i}.0.downsample.0", "input"): Site(f"layer{i}.0.conv1", "input") for i in (2, 3, 4)}


class _ByEinsum(nn.Module):
    """Attention whose two products are written by einsum, in one of several ways."""

    def __init__(self, scores, values):
        super().__init__()
        self.qkv, self.scores, self.values = nn.Linear(12, 36), scores, values

    def forward(self, x):
        q, k, v = self.qkv(x).view(len(x), x.shape[1], 3, 3, 4).permute(2, 0, 3, 1, 4)
        laid = {"bhnd": q, "bhmd": k, "bhdm": k.mT, "bnhd": q.transpose(1, 2), "bmhd": k.transpose(1, 2)}
        attention = torch.einsum(self.scores, *(laid[part] for part in self.parts(self.scores))).softmax(-1)
        laid = {"bhnm": attention, "bhmd": v, "bmhd": v.transpose(1, 2)}
        return torch.einsum(self.values, *(laid[part] for part in self.parts(self.values))).flatten(1)

    def parts(self, equation):
        return equation.partition("->")[0].replace(" ", "").replace("...", "bh").split(",")


@pytest.mark.parametrize(
    ("scores", "values"),
    [
        ("bhnd,bhmd->bhnm", "bhnm,bhmd->bhnd"),
        ("bnhd,bmhd->bhnm", "bhnm,bmhd->bnhd"),
        ("bhmd,bhnd->bhnm", "bhmd,bhnm->bhnd"),
        ("bhnd,bhdm->bhnm", "bhnm, bhmd -> bhnd"),
        ("...nd,...md->...nm", "...nm,...md->...nd"),
        ("bmhd,bnhd->bhnm", "bhnm,bhmd->bhdn"),
    ],
)
def test_attention_by_einsum_is_seen(scores, values):
    """Whatever the letters' order: query over queries, key over keys, rows of the softmax sum to 1, MACs of both."""
    torch.manual_seed(0)
    model, x = _ByEinsum(scores, values).eval(), torch.randn(2, 5, 12)
    trace = trace_forward(model, x)
    assert not trace.unobserved
    seen = {}
    with torch.no_grad():
        plain = model(x)
        sites = [Site("", tensor) for tensor in ATTENTION_TENSORS]
        with intercept(
            net_of(model, trace), {site: (lambda x, site=site: seen.update({site: x.clone()})) for site in sites}
        ):
            torch.testing.assert_close(model(x), plain)
        q, k, v = model.qkv(x).view(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
    for tensor, expected in zip(ATTENTION_TENSORS, (q, k, v, None), strict=True):
        found = seen[Site("", tensor)]
        if expected is not None:
            assert torch.equal(found.flatten().sort().values, expected.flatten().sort().values), tensor
            assert found.shape[-2:] == (5, 4)
        else:
            torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:-1]))
    assert trace.macs[Site("", "query")] == trace.macs[Site("", "attention")] == 3 * 5 * 5 * 4
    with torch.no_grad():
        for site in sites:
            with intercept(net_of(model, trace), {site: lambda x: x.flip(-1)}):
                assert not torch.allclose(model(x), plain), site


def test_tensors_with_time_before_the_batch_hold_its_samples():
    """Elements and MACs are of one sample where its axis is the first or, with time before it, the second."""

    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.signal, self.volume = nn.Linear(4, 4), nn.Conv1d(4, 4, 3), nn.Conv3d(1, 2, 1)

        def forward(self, x):
            y = self.signal(self.layer(x.transpose(0, 1)).permute(1, 2, 0))
            return self.volume(y[:, None, :, :, None])

    model, x = TimeFirst(), torch.randn(3, 5, 4)
    many, one = trace_forward(model, x), trace_forward(model, x[:1])
    assert many.macs == one.macs == {
        Site("layer", "weight"): 5 * 16, Site("signal", "weight"): 3 * 4 * 12, Site("volume", "weight"): 12 * 2
    }  # fmt: skip
