"""The planner's integer program: the optimum of enumeration, exact budgets, ties, and a clean standard output."""

import ctypes

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from analysis.planner import plan_bits
from analysis.planning.bit_options import apply_pins
from analysis.solver.choice_program import Budget, NoPlanError, Program
from analysis.solver.integer_program import solve
from analysis.solver.reductions import reduce_program
from quant.bit_plan import PlanBudget
from quant.errors import InputError
from quant.site import Site
from tests.choice_programs import programs, within
from tests.plan_frames import NETWORKS, chain, cost_frame, option_frame

C_LIBRARY = ctypes.CDLL(None)


@pytest.mark.parametrize("small", [3, 14])
def test_the_budget_holds_where_the_solver_cannot_see(small):
    """A layer of 10^12 weights hides single weights in the solver's tolerance; the plan keeps the budget all the same.

    The budget lets the large layer have 3 bits and one single weight 8, yet every one of them wants 8.
    """
    names = [("big:weight", "big:input"), *((f"s{i}:weight", f"s{i}:input") for i in range(small))]
    numel = {name: 10**12 if name.startswith("big") else 1 for pair in names for name in pair}
    weights = [pair[0] for pair in names]
    scores = {(name, b): (-100.0 if name == "big:weight" else -1.0) * (b > 2) for name in weights for b in (2, 8)}
    scores = {(name, 3 if name == "big:weight" and b == 8 else b): score for (name, b), score in scores.items()}
    limit = (3 * 10**12 + 2 * small + 6) / (10**12 + small)
    solution = plan_bits(
        option_frame(scores),
        cost_frame(names, numel, [1] * len(names)),
        budget=PlanBudget(weight_bits=limit),
        stored=10**12 + small,
    )
    assert solution.totals.weight_bits <= limit
    assert solution.lower_bound <= -101
    assert (solution.objective, solution.status) == (-101, "optimal")


@settings(max_examples=300)
@given(program=programs(products=True))
def test_no_choice_is_better(program):
    """Enumeration finds no better choice, with and without products, or no plan at all where there is none."""
    best = min(map(program.total, within(program)), default=None)
    if best is None:
        with pytest.raises(NoPlanError):
            solve(program, relative_gap=0.0, time_limit=10)
        return
    solved = solve(program, relative_gap=0.0, time_limit=10)
    assert program.fits(solved.choice)
    assert program.total(solved.choice) == pytest.approx(best, abs=1e-7)
    assert best - 1e-6 < solved.lower_bound <= best + 1e-9
    assert solved.status == "optimal"


@settings(max_examples=100)
@given(program=programs(products=True), gap=st.sampled_from((1e-3, 0.1, 0.5)))
def test_a_looser_gap_is_kept_too(program, gap):
    """Asked for a gap, the choice is within the budgets, the bound below the optimum, and `optimal` means closed."""
    every = within(program)
    assume(every)
    solved = solve(program, relative_gap=gap, time_limit=10)
    assert program.fits(solved.choice)
    assert solved.lower_bound <= min(map(program.total, every)) + 1e-9
    total = program.total(solved.choice)
    assert total - solved.lower_bound <= gap * abs(total) + 1e-6


def test_a_product_too_large_to_join_is_solved_all_the_same():
    """Ten units in a chain of products, 5^10 combinations: the optimum is that of dynamic programming along the chain.

    Multipliers turn the budget into a price, so the plan for the price is best at what it spends.
    """
    random = np.random.default_rng(0)
    score = [np.sort(random.uniform(0, 1, 5))[::-1] for _ in range(10)]
    pairs = {(u, u + 1): random.integers(1, 50) * np.outer(np.arange(1, 6), np.arange(1, 6)) for u in range(9)}
    price = 2e-3
    states: list[tuple[float, tuple[int, ...]]] = [(float(score[0][k]), (k,)) for k in range(5)]
    for u in range(1, 10):
        states = [
            min((cost + score[u][k] + price * pairs[u - 1, u][path[-1], k], (*path, k)) for cost, path in states)
            for k in range(5)
        ]
    best = min(states)[1]
    budget = Budget([np.zeros(5, dtype=np.int64)] * 10, 0, pairs)
    program = Program(score, [Budget(budget.own, budget.spent(best), pairs)])
    assert reduce_program(program).program.pairs
    solved = solve(program, relative_gap=1e-6, time_limit=20)
    assert program.total(solved.choice) == pytest.approx(program.total(best), rel=1e-5)
    assert solved.status == "optimal"


def test_ties_that_overlap_are_one_and_need_a_common_bit_width():
    """Two ties with a site in common bind all three sites; without a common bit-width they are refused."""
    options, cost, parameters = chain(3)
    a, b, c = (Site(f"fc{i}", "weight") for i in range(3))
    bits = plan_bits(options, cost, budget=PlanBudget(weight_bits=4.5), stored=parameters, ties=[(a, b), (b, c)]).bits
    assert bits[a] == bits[b] == bits[c] == 4
    pinned = apply_pins(options, [("fc0:weight", 2), ("fc1:weight", 3)], {})
    with pytest.raises(InputError, match="fc0:weight, fc1:weight have no bit-width in common"):
        plan_bits(pinned, cost, budget=PlanBudget(), stored=parameters, ties=[(a, b)])


def test_a_product_of_two_tied_sites_grows_with_the_square_of_their_bits():
    """Of two layers of 10^9 MACs one is planned, weight and input tied at 2 or 4 bits: 4 or 16 GBitOps beside 1024."""
    scores = {(name, b): -float(b) for name in ("a:weight", "a:input") for b in (2, 4)}
    cost = cost_frame(NETWORKS[0], dict.fromkeys(("a:weight", "a:input", "b:weight", "b:input"), 8), [10**9] * 2)
    tie = (Site("a", "weight"), Site("a", "input"))

    def plan(gbitops: int) -> dict[Site, int]:
        budget = PlanBudget(bitops=gbitops * 10**9)
        return plan_bits(option_frame(scores), cost, budget=budget, stored=16, ties=[tie]).bits

    assert plan(1040) == dict.fromkeys(tie, 4)
    assert plan(1039) == plan(1028) == dict.fromkeys(tie, 2)
    with pytest.raises(InputError, match="the cheapest has 1028, the most expensive 1040"):
        plan(1027)


def test_solving_prints_nothing(capfd):
    """A program at which the HiGHS of scipy 1.17 prints a line of its own leaves standard output empty."""
    options, cost, parameters = chain(8, seed=3)
    plan_bits(options, cost, budget=PlanBudget(weight_bits=3.0, activation_bits=4.0), stored=parameters)
    C_LIBRARY.fflush(None)
    assert capfd.readouterr().out == ""
