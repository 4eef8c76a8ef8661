"""Which budgets of a plan exclude each other, where each alone can be met."""

import time
from collections.abc import Sequence

import numpy as np

from analysis.planning.budgets import PlanLimit
from analysis.solver.choice_program import NoPlanError, Program
from analysis.solver.integer_program import solve
from quant.errors import InputError


def conflict(limits: Sequence[PlanLimit], *, time_limit: float) -> InputError:
    """The error for budgets that no plan meets together: it names the fewest that exclude each other.

    Each budget is left out in turn, and stays out if there is still no plan: all that are left then matter. The
    message also says what can be had of the last of them within the others. The searches share `time_limit` seconds; a
    budget that was not shown to be without effect in that time is named too.
    """
    deadline = time.monotonic() + time_limit
    blamed = sorted(limits, key=lambda one: bool(one.costs.pairs))  # the last one's costs must be per unit
    blamed.reverse()
    for one in tuple(blamed):
        others = [other for other in blamed if other is not one]
        if others and _exclude_each_other(others, deadline):
            blamed = others
    *others, last = blamed
    zero = last.costs.least_at_zero()
    score = [costs.astype(np.float64) for costs in zero.own]
    hint = ""
    try:
        found = solve(Program(score, [one.costs for one in others]), relative_gap=1e-6, time_limit=_left(deadline))
        within = " and ".join(one.words for one in others)
        hint = f" Within {within}, a plan can have {last.figure(last.costs.spent(found.choice))} of the last."
    except (NoPlanError, InputError):
        pass
    names = " and ".join(one.words for one in blamed)
    return InputError(f"No plan is within {names} at once, though each can be met alone.{hint} Raise one of them.")


def _exclude_each_other(limits: Sequence[PlanLimit], deadline: float) -> bool:
    nothing = [np.zeros(len(costs)) for costs in limits[0].costs.own]
    try:
        solve(Program(nothing, [one.costs for one in limits]), relative_gap=1.0, time_limit=_left(deadline))
    except NoPlanError:
        return True
    except InputError:
        return False
    return False


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.1)
