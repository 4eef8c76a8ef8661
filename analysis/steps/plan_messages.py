"""What `qvw plan` says of a plan in the terminal: certificate, costs beside the budgets, bits, knees of the front."""

from collections import Counter

import pandas as pd

from analysis.planner import PlanSolution
from analysis.planning.budget_kinds import BUDGET_KINDS, amount
from analysis.planning.frontier import knee
from quant.bit_plan import BitPlan, PlannedSite


def plan_words(plan: BitPlan, solution: PlanSolution, options: pd.DataFrame, *, search: bool) -> str:
    """The lines about a plan; `options` are those that it was chosen from, `search` where no bound is known."""
    budgets, totals = plan.budget.as_dict(), plan.totals
    certificate = "no bound: a search" if search else f"{solution.status}, gap {solution.gap:.2g}"
    title = f"sum of predicted changes of {plan.solver.objective}: {solution.objective:.4g} ({certificate})"
    if plan.predicted_delta_loss is not None and plan.solver.objective != "delta_loss":
        title += f"; measured loss changes of these bits add up to {plan.predicted_delta_loss:.4g}"
    lines = [title]
    for name, kind in BUDGET_KINDS.items():
        spent = getattr(totals, name)
        if spent is not None:
            limit = f"   budget {budgets[name] / kind.unit:.10g}" if name in budgets else ""
            lines.append(f"  {kind.label:22}{spent / kind.unit:10.4f}{limit}")
    for what, weights in (("weights", True), ("activations", False)):
        counts = Counter(site.bit_width for site in plan.sites if site.site.is_weight == weights)
        if counts:
            of = ", ".join(f"{count} at {bits}" for bits, count in sorted(counts.items()))
            lines.append(f"  {what:22}{sum(counts.values()):5} tensors: {of} bits")
    moved = int((options["score"] != options["score_measured"]).sum())
    if moved:
        lines.append(f"  {moved} of {len(options)} scores rise with the bits somewhere, and were evened out.")
    return "\n".join(lines)


def rising_scores(options: pd.DataFrame, objective: str) -> str:
    """A warning where scores rise with the bits more often than they fall; empty where they do not."""
    ordered = options.sort_values(["module", "tensor", "bit_width"])
    steps = ordered.groupby(["module", "tensor"])["score_measured"].diff().dropna()
    rising = int((steps > 0).sum())
    if len(steps) == 0 or 2 * rising <= len(steps):
        return ""
    return (
        f"{rising} of {len(steps)} steps to more bits raise the {objective}: a score is what its bits do harm, the "
        "smaller the better. Is the sign reversed, or is all of it noise?"
    )


def loose_budgets(plan: BitPlan, most_expensive: list[PlannedSite], totals: object) -> list[str]:
    """A line for each budget that even the `most_expensive` plan on offer, which costs `totals`, keeps."""
    most = max((site.bit_width for site in most_expensive), default=0)
    return [
        f"the budget of {amount(name, limit)} binds nothing: with the most bits offered (up to {most}) the plan takes "
        f"{amount(name, spent)}."
        for name, limit in plan.budget.as_dict().items()
        if (spent := getattr(totals, name)) is not None and spent <= limit
    ]


def unspent_budgets(plan: BitPlan) -> list[str]:
    """A line for each budget of which a proved plan leaves a tenth or more: more bits lower no score there."""
    return [
        f"{1 - spent / limit:.0%} of the budget of {amount(name, limit)} is left: by this measurement more bits "
        "would gain nothing within the other budgets."
        for name, limit in plan.budget.as_dict().items()
        if (spent := getattr(plan.totals, name)) is not None and plan.solver.status == "optimal" and spent < 0.9 * limit
    ]


def knee_words(front: pd.DataFrame, objective: str) -> str:
    """The knee of each curve of a front, with what the next unit of its budget saves."""
    found = knee(front)
    if found.empty:
        return "The front has no knee: more budget saves at an even pace, or nothing."
    lines = ["Knee of each curve of pareto.png, other budgets kept, and what more of it saves there:"]
    for row in found.to_dict("records"):
        kind = BUDGET_KINDS[row["budget_kind"]]
        lines.append(
            f"  {amount(row['budget_kind'], row['budget']):32} predicted {objective} "
            f"{row['objective']:.4g}, {row['shadow_price'] * kind.unit:.3g} less for {kind.next_unit}"
        )
    return "\n".join(lines)
