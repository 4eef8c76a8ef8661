"""Small random choice programs and their optimum by enumeration, for the tests of the planner's solver."""

import itertools

import numpy as np
from hypothesis import strategies as st

from analysis.solver.choice_program import Budget, Program


@st.composite
def programs(draw: st.DrawFn, *, products: bool) -> Program:
    """A program of 1 to 4 units with 1 to 5 options, 1 to 3 budgets, perhaps `products`, and rooms on the boundary."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    score = [np.round(random.normal(size=size), draw(st.integers(0, 4))) for size in sizes]
    budgets = []
    for _ in range(draw(st.integers(1, 3))):
        most = 10 ** draw(st.integers(0, 8))
        own = [random.integers(0, most, size, endpoint=True) for size in sizes]
        own = [np.sort(costs) for costs in own] if draw(st.booleans()) else own
        pairs = {
            (u, v): random.integers(0, most, (sizes[u], sizes[v]), endpoint=True)
            for u, v in itertools.combinations(range(len(sizes)), 2)
            if products and draw(st.booleans())
        }
        anchor = [draw(st.integers(0, size - 1)) for size in sizes]
        room = Budget(own, 0, pairs).spent(anchor) - draw(st.sampled_from((0, 0, 1, most)))
        budgets.append(Budget(own, room, pairs))
    return Program(score, budgets)


def within(program: Program) -> list[tuple[int, ...]]:
    """Every choice that is within the budgets."""
    return [choice for choice in itertools.product(*(range(len(s)) for s in program.score)) if program.fits(choice)]
