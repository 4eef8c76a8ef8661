"""The bit planner: which site gets how many bits, as an exact integer program, with a certificate.

`options` is a frame with one row per (module, tensor, bit_width): score (predicted loss increase, in the unit of the
measured metric; may be negative), granularity, signed, offset. `cost` is the frame of cost.parquet (see accounting).
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from analysis import accounting
from analysis.integer_program import solve
from quant.bit_plan import PlanBudget, PlannedSite, PlanTotals
from quant.site import Site

PINNED_BITS = 8  # of the first convolution or patch embedding and the classifier, in layout `paper`


@dataclass(frozen=True, kw_only=True)
class PlanSolution:
    """The chosen sites in network order, what they cost, and how good the choice is.

    `objective` is the sum of the chosen scores. No plan within the budget has less than `lower_bound`; `gap` is
    their difference over |objective|. `status` is `optimal` (to the asked gap) or `time_limit`.
    """

    sites: tuple[PlannedSite, ...]
    totals: PlanTotals
    objective: float
    lower_bound: float
    gap: float
    status: str

    @cached_property
    def bits(self) -> dict[Site, int]:
        """The bit-width of each site."""
        return {planned.site: planned.bit_width for planned in self.sites}


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
        subject to  sum_b   x[i, b] = 1                       for each site i, tied sites together
                    totals_k(x) <= budget_k                   for each budget k, by analysis/accounting.py
                    x[i, b] in {0, 1}

    Scores add as if sites were independent, as in HAWQ-V3 (Yao et al., ICML 2021, arXiv:2011.10680). `parameters`
    counts the whole model's. A site that no budget reaches gets its least score, the larger bit-width of equals.
    `time_limit` is in seconds. InputError: unusable options, or a budget that no plan can meet.
    """
    planned = _planned_options(options, cost)
    scores = dict(zip(zip(options["module"], options["tensor"], options["bit_width"], strict=True), options["score"], strict=True))
    units = _units(planned, scores, ties)
    rows = _budget_rows(units, planned, cost, budget, parameters)

    def totals(choice: Sequence[int]) -> PlanTotals:
        return accounting.totals(_chosen(units, choice, planned), cost, parameters)

    def fits(choice: Sequence[int]) -> bool:
        spent = totals(choice)
        return all(getattr(spent, name) <= limit for name, limit in budget.as_dict().items())

    result = solve(units, rows, fits, relative_gap=relative_gap, time_limit=time_limit)
    return PlanSolution(
        sites=_chosen(units, result.choice, planned),
        totals=totals(result.choice),
        objective=result.objective,
        lower_bound=result.lower_bound,
        gap=result.gap,
        status=result.status,
    )
