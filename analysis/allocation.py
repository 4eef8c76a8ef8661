"""Bit plans for a live network: the best one within a budget, and the best one for every budget."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from torch import nn

from analysis.cost import cost_table
from analysis.inputs.weights import weights_sha256
from analysis.planning import frontier
from analysis.planning.budget_kinds import BUDGET_KINDS
from analysis.planning.candidates import offered, tied
from analysis.planning.objectives import measured_scores, products_of
from analysis.planning.plan_assembly import planned
from analysis.planning.plan_request import PlanRequest
from analysis.results import ParetoFront, Sensitivity
from analysis.sensitivity import preferred_rows
from quant.bit_plan import BitPlan, PlanModel
from quant.choices import Layout
from quant.errors import InputError
from quant.network import Network


def plan_bits(
    model: Network | nn.Module,
    sensitivity: Sensitivity | pd.DataFrame,
    *,
    weight_bits: float | None = None,
    activation_bits: float | None = None,
    like: str | None = None,
    size_bytes: int | None = None,
    activation_bytes: int | None = None,
    gbitops: float | None = None,
    candidates: Sequence[int] | None = None,
    pins: Mapping[str, int] | None = None,
    bounds: Mapping[str, tuple[int, int]] | None = None,
    ties: Sequence[str] = (),
    layout: Layout = "paper",
    objective: str = "divergence",
    robust: bool = False,
    interactions: bool = False,
    time_limit: float = 60.0,
) -> BitPlan:
    """The bit-width of every site with the least total divergence within the budgets, by an exact integer program.

    Budgets, one at least: mean bits of all weights (`weight_bits`) and of all activations (`activation_bits`), or those
    of uniform bits (`like="w3a4"`); the packed file (`size_bytes`); the quantized activations of one sample
    (`activation_bytes`); 10^9 bit operations of one sample (`gbitops`). `candidates` are the bit-widths to choose from,
    by default all that were measured. `pins` fixes bits and `bounds` limits them, by shell patterns over modules or
    `module:tensor`; `ties` are patterns whose sites share their bits, `qkv` (query, key and value of each attention) or
    `shared` (inputs that are the same tensor). Layout `paper` keeps the first layer and the head at 8 bits, `strict`
    makes no exception. `objective` is a measured column (divergence, loss, score, metric, logit_nmse), `robust` takes
    its upper 95 % bound. Scores add as if sites were independent (HAWQ-V3: Yao et al., ICML 2021, arXiv:2011.10680);
    `interactions` counts pairs too, from the products of an estimate. `time_limit` is in seconds; `plan.solver` has the
    certificate. A site that the plan does not name stays in floating point.

    Raises InputError where no budget is given or none can be met, and for a pattern that matches no site.

    >>> import torch
    >>> from analysis.measure import measure_sensitivity
    >>> net = Network(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3)), torch.randn(1, 3, 8, 8))
    >>> sens = measure_sensitivity(net, [(torch.randn(8, 3, 8, 8), torch.randint(3, (8,)))], bits=(2, 4, 8))
    >>> plan = plan_bits(net, sens, weight_bits=4, activation_bits=6, layout="strict")
    >>> plan.totals.weight_bits <= 4
    True
    """
    net, table = _network(model, sensitivity), _table(sensitivity)
    request = _request(
        weight_bits=weight_bits, activation_bits=activation_bits, like=like, size_bytes=size_bytes,
        activation_mib=None if activation_bytes is None else activation_bytes / 2**20, gbitops=gbitops,
        candidates=candidates, pins=pins, bounds=bounds, ties=ties, layout=layout, objective=objective, robust=robust,
        interactions=interactions,
    )  # fmt: skip
    products = None
    if interactions:
        found = sensitivity.products if isinstance(sensitivity, Sensitivity) else None
        if found is None:
            raise InputError("`interactions` needs the products of estimate_sensitivity; this sensitivity has none.")
        products = lambda options: products_of(found, options)  # noqa: E731  # a closure over one frame
    rows = _rows(table)
    scores = measured_scores(rows, objective, robust=robust)
    made = planned(
        scores, rows, cost_table(net.infos, net.trace.unplanned), request, model=plan_model(net),
        stored=net.stored, products=products, time_limit=time_limit, tell=_warn,
    )  # fmt: skip
    return made.plan


def pareto_front(
    model: Network | nn.Module,
    sensitivity: Sensitivity | pd.DataFrame,
    *,
    budget: str | Sequence[str] = "weight_bits",
    points: int = 17,
    candidates: Sequence[int] | None = None,
    pins: Mapping[str, int] | None = None,
    bounds: Mapping[str, tuple[int, int]] | None = None,
    ties: Sequence[str] = (),
    layout: Layout = "paper",
    objective: str = "divergence",
    robust: bool = False,
    time_limit: float = 10.0,
) -> ParetoFront:
    """The least total divergence for every budget of one kind, from the cheapest plan to the most expensive one.

    `budget` is weight_bits, activation_bits, size_bytes, activation_bytes or bitops, or several of them; `points`
    budgets in equal ratios are solved for each, `time_limit` seconds each. Other arguments are those of `plan_bits`.
    `table` has one row per budget that buys something, with its `shadow_price`: what the next unit saves; `uniform` has
    uniform bits beside it.

    >>> import torch
    >>> from analysis.measure import measure_sensitivity
    >>> net = Network(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3)), torch.randn(1, 3, 8, 8))
    >>> sens = measure_sensitivity(net, [(torch.randn(8, 3, 8, 8), torch.randint(3, (8,)))], bits=(2, 4, 8))
    >>> bool(pareto_front(net, sens, layout="strict", points=5).table["objective"].is_monotonic_decreasing)
    True
    """
    net, table = _network(model, sensitivity), _table(sensitivity)
    kinds = (budget,) if isinstance(budget, str) else tuple(budget)
    unknown = [kind for kind in kinds if kind not in BUDGET_KINDS or kind == "latency_ms"]
    if unknown or not kinds:
        known = ", ".join(kind for kind in BUDGET_KINDS if kind != "latency_ms")
        raise InputError(f"`budget` is {unknown[0] if unknown else budget!r}; choose from {known}.")
    request = _request(candidates=candidates, pins=pins, bounds=bounds, ties=ties, layout=layout, objective=objective,
                       robust=robust)  # fmt: skip
    rows, cost = _rows(table), cost_table(net.infos, net.trace.unplanned)
    options = offered(measured_scores(rows, objective, robust=robust), rows, cost, request, _warn)
    shared = tied(request.tie, options, cost)
    front = frontier.pareto_front(
        options, cost, stored=net.stored, kinds=kinds, ties=shared, points=points, time_limit=time_limit
    )
    uniform = frontier.uniform_points(options, cost, stored=net.stored, kinds=kinds, ties=shared)
    return ParetoFront(name=net.name, table=front, uniform=uniform, objective=objective)


def plan_model(net: Network) -> PlanModel:
    """What a plan says of a live network: its name and the hash of its weights."""
    return PlanModel(name=net.name, kwargs={}, weights_sha256=weights_sha256(net.model))


def _network(model: Network | nn.Module, sensitivity: Sensitivity | pd.DataFrame) -> Network:
    if isinstance(model, Network):
        return model
    known = sensitivity.network if isinstance(sensitivity, Sensitivity) else None
    if known is not None and known.model is model:
        return known
    raise InputError("`model` is a plain module that this sensitivity was not measured on; give its Network.")


def _table(sensitivity: Sensitivity | pd.DataFrame) -> pd.DataFrame:
    table = sensitivity.table if isinstance(sensitivity, Sensitivity) else sensitivity
    if not isinstance(table, pd.DataFrame) or not {"module", "tensor", "bit_width", "divergence"} <= set(table):
        raise InputError(
            "`sensitivity` must be what measure_sensitivity or estimate_sensitivity returns, or such a table."
        )
    return table


def _rows(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of single sites to plan by; those without a figure are left out, with a warning."""
    rows = preferred_rows(table)
    if rows.empty:
        raise InputError("`sensitivity` has no rows of single sites; measure some without `groups`.")
    missing = rows["divergence"].isna()
    late = missing & rows["note"].astype(str).str.contains("time limit")
    if late.any():
        widths = sorted(set(rows["bit_width"]) - set(rows.loc[late, "bit_width"]))
        raise InputError(
            f"{int(late.sum())} of {len(rows)} rows were not measured within the time limit. Give more time"
            + (f", or plan with the rows at {widths} bits: candidates={tuple(widths)}." if widths else ".")
        )
    if missing.any():
        sites = rows.loc[missing, ["module", "tensor"]].drop_duplicates()
        first = ":".join(sites.iloc[0])
        _warn(f"{len(sites)} sites have no figure and stay in floating point, the first {first}.")
    return rows[~missing]


def _request(
    *,
    pins: Mapping[str, int] | None,
    bounds: Mapping[str, tuple[int, int]] | None,
    ties: Sequence[str],
    candidates: Sequence[int] | None,
    **options: Any,
) -> PlanRequest:
    """The request, in the form of the command line; its budgets are checked when they are read."""
    return PlanRequest(
        **options,
        candidates=None if candidates is None else tuple(candidates),
        pin=tuple(f"{pattern}={bits}" for pattern, bits in (pins or {}).items()),
        bounds=tuple(f"{pattern}={low}-{high}" for pattern, (low, high) in (bounds or {}).items()),
        tie=(ties,) if isinstance(ties, str) else tuple(ties),
    )


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=4)
