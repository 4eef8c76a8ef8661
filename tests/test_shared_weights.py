"""Weights that several modules use, and weights that a layer computes at every pass."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from analysis.cost import cost_table
from analysis.planning import accounting
from quant.errors import InputError
from quant.insertion import attach_quantizers_, latent_weights, quantized
from quant.prepare import restore_float_
from quant.site import Site
from quant.sites import check_plain_weights, find_sites
from tests.test_multihead import opened

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Twins(nn.Module):
    """Two linears with one weight, the second over twice as many tokens."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight, self.head = self.a.weight, nn.Linear(8, 2)

    def forward(self, x):
        """Two numbers of images."""
        x = self.a(self.stem(x).flatten(2).transpose(1, 2)).relu()
        return self.head(self.b(torch.cat([x, 2 * x], 1)).mean(1))


class Words(nn.Module):
    """An embedding whose table is the weight of the last linear, as in language models."""

    def __init__(self):
        super().__init__()
        self.table, self.middle, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        """A score for each word, from words made of the brightness of pixels."""
        words = (x.flatten(1)[:, :6].sigmoid() * 11).long()
        return self.head(self.middle(self.table(words)).relu()).mean(1)


NETWORKS = {"twins": (Twins, Site("a", "weight")), "words": (Words, Site("head", "weight"))}


@pytest.fixture(params=NETWORKS)
def tied(request):
    """A network with a weight that two modules have, and the site of it."""
    torch.manual_seed(0)
    make, site = NETWORKS[request.param]
    return make().eval(), site


def test_a_shared_weight_is_quantized_in_all_its_uses(tied):
    """As if the parameter itself were on the grid; in training too, with one quantizer for all uses."""
    model, site = tied
    net, quantizers = opened(model, bits=2)
    assert [s for s, info in net.by_site.items() if s.is_weight and info.quantizable and info.shared_with] == [site]
    assert net.by_site[site].note
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        weight = by_hand.get_submodule(site.module).weight
        weight.copy_(quantizers[site](weight))
        expected, before = by_hand(IMAGES), model(IMAGES)
        with quantized(net, {site: quantizers[site]}):
            torch.testing.assert_close(model(IMAGES), expected)
        assert torch.equal(model(IMAGES), before)
    keys = set(model.state_dict())
    attach_quantizers_(net, {site: quantizers[site]})
    torch.testing.assert_close(model(IMAGES), expected)
    assert latent_weights(model).keys() == {site}
    added = set(model.state_dict()) - keys
    assert {name.rpartition(".")[2] for name in added} == {"scale", "min_scale"}
    assert len(added) == 2
    twin = copy.deepcopy(model)
    twin(IMAGES).square().sum().backward()
    latent, quantizer = latent_weights(twin)[site]
    assert quantizer.scale.grad is not None
    assert all(twin.get_submodule(name)._parameters["weight"] is latent for name in net.by_site[site].shared_with)
    restore_float_(model)
    assert torch.equal(model(IMAGES), before)
    assert set(model.state_dict()) == keys


def test_all_sites_around_a_shared_weight_train(tied):
    """Every input has a quantizer of its own; the calibrated network is where training starts."""
    model, _ = tied
    net, quantizers = opened(model)
    with torch.no_grad(), quantized(net, quantizers):
        expected = model(IMAGES)
    attach_quantizers_(net, quantizers)
    assert torch.equal(model(IMAGES), expected)
    model(IMAGES).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_each_use_of_a_shared_weight_costs_at_its_own_input():
    """The bits of the weight count in both products, each with the bits of the input that it meets."""
    _, sites = find_sites(Twins().eval(), IMAGES[:1])
    bits = {Site("a", "weight"): 2, Site("a", "input"): 4, Site("b", "input"): 8}
    macs = {"a": 16 * 8 * 8, "b": 32 * 8 * 8}
    outside = sum(i.macs for i in sites if i.site.module in ("stem", "head"))
    expected = 2 * 4 * macs["a"] + 2 * 8 * macs["b"] + 1024 * outside
    assert accounting.bitops(bits, cost_table(sites)) == expected


def old_spectral_norm(layer):
    """The older form, which torch still has."""
    return nn.utils.spectral_norm(layer)


@pytest.mark.parametrize(
    ("change", "way"),
    [
        (parametrizations.weight_norm, "remove_parametrizations"),
        (parametrizations.spectral_norm, "remove_parametrizations"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "prune.remove"),
        (old_spectral_norm, "remove_spectral_norm"),
    ],
)
def test_weights_that_are_computed_at_every_pass_say_how_to_make_them_plain(change, way):
    """They are counted and noted; where nothing else can be quantized, the error names the layers and the call."""
    model = nn.Sequential(change(nn.Linear(8, 8)), nn.ReLU(), change(nn.Linear(8, 2))).eval()
    trace, sites = find_sites(model, torch.randn(1, 8))
    weights = [i for i in sites if i.site.is_weight]
    assert [(i.quantizable, i.macs, way in i.note) for i in weights] == [(False, 64, True), (False, 16, True)]
    assert not trace.unobserved
    with pytest.raises(InputError, match=rf"0, 2 .*{way}"):
        check_plain_weights(model, sites)
    mixed = nn.Sequential(model[0], nn.Linear(8, 2)).eval()
    _, sites = find_sites(mixed, torch.randn(1, 8))
    check_plain_weights(mixed, sites)
    assert [i.site.module for i in sites if i.quantizable] == ["1", "1"]


def test_a_parameter_beside_the_layers_weight_is_none_of_its_own():
    """A low-rank addition inside a linear's own forward multiplies by parameters of its own: these are listed."""

    class LowRank(nn.Linear):
        def __init__(self):
            super().__init__(8, 8)
            self.down, self.up = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))

        def forward(self, x):
            return super().forward(x) + F.linear(F.linear(x, self.down), self.up)

    trace, sites = find_sites(nn.Sequential(LowRank(), nn.Linear(8, 2)).eval(), torch.randn(1, 8))
    assert next(i.macs for i in sites if i.site == Site("0", "weight")) == 64
    assert trace.unplanned == {"0": 32}
    assert trace.unplanned_parameters == {"0.down": 16, "0.up": 16}
