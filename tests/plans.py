"""Bit plans without a planner, for tests of what training takes."""

from quant.bit_plan import BitPlan, PlanBudget, PlanModel, PlannedSite, PlanSolver, PlanTotals
from quant.calibrate import planned_sites
from quant.network import Network


def plan_of(sites: list[PlannedSite]) -> BitPlan:
    """A plan that says nothing but the sites."""
    return BitPlan(
        model=PlanModel(name="m", kwargs={}, weights_sha256=None), layout="strict", budget=PlanBudget(),
        sites=tuple(sites), totals=PlanTotals(weight_bits=None, activation_bits=None, size_bytes=0, bitops=0),
        predicted_delta_loss=None, solver=PlanSolver(name="uniform", status="given"),
    )  # fmt: skip


def uniform(net: Network, data: list, weights: int | None = 4, activations: int | None = 4) -> BitPlan:
    """Every site of a network at the same bits, default schemes; None leaves weights or activations in float."""
    bits = {info.site: weights if info.site.is_weight else activations for info in net.infos if info.quantizable}
    return plan_of(planned_sites(net, {site: width for site, width in bits.items() if width}, data))
