"""The size of a packed file is known before it is written, to the byte, and budgets in bytes hold for the file."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from analysis.allocation import plan_bits
from analysis.evaluation import evaluate
from analysis.measure import measure_sensitivity
from quant.errors import InputError
from quant.network import Network
from quant.packed_file import save_packed
from quant.prepare import prepare_qat_
from quant.stored_model import StoredModel
from tests.plans import plan_of, uniform
from tests.test_packed_file import Tied
from tests.test_prepared_model import NETWORKS

CASES = {**{name: entry[:2] for name, entry in NETWORKS.items()}, "tied": (Tied, torch.randn(8, 1, 16, 16))}


def network(name):
    """A network of the kind with its images."""
    build, images = CASES[name]
    torch.manual_seed(0)
    return Network(build().eval(), [images]), images


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", CASES)
def test_the_size_is_that_of_the_file(name, seed, tmp_path):
    """For all sites and for some, at bits that differ; the text of a file gives the same."""
    net, images = network(name)
    generator = torch.Generator().manual_seed(seed)
    bits = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 16])
    sites = [
        replace(planned, bit_width=int(bits[torch.randint(len(bits), (1,), generator=generator)]))
        for planned in uniform(net, [images]).sites
        if not seed or torch.rand(1, generator=generator) < 0.6
    ]
    expected = StoredModel.from_json(net.stored.to_json()).size(sites)
    prepare_qat_(net, plan_of(sites), [images])
    save_packed(net.model, tmp_path / "m.safetensors")
    assert expected == (tmp_path / "m.safetensors").stat().st_size


@pytest.mark.parametrize("name", [name for name in CASES if name != "tied"])
def test_without_a_plan_it_is_the_state_dict(name, tmp_path):
    """As safetensors writes it."""
    net, _ = network(name)
    save_file(net.model.state_dict(), tmp_path / "m.safetensors")
    assert net.stored.size(()) == (tmp_path / "m.safetensors").stat().st_size
    assert net.stored.parameters == sum(p.numel() for p in net.model.parameters())


def test_a_site_that_is_not_there_is_refused():
    """Nothing is left out of the sum in silence."""
    net, images = network("conv")
    other, _ = network("vit")
    with pytest.raises(InputError):
        other.stored.size(uniform(net, [images]).sites)


@pytest.fixture(scope="module")
def swept():
    """A small network with BatchNorm, and its sensitivity."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 4)
    ).eval()
    data = [(torch.randn(32, 1, 8, 8), torch.randint(4, (32,)))]
    net = Network(model, data[0])
    return net, data, measure_sensitivity(net, data, bits=(2, 4, 8))


def test_a_budget_in_bytes_is_kept_by_the_file_and_used_as_well_as_any_plan_could(swept, tmp_path):
    """Against all choices, each counted exactly: the bound holds, and an optimal plan has no better one beside it."""
    net, data, sens = swept
    table = sens.table.set_index(["module", "tensor", "bit_width"])["divergence"]
    most = plan_bits(net, sens, weight_bits=8, layout="strict")
    sizes, choices = set(), []
    weights = [planned for planned in most.sites if planned.site.is_weight]
    rest = [planned for planned in most.sites if not planned.site.is_weight]
    for bits in itertools.product((2, 4, 8), repeat=len(weights)):
        sites = [replace(planned, bit_width=width) for planned, width in zip(weights, bits, strict=True)]
        size = net.stored.size([*sites, *rest])
        sizes.add(size)
        choices.append((size, math.fsum(table[s.module, s.tensor, s.bit_width] for s in [*sites, *rest])))
    for budget in sorted(sizes):
        plan = plan_bits(net, sens, size_bytes=budget, layout="strict")
        assert plan.totals.size_bytes <= budget
        found = math.fsum(table[s.module, s.tensor, s.bit_width] for s in plan.sites)
        best = min(score for size, score in choices if size <= budget)
        assert plan.solver.lower_bound <= best + 1e-9
        assert found <= best + 1e-9 or plan.solver.status == "feasible"
    with pytest.raises(InputError):
        plan_bits(net, sens, size_bytes=min(sizes) - 8, layout="strict")
    row = evaluate(net, data, {"planned": plan}, calibration=data).iloc[0]
    prepare_qat_(net, plan, data)
    save_packed(net.model, tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").stat().st_size == plan.totals.size_bytes == row["size_bytes"]
