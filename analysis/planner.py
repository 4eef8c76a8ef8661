"""The bit planner: which site gets how many bits, as an exact integer program, with a certificate.

`options` is a frame with one row per (module, tensor, bit_width): score (predicted loss increase, in the unit of the
measured metric; may be negative), granularity, signed, offset. `cost` is the frame of cost.parquet (see accounting).
"""

import math
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import pandas as pd

from analysis.planning import accounting
from analysis.planning.bit_options import check_scores
from analysis.planning.budgets import binding_limits, fixed_bytes, tied_units
from analysis.planning.conflicts import conflict
from analysis.planning.interactions import Products, improved, interactions, total
from analysis.solver.choice_program import NoPlanError, Program
from analysis.solver.integer_program import solve
from quant.bit_plan import PlanBudget, PlannedSite, PlanTotals, check_known_sites
from quant.errors import InputError
from quant.site import Site


@dataclass(frozen=True, kw_only=True)
class PlanSolution:
    """The chosen sites in network order, what they cost, and how good the choice is.

    `objective` is the sum of the chosen scores, and of their interactions where they were counted. No plan within the
    budget has less than `lower_bound`; `gap` is their difference over |objective|. `status` is `optimal` (the gap that
    was asked for is closed), `time_limit`, `feasible` (the budget had to be narrowed, against rounding or for digits in
    the file's header; the bound is that of the whole budget), or `local_search` (interactions were counted: no bound).
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


def plan_bits(
    options: pd.DataFrame,
    cost: pd.DataFrame,
    *,
    budget: PlanBudget,
    stored: accounting.Stored,
    ties: Iterable[Collection[Site]] = (),
    latency: pd.DataFrame | None = None,
    products: Products | None = None,
    relative_gap: float = 1e-6,
    time_limit: float = 60.0,
) -> PlanSolution:
    """The choice of one bit-width per site with the least total score whose totals are within `budget`.

        minimise    sum_ib  score[i, b] * x[i, b]
        subject to  sum_b   x[i, b] = 1           for each site i; tied sites share x
                    totals_k(x) <= budget_k       for each budget k, by analysis/planning/accounting.py
                    x[i, b] in {0, 1}

    Scores add as if sites were independent, as in HAWQ-V3 (Yao et al., ICML 2021, arXiv:2011.10680). `stored`
    is that of accounting; `time_limit` is in seconds. A site that no budget reaches gets its least score, the
    larger bit-width of equals. InputError: unusable options, or a budget that no plan can meet.

    With `products` (objectives.site_products) the objective also counts what pairs of sites cost together. The exact
    optimum of the sum is then improved by a search, whose status is `local_search`; gap and bound are NaN.
    """
    planned, scores = read_options(options, cost)
    units = tied_units(planned, scores, ties)
    times = None if latency is None else accounting.latency_table(latency, cost)
    deadline = time.monotonic() + time_limit
    fixed, most = fixed_bytes(planned, cost, stored)
    bound, narrowed = -math.inf, False
    while True:
        limits = binding_limits(units, planned, cost, budget, fixed, times)
        left = max(deadline - time.monotonic(), 1.0) if narrowed else time_limit
        program = Program([unit.score for unit in units], [limit.costs for limit in limits])
        try:
            solved = solve(program, relative_gap=relative_gap, time_limit=left)
        except NoPlanError:
            raise conflict(limits, time_limit=max(deadline - time.monotonic(), 1.0)) from None
        choice, objective, ended = solved.choice, None, True
        if products is not None:
            found = interactions(units, scores, products)
            choice, ended = improved(found, program.budgets, choice, relative_gap=relative_gap, deadline=deadline)
            objective = total(found, choice)
        bits = {site: unit.bits[k] for unit, k in zip(units, choice, strict=True) for site in unit.sites}
        sites = tuple(by_bits[bits[site]] for site, by_bits in planned.items())
        totals = accounting.totals(sites, cost, stored, latency)
        if not narrowed:  # of the least header: a bound for every plan
            bound = solved.lower_bound
        assert totals.size_bytes is not None
        over = totals.size_bytes - (budget.size_bytes or math.inf)
        if over <= 0 or fixed >= most:
            break
        fixed, narrowed = min(most, fixed + int(over)), True
    exceeded = [name for name, limit in budget.as_dict().items() if getattr(totals, name) > limit]
    if exceeded:  # the solver counts in whole numbers, the totals are counted again
        raise RuntimeError(f"The plan exceeds its budget of {exceeded[0]}: {getattr(totals, exceeded[0])}.")
    if objective is not None:
        return PlanSolution(
            sites=sites, totals=totals, objective=objective, lower_bound=math.nan, gap=math.nan,
            status="local_search" if ended else "time_limit",
        )  # fmt: skip
    objective = math.fsum(scores[p.site, p.bit_width] for p in sites)
    lower_bound = min(bound, objective)
    gap = 0.0 if objective == lower_bound else (objective - lower_bound) / max(abs(objective), 1e-300)
    return PlanSolution(
        sites=sites,
        totals=totals,
        objective=objective,
        lower_bound=lower_bound,
        gap=gap,
        status="feasible" if narrowed and solved.status == "optimal" and gap > relative_gap else solved.status,
    )


def read_options(
    options: pd.DataFrame, cost: pd.DataFrame
) -> tuple[dict[Site, dict[int, PlannedSite]], dict[tuple[Site, int], float]]:
    """The options by site, in network order and rising bit-width, and the score of each."""
    planned: dict[Site, dict[int, PlannedSite]] = {site: {} for site in accounting.cost_rows(cost)}
    scores: dict[tuple[Site, int], float] = {}
    check_scores(options)
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
