"""A bit plan from scored options: budgets, exceptions and the exact program, for a live network or a run folder."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from analysis.planner import PlanSolution, plan_bits
from analysis.planning.accounting import Stored
from analysis.planning.candidates import offered, tied
from analysis.planning.objectives import MEASURED, Products, summed
from analysis.planning.plan_request import PlanRequest
from analysis.terminal.console import warn
from quant.bit_plan import BitPlan, PlanModel, PlanSolver
from quant.site import Site


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan, with what it was chosen from and how good the choice is."""

    plan: BitPlan
    solution: PlanSolution
    options: pd.DataFrame
    ties: Sequence[Sequence[Site]]


def planned(
    scored_rows: pd.DataFrame,
    rows: pd.DataFrame,
    cost: pd.DataFrame,
    request: PlanRequest,
    *,
    model: PlanModel,
    stored: Stored,
    latency: pd.DataFrame | None = None,
    products: Callable[[pd.DataFrame], Products] | None = None,
    time_limit: float = 60.0,
    tell: Callable[[str], None] = warn,
) -> Planned:
    """The plan with the least total score within the budgets of the request.

    `rows` are the single-site rows of one sensitivity table, `scored_rows` those of them with a column `score`; `cost`
    is the frame of `cost_table`. `products` gives those of the options, where interactions are to count.
    """
    options = offered(scored_rows, rows, cost, request, tell)
    budget = request.budget(options, cost, stored)
    ties = tied(request.tie, options, cost)
    solution = plan_bits(
        options, cost, budget=budget, stored=stored, ties=ties, latency=latency,
        products=None if products is None else products(options), time_limit=time_limit,
    )  # fmt: skip
    loss = summed(solution.sites, rows, "delta_loss")
    plan = BitPlan(
        model=model, layout=request.layout, budget=budget, sites=solution.sites, totals=solution.totals,
        predicted_delta_loss=None if math.isnan(loss) else loss,
        solver=PlanSolver(
            name="highs", status=solution.status,
            gap=None if math.isnan(solution.gap) else solution.gap,
            lower_bound=None if math.isnan(solution.lower_bound) else solution.lower_bound,
            objective=minimised_column(request, rows),
        ),
    )  # fmt: skip
    return Planned(plan=plan, solution=solution, options=options, ties=ties)


def minimised_column(request: PlanRequest, rows: pd.DataFrame) -> str:
    """What the plan file says was minimised; of classifiers the divergence goes by its name, the KL."""
    if request.scores is not None:
        return f"scores of {request.scores.name}"
    objective = request.minimised
    name = MEASURED[objective][0] if objective in MEASURED else objective
    if name == "divergence" and "task" in rows and (rows["task"] == "classification").all():
        name = "kl"
    if objective in MEASURED and MEASURED[objective][2] < 0:
        name = f"-{name}"
    name = f"{name}, upper 95 % bound" if request.robust else name
    return f"{name}, with interactions" if request.interactions else name
