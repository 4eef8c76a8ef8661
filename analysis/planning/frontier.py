"""The Pareto front: the least predicted loss for each budget, cheapest to most expensive, its price and knee.

`options`, `cost`, `ties` and `latency` are those of planner.plan_bits, and all figures are of its accounting.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from analysis.planner import PlanSolution, plan_bits, read_options
from analysis.planning import accounting
from analysis.planning.budget_kinds import BUDGET_KINDS
from analysis.planning.objectives import summed
from quant.bit_plan import PlanBudget
from quant.errors import InputError
from quant.site import Site

TOTALS = ("weight_bits", "activation_bits", "size_bytes", "bitops")
ON_REQUEST = ("activation_bytes", "latency_ms")  # have a curve where the budget sets them: few plans are about them
PARETO_COLUMNS = (
    "budget_kind", "budget", *TOTALS, *ON_REQUEST, "objective", "lower_bound", "gap", "status", "shadow_price",
    "predicted_delta_loss",
)  # fmt: skip
UNIFORM_COLUMNS = ("budget_kind", "bit_width", *TOTALS, *ON_REQUEST, "objective", "predicted_delta_loss")
_FLOATS = dict.fromkeys((*TOTALS, *ON_REQUEST), float)
_WHOLE = ("size_bytes", "activation_bytes", "bitops")


def pareto_front(
    options: pd.DataFrame,
    cost: pd.DataFrame,
    *,
    stored: accounting.Stored,
    kinds: Sequence[str] | None = None,
    budget: PlanBudget | None = None,
    ties: Iterable[Collection[Site]] = (),
    latency: pd.DataFrame | None = None,
    points: int = 17,
    relative_gap: float = 1e-6,
    time_limit: float = 60.0,
    solved: Callable[[], object] = lambda: None,
) -> pd.DataFrame:
    """One row per kind of budget and budget, rising; columns PARETO_COLUMNS. All other budgets of `budget` hold.

    `kinds` are names of TOTALS and ON_REQUEST, by default all of TOTALS that some site counts for, and those of
    ON_REQUEST that `budget` sets. A curve has `points` budgets in equal ratios, from that of the cheapest plan to that
    of the plan with the least score, and the one that `budget` itself sets, if it lies between. Each row is the best of
    all plans found that are within its budget, the cheaper of equals: so objective never rises. A larger
    budget that buys nothing has no row of its own. A bound for a larger budget holds for a smaller one too, so
    lower_bound never rises either.

    objective and lower_bound are sums of the scores of `options`, in their unit; predicted_delta_loss is that of the
    column delta_loss of `options`, whatever was minimised (NaN without it). shadow_price is what the
    next unit of the budget (a bit on average, a byte, a bit operation, a millisecond) saves: the fall to the next row
    over the difference of the two budgets, 0 at the last row, where the scores cannot fall further. `relative_gap` and
    `time_limit` (seconds) are those of one point; `solved` is called after each. InputError: as of `plan_bits`.
    """
    if points < 2:
        raise InputError(f"A Pareto front of {points} points has no two ends. Ask for 2 or more.")
    ties = [tuple(tie) for tie in ties]  # read once for each plan
    plan = partial(
        plan_bits, cost=cost, stored=stored, ties=ties, latency=latency,
        relative_gap=relative_gap, time_limit=time_limit,
    )  # fmt: skip
    curves = []
    for kind in _applicable(options, kinds, budget, latency):
        others = replace(budget or PlanBudget(), **{kind: None})
        most_expensive = plan(options, budget=others)
        # Every cost but a table of latencies grows with the bits: the fewest bits are the least of all costs at once.
        spent = options["bit_width"] if kind != "latency_ms" else _milliseconds(options, cost, latency)
        cheapest = plan(options.assign(score=spent.astype(float)), budget=others)
        asked = getattr(budget, kind, None)
        limits = _limits(kind, getattr(cheapest.totals, kind), getattr(most_expensive.totals, kind), asked, points)
        solutions = []
        for limit in limits[:-1]:
            solutions.append(plan(options, budget=replace(others, **{kind: limit})))
            solved()
        solved()
        curves.append(_curve(kind, limits, [*solutions, most_expensive], options, relative_gap))
    return pd.concat(curves, ignore_index=True)


def uniform_points(
    options: pd.DataFrame,
    cost: pd.DataFrame,
    *,
    stored: accounting.Stored,
    kinds: Sequence[str] | None = None,
    budget: PlanBudget | None = None,
    ties: Iterable[Collection[Site]] = (),
    latency: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """What one bit-width for all sites costs, to set beside the front; one row per kind of budget and bit-width.

    Columns UNIFORM_COLUMNS. The sites that the kind counts have the bit-width, save pinned ones (weights for
    `weight_bits` and `size_bytes`, activations for `activation_bits`, both for `bitops`); the others are planned
    within all other budgets, as on the front, so no point lies below it. A bit-width that a site was not offered, or
    that is not within the other budgets, has no row.
    """
    plan = partial(plan_bits, cost=cost, stored=stored, ties=[tuple(tie) for tie in ties], latency=latency)
    is_weight = options["tensor"].str.startswith("weight")
    is_open = options.groupby(["module", "tensor"])["bit_width"].transform("nunique") > 1
    rows = []
    for kind in _applicable(options, kinds, budget, latency):
        sort = BUDGET_KINDS[kind].counts
        counted = is_open if sort == "all" else is_open & (is_weight == (sort == "weights"))
        others = replace(budget or PlanBudget(), **{kind: None})
        sites = options.loc[counted, ["module", "tensor"]].drop_duplicates()
        for bit_width, at in options[counted].groupby("bit_width"):
            if len(at) < len(sites):
                continue
            uniform = options[~counted | (options["bit_width"] == bit_width)]
            try:
                solution = plan(uniform, budget=others)
            except InputError:  # not within the other budgets
                continue
            figures = {"budget_kind": kind, "bit_width": bit_width, "objective": solution.objective}
            figures["predicted_delta_loss"] = summed(solution.sites, options, "delta_loss")
            rows.append(figures | asdict(solution.totals))
    return pd.DataFrame(rows, columns=list(UNIFORM_COLUMNS)).astype(_FLOATS)


def knee(front: pd.DataFrame) -> pd.DataFrame:
    """The row of each curve of `front` that lies farthest below the chord between its ends, under its own index.

    Both axes are scaled to 0..1: what the plan costs, and the objective itself, not its logarithm. On a convex
    curve the next unit saves more than the average unit of the whole curve before the knee, and less after it; on a
    logarithmic axis a loss that falls by a constant factor a bit is a straight line, whose farthest point is noise,
    and a loss below 0 has no place. The knee belongs to the range of bit-widths offered. A curve that falls nowhere
    below its chord has no row.
    """
    found = []
    for kind in front["budget_kind"].unique():
        rows = np.flatnonzero(front["budget_kind"] == kind)
        spent, loss = (front[column].to_numpy(dtype=float)[rows] for column in (kind, "objective"))
        if not (spent[-1] > spent[0] and loss[0] > loss[-1]):
            continue
        below = (spent[-1] - spent) / (spent[-1] - spent[0]) - (loss - loss[-1]) / (loss[0] - loss[-1])
        if below.max() > 1e-9:  # rounding of a straight line
            found.append(rows[below.argmax()])
    return front.iloc[found]


def _applicable(
    options: pd.DataFrame, kinds: Sequence[str] | None, budget: PlanBudget | None, latency: pd.DataFrame | None
) -> list[str]:
    """The kinds asked for, or all that have a site to act on, those of ON_REQUEST where the budget sets them."""
    known = (*TOTALS, *ON_REQUEST)
    unknown = [kind for kind in kinds or () if kind not in known]
    if unknown:
        raise InputError(f"There is no budget {unknown[0]!r}. Choose from {', '.join(known)}.")
    if latency is None and "latency_ms" in (kinds or ()):
        raise InputError("A front over latency_ms needs a latency table. Give one or leave it out.")
    is_weight = options["tensor"].str.startswith("weight")
    empty = {"weight_bits"} if not is_weight.any() else set()
    empty |= {"activation_bits", "activation_bytes"} if is_weight.all() else set()
    wrong = [kind for kind in kinds or () if kind in empty]
    if wrong:
        raise InputError(f"A front over {wrong[0]} has no site to act on. Measure such sites or leave it out.")
    if kinds is not None:
        return [kind for kind in known if kind in kinds]
    asked = [kind for kind in ON_REQUEST if getattr(budget, kind, None) is not None]
    return [kind for kind in (*TOTALS, *asked) if kind not in empty]


def _milliseconds(options: pd.DataFrame, cost: pd.DataFrame, latency: pd.DataFrame | None) -> pd.Series:
    """What each option costs by the latency table."""
    assert latency is not None
    times, (planned, _) = accounting.latency_table(latency, cost), read_options(options, cost)
    keys = zip(options["module"], options["tensor"], options["bit_width"], strict=True)
    spent = [accounting.site_latency(planned[Site(m, t)][bits], times) for m, t, bits in keys]
    return pd.Series(spent, index=options.index) / accounting.PICOSECONDS


def _limits(kind: str, low: float, high: float, asked: float | None, points: int) -> list[Any]:
    """Budgets from `low` to `high`, both exactly, in equal ratios: loss falls steeply where bits are few."""
    low = max(low, 1 / accounting.PICOSECONDS)  # of a table of zeros; no budget is 0
    inner = [float(limit) for limit in np.geomspace(low, max(high, low), points)[1:-1]]
    if asked is not None:
        inner.append(asked)
    if kind in _WHOLE:
        inner = [int(limit) for limit in inner]
    return [*sorted({limit for limit in [low, *inner] if low <= limit < high}), high]


def _curve(
    kind: str, limits: list[Any], solutions: Sequence[PlanSolution], options: pd.DataFrame, relative_gap: float
) -> pd.DataFrame:
    """The rows of one kind of budget; `solutions` has the plan of each limit."""
    bounds = np.maximum.accumulate([solution.lower_bound for solution in reversed(solutions)])[::-1]
    rows: list[tuple[PlanSolution, dict[str, Any]]] = []
    for limit, own, bound in zip(limits, solutions, bounds, strict=True):
        within = [solution for solution in solutions if getattr(solution.totals, kind) <= limit]
        best = min(within, key=lambda solution: (solution.objective, getattr(solution.totals, kind)))
        lower_bound = min(float(bound), best.objective)
        if rows and best is rows[-1][0]:  # a larger budget that buys nothing
            continue
        gap = (
            0.0 if lower_bound == best.objective else (best.objective - lower_bound) / max(abs(best.objective), 1e-300)
        )
        row = {
            "budget_kind": kind,
            "budget": float(limit),
            **asdict(best.totals),
            "objective": best.objective,
            "predicted_delta_loss": summed(best.sites, options, "delta_loss"),
            "lower_bound": lower_bound,
            "gap": gap,
            "status": "optimal" if gap <= relative_gap else own.status,
        }
        rows.append((best, row))
    frame = pd.DataFrame([row for _, row in rows])
    loss, budget = frame["objective"].to_numpy(), frame["budget"].to_numpy()
    frame["shadow_price"] = [*((loss[:-1] - loss[1:]) / np.diff(budget)), 0.0]
    return frame[list(PARETO_COLUMNS)].astype(_FLOATS)
