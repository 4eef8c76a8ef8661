"""Plans to compare with: within the budget, and what their names say."""

import itertools

import numpy as np
import pytest

from analysis.planner import plan_bits
from analysis.planning import accounting
from analysis.planning.baselines import greedy, largest_uniform, random_choice, uniform, within_budget, worst_first
from quant.bit_plan import PlanBudget
from quant.site import Site
from tests.plan_frames import chain, option_frame

BUDGETS = (PlanBudget(weight_bits=3.0, activation_bits=4.0), PlanBudget(bitops=10**12), PlanBudget(weight_bits=2.5))


def score_of(sites, options):
    """The sum of the scores of a plan."""
    scores = {(r.module, r.tensor, r.bit_width): r.score for r in options.itertuples()}
    return sum(scores[s.module, s.tensor, s.bit_width] for s in sites)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("choose", [greedy, worst_first, random_choice(0)])
def test_a_lowered_plan_is_within_the_budget_and_no_better_than_the_optimum(budget, choose):
    """Every site has one of its bit-widths; the integer program's objective is never beaten."""
    options, cost, parameters = chain(6)
    options = options.assign(score=options["score"].abs())
    sites = within_budget(options, cost, choose, budget=budget, stored=parameters)
    assert len(sites) == 12
    totals = accounting.totals(sites, cost, parameters)
    assert all(getattr(totals, name) <= limit for name, limit in budget.as_dict().items())
    best = plan_bits(options, cost, budget=budget, stored=parameters)
    assert score_of(sites, options) >= best.objective - 1e-9


def test_greedy_takes_the_cheapest_step_and_worst_first_the_dearest():
    """Two weights of one size, one of which hurts a hundred times as much: only one may step down."""
    _, cost, parameters = chain(2)
    cost.loc[cost["tensor"] == "weight", "numel"] = 1000
    scores = {(f"fc{i}:{t}", b): 100.0**i / b for i in range(2) for t in ("weight", "input") for b in (4, 8)}
    options = option_frame(scores)
    budget = PlanBudget(weight_bits=6.0)
    for choose, lowered_module in ((greedy, "fc0"), (worst_first, "fc1")):
        sites = within_budget(options, cost, choose, budget=budget, stored=parameters)
        bits = {s.module: s.bit_width for s in sites if s.tensor == "weight"}
        assert bits == {"fc0": 4 if lowered_module == "fc0" else 8, "fc1": 4 if lowered_module == "fc1" else 8}
        assert {s.bit_width for s in sites if s.tensor == "input"} == {8}  # no budget counts them


def test_tied_sites_step_together():
    """All weights tied: they end at one bit-width."""
    options, cost, parameters = chain(4)
    tie = [tuple(Site(f"fc{i}", "weight") for i in range(4))]
    sites = within_budget(options, cost, greedy, budget=PlanBudget(weight_bits=3.5), stored=parameters, ties=tie)
    assert {s.bit_width for s in sites if s.tensor == "weight"} == {3}


def test_where_nothing_fits_there_is_no_plan():
    """Two bits everywhere exceed a budget of one."""
    options, cost, parameters = chain(3)
    budget = PlanBudget(weight_bits=1.0)
    assert within_budget(options, cost, greedy, budget=budget, stored=parameters) is None
    assert largest_uniform(options, cost, budget=budget, stored=parameters) is None


def test_random_plans_differ_by_their_seed_alone():
    """The same seed gives the same plan, five seeds not all the same."""
    options, cost, parameters = chain(8)
    budget = PlanBudget(weight_bits=3.0)
    plans = [within_budget(options, cost, random_choice(i), budget=budget, stored=parameters) for i in (0, 0, 1, 2, 3)]
    assert plans[0] == plans[1]
    assert len(set(plans)) > 1


@pytest.mark.parametrize(("weight_bits", "activation_bits"), list(itertools.product((3.0, 3.9, 8.0), (2.0, 5.0))))
def test_the_largest_uniform_plan_is_the_largest_that_fits(weight_bits, activation_bits):
    """By hand: the greatest measured bit-width at or below each budget."""
    options, cost, parameters = chain(3)
    budget = PlanBudget(weight_bits=weight_bits, activation_bits=activation_bits)
    sites = largest_uniform(options, cost, budget=budget, stored=parameters)
    expected = [max(b for b in (2, 3, 4, 8) if b <= limit) for limit in (weight_bits, activation_bits)]
    assert {s.bit_width for s in sites if s.tensor == "weight"} == {expected[0]}
    assert {s.bit_width for s in sites if s.tensor == "input"} == {expected[1]}


def test_pinned_sites_keep_their_bits_in_a_uniform_plan():
    """A site with one option has it; the others have what is asked for, measured or not: a cost needs no score."""
    options, cost, _ = chain(3)
    pinned = options[(options["module"] != "fc0") | (options["bit_width"] == 8)]
    assert [s.bit_width for s in uniform(pinned, cost, 3, 4)] == [8, 8, 3, 4, 3, 4]
    assert [s.bit_width for s in uniform(pinned, cost, 5, 4)] == [8, 8, 5, 4, 5, 4]


def test_the_uniform_plan_may_have_bits_that_were_not_measured():
    """With 2, 4 and 8 offered, 3.5 bits allow 2 of those offered and 3 of all between the least and the most."""
    options, cost, parameters = chain(3)
    some = options[options["bit_width"] != 3]
    found = [
        largest_uniform(some, cost, budget=PlanBudget(weight_bits=3.5), stored=parameters, any_width=any_width)
        for any_width in (False, True)
    ]
    assert [{s.bit_width for s in sites if s.tensor == "weight"} for sites in found] == [{2}, {3}]
    assert [{s.bit_width for s in sites if s.tensor == "input"} for sites in found] == [{8}, {8}]


def test_a_plan_covers_only_what_was_measured():
    """Sites that the options lack stay out of every plan."""
    options, cost, parameters = chain(3)
    weights = options[options["tensor"] == "weight"]
    sites = within_budget(weights, cost, greedy, budget=PlanBudget(weight_bits=3.0), stored=parameters)
    assert {s.tensor for s in sites} == {"weight"}
    assert np.isfinite(score_of(sites, options))
