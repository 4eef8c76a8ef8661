"""The Lagrangian relaxation: never above the optimum, and plans within every budget."""

import math
import time

import numpy as np
import pytest
from hypothesis import assume, given

from analysis.solver.choice_program import Budget, NoPlanError, Program
from analysis.solver.lagrangian import relax
from analysis.solver.reductions import reduce_program
from tests.choice_programs import programs, within


@given(program=programs(products=False))
def test_the_bound_never_exceeds_the_optimum(program):
    """No choice within the budgets has less than the bound, nor one with option k less than bound + reduced[k]."""
    every = within(program)
    assume(every)
    try:
        small = reduce_program(program).program
    except NoPlanError:
        pytest.fail("a program with a plan was reduced to none")
    relaxed = relax(small, relative_gap=0.0, deadline=time.monotonic() + 60)
    inside = within(small)
    assert relaxed.bound <= min(map(small.total, inside))
    for unit, extra in enumerate(relaxed.reduced):
        for option, more in enumerate(extra):
            totals = [small.total(choice) for choice in inside if choice[unit] == option]
            assert relaxed.bound + more <= min(totals, default=math.inf) + 1e-9
    if relaxed.choice is not None:
        assert small.fits(relaxed.choice)


@pytest.mark.parametrize("budgets", [1, 3])
def test_many_units_leave_a_small_gap(budgets):
    """With 500 units of 9 options a plan is found within a thousandth of the bound: fractional units are few."""
    random = np.random.default_rng(budgets)
    levels = [np.sort(random.integers(0, 10**6, 9)) for _ in range(500 * budgets)]
    score = [np.sort(random.uniform(0, 1, 9))[::-1] for _ in range(500)]
    costs = [levels[i::budgets] for i in range(budgets)]
    program = reduce_program(Program(score, [Budget(own, sum(int(c.mean()) for c in own)) for own in costs])).program
    relaxed = relax(program, relative_gap=1e-4, deadline=time.monotonic() + 60)
    assert relaxed.choice is not None
    assert program.fits(relaxed.choice)
    assert 0 <= program.total(relaxed.choice) - relaxed.bound <= 1e-3 * abs(relaxed.bound)


def test_a_late_deadline_leaves_a_bound():
    """Out of time at once, the bound is still one: that of the multipliers tried."""
    program = reduce_program(Program([np.array([1.0, 0.0])] * 3, [Budget([np.array([0, 2])] * 3, 3)])).program
    relaxed = relax(program, relative_gap=0.0, deadline=time.monotonic() - 1)
    assert relaxed.bound <= 2.0
