"""Plans of a live network: the optimum of a small case, budgets, pins, what is refused."""

import itertools

import pandas as pd
import pytest
import torch
from torch import nn

import analysis
from quant.errors import InputError

torch.manual_seed(0)
DATA = [(torch.randn(16, 3, 8, 8), torch.randint(3, (16,)))]
MODEL = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3)).eval()
NET = analysis.Network(MODEL, DATA[0])
SENS = analysis.measure_sensitivity(NET, DATA, bits=(2, 4, 8), sites=("weight",))


def test_the_plan_is_the_best_of_all_assignments():
    """27 assignments of three weights: none within the budget has a smaller sum of divergences."""
    plan = analysis.plan_bits(NET, SENS, weight_bits=4, layout="strict")
    table = SENS.table.set_index(["module", "bit_width"])["divergence"]
    numel = {info.site.module: info.numel for info in NET.infos if info.site.is_weight}
    table = table.groupby("module").cummin() if table.groupby("module").is_monotonic_decreasing.all() else table
    best = min(
        sum(table[module, bits] for module, bits in zip(numel, choice, strict=True))
        for choice in itertools.product((2, 4, 8), repeat=3)
        if sum(n * bits for n, bits in zip(numel.values(), choice, strict=True)) <= 4 * sum(numel.values())
    )
    found = sum(table[site.module, site.bit_width] for site in plan.sites)
    assert found == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("budget", [{"weight_bits": 5.0}, {"size_bytes": 3000}, {"gbitops": 0.005}])
def test_a_budget_holds(budget):
    """Whatever is limited, the totals are within it."""
    plan = analysis.plan_bits(NET, SENS, layout="strict", **budget)
    ((name, limit),) = budget.items()
    total = plan.totals.bitops / 1e9 if name == "gbitops" else getattr(plan.totals, name)
    assert total <= limit


def test_pins_bounds_and_candidates():
    """A pin fixes, a bound limits, candidates restrict the rest; the layout keeps first layer and head at 8."""
    with pytest.warns(UserWarning, match="pin"):  # which the layout would have at 8 bits
        plan = analysis.plan_bits(NET, SENS, weight_bits=8, pins={"0": 4}, bounds={"2": (2, 4)})
    bits = {site.module: site.bit_width for site in plan.sites}
    assert bits["0"] == 4
    assert bits["2"] <= 4
    assert bits["4"] == 8
    few = analysis.plan_bits(NET, SENS, weight_bits=8, candidates=(2, 4), layout="strict")
    assert {site.bit_width for site in few.sites} <= {2, 4}


def test_uniform_bits_as_a_budget():
    """`like` costs no more than the uniform bits, and its divergence is no larger."""
    plan = analysis.plan_bits(NET, SENS, like="w4a4", layout="strict")
    assert plan.totals.weight_bits <= 4


def test_a_plain_module_is_enough_where_it_was_measured():
    """The sensitivity knows its network; another module is refused."""
    plan = analysis.plan_bits(MODEL, SENS, weight_bits=4, layout="strict")
    assert plan.sites == analysis.plan_bits(NET, SENS, weight_bits=4, layout="strict").sites
    with pytest.raises(InputError, match="Network"):
        analysis.plan_bits(nn.Linear(2, 2), SENS, weight_bits=4)


def test_a_plan_from_gradients():
    """An estimate is a sensitivity: the planner takes it, with interactions too."""
    quick = analysis.estimate_sensitivity(NET, DATA, bits=(2, 4, 8), sites=("weight",))
    assert analysis.plan_bits(NET, quick, weight_bits=4, layout="strict").totals.weight_bits <= 4
    plan = analysis.plan_bits(NET, quick, weight_bits=4, layout="strict", interactions=True)
    assert plan.solver.status == "local_search"
    with pytest.raises(InputError, match="products"):
        analysis.plan_bits(NET, SENS, weight_bits=4, layout="strict", interactions=True)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({}, "budget"),
        ({"weight_bits": 1.0, "layout": "strict"}, "cheapest"),
        ({"weight_bits": 4, "pins": {"nothing*": 4}}, "nothing"),
        ({"weight_bits": 4, "objective": "speed"}, "speed"),
        ({"like": "w4a4", "weight_bits": 4}, "like"),
        ({"like": "4w4a"}, "w4a4"),
    ],
)
def test_wrong_requests_are_refused(arguments, word):
    """One message that names the argument, in the library's words."""
    with pytest.raises(InputError, match=word) as caught:
        analysis.plan_bits(NET, SENS, **arguments)
    assert "--" not in str(caught.value)


def test_the_front_never_rises():
    """A larger budget never costs more divergence; uniform bits lie on or above the front."""
    front = analysis.pareto_front(NET, SENS, layout="strict", points=6)
    assert front.table["objective"].is_monotonic_decreasing
    for point in front.uniform.itertuples():
        as_costly = front.table[front.table["budget"] >= point.weight_bits - 1e-9]
        best = as_costly["objective"].max() if len(as_costly) else front.table["objective"].min()
        assert best <= point.objective + 1e-12
    with pytest.raises(InputError, match="budget"):
        analysis.pareto_front(NET, SENS, budget="watts")


def test_rows_that_the_time_limit_left_out_are_not_planned_silently():
    """A site measured at the fewest bits alone would get these: the plan is refused, or made of complete widths."""
    table = SENS.table.copy()
    late = (table["bit_width"] == 8) & (table["module"] == "4")
    table.loc[late, "divergence"], table.loc[late, "note"] = float("nan"), "not measured: the time limit of 1 s"
    with pytest.raises(InputError, match="time limit"):
        analysis.plan_bits(NET, table, weight_bits=4, layout="strict")
    unknown = SENS.table.copy()
    unknown.loc[unknown["module"] == "4", "divergence"] = float("nan")
    with pytest.warns(UserWarning, match="floating point"):
        plan = analysis.plan_bits(NET, unknown, weight_bits=4, layout="strict")
    assert {site.module for site in plan.sites} == {"0", "2"}
    assert isinstance(SENS.top(2), pd.DataFrame)
