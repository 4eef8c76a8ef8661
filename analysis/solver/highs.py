"""A choice program as HiGHS takes it, solved within the budgets exactly although HiGHS works to tolerances."""

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from analysis.solver.choice_program import Program
from analysis.terminal.standard_output import c_output_discarded

_LARGEST = 1e3  # coefficients are scaled to this; HiGHS takes 1e-6 for nothing, in a row and in the objective
_EXACT_TRIES, _TRIES = 10, 40  # see solve_by_highs


@dataclass(frozen=True)
class Found:
    """What HiGHS came to: a choice within the budgets or None, a lower bound on every choice, and how it ended.

    `ended` is `closed` (the gap that was asked for), `narrowed` (the room was narrowed against rounding; the bound is
    that of the whole room), `time`, or `empty`: no choice is within the budgets, and the bound is infinite.
    """

    choice: list[int] | None
    bound: float
    ended: Literal["closed", "narrowed", "time", "empty"]


def solve_by_highs(program: Program, *, gap: float, deadline: float) -> Found:
    """The least score within the budgets, to `gap` times its height above the sum of the units' least scores.

    A product x_u[p] * x_v[q] of two choices is y[p, q] >= 0 with sum_q y[p, q] = x_u[p] and sum_p y[p, q] = x_v[q];
    y need not be declared integer. HiGHS works to tolerances, so each choice is checked exactly: one that exceeds
    a budget is cut off and the program solved again, after a few times with a little less room as well. The `deadline`
    is one of time.monotonic.
    """
    if not program.budgets:
        choice = [int(score.argmin()) for score in program.score]
        return Found(choice, program.total(choice), "closed")
    pairs = program.pairs
    sizes = [len(score) for score in program.score]
    sizes += [sizes[u] * sizes[v] for u, v in pairs]
    starts = np.cumsum([0, *sizes])
    columns = [slice(a, b) for a, b in itertools.pairwise(starts)]
    x_columns = columns[: len(program.score)]
    upper, limits, rooms = _budget_rows(program, pairs, columns)

    floor = [float(score.min()) for score in program.score]
    objective = np.zeros(starts[-1])
    objective[: x_columns[-1].stop] = np.concatenate([s - low for s, low in zip(program.score, floor, strict=True)])
    scale = _LARGEST / (objective.max() or 1.0)
    equal, right = _structure(sizes, pairs, columns)
    constraints = [LinearConstraint(equal, right, right)]
    cuts: list[NDArray[np.float64]] = []
    bound, less = 0.0, 0.0
    for attempt in range(_TRIES):
        rows = sparse.csr_array(np.array([*limits, *cuts]).reshape(-1, starts[-1]))
        most = [*(room - less for room in rooms), *[len(x_columns) - 1.0] * len(cuts)]
        with c_output_discarded():  # HiGHS 1.12 in scipy 1.17 prints a line of its own now and then
            result = milp(
                objective * scale,
                integrality=np.arange(starts[-1]) < x_columns[-1].stop,
                bounds=Bounds(0, upper),
                constraints=[*constraints, LinearConstraint(rows, -np.inf, most)],
                # a new dictionary each time: milp empties the one that it is given
                options={"mip_rel_gap": gap, "time_limit": max(deadline - time.monotonic(), 0.1)},
            )
        if result.status == 2 and not less:
            return Found(None, math.inf, "empty")
        if result.status not in (0, 1, 2):
            raise RuntimeError(f"HiGHS failed: {result.message}")
        if not less and result.mip_dual_bound is not None:
            bound = max(bound, result.mip_dual_bound)
        proven = math.fsum(floor) + bound / scale
        if result.x is None:
            return Found(None, proven, "time" if result.status == 1 else "narrowed")
        choice = [int(np.argmax(result.x[column])) for column in x_columns]
        if program.fits(choice):
            return Found(choice, proven, "time" if result.status == 1 else "narrowed" if less else "closed")
        cuts.append(np.zeros(starts[-1]))
        cuts[-1][[column.start + k for column, k in zip(x_columns, choice, strict=True)]] = 1
        less = 0.0 if attempt < _EXACT_TRIES else 1e-6 * 2.0 ** (attempt - _EXACT_TRIES)
    return Found(None, proven, "narrowed")


def _budget_rows(
    program: Program, pairs: Sequence[tuple[int, int]], columns: Sequence[slice]
) -> tuple[NDArray[np.float64], list[NDArray[np.float64]], list[float]]:
    """The upper bound of each column, and a row with its right side per budget, scaled."""
    upper = np.ones(columns[-1].stop)
    limits, rooms = [], []
    for budget in program.budgets:
        costs = np.zeros(len(upper), dtype=np.int64)
        for column, own in zip(columns, budget.own, strict=False):
            costs[column] = own
        for column, pair in zip(columns[len(budget.own) :], pairs, strict=True):
            costs[column] = budget.pairs[pair].ravel() if pair in budget.pairs else 0
        upper[costs > budget.room] = 0  # exactly, and the row is left with smaller coefficients
        costs[costs > budget.room] = 0
        divisor = max(int(np.gcd.reduce(costs)), 1)
        scale = min(1.0, _LARGEST / max(costs.max() // divisor, 1))
        limits.append(costs // divisor * scale)
        rooms.append(budget.room // divisor * scale)
    return upper, limits, rooms


def _structure(
    sizes: Sequence[int], pairs: Sequence[tuple[int, int]], columns: Sequence[slice]
) -> tuple[sparse.csr_array, NDArray[np.float64]]:
    """The equations: one option per unit; each pair's y has the two choices as its margins."""
    units = len(columns) - len(pairs)
    entries: list[tuple[int, int, float]] = []
    for u, column in enumerate(columns[:units]):
        entries += [(u, i, 1.0) for i in range(column.start, column.stop)]
    row = units
    for (u, v), column in zip(pairs, columns[units:], strict=True):
        y = np.arange(column.start, column.stop).reshape(sizes[u], -1)
        for margins, x in ((y, columns[u]), (y.T, columns[v])):
            for k, members in enumerate(margins):
                entries += [(row, int(i), 1.0) for i in members] + [(row, x.start + k, -1.0)]
                row += 1
    at_row, at_column, value = zip(*entries, strict=True)
    equal = sparse.coo_array((value, (at_row, at_column)), shape=(row, columns[-1].stop)).tocsr()
    return equal, (np.arange(row) < units).astype(float)
