"""The solution of a choice program: reduced, bounded by Lagrangian relaxation, and what is left solved by HiGHS."""

import math
import time
from dataclasses import dataclass

import numpy as np

from analysis.solver.choice_program import NoPlanError, Program
from analysis.solver.highs import Found, solve_by_highs
from analysis.solver.lagrangian import Relaxation, relax
from analysis.solver.reductions import reduce_program
from quant.errors import InputError


@dataclass(frozen=True)
class Solved:
    """The option of each unit, a lower bound on the score of every choice, and the status (as in PlanSolution)."""

    choice: list[int]
    lower_bound: float
    status: str


def solve(program: Program, *, relative_gap: float, time_limit: float) -> Solved:
    """The least score within the budgets, to `relative_gap` of its size or until `time_limit` in seconds.

    A program without products (or with such as become joint choices) gets a bound and a plan by Lagrangian relaxation.
    If they are further apart than the gap, options that no better plan can contain are left out and HiGHS solves the
    rest. NoPlanError: nothing is within all budgets. InputError: no plan was found in time.
    """
    deadline = time.monotonic() + time_limit
    reduced = reduce_program(program)
    small = reduced.program
    if small.pairs:
        fewest = [0] * len(small.score)  # a plan to fall back on
        start = Relaxation(-math.inf, fewest if small.fits(fewest) else None, [np.zeros(len(s)) for s in small.score])
    else:
        start = relax(small, relative_gap=relative_gap, deadline=deadline)
    found = close_gap(small, start, relative_gap, deadline)
    if found.choice is None:
        if found.ended == "empty":
            raise NoPlanError
        raise InputError(
            f"No plan was found in {time_limit:g} s, nor a proof that there is none. "
            "Raise a budget, allow more time or offer fewer bit-widths."
        )
    status = {"time": "time_limit", "narrowed": "feasible"}.get(found.ended, "optimal")
    return Solved(reduced.expand(found.choice), found.bound, status)


def close_gap(program: Program, start: Relaxation, relative_gap: float, deadline: float) -> Found:
    """The plan of `start` if it is within the gap, or the best of it and of what HiGHS finds among the options left.

    Left out is an option with which every plan has nearly the score of the plan of `start`: half the gap below it is
    what HiGHS may leave open, and half is what the options left out may.
    """
    target, gap = math.inf, relative_gap
    if start.choice is not None:
        total = program.total(start.choice)
        asked = relative_gap * abs(total)
        if total - start.bound <= asked:
            return Found(start.choice, start.bound, "closed")
        target = total - asked / 2
        height = total - math.fsum(float(score.min()) for score in program.score)
        gap = min(1.0, asked / 2 / max(height, 1e-300))
    kept = [np.flatnonzero(start.bound + extra < target) for extra in start.reduced]
    try:
        rest = reduce_program(program.restricted(kept))
        found = solve_by_highs(rest.program, gap=gap, deadline=deadline)
    except NoPlanError:
        found = Found(None, math.inf, "empty")
    choice, bound = start.choice, max(start.bound, min(target, found.bound))
    if found.choice is not None:
        better = [int(options[k]) for options, k in zip(kept, rest.expand(found.choice), strict=True)]
        if choice is None or program.total(better) < program.total(choice):
            choice = better
    closed = choice is not None and program.total(choice) - bound <= relative_gap * abs(program.total(choice))
    if closed or found.ended != "closed" or choice == start.choice:
        return Found(choice, bound, "closed" if closed else found.ended)
    # The gap was asked for in parts of a worse plan's score; of the new plan's it is not closed yet.
    again = close_gap(program, Relaxation(start.bound, choice, start.reduced), relative_gap, deadline)
    return Found(again.choice, max(bound, again.bound), again.ended)
