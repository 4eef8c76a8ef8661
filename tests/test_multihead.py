"""torch's own attention: what is seen inside it, what quantizing it does, and that it stays what it was."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from quant.calibrate import default_scheme, make_quantizer, observe_activations
from quant.insertion import attach_quantizers_, latent_weights, quantized
from quant.intercept import intercept
from quant.multihead import multi_head_attention, without_fast_path
from quant.network import Network
from quant.prepare import restore_float_
from quant.site import ATTENTION_TENSORS, Site
from quant.sites import find_sites
from tests.networks import net_of

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Fusion(nn.Module):
    """Patches, torch's attention of them, a head; `memory` says what key and value are made of."""

    def __init__(self, memory="self", **options):
        super().__init__()
        self.patches, self.memory = nn.Conv2d(3, 32, 4, 4), memory
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True, **options)
        self.head = nn.Linear(32, 2)

    def forward(self, x):
        """Two numbers of images."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        key = value = x
        if self.memory != "self":
            key = value = x[:, :5].relu()[..., : self.attention.kdim]
        if self.memory == "three":
            value = key + 1
        return self.head((x + self.attention(x, key, value, need_weights=self.memory == "self")[0]).mean(1))


class Encoder(nn.Module):
    """torch's encoder, whose layers run in one kernel where nobody looks; with padding as nested tensors."""

    def __init__(self, padded=False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation="gelu")
        self.embed, self.encoder, self.padded = nn.Linear(3, 16), nn.TransformerEncoder(layer, 2), padded
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        """Two numbers of images."""
        x = self.embed(x.flatten(2).transpose(1, 2)[:, :20])
        mask = torch.zeros(x.shape[:2], dtype=torch.bool)
        mask[:, 15:] = True
        return self.head(self.encoder(x, src_key_padding_mask=mask if self.padded else None).mean(1))


class Own(nn.Module):
    """torch's function of attention with parameters of a module that is no nn.MultiheadAttention."""

    def __init__(self):
        super().__init__()
        self.packed, self.out, self.head = nn.Parameter(torch.randn(48, 16)), nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x):
        """Two numbers of images, whose rows are tokens."""
        x = x.flatten(2).transpose(1, 2)[:, :, :1].expand(-1, -1, 16).transpose(0, 1)[:7] * torch.linspace(1, 2, 16)
        x = F.multi_head_attention_forward(x, x, x, 16, 2, self.packed, None, None, None, False, 0.0,
                                           self.out.weight, self.out.bias, need_weights=False)[0]  # fmt: skip
        return self.head(x.mean(0))


class Pool(nn.Module):
    """Pooling by attention as CLIP's: torch's function gets the weights of four linears, each a site of its own."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.c = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, x):
        """Three numbers of images."""
        x = x.flatten(2).permute(2, 0, 1)[:9]
        bias = torch.cat([self.q.bias, self.k.bias, self.v.bias])
        return F.multi_head_attention_forward(
            x[:1], x, x, 3, 1, None, bias, None, None, False, 0.0, self.c.weight, self.c.bias,
            use_separate_proj_weight=True, q_proj_weight=self.q.weight, k_proj_weight=self.k.weight,
            v_proj_weight=self.v.weight, need_weights=False,
        )[0][0]  # fmt: skip


NETWORKS = {
    "self": lambda: Fusion(), "extra": lambda: Fusion(bias=False, add_bias_kv=True, add_zero_attn=True),
    "cross": lambda: Fusion("cross"), "widths": lambda: Fusion("cross", kdim=10, vdim=10),
    "three": lambda: Fusion("three"), "own": Own, "pool": Pool,
    "encoder": lambda: Encoder(), "padded": lambda: Encoder(padded=True),
}  # fmt: skip


@pytest.fixture(params=sorted(NETWORKS))
def model(request):
    """A network with torch's own attention, in evaluation mode."""
    torch.manual_seed(0)
    return NETWORKS[request.param]().eval()


def opened(model, bits=4):
    """The network, and calibrated quantizers of all that can be quantized."""
    net = Network(model, IMAGES[:1])
    wanted = {info.site: info for info in net.infos if info.quantizable}
    samples = observe_activations(net, wanted, [IMAGES], count=1)
    quantizers = {}
    for site, info in wanted.items():
        scheme = default_scheme(model, info, bits, sample=samples.get(site))
        quantizers[site] = make_quantizer(model, info, scheme, sample=samples.get(site), estimator="minmax")
    return net, quantizers


def answer(model):
    """The network's answers without a gradient and without torch's fast path."""
    with torch.no_grad(), without_fast_path():
        return model(IMAGES)


class ByFormula(TorchFunctionMode):
    """Lets the formula stand for torch's function."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        known = func is F.multi_head_attention_forward
        return (multi_head_attention if known else func)(*args, **(kwargs or {}))


@pytest.mark.parametrize("need", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("options", [{}, dict(bias=False, add_bias_kv=True), dict(add_zero_attn=True, batch_first=True),
                                     dict(kdim=12, vdim=12)])  # fmt: skip
@pytest.mark.parametrize("batched", [True, False])
def test_the_formula_gives_what_torchs_function_gives(options, need, batched):
    """For masks of every form, padding, extra keys, widths of its own, and without a batch."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 4, **options).eval()
    first = options.get("batch_first", False)
    width, keys = options.get("kdim", 16), 6

    def tokens(count, width):
        return torch.randn(*((2, count) if first else (count, 2)), width) if batched else torch.randn(count, width)

    causal = torch.ones(5, keys, dtype=torch.bool).triu(1)
    masks = (None, causal, torch.randn(5, keys), torch.randn((2 if batched else 1) * 4, 5, keys))
    padding = torch.zeros((2, keys) if batched else (keys,), dtype=torch.bool)
    padding[..., -2:] = True
    query, key, value = tokens(5, 16), tokens(keys, width), tokens(keys, width)
    for mask, padded, memory in itertools.product(masks, (False, True), ("same", "three")):
        if padded and mask is not None and mask.dtype != torch.bool:
            continue  # torch wants both masks of one type
        arguments = dict(attn_mask=mask, key_padding_mask=padding if padded else None, need_weights=need[0],
                         average_attn_weights=need[1])  # fmt: skip
        results = []
        for mode in (without_fast_path(), ByFormula()):
            with torch.no_grad(), without_fast_path(), mode:
                results.append(layer(query, key, key if memory == "same" else value, **arguments))
        torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=1e-6)


def test_every_tensor_of_it_is_a_site(model):
    """Query, key and value weights, its input, the four tensors inside, and the projection; and they are all seen."""
    trace, sites = find_sites(model, IMAGES)
    found = {info.site for info in sites if info.quantizable}
    assert trace.attention
    assert not trace.unobserved
    for name in trace.in_proj:
        own = {Site(name, f"weight.{part}") for part in ("query", "key", "value")} | {Site(name, "input")}
        inside = {Site(name, tensor) for tensor in ATTENTION_TENSORS}
        out = f"{name}.out_proj".lstrip(".") if name else "out"
        assert own | inside | {Site(out, "weight"), Site(out, "input")} <= found
    before, elements = answer(model), dict.fromkeys(trace.shapes, 0)

    def keep(site):
        def handler(x):
            elements[site] += x.numel()

        return handler

    with torch.no_grad(), intercept(net_of(model, trace), {site: keep(site) for site in trace.shapes}):
        torch.testing.assert_close(model(IMAGES), before, atol=1e-6, rtol=1e-6)
    assert elements == trace.elements
    outside = {site: lambda x: None for site in trace.shapes if not site.is_attention}
    with torch.no_grad(), intercept(net_of(model, trace), outside):
        torch.testing.assert_close(model(IMAGES), before, atol=1e-6, rtol=1e-6)


def test_its_multiply_accumulates_are_torchs(model):
    """Each part of the projection has the MACs of the tensor that it meets; the sum is torch's own count."""
    trace, sites = find_sites(model, IMAGES)
    with FlopCounterMode(display=False) as counter:
        answer(model)
    assert 2 * len(IMAGES) * sum(info.macs for info in sites) == counter.get_total_flops()
    assert not trace.unplanned


def test_each_site_alone_changes_the_answers_and_comes_back(model):
    """In the sweep and in training alike: the same bits, and the model is as before."""
    net, quantizers = opened(model, bits=2)
    before, state = answer(model), copy.deepcopy(model.state_dict())
    for site, quantizer in quantizers.items():
        with torch.no_grad(), quantized(net, {site: quantizer}):
            changed = model(IMAGES)
        assert not torch.equal(changed, before), site
        attach_quantizers_(net, {site: quantizer})
        torch.testing.assert_close(answer(model), changed, atol=1e-6, rtol=1e-6)
        restore_float_(model)
    assert torch.equal(answer(model), before)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


def test_it_trains(model):
    """All sites at once start as the calibrated network, also in evaluation, and every scale learns."""
    net, quantizers = opened(model)
    before = answer(model)
    with torch.no_grad(), quantized(net, quantizers):
        expected = model(IMAGES)
    attach_quantizers_(net, quantizers)
    assert latent_weights(model).keys() == {site for site in quantizers if site.is_weight}
    with torch.no_grad():  # where torch would take its fast path
        assert torch.equal(model(IMAGES), expected)
    twin = copy.deepcopy(model).train()
    twin(IMAGES).square().sum().backward()
    assert not [name for name, p in twin.named_parameters() if p.grad is None]
    restore_float_(model)
    assert torch.equal(answer(model), before)


def test_the_switch_of_the_fast_path_comes_back():
    """After tracing, intercepting and an error it is what it was."""
    model = NETWORKS["encoder"]().eval()
    for enabled in (True, False):
        torch.backends.mha.set_fastpath_enabled(enabled)
        try:
            trace, _ = find_sites(model, IMAGES)
            with pytest.raises(ValueError, match="stop"):
                _stopped(model, trace)
            assert torch.backends.mha.get_fastpath_enabled() == enabled
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


def _stopped(model, trace):
    with intercept(net_of(model, trace), {}):
        assert not torch.backends.mha.get_fastpath_enabled()
        raise ValueError("stop")


def test_parameters_of_ones_own_are_sites_too():
    """F.multi_head_attention_forward with parameters of a module that is no nn.MultiheadAttention."""
    trace, sites = find_sites(nn.Sequential(Own()).eval(), IMAGES)
    parts = [info for info in sites if info.site.module == "0" and info.site.is_weight]
    assert [(info.parameter, info.rows) for info in parts] == [("packed", (i, i + 16)) for i in (0, 16, 32)]
    assert list(trace.attention) == ["0"]
    assert trace.shapes[Site("0", "query")] == (4, 2, 7, 8)
    assert trace.shapes[Site("0", "input")] == (4, 7, 16)


def test_pooling_by_attention_uses_its_linears_without_calling_them():
    """Query, key and value weights are those of the linears, each with the MACs of what it meets."""
    trace, sites = find_sites(nn.Sequential(Pool()).eval(), IMAGES)
    assert trace.functional == {"0.q", "0.k", "0.v", "0.c"}
    assert list(trace.attention) == ["0"]
    assert {i.site.module: i.macs for i in sites if i.site.is_weight} == {"0.q": 9, "0.k": 81, "0.v": 81, "0.c": 9}
    assert not trace.unplanned


def test_torchvisions_transformer_is_seen_inside():
    """vit_b_16 has twelve attentions of torch's own, with twelve heads each."""
    model = torchvision.models.vit_b_16(image_size=32).eval()
    trace, sites = find_sites(model, torch.randn(1, 3, 32, 32))
    assert len(trace.attention) == 12
    assert not trace.unobserved
    assert {info.heads for info in sites if info.site.is_attention} == {12}


def test_an_attention_that_is_called_twice_is_one_set_of_sites():
    """Self and cross attention by the same module: every tensor over both calls, and said so."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 2)

        def forward(self, x):
            x = self.attention(x, x, x)[0]
            memory = x[:, :2]
            return self.head(self.attention(x, memory, memory)[0].mean(1))

    _, sites = find_sites(Twice().eval(), torch.randn(1, 6, 16))
    found = {info.site.tensor: info for info in sites if info.site.module == "attention"}
    assert all("called 2 times" in info.note for info in found.values())
    assert found["attention"].numel == 4 * (6 * 6 + 6 * 2)
    assert found["input"].numel == 16 * (6 + 6 + 2)
    assert found["weight.query"].macs == 16 * 16 * (6 + 6)
    assert found["weight.key"].macs == 16 * 16 * (6 + 2)
