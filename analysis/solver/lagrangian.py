"""A proven bound and a good plan for a choice program without products, however large, by Lagrangian relaxation."""

import time
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from analysis.solver.choice_program import Program
from analysis.terminal.standard_output import c_output_discarded

_STEPS = 400  # of the search for multipliers; a few dozen are usual
_ROUNDING = 8 * float(np.finfo(float).eps)  # a few float operations per term of the bound
_STARTS = 12  # choices of the search's last steps that are made plans, until one closes the gap
_PAIRED = 400  # options among which pairs of moves are sought; see _gain
_LOOSE_BOX = 1e4  # of a multiplier, over the range of the total score; see _box


@dataclass(frozen=True)
class Relaxation:
    """The best bound that was found, the resulting plan, and what each option costs the bound.

    `bound` is in the unit of the scores: no choice within the budgets has less. `choice` is one within them, or None
    if none was found. Any choice with option k of unit u has at least `bound + reduced[u][k]`.
    """

    bound: float
    choice: list[int] | None
    reduced: list[NDArray[np.float64]]


class _Options:
    """The options of all units in one row, unit after unit: scores, and costs (budgets, options) in whole numbers."""

    def __init__(self, program: Program) -> None:
        sizes = [len(score) for score in program.score]
        self.starts = np.cumsum([0, *sizes])[:-1]
        self.unit_of = np.repeat(np.arange(len(sizes)), sizes)
        self.score = np.concatenate(program.score)
        self.cost = np.stack([np.concatenate(budget.own) for budget in program.budgets])
        self.room = np.array([budget.room for budget in program.budgets], dtype=np.int64)
        self.share = self.cost / self.room[:, None]  # of the room; multipliers are prices of the whole room

    def best(self, value: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The least value of each unit, and the option that has it (the first of equals)."""
        least = np.minimum.reduceat(value, self.starts)
        hits = np.flatnonzero(value == least[self.unit_of])
        return least, hits[np.searchsorted(hits, self.starts)]

    def over(self, pick: NDArray[np.int64]) -> NDArray[np.int64]:
        """What the picked options cost beyond each budget's room."""
        return self.cost[:, pick].sum(axis=1) - self.room

    def change(self, values: NDArray, pick: NDArray[np.int64]) -> NDArray:
        """How `values` (..., options) change if a unit takes another option than the picked one."""
        return values - values[..., pick][..., self.unit_of]


def relax(program: Program, *, relative_gap: float, deadline: float) -> Relaxation:
    """The Lagrangian relaxation of a program without products, by the time `deadline` (of time.monotonic).

        L(m) = sum_u min_k (score[u, k] + sum_b m_b cost_b[u, k]) - sum_b m_b room_b  <=  the optimum, for any m >= 0

    L is concave with kinks; Kelley's cutting planes find its maximum (Kelley, J. SIAM 8(4), 1960), which is that of
    the linear relaxation, in few steps, as there are few budgets. The search ends when L cannot rise by more than a
    tenth of `relative_gap`. The last choices on the way are repaired into plans within the budgets; the best is kept.
    """
    if not program.budgets:
        lowest = [int(score.argmin()) for score in program.score]
        return Relaxation(program.total(lowest), lowest, [score - score.min() for score in program.score])
    options = _Options(program)
    spread = np.maximum.reduceat(options.score, options.starts) - np.minimum.reduceat(options.score, options.starts)
    scale = float(spread.sum()) or 1.0
    box = _box(options) * scale
    multipliers = np.zeros(len(options.room))
    best_bound, best_multipliers = -np.inf, multipliers
    slopes, heights = [], []
    recent: deque[NDArray[np.int64]] = deque(maxlen=_STARTS)
    for _ in range(_STEPS):
        bound, pick = _dual(options, multipliers)
        if bound > best_bound:
            best_bound, best_multipliers = bound, multipliers
        recent.append(pick)
        slopes.append(options.over(pick) / options.room)
        heights.append(bound / scale - slopes[-1] @ multipliers / scale)
        ceiling, multipliers = _highest(np.array(slopes), np.array(heights), box / scale)
        multipliers = multipliers * scale
        tolerance = max(0.1 * relative_gap * abs(best_bound), 1e-9 * scale)
        if ceiling * scale - best_bound <= tolerance or time.monotonic() > deadline:
            break
    priced = options.score + best_multipliers @ options.share
    low, _ = options.best(priced)
    choice: NDArray[np.int64] | None = None
    total = np.inf
    for start in reversed(recent):
        plan = _plan(options, priced, start, deadline)
        if plan is not None and options.score[plan].sum() < total:
            choice, total = plan, float(options.score[plan].sum())
        if total - best_bound <= relative_gap * abs(total) or time.monotonic() > deadline:
            break
    ends = [*options.starts[1:], len(options.score)]
    return Relaxation(
        bound=best_bound,
        choice=None if choice is None else (choice - options.starts).tolist(),
        reduced=[priced[a:b] - least for a, b, least in zip(options.starts, ends, low, strict=True)],
    )


def _box(options: _Options) -> float:
    """The largest multiplier of use, in units of the range of the total score.

    Where one plan is cheapest in every budget, L(m) <= its score - sum_b m_b room_b, so no multiplier at the maximum
    is beyond the range; elsewhere the box is a guess, and a bound at its edge is a bound all the same.
    """
    free = ~options.cost.any(axis=0)
    return 1.0 if np.logical_or.reduceat(free, options.starts).all() else _LOOSE_BOX


def _dual(options: _Options, multipliers: NDArray[np.float64]) -> tuple[float, NDArray[np.int64]]:
    """L at the multipliers, less what its rounding may have added, and the options that attain it."""
    priced = options.score + multipliers @ options.share
    least, pick = options.best(priced)
    size = np.abs(options.score[pick]).sum() + multipliers @ (options.share[:, pick].sum(axis=1) + 1)
    return float(least.sum() - multipliers.sum() - _ROUNDING * np.log2(len(least) + 2) * size), pick


def _highest(
    slopes: NDArray[np.float64], heights: NDArray[np.float64], box: float
) -> tuple[float, NDArray[np.float64]]:
    """The highest point under all planes height + slope @ m with 0 <= m <= box: its height, and m."""
    with c_output_discarded():
        result = linprog(
            np.r_[-1.0, np.zeros(slopes.shape[1])],
            A_ub=np.column_stack([np.ones(len(slopes)), -slopes]),
            b_ub=heights,
            bounds=[(None, None), *[(0, box)] * slopes.shape[1]],
            method="highs",
        )
    if result.x is None:  # numerically out of reach; the search ends with what it has
        return -np.inf, np.zeros(slopes.shape[1])
    return float(result.x[0]), np.clip(result.x[1:], 0, box)


def _plan(
    options: _Options, priced: NDArray[np.float64], pick: NDArray[np.int64], deadline: float
) -> NDArray[np.int64] | None:
    """A choice within the budgets, or None: moves at the least price until it fits, then those that gain most.

    `priced` are the scores with the multipliers' prices of the costs, `pick` the options of least price.
    """
    pick = pick.copy()
    while (options.over(pick) > 0).any():
        move = _relief(options, priced, pick)
        if move is None or time.monotonic() > deadline:
            return None
        pick[options.unit_of[move]] = move
    while (moves := _gain(options, priced, pick)) and time.monotonic() < deadline:
        pick[options.unit_of[moves]] = moves
    return pick


def _relief(options: _Options, priced: NDArray[np.float64], pick: NDArray[np.int64]) -> int | None:
    """The option that takes off excess at the least price for what it takes off, or None if none does."""
    over = options.over(pick)
    after = over[:, None] + options.change(options.cost, pick)
    excess = (np.maximum(over, 0) / options.room).sum()
    relief = excess - (np.maximum(after, 0) / options.room[:, None]).sum(axis=0)
    useful = np.flatnonzero(relief > 1e-12 * excess)
    if not len(useful):
        return None
    price = np.maximum(options.change(priced, pick)[useful], 0) / relief[useful]
    return int(useful[np.argmin(price)])


def _gain(options: _Options, priced: NDArray[np.float64], pick: NDArray[np.int64]) -> list[int]:
    """The option, or the two of two units, that lower the score most and stay within the budgets; none: empty.

    Pairs are sought among the options of least price, for a pair that gains has one that all but pays for the other.
    """
    over = options.over(pick)
    score, cost = options.change(options.score, pick), options.change(options.cost, pick)
    score[np.abs(score) < 1e-12 * np.abs(options.score).max()] = 0.0  # rounding must not look like a gain for ever
    single = np.flatnonzero((score < 0) & (cost <= -over[:, None]).all(axis=0))
    best = [int(single[np.argmin(score[single])])] if len(single) else []
    change = options.change(priced, pick)
    change[pick] = np.inf
    few = np.argsort(change, kind="stable")[:_PAIRED]
    few = few[np.isfinite(change[few])]
    together = score[few][:, None] + score[few]
    first, second = np.nonzero(together < (score[best].sum() if best else -1e-12 * np.abs(options.score).max()))
    apart = (first < second) & (options.unit_of[few[first]] != options.unit_of[few[second]])
    first, second = few[first[apart]], few[second[apart]]
    fits = (cost[:, first] + cost[:, second] <= -over[:, None]).all(axis=0)
    first, second = first[fits], second[fits]
    if len(first):
        k = np.argmin(score[first] + score[second])
        best = [int(first[k]), int(second[k])]
    return best
