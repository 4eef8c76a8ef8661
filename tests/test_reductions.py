"""Exact reductions: no optimum is lost, and a joint choice costs what its members cost."""

import contextlib

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from analysis.solver.choice_program import Budget, NoPlanError, Program
from analysis.solver.reductions import reduce_program, undominated
from tests.choice_programs import programs, within


@given(program=programs(products=True))
def test_pruning_and_joining_change_no_optimum(program):
    """The best choice of the reduced program is within the original's budgets and as good as the best of all there."""
    every = within(program)
    if not every:
        with contextlib.suppress(NoPlanError):
            assert not within(reduce_program(program).program)
        return
    reduced = reduce_program(program)
    best = min(within(reduced.program), key=reduced.program.total)
    expanded = reduced.expand(best)
    assert program.fits(expanded)
    assert program.total(expanded) == pytest.approx(min(map(program.total, every)), abs=1e-12)


@given(program=programs(products=True))
def test_what_is_left_costs_the_same(program):
    """Each choice of the reduced program is within its budgets exactly if it is within the original's."""
    assume(within(program))
    reduced = reduce_program(program)
    inside = set(within(reduced.program))
    for choice in np.ndindex(*(len(score) for score in reduced.program.score)):
        assert (choice in inside) == program.fits(reduced.expand(choice))
        assert reduced.program.total(choice) == pytest.approx(program.total(reduced.expand(choice)), abs=1e-12)


@given(rows=st.lists(st.tuples(*[st.integers(0, 6)] * 3), min_size=1, max_size=600), spread=st.integers(1, 50))
def test_the_front_is_what_no_row_covers(rows, spread):
    """A row stays exactly if no other is nowhere more and somewhere less, and no later one equals it."""
    costs = np.array([(a * spread + b, b, c * spread - a) for a, b, c in rows])
    kept = undominated(costs)
    below = (costs[:, None, :] <= costs[None, :, :]).all(axis=2)
    equal = (costs[:, None, :] == costs[None, :, :]).all(axis=2)
    later = np.arange(len(costs))[:, None] > np.arange(len(costs))
    lost = (below & ~equal).any(axis=0) | (equal & later).any(axis=0)
    assert kept.tolist() == np.flatnonzero(~lost).tolist()


def test_an_option_that_is_dear_with_one_partner_only_stays():
    """With partner 0 option 1 is dearer, with partner 1 cheaper: neither option of a product dominates the other."""
    product = np.array([[0, 9], [4, 5]])
    zero = [np.zeros(2, dtype=np.int64)] * 2
    program = Program([np.array([0.0, 0.0]), np.array([1.0, 0.0])], [Budget(zero, 5, {(0, 1): product})])
    reduced = reduce_program(program)
    assert {tuple(row) for row in reduced.options[0].tolist()} == {(1, 1)}
    assert reduced.members == [(0, 1)]


def test_a_product_of_many_options_stays_a_product():
    """Beyond the limit of combinations the pair is kept, still without its useless options."""
    grid = np.outer(np.arange(100), np.arange(100))
    own = [np.zeros(100, dtype=np.int64)] * 2
    score = -np.arange(100.0)
    reduced = reduce_program(Program([score, score], [Budget(own, 5000, {(0, 1): grid})]))
    assert reduced.program.pairs == [(0, 1)]
    assert [len(each) for each in reduced.program.score] == [100, 100]
