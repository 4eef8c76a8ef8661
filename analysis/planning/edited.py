"""Plans that somebody edited: their totals are counted where they are used, and their prediction is taken back."""

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from analysis.planning import accounting
from analysis.planning.budget_kinds import amount
from quant.bit_plan import BitPlan, PlanSolver, PlanTotals
from quant.errors import InputError

_COUNTED = ("bitops", "weight_bits", "activation_bits", "activation_bytes")
"""By these an edit shows; bytes of the file also differ by the version that counted scales, headers and buffers."""


def recounted(
    plan: BitPlan, here: PlanTotals, path: Path, *, same_weights: bool, tell: Callable[[str], None]
) -> BitPlan:
    """The plan with the totals `here`, where those of its file are stale or left out, which is told.

    The predicted loss and the certificate of other bits no longer hold then. Stale totals of a plan of other weights
    may mean other shapes or heads: InputError.
    """
    said, found = asdict(plan.totals), asdict(here)
    stale = [
        name
        for name in _COUNTED
        if said[name] is not None
        and found[name] is not None
        and not math.isclose(said[name], found[name], rel_tol=1e-9)
    ]
    if stale and not same_weights:
        raise InputError(
            f"{path} says that it takes {amount(stale[0], said[stale[0]], 6)}, but here it takes "
            f"{amount(stale[0], found[stale[0]], 6)}: it was made for other shapes or heads, or edited for other "
            "weights. Plan again for this model, or leave its totals out."
        )
    if not stale and plan.totals.size_bytes is not None:
        return plan
    counts = ", ".join(
        f"{amount(name, value, 4)}" + (f" (was {amount(name, said[name], 4)})" if name in stale else "")
        for name, value in found.items()
        if value is not None and name != "activation_bytes"
    )
    tell(f"{path} was edited: it takes {counts}. The loss that was predicted is not of these bits.")
    edited = PlanSolver(name="hand", status="given", objective=plan.solver.objective)
    return replace(plan, totals=here, predicted_delta_loss=None, solver=edited)


def recounted_beside(
    plan: BitPlan, cost: pd.DataFrame, stored: accounting.Stored, path: Path, tell: Callable[[str], None]
) -> BitPlan:
    """The same for a plan in a run folder, whose tables say what its sites cost."""
    return recounted(plan, accounting.totals(plan.sites, cost, stored), path, same_weights=True, tell=tell)
