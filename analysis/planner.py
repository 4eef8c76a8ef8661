"""The bit planner: which site gets how many bits, as an exact integer program, with a certificate.

`options` is a frame with one row per (module, tensor, bit_width): score (predicted loss increase, in the unit of the
measured metric; may be negative), granularity, signed, offset. `cost` is the frame of cost.parquet (see accounting).
"""

import difflib
import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import partial

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, isotonic_regression, milp

from analysis import accounting
from quant.bit_plan import PlanBudget, PlannedSite, PlanTotals, check_known_sites
from quant.errors import InputError
from quant.site import ALLOWED_BIT_WIDTHS, Site

PINNED_BITS = 8  # of the first convolution or patch embedding and the classifier, in layout `paper`

_UNITS = {  # how a message shows a budget: words, and the divisor of the stored figure
    "weight_bits": ("mean weight bits", 1),
    "activation_bits": ("mean activation bits", 1),
    "size_bytes": ("MiB", 2**20),
    "bitops": ("GBitOps", 10**9),
}
_LARGEST = 1e3  # coefficients are scaled to this; HiGHS takes 1e-6 for nothing, in a row and in the objective
_NOT_TOGETHER = "No plan is within all budgets at once, though each can be met alone. Raise one of them."
_EXACT_TRIES, _TRIES = 10, 40  # see _solve


@dataclass(frozen=True, kw_only=True)
class PlanSolution:
    """The chosen sites in network order, what they cost, and how good the choice is.

    `objective` is the sum of the chosen scores. No plan within the budget has less than `lower_bound`; `gap` is
    their difference over |objective|. `status` is `optimal` (HiGHS closed the gap that it was asked for), `time_limit`,
    or `feasible` (the budget had to be narrowed against rounding; the bound is that of the whole budget).
    """

    sites: tuple[PlannedSite, ...]
    totals: PlanTotals
    objective: float
    lower_bound: float
    gap: float
    status: str

    @property
    def bits(self) -> dict[Site, int]:
        """The bit-width of each site."""
        return {planned.site: planned.bit_width for planned in self.sites}


@dataclass(frozen=True)
class _Unit:
    """Sites that share one choice, with the bit-widths open to them in rising order and the score of each."""

    sites: tuple[Site, ...]
    bits: tuple[int, ...]
    score: NDArray[np.float64]


@dataclass(frozen=True)
class _Budget:
    """One budget in whole numbers: the units' own costs, plus weight * bits_u * bits_v per pair of units, <= room.

    Each cost is what an option takes above its unit's cheapest, so `room` is the budget less the cheapest plan.
    """

    own: list[NDArray[np.int64]]
    pairs: dict[tuple[int, int], NDArray[np.int64]]
    room: int


def plan_bits(
    options: pd.DataFrame,
    cost: pd.DataFrame,
    *,
    budget: PlanBudget,
    parameters: int,
    ties: Iterable[Collection[Site]] = (),
    relative_gap: float = 1e-6,
    time_limit: float = 60.0,
) -> PlanSolution:
    """The choice of one bit-width per site with the least total score whose totals are within `budget`.

        minimise    sum_ib  score[i, b] * x[i, b]
        subject to  sum_b   x[i, b] = 1           for each site i; tied sites share x
                    totals_k(x) <= budget_k       for each budget k, by analysis/accounting.py
                    x[i, b] in {0, 1}

    Scores add as if sites were independent, as in HAWQ-V3 (Yao et al., ICML 2021, arXiv:2011.10680). `parameters`
    counts the whole model's; `time_limit` is in seconds. A site that no budget reaches gets its least score, the
    larger bit-width of equals. InputError: unusable options, or a budget that no plan can meet.
    """
    planned, scores = _read_options(options, cost)
    units = _units(planned, scores, ties)
    budgets = _budgets(units, planned, cost, budget, parameters)

    def chosen(choice: Sequence[int]) -> tuple[PlannedSite, ...]:
        bits = {site: unit.bits[k] for unit, k in zip(units, choice, strict=True) for site in unit.sites}
        return tuple(planned[site][bit_width] for site, bit_width in bits.items())

    def fits(choice: Sequence[int]) -> bool:
        spent = accounting.totals(chosen(choice), cost, parameters)
        return all(getattr(spent, name) <= limit for name, limit in budget.as_dict().items())

    choice, lower_bound, status = _solve(units, budgets, fits, relative_gap, time_limit)
    order = {site: i for i, site in enumerate(planned)}
    sites = tuple(sorted(chosen(choice), key=lambda site: order[site.site]))
    objective = math.fsum(scores[p.site, p.bit_width] for p in sites)
    lower_bound = min(lower_bound, objective)
    return PlanSolution(
        sites=sites,
        totals=accounting.totals(sites, cost, parameters),
        objective=objective,
        lower_bound=lower_bound,
        gap=0.0 if objective == lower_bound else (objective - lower_bound) / max(abs(objective), 1e-300),
        status=status,
    )


def _read_options(
    options: pd.DataFrame, cost: pd.DataFrame
) -> tuple[dict[Site, dict[int, PlannedSite]], dict[tuple[Site, int], float]]:
    """The options by site, in network order and rising bit-width, and the score of each."""
    planned: dict[Site, dict[int, PlannedSite]] = {site: {} for site in accounting.cost_rows(cost)}
    scores: dict[tuple[Site, int], float] = {}
    _check_scores(options)
    check_known_sites((Site(*key) for key in zip(options["module"], options["tensor"], strict=True)), planned)
    for row in options.sort_values("bit_width", kind="stable").itertuples(index=False):
        one = PlannedSite(
            module=row.module,
            tensor=row.tensor,
            bit_width=int(row.bit_width),
            granularity=row.granularity,
            signed=bool(row.signed),
            offset=bool(row.offset),
        )
        if (one.site, one.bit_width) in scores:
            raise InputError(f"{one.site} has two scores at {one.bit_width} bits. Keep one row per site and bit-width.")
        planned[one.site][one.bit_width] = one
        scores[one.site, one.bit_width] = float(row.score)
    if not scores:
        raise InputError("There is no site to plan. Measure some with `qvw sensitivity`.")
    return {site: by_bits for site, by_bits in planned.items() if by_bits}, scores


def _check_scores(options: pd.DataFrame) -> None:
    bad = options[~np.isfinite(options["score"].to_numpy(dtype=float))]
    if len(bad):
        row = bad.iloc[0]
        raise InputError(
            f"The score of {row['module']}:{row['tensor']} at {row['bit_width']} bits is {row['score']}, "
            f"as are {len(bad) - 1} more. Choose another objective (without labels: kl), or measure the site again."
        )


def _units(
    planned: Mapping[Site, Mapping[int, PlannedSite]],
    scores: Mapping[tuple[Site, int], float],
    ties: Iterable[Collection[Site]],
) -> list[_Unit]:
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
        units.append(_Unit(tuple(group), bits, np.array([math.fsum(scores[s, b] for s in group) for b in bits])))
    return units


def _budgets(
    units: Sequence[_Unit],
    planned: Mapping[Site, Mapping[int, PlannedSite]],
    cost: pd.DataFrame,
    budget: PlanBudget,
    parameters: int,
) -> list[_Budget]:
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
                "pinned sites counted. Raise the budget or offer a smaller bit-width."
            )
        if most < dearest:
            binding.append(
                _Budget(
                    [costs - costs.min() for costs in own],
                    {pair: costs - costs.min() for pair, costs in pairs.items()},
                    most - cheapest,
                )
            )
    return binding


def _bitops(
    units: Sequence[_Unit], cost: pd.DataFrame
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


def _solve(
    units: Sequence[_Unit],
    budgets: Sequence[_Budget],
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
    units: Sequence[_Unit], pairs: Sequence[tuple[int, int]], columns: Sequence[slice]
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


def isotonic(options: pd.DataFrame) -> pd.DataFrame:
    """`options` with scores that never rise with the bit-width: the nearest such ones per site, in least squares.

    More bits cannot truly hurt; where a measured score says so it is noise. The measured ones go to `score_measured`.
    """
    _check_scores(options)
    measured = options["score"].to_numpy(dtype=float)
    score = measured.copy()
    for rows in options.groupby(["module", "tensor"], sort=False).indices.values():
        rising = rows[np.argsort(options["bit_width"].to_numpy()[rows], kind="stable")]
        score[rising] = isotonic_regression(measured[rising], increasing=False).x
    return options.assign(score=score, score_measured=measured)


def tied_sites(patterns: Iterable[str], sites: Collection[Site]) -> list[tuple[Site, ...]]:
    """One group per pattern (fnmatch, over `module:tensor`): its sites share their bit-width."""
    groups = []
    for pattern in patterns:
        groups.append(tuple(site for site in sites if fnmatchcase(str(site), pattern)))
        if not groups[-1]:
            raise _no_match("tie", pattern, [str(site) for site in sites])
    return groups


def apply_pins(
    options: pd.DataFrame,
    pins: Iterable[tuple[str, int]],
    layout_pins: Mapping[Site, int],
    candidates: Collection[int] | None = None,
) -> pd.DataFrame:
    """`options` with one row left per pinned site, and of the others those at the `candidates`, if given.

    A pin is (pattern, bit_width), the pattern as in fnmatch over the module's name or `module:tensor`. A later pin
    wins over an earlier one, and any over the layout's. InputError: no match, or no score at the pinned bit-width.
    """
    sites = [Site(*key) for key in zip(options["module"], options["tensor"], strict=True)]
    pinned = {site: (bits, "the layout") for site, bits in layout_pins.items()}
    for pattern, bits in pins:
        matches = [site for site in sites if fnmatchcase(site.module, pattern) or fnmatchcase(str(site), pattern)]
        if not matches:
            raise _no_match("pin", pattern, [name for site in sites for name in (site.module, str(site))])
        pinned.update(dict.fromkeys(matches, (bits, f"the pin {pattern}={bits}")))
    measured: dict[Site, list[int]] = {}
    kept: dict[Site, list[int]] = {}
    for site, bits in zip(sites, options["bit_width"], strict=True):
        measured.setdefault(site, []).append(int(bits))
    for site, offered in measured.items():
        bits, who = pinned.get(site, (0, ""))
        kept[site] = [b for b in offered if (b == bits if who else candidates is None or b in candidates)]
        if not kept[site]:
            wanted = f"{bits} bits by {who}" if who else f"one of {sorted(candidates or ())} bits"
            raise InputError(
                f"{site} is to have {wanted}, but was measured at {sorted(offered)}. "
                "Measure it with `qvw sensitivity --bits`, or choose a bit-width that was measured."
            )
    keep = [int(bits) in kept[site] for site, bits in zip(sites, options["bit_width"], strict=True)]
    return options[keep]


def layout_pins(cost: pd.DataFrame, layout: str) -> dict[Site, int]:
    """The bit-widths that the layout fixes: 8 for the first and last layer under `paper`, none under `strict`."""
    if layout not in ("paper", "strict"):
        raise InputError(f"The layout {layout!r} is unknown. Choose paper or strict.")
    return {site: PINNED_BITS for site, row in accounting.cost_rows(cost).items() if row.pinned and layout == "paper"}


def uniform_bits(
    cost: pd.DataFrame, weight_bits: int | None, activation_bits: int | None, layout: str
) -> dict[Site, int]:
    """One bit-width for all weights and one for all activations, save the layout's pins; None leaves them in float."""
    for bits in (weight_bits, activation_bits):
        if bits is not None and bits not in ALLOWED_BIT_WIDTHS:
            raise InputError(f"A uniform bit-width of {bits} is not allowed. Choose from {ALLOWED_BIT_WIDTHS}.")
    pins = layout_pins(cost, layout)
    wanted = {site: weight_bits if site.is_weight else activation_bits for site in accounting.cost_rows(cost)}
    return {site: pins.get(site, bits) for site, bits in wanted.items() if bits is not None}


def _no_match(what: str, pattern: str, names: Sequence[str]) -> InputError:
    close = difflib.get_close_matches(pattern, list(dict.fromkeys(names)), n=1, cutoff=0.0)
    nearest = f" The nearest is {close[0]}." if close else ""
    return InputError(f"The {what} {pattern!r} matches no measured site.{nearest} Patterns are as in a shell: * and ?.")
