"""HiGHS under exact budgets: what its tolerance hides is found out, and what was left out counts in the bound."""

import math
import time

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from analysis.solver.choice_program import Budget, Program
from analysis.solver.highs import solve_by_highs
from analysis.solver.integer_program import close_gap
from analysis.solver.lagrangian import Relaxation
from tests.choice_programs import programs, within


@pytest.mark.parametrize(("small", "ended"), [(3, "closed"), (14, "narrowed")])
def test_a_budget_holds_where_the_solver_cannot_see(small, ended):
    """A unit that costs 10^12 hides costs of 6 in the tolerance; the choice is within the room all the same.

    The room lets the large unit and one small unit have what they want. Few wrong choices are cut off one by one; with
    many the room is narrowed, and the bound stays that of the whole room.
    """
    score = [np.array([0.0, -100.0]), *[np.array([0.0, -1.0])] * small]
    own = [np.array([0, 10**12]), *[np.array([0, 6])] * small]
    program = Program(score, [Budget(own, 10**12 + 6)])
    found = solve_by_highs(program, gap=0.0, deadline=time.monotonic() + 60)
    assert found.choice is not None
    assert program.fits(found.choice)
    assert (found.ended, found.bound <= -101) == (ended, True)
    assert ended == "narrowed" or program.total(found.choice) == -101


def test_no_choice_is_told_from_none_in_time():
    """Budgets that exclude each other end `empty`, with an infinite bound."""
    own = [np.array([0, 1])], [np.array([1, 0])]
    program = Program([np.zeros(2)], [Budget(costs, 0) for costs in own])
    found = solve_by_highs(program, gap=0.0, deadline=time.monotonic() + 60)
    assert (found.choice, found.bound, found.ended) == (None, math.inf, "empty")


@given(program=programs(products=False), gap=st.sampled_from((0.0, 0.01, 0.3)), short=st.floats(0.0, 2.0))
def test_the_bound_counts_what_was_left_out(program, gap, short):
    """From any plan and any valid bound, the result's bound is below the optimum and the gap that was asked is closed.

    What each option costs the bound is exact here, so options go that a plan within the gap of the best may have.
    """
    every = within(program)
    assume(every)
    best = min(map(program.total, every))
    bound = best - short
    reduced = [
        np.array([min((program.total(c) for c in every if c[u] == k), default=math.inf) - bound for k in range(len(s))])
        for u, s in enumerate(program.score)
    ]
    found = close_gap(program, Relaxation(bound, list(every[0]), reduced), gap, time.monotonic() + 60)
    assert found.choice is not None
    assert program.fits(found.choice)
    assert found.bound <= best + 1e-9
    total = program.total(found.choice)
    assert total - found.bound <= gap * abs(total) + 1e-6
