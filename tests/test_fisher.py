"""Fisher's information: against exact divergences, gradients image by image, finite differences and closed forms."""

import copy
import math

import numpy as np
import pytest
import scipy.special
import timm
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from analysis.sweeps.fisher import fisher_scores
from analysis.tasks import classification
from quant.calibrate import default_scheme, make_quantizer, observe_activations
from quant.errors import InputError
from quant.insertion import quantized, weight_of
from quant.intercept import intercept
from quant.site import Site
from quant.sites import find_sites
from tests.networks import net_of

IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class SmallCNN(nn.Module):
    """Two convolutions, the first with an activation function in place, and a classifier of three classes."""

    def __init__(self):
        super().__init__()
        self.conv1, self.act = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ELU(inplace=True)
        self.conv2, self.fc = nn.Conv2d(4, 5, 3, stride=2), nn.Linear(5, 3)

    def forward(self, x):
        """Logits of (images, 3, height, width)."""
        x = torch.tanh(self.conv2(self.act(self.conv1(x))))
        return 2 * self.fc(x.mean(dim=(2, 3)))


def model_of(name):
    """A small network in float64, its biases not those of a fresh network; BEiT and SwinV2 give qkv a bias apart."""
    torch.manual_seed(0)
    common = {"img_size": 32, "num_classes": 10}
    if name == "cnn":
        model = SmallCNN()
    elif name == "resnet":
        model = timm.create_model("resnet18", layers=(1, 1, 1, 1), channels=(8, 8, 8, 8), stem_width=8, num_classes=10,
                                  zero_init_last=False)  # fmt: skip
    elif name == "vit":
        model = timm.create_model("vit_tiny_patch16_224", patch_size=16, embed_dim=16, depth=2, num_heads=2, **common)
    elif name == "beit":
        model = timm.create_model("beit_base_patch16_224", patch_size=16, embed_dim=16, depth=1, num_heads=2, **common)
    elif name == "swin":
        model = timm.create_model("swin_tiny_patch4_window7_224", patch_size=4, window_size=4, embed_dim=8,
                                  depths=(2, 1), num_heads=(2, 2), **common)  # fmt: skip
    else:
        model = timm.create_model("swinv2_tiny_window8_256", patch_size=4, window_size=4, embed_dim=8, depths=(2,),
                                  num_heads=(2,), **common)  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = parameter.std().item() if parameter.ndim > 1 and parameter.std() > 0.05 else 0.2
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
        if name == "resnet":
            model.fc.weight.mul_(0.05)  # else one class has nearly all the probability, and nothing matters
    return model.eval().double()


def opened(model, images, bits):
    """Trace, sites that can be quantized, and of each site a quantizer for each bit-width."""
    trace, sites = find_sites(model, images[:2])
    sites = {info.site: info for info in sites if info.quantizable}
    samples = observe_activations(net_of(model, trace, sites), sites, [images], count=1)
    quantizers = {}
    for site, info in sites.items():
        quantizers[site] = {}
        for bit_width in bits:
            scheme = default_scheme(model, info, bit_width, sample=samples.get(site))
            quantizers[site][bit_width] = make_quantizer(
                model, info, scheme, sample=samples.get(site), estimator="minmax"
            )
    return trace, sites, quantizers


def towards(quantizer, t):
    """A part t of the way from a tensor to the quantized one."""
    return lambda x: x + t * (quantizer(x) - x)


def rippled(x):
    """A small error that, unlike rounding, is nearly the same where the tensor itself has changed a little."""
    return x + 1e-5 * torch.sin(5 * x)


def probe_gradient(logits, generator):
    """The gradient u of the task's probe at the logits."""
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(classification().probe(logits, generator), logits)[0]


def probes_of(model, batches):
    """The gradients of the probes that `fisher_scores` uses on these batches."""
    generator = torch.Generator().manual_seed(0)
    return [probe_gradient(model(images), generator) for images in batches]


@settings(max_examples=20)
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=5), st.integers(0, 1000))
def test_the_mean_over_all_signs_is_the_hessian_of_kl(logits, seed):
    """E[u u^T] = diag(p) - p p^T over all 2^C patterns of signs; u sums to 0, as adding a constant changes nothing."""
    assume(max(logits) - min(logits) > 1e-2)  # two patterns give the same u where p is uniform
    rows = torch.tensor(logits, dtype=torch.float64).expand(1000, -1)
    u = probe_gradient(rows, torch.Generator().manual_seed(seed))
    torch.testing.assert_close(u.sum(dim=1), torch.zeros(1000, dtype=torch.float64), atol=1e-12, rtol=0)
    patterns = u.round(decimals=10).unique(dim=0).numpy()
    assert len(patterns) == 2 ** len(logits)
    p = scipy.special.softmax(logits)
    np.testing.assert_allclose(patterns.T @ patterns / len(patterns), np.diag(p) - np.outer(p, p), atol=1e-9)


def test_small_errors_of_all_sites_together_have_the_kl_of_the_products():
    """1/2 E (sum over sites of products)^2 is the exact KL: every pattern of signs is met, so without sampling error.

    The sum over sites apart is another figure: errors add before they are squared.
    """
    model, repeats = model_of("cnn"), 100
    for image in IMAGES[:2, :, :8, :8]:
        images = image.expand(repeats, -1, -1, -1).contiguous()
        trace, sites, _ = opened(model, images, ())
        scores = fisher_scores(
            net_of(model, trace, sites), {site: {16: rippled} for site in sites}, [images], classification()
        )
        u = probes_of(model, [images])[0]
        patterns, group = u.round(decimals=10).unique(dim=0, return_inverse=True)
        assert len(patterns) == 8
        first = [group.tolist().index(i) for i in range(8)]
        chosen = dict.fromkeys(sites, rippled)
        with torch.no_grad():
            p = model(images[:1]).log_softmax(dim=1)
            for together in (*([site] for site in chosen), list(chosen)):
                with quantized(net_of(model, trace, sites), {site: chosen[site] for site in together}):
                    q = model(images[:1]).log_softmax(dim=1)
                kl = (p.exp() * (p - q)).sum().item()
                products = sum(scores[site, 16].products[first].astype(np.float64) for site in together)
                assert (products**2).mean() / 2 == pytest.approx(kl, rel=5e-3)
        apart = sum((scores[site, 16].products[first].astype(np.float64) ** 2).mean() / 2 for site in chosen)
        assert abs(apart / kl - 1) > 0.1


def test_on_a_transformer_the_kl_lies_within_the_sampling_error_of_the_products():
    """Two images, each with 150 probes: |mean - KL| below 4 standard errors, these below 10 % of the KL."""
    model = model_of("vit")
    images = IMAGES[:2].repeat(150, 1, 1, 1)
    names = [("patch_embed.proj", "input"), ("blocks.0.attn", "value"), ("blocks.1.attn.qkv", "weight.value"),
             ("blocks.0.attn", "attention"), ("blocks.1.mlp.fc2", "input")]  # fmt: skip
    trace, sites, _ = opened(model, images[:2], ())
    chosen = dict.fromkeys((Site(*name) for name in names), rippled)
    scores = fisher_scores(
        net_of(model, trace, sites), {site: {16: rippled} for site in chosen}, images.split(50), classification()
    )
    with torch.no_grad():
        p = model(IMAGES[:2]).log_softmax(dim=1)
        with quantized(net_of(model, trace, sites), chosen):
            q = model(IMAGES[:2]).log_softmax(dim=1)
    kl = (p.exp() * (p - q)).sum(dim=1).mean().item()
    predicted = sum(score.products.astype(np.float64) for score in scores.values()) ** 2 / 2
    error = predicted.reshape(150, 2).std(axis=0, ddof=1)
    error = math.sqrt((error**2).sum() / 150) / 2
    assert error < 0.1 * kl
    assert abs(predicted.mean() - kl) < 4 * error


def gradients_of(model, trace, sites, images, probes):
    """Gradients of the probe at every weight, activation and output of a layer, with one image in the pass at a time.

    Of each tensor a list with one gradient an image; layers' outputs are Site(module, "output").
    """
    activations = [site for site in sites if not site.is_weight]
    layers = dict.fromkeys(site.module for site in sites if not site.is_attention)
    weights = {site: model.get_submodule(site.module).weight for site in sites if site.is_weight}
    shifts = {}

    def shifted(site):
        def handler(x):
            shifts[site] = torch.zeros_like(x).requires_grad_()
            return x + shifts[site]

        return handler

    watched = [*activations, *(Site(name, "output") for name in layers)]
    found = {site: [] for site in (*watched, *weights)}
    for image, u in zip(images, probes, strict=True):
        with intercept(net_of(model, trace), {site: shifted(site) for site in watched}):
            loss = (model(image[None]) * u).sum()
        leaves = {site: shifts[site] for site in watched} | weights
        for site, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            rows = sites[site].rows if site in weights else None
            found[site].append(gradient if rows is None else gradient[slice(*rows)])
    return found


def tensors_of(model, trace, sites, images):
    """Every activation among `sites` and every layer's output, one image in the pass at a time."""
    found = {}
    names = dict.fromkeys(site.module for site in sites if not site.is_attention)
    watched = [site for site in sites if not site.is_weight] + [Site(name, "output") for name in names]
    handlers = {site: lambda x, site=site: found.setdefault(site, []).append(x.clone()) for site in watched}
    with torch.no_grad(), intercept(net_of(model, trace), handlers):
        for image in images:
            model(image[None])
    return found


@pytest.mark.parametrize("name", ["cnn", "resnet", "vit", "beit", "swin", "swinv2"])
def test_every_score_is_what_one_image_at_a_time_gives(name):
    """Batches of 4 and 2: windows, fused qkv and tables do not mix images.

    The products are finite differences of the logits along the error; the gradients those of a pass with one image.
    """
    model = model_of(name)
    trace, sites, quantizers = opened(model, IMAGES, (3, 6))
    batches = IMAGES.split(4)
    probes = torch.cat(probes_of(model, batches))
    scores = fisher_scores(net_of(model, trace, sites), quantizers, batches, classification())
    tables = {site for site in sites if ".cpb_mlp." in site.module}
    assert {site for site, _ in scores} == set(sites) - tables
    sites = {site: info for site, info in sites.items() if site not in tables}
    gradients, tensors = gradients_of(model, trace, sites, IMAGES, probes), tensors_of(model, trace, sites, IMAGES)
    for (site, bits), score in scores.items():
        quantizer, logits = quantizers[site][bits], {}
        for t in (-1e-6, 1e-6):
            with torch.no_grad(), quantized(net_of(model, trace, sites), {site: towards(quantizer, t)}):
                logits[t] = model(IMAGES)
        products = (probes * (logits[1e-6] - logits[-1e-6])).sum(dim=1) / 2e-6
        np.testing.assert_allclose(score.products, products.numpy(), rtol=1e-4, atol=1e-5 * products.abs().max())
        assert score.fisher == pytest.approx(products.square().mean().item() / 2, rel=1e-4)
        x = [weight_of(model, sites[site])] if site.is_weight else tensors[site]
        error, signal = (torch.stack(list(part)) for part in ((quantizer(part) - part for part in x), x))
        trace_of_fisher = torch.stack(gradients[site]).square().sum().item() / len(IMAGES)
        assert score.squared_error == pytest.approx(error.square().mean().item(), rel=1e-9)
        assert score.noise == pytest.approx((error.square().sum() / signal.square().sum()).item(), rel=1e-9)
        assert score.fit == pytest.approx(trace_of_fisher / 2 * score.squared_error, rel=1e-7)
        if site.is_attention:
            change, gradient = error, torch.stack(gradients[site])
        else:
            output = Site(site.module, "output")
            with quantized(net_of(model, trace, sites), {site: quantizer}):
                changed = tensors_of(model, trace, {Site(site.module, "input"): None}, IMAGES)[output]
            change, gradient = torch.stack(changed) - torch.stack(tensors[output]), torch.stack(gradients[output])
        expected = (gradient * change).square().sum().item() / len(IMAGES)
        assert score.output_gradient == pytest.approx(expected, rel=1e-6)


@given(st.floats(-2, 2).filter(lambda c: abs(c) > 1e-3))
@settings(max_examples=20)
def test_of_one_linear_layer_every_score_has_a_closed_form(c):
    """Logits z = W x + b and the error c x or c W: the product is c u.(z - b); all scores grow with c squared."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).double()
    images = IMAGES[:, :, :2, :2]
    trace, sites = find_sites(model, images[:2])
    sites = {info.site: info for info in sites if info.quantizable}
    scores = fisher_scores(
        net_of(model, trace, sites), {site: {1: lambda x: x + c * x} for site in sites}, [images], classification()
    )
    u, x, weight = probes_of(model, [images])[0], images.reshape(6, 12), model[1].weight.detach()
    products = c * (u * (x @ weight.T)).sum(dim=1)
    slopes = {"input": (u @ weight), "weight": u[:, :, None] * x[:, None, :]}
    errors = {"input": c * x, "weight": c * weight}
    for tensor in ("input", "weight"):
        score = scores[Site("1", tensor), 1]
        np.testing.assert_allclose(score.products, products.numpy(), rtol=1e-5, atol=1e-7)
        assert score.fisher == pytest.approx(products.square().mean().item() / 2)
        mean_square = errors[tensor].square().mean().item()
        assert score.fit == pytest.approx(slopes[tensor].square().sum().item() / 6 / 2 * mean_square)
        output = (u * c * (x @ weight.T)).square().sum().item() / 6
        assert score.output_gradient == pytest.approx(output)
        assert score.noise == pytest.approx(c**2)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
@settings(max_examples=15)
def test_the_split_into_batches_changes_nothing(sizes):
    """Batches of any sizes, of one image too, give the figures of all images in one batch."""
    model, images = model_of("cnn"), IMAGES[:, :, :8, :8]
    trace, sites, quantizers = opened(model, images, (3,))
    whole = fisher_scores(net_of(model, trace, sites), quantizers, [images], classification())
    cuts = [cut for cut in np.cumsum(sizes) if cut < 6]
    split = fisher_scores(net_of(model, trace, sites), quantizers, images.tensor_split(cuts), classification())
    assert split.keys() == whole.keys()
    for key, score in split.items():
        np.testing.assert_allclose(score.products, whole[key].products, rtol=1e-5, atol=1e-8)
        assert score[:5] == pytest.approx(whole[key][:5], rel=1e-9)


def test_bfloat16_gives_the_figures_of_float64_within_its_rounding():
    """At 3 bits, where the error is much larger than that of bfloat16 itself: within 25 %, in the median within 5 %."""
    model = model_of("vit")
    trace, sites, quantizers = opened(model, IMAGES, (3,))
    exact = fisher_scores(net_of(model, trace, sites), quantizers, [IMAGES], classification())
    rounded = fisher_scores(net_of(model.bfloat16(), trace, sites), quantizers, [IMAGES.bfloat16()], classification())
    assert rounded.keys() == exact.keys()
    for place in (1, 2, 3, 4):
        ratio = np.array([rounded[key][place] / exact[key][place] for key in exact])
        assert abs(np.median(ratio) - 1) < 0.05
        assert np.abs(np.log(ratio)).max() < 0.25


class Twice(nn.Module):
    """A layer called twice, one inside a table that no image enters, one with the images along the second axis."""

    def __init__(self):
        super().__init__()
        self.twice, self.table, self.tokens, self.fc = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        """Logits of (images, 3, 4, 4), as 12 tokens of 4 values."""
        x = self.twice(torch.tanh(self.twice(x.reshape(len(x), 12, 4))))
        x = x * torch.sigmoid(self.table(torch.ones(12, 4).to(x)))
        x = torch.tanh(self.tokens(x.transpose(0, 1))).transpose(0, 1)
        return self.fc(x.mean(dim=1))


@pytest.mark.parametrize("size", [1, 3, 4, 6])
def test_what_has_no_gradient_of_an_image_is_left_out(size):
    """Also where the leading axis, 12 tokens, happens to be a multiple of the images."""
    torch.manual_seed(0)
    model, images = Twice().double(), IMAGES[:, :, :4, :4]
    trace, sites, quantizers = opened(model, images, (4,))
    scores = fisher_scores(net_of(model, trace, sites), quantizers, images.split(size), classification())
    assert {str(site) for site in sites} > {"twice:weight", "table:weight", "tokens:input", "tokens:weight"}
    assert {str(site) for site, _ in scores} == {"fc:weight", "fc:input"}


class Overwritten(SmallCNN):
    """The input of conv2 is multiplied in place after it was used."""

    def forward(self, x):
        """Logits of (images, 3, height, width)."""
        x = torch.tanh(self.conv1(x))
        y = self.conv2(x)
        x.mul_(2)
        return self.fc(y.mean(dim=(2, 3)) + x.mean())


def parameters_of(model):
    """What has to come back: parameter objects, their values, and whether they ask for a gradient."""
    return {name: (parameter, parameter.detach().clone(), parameter.requires_grad)
            for name, parameter in model.named_parameters()}  # fmt: skip


def assert_came_back(model, before):
    """The same objects with the same bits, flags and no gradients; no hook, no opened attention, no training mode."""
    for name, parameter in model.named_parameters():
        own, value, asks = before[name]
        assert parameter is own
        assert torch.equal(parameter, value)
        assert parameter.requires_grad == asks
        assert parameter.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks or m.training for m in model.modules())
    assert not any(type(m).__name__.startswith("LoadedRun") for m in model.modules())


def test_an_input_that_is_written_into_later_is_refused_and_the_model_comes_back():
    """The gradient there belongs to a value that is gone: an error that names the module."""
    torch.manual_seed(0)
    model, images = Overwritten().double().eval(), IMAGES[:, :, :8, :8]
    model.fc.bias.requires_grad_(False)
    trace, sites, quantizers = opened(model, images, (4,))
    before = parameters_of(model)
    with pytest.raises(InputError, match=r"writes into the input of conv2"):
        fisher_scores(net_of(model, trace, sites), quantizers, [images], classification())
    assert_came_back(model, before)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ["resnet", "swin"])
def test_the_model_comes_back_bit_for_bit(name, fails):
    """Parameters, buffers, requires_grad, classes and hooks; also where a quantizer fails in the backward pass."""
    model = model_of(name)
    trace, sites, quantizers = opened(model, IMAGES, (4,))
    for parameter in list(model.parameters())[::3]:
        parameter.requires_grad_(False)
    before, state = parameters_of(model), copy.deepcopy(model.state_dict())
    images = IMAGES.clone()

    def broken(_x):
        raise RuntimeError("pulled the plug")

    if fails:
        site = [site for site in sites if site.is_weight][1]
        quantizers[site] = {4: broken}
        with pytest.raises(RuntimeError, match="pulled the plug"):
            fisher_scores(net_of(model, trace, sites), quantizers, [images], classification())
    else:
        fisher_scores(net_of(model, trace, sites), quantizers, [images], classification())
    assert_came_back(model, before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(images, IMAGES)
    assert not images.requires_grad
