"""The planner's integer program: units that share a choice, budgets in whole numbers, and their solution by HiGHS."""

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from analysis import accounting
from analysis.standard_output import c_output_discarded
from quant.bit_plan import PlanBudget, PlannedSite, check_known_sites
from quant.errors import InputError
from quant.site import Site

_UNITS = {  # how a message shows a budget: words, and the divisor of the stored figure
    "weight_bits": ("mean weight bits", 1),
    "activation_bits": ("mean activation bits", 1),
    "size_bytes": ("MiB", 2**20),
    "bitops": ("GBitOps", 10**9),
}
_LARGEST = 1e3  # coefficients are scaled to this; HiGHS takes 1e-6 for nothing, in a row and in the objective
_NOT_TOGETHER = "No plan is within all budgets at once, though each can be met alone. Raise one of them."
_EXACT_TRIES, _TRIES = 10, 40  # see solve


@dataclass(frozen=True)
class Unit:
    """Sites that share one choice, with the bit-widths open to them in rising order and the score of each."""

    sites: tuple[Site, ...]
    bits: tuple[int, ...]
    score: NDArray[np.float64]


@dataclass(frozen=True)
class Budget:
    """One budget in whole numbers: the units' own costs, plus weight * bits_u * bits_v per pair of units, <= room.

    Each cost is what an option takes above its unit's cheapest, so `room` is the budget less the cheapest plan.
    """

    own: list[NDArray[np.int64]]
    pairs: dict[tuple[int, int], NDArray[np.int64]]
    room: int


def tied_units(
    planned: Mapping[Site, Mapping[int, PlannedSite]],
    scores: Mapping[tuple[Site, int], float],
    ties: Iterable[Collection[Site]],
) -> list[Unit]:
    """Tied sites as one unit each (ties that overlap are one), the other sites alone, in network order."""
    group_of = {site: [site] for site in planned}
    for tie in ties:
        check_known_sites(tie, planned)
        merged = list(dict.fromkeys(member for site in tie for member in group_of[site]))
        group_of.update(dict.fromkeys(merged, merged))
    units = []
    for group in {id(group): group for group in group_of.values()}.values():
        bits = tuple(sorted(set.intersection(*(set(planned[site]) for site in group))))
        if not bits:
            raise InputError(
                f"The tied sites {', '.join(map(str, group[:4]))} have no bit-width in common. "
                "Untie or unpin one of them, or measure the bit-width that is missing."
            )
        units.append(Unit(tuple(group), bits, np.array([math.fsum(scores[s, b] for s in group) for b in bits])))
    return units


def binding_budgets(
    units: Sequence[Unit],
    planned: Mapping[Site, Mapping[int, PlannedSite]],
    cost: pd.DataFrame,
    budget: PlanBudget,
    parameters: int,
) -> list[Budget]:
    """The budgets that can bind, in whole numbers; InputError for one that no plan can meet."""
    rows = accounting.cost_rows(cost)

    def bits_paid(option: PlannedSite, *, weights: bool) -> int:
        paid = option.site.is_weight == weights
        return option.bit_width * accounting.elements(option.site, rows[option.site]) if paid else 0

    def per_unit(cost_of: Callable[[PlannedSite], int]) -> list[NDArray[np.int64]]:
        return [
            np.array([sum(cost_of(planned[site][b]) for site in unit.sites) for b in unit.bits], dtype=np.int64)
            for unit in units
        ]

    binding = []
    for name, limit in budget.as_dict().items():
        pairs: dict[tuple[int, int], NDArray[np.int64]] = {}
        constant, per = 0, 1  # the budget is on (constant + costs) / per
        if name == "bitops":
            own, pairs, constant = _bitops(units, cost)
        elif name == "size_bytes":
            own = per_unit(lambda option: accounting.site_bytes(option, rows[option.site]))
            inside = sum(int(rows[site].numel) for site in planned if site.is_weight)
            constant = accounting.FLOAT_BYTES * (parameters - inside)
        else:
            weights = name == "weight_bits"
            own = per_unit(partial(bits_paid, weights=weights))
            per = sum(accounting.elements(site, rows[site]) for site in planned if site.is_weight == weights)
            if not per:
                raise InputError(
                    f"The budget {name}={limit:g} has no site to act on. Measure such sites or leave it out."
                )
        every = [*own, *pairs.values()]
        cheapest = constant + sum(int(costs.min()) for costs in every)
        dearest = constant + sum(int(costs.max()) for costs in every)
        most = math.floor(Fraction(limit) * per)
        # A mean is a rounded quotient: 29/10 is within 2.9, although the float 2.9 is a little less.
        while per > 1 and most < dearest and (most + 1) / per <= limit:
            most += 1
        if most < cheapest:
            words, unit = _UNITS[name]
            low, high = (math.ceil(Fraction(total, per * unit) * 10**6) / 10**6 for total in (cheapest, dearest))
            raise InputError(
                f"No plan is within {limit / unit:.10g} {words}: the cheapest has {low:.10g}, the dearest {high:.10g}, "
                "pinned sites counted. Raise the budget, offer a smaller bit-width, or pin less (--layout strict)."
            )
        if most < dearest:
            binding.append(
                Budget(
                    [costs - costs.min() for costs in own],
                    {pair: costs - costs.min() for pair, costs in pairs.items()},
                    most - cheapest,
                )
            )
    return binding


def _bitops(
    units: Sequence[Unit], cost: pd.DataFrame
) -> tuple[list[NDArray[np.int64]], dict[tuple[int, int], NDArray[np.int64]], int]:
    """BitOps per unit alone, per pair of units that both have a choice, and of the products outside the plan."""
    unit_of = {site: u for u, unit in enumerate(units) for site in unit.sites}
    bits = [np.array(unit.bits, dtype=np.int64) for unit in units]
    own = [np.zeros_like(b) for b in bits]
    pairs: dict[tuple[int, int], NDArray[np.int64]] = {}
    constant = 0
    for a, b, macs in accounting.edges(cost).itertuples(index=False):
        ends = sorted(unit_of[site] for site in (Site.parse(a), Site.parse(b)) if site in unit_of)
        if not ends:
            constant += macs * accounting.FLOAT_BITS**2
        elif len(ends) == 1:
            own[ends[0]] += macs * accounting.FLOAT_BITS * bits[ends[0]]
        elif ends[0] == ends[1]:
            own[ends[0]] += macs * bits[ends[0]] ** 2
        else:
            u, v = ends
            if len(bits[u]) == 1:
                u, v = v, u
            if len(bits[v]) == 1:
                own[u] += macs * int(bits[v][0]) * bits[u]
            else:
                pairs[u, v] = pairs.get((u, v), 0) + macs * np.outer(bits[u], bits[v])
    return own, pairs, constant


def solve(
    units: Sequence[Unit],
    budgets: Sequence[Budget],
    fits: Callable[[Sequence[int]], bool],
    relative_gap: float,
    time_limit: float,
) -> tuple[list[int], float, str]:
    """The option of each unit, a lower bound on the total score, and the status, by HiGHS.

    A product x_u[p] * x_v[q] of two choices is y[p, q] >= 0 with sum_q y[p, q] = x_u[p] and sum_p y[p, q] = x_v[q];
    y need not be declared integer. HiGHS works to tolerances, so `fits` checks the choice exactly: one that exceeds
    a budget is cut off and the program solved again, after a few times with a little less room as well.
    """
    pairs = sorted({pair for budget in budgets for pair in budget.pairs})
    sizes = [len(unit.bits) for unit in units] + [len(units[u].bits) * len(units[v].bits) for u, v in pairs]
    starts = np.cumsum([0, *sizes])
    columns = [slice(a, b) for a, b in itertools.pairwise(starts)]
    x_columns = starts[len(units)]

    upper = np.ones(starts[-1])
    limits, rooms = [], []
    for budget in budgets:
        costs = np.zeros(starts[-1], dtype=np.int64)
        for column, own in zip(columns, budget.own, strict=False):
            costs[column] = own
        for column, pair in zip(columns[len(units) :], pairs, strict=True):
            costs[column] = budget.pairs[pair].ravel() if pair in budget.pairs else 0
        upper[costs > budget.room] = 0  # exactly, and the row is left with smaller coefficients
        costs[costs > budget.room] = 0
        divisor = max(int(np.gcd.reduce(costs)), 1)
        scale = min(1.0, _LARGEST / max(costs.max() // divisor, 1))
        limits.append(costs // divisor * scale)
        rooms.append(budget.room // divisor * scale)

    paired = {u for pair in pairs for u in pair}
    objective, floor = np.zeros(starts[-1]), []
    for u, (unit, column) in enumerate(zip(units, columns, strict=False)):
        if u not in paired and not any(budget.own[u].any() for budget in budgets):
            best = np.flatnonzero(unit.score == unit.score.min())[-1]
            upper[column] = np.arange(len(unit.bits)) == best
        is_open = upper[column] > 0
        if not is_open.any():
            raise InputError(_NOT_TOGETHER)
        floor.append(unit.score[is_open].min())
        objective[column] = np.where(is_open, unit.score - floor[-1], 0.0)
    unit_of_score = _LARGEST / (objective.max() or 1.0)

    equal, right = _structure(units, pairs, columns)
    constraints = [LinearConstraint(equal, right, right)]
    cuts: list[NDArray[np.float64]] = []
    bound, less = 0.0, 0.0
    deadline = time.monotonic() + time_limit
    for attempt in range(_TRIES):
        rows = sparse.csr_array(np.array([*limits, *cuts]).reshape(-1, starts[-1]))
        most = [*(room - less for room in rooms), *[len(units) - 1.0] * len(cuts)]
        with c_output_discarded():  # HiGHS 1.12 in scipy 1.17 prints a line of its own now and then
            result = milp(
                objective * unit_of_score,
                integrality=np.arange(starts[-1]) < x_columns,
                bounds=Bounds(0, upper),
                constraints=[*constraints, LinearConstraint(rows, -np.inf, most)] if most else constraints,
                # a new dictionary each time: milp empties the one that it is given
                options={"mip_rel_gap": relative_gap, "time_limit": max(deadline - time.monotonic(), 0.1)},
            )
        if result.status == 2 and len(budgets) > 1 and not less:
            raise InputError(_NOT_TOGETHER)
        if result.x is None and result.status == 1:
            raise InputError(f"No plan was found in {time_limit:g} s. Allow more time or offer fewer bit-widths.")
        if result.x is None:
            raise RuntimeError(f"HiGHS found no plan: {result.message}")
        if not less and result.mip_dual_bound is not None:
            bound = max(bound, result.mip_dual_bound)
        choice = [int(np.argmax(result.x[column])) for column in columns[: len(units)]]
        if fits(choice):
            status = "time_limit" if result.status == 1 else "feasible" if less else "optimal"
            return choice, math.fsum(floor) + bound / unit_of_score, status
        cuts.append(np.zeros(starts[-1]))
        cuts[-1][[column.start + k for column, k in zip(columns, choice, strict=False)]] = 1
        less = 0.0 if attempt < _EXACT_TRIES else 1e-6 * 2.0 ** (attempt - _EXACT_TRIES)
    raise RuntimeError(f"HiGHS exceeded the budget {_TRIES} times; its tolerance is too coarse for these costs.")


def _structure(
    units: Sequence[Unit], pairs: Sequence[tuple[int, int]], columns: Sequence[slice]
) -> tuple[sparse.csr_array, NDArray[np.float64]]:
    """The equations: one option per unit; each pair's y has the two choices as its margins."""
    entries: list[tuple[int, int, float]] = []
    for u, column in enumerate(columns[: len(units)]):
        entries += [(u, i, 1.0) for i in range(column.start, column.stop)]
    row = len(units)
    for (u, v), column in zip(pairs, columns[len(units) :], strict=True):
        y = np.arange(column.start, column.stop).reshape(len(units[u].bits), -1)
        for margins, x in ((y, columns[u]), (y.T, columns[v])):
            for k, members in enumerate(margins):
                entries += [(row, int(i), 1.0) for i in members] + [(row, x.start + k, -1.0)]
                row += 1
    at_row, at_column, value = zip(*entries, strict=True)
    equal = sparse.coo_array((value, (at_row, at_column)), shape=(row, columns[-1].stop)).tocsr()
    return equal, (np.arange(row) < len(units)).astype(float)
