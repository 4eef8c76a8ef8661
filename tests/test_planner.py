"""The bit planner: the proven optimum, within every budget, for whatever network."""

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.planner import PlanSolution, plan_bits
from quant.bit_plan import PlanBudget
from quant.errors import InputError
from quant.site import Site
from tests.plan_frames import NETWORKS, chain, cost_frame, option_frame

KINDS = ("weight_bits", "activation_bits", "size_bytes", "activation_bytes", "bitops", "latency_ms")


def spent(
    bits: dict[str, int], products: Any, numel: dict[str, int], macs: list[int], parameters: int, offset: Any
) -> dict[str, float]:
    """The costs of an assignment, written out a second time and without frames."""
    weights = {name: b for name, b in bits.items() if "weight" in name}
    inputs = {name: b for name, b in bits.items() if "weight" not in name}
    size = 4 * (parameters - sum(numel[name] for name in weights))
    size += sum(-(-numel[name] * b // 8) for name, b in weights.items())
    size += sum(4 * (3 if name in weights else 1) * (2 if name in offset else 1) for name in bits)
    return {
        "weight_bits": sum(numel[n] * b for n, b in weights.items()) / max(sum(numel[n] for n in weights), 1),
        "activation_bits": sum(numel[n] * b for n, b in inputs.items()) / max(sum(numel[n] for n in inputs), 1),
        "size_bytes": size,
        "activation_bytes": sum(math.ceil(numel[n] * b / 8) for n, b in inputs.items()),
        "latency_ms": sum(milliseconds(n, b) * 1000 for n, b in bits.items()) / 1000,
        "bitops": sum(m * bits.get(a, 32) * bits.get(b, 32) for (a, b), m in zip(products, macs, strict=True)),
    }


def milliseconds(name: str, bit_width: int) -> float:
    """A latency in whole microseconds that depends on the site and is not in proportion to its bits."""
    return (len(name) * 7 + bit_width * (3 + name.count("t")) + (20 if bit_width == 3 else 0)) / 1000


def latency_frame(options: pd.DataFrame) -> pd.DataFrame:
    """The latency of every option."""
    keys = options[["module", "tensor", "bit_width"]]
    return keys.assign(milliseconds=[milliseconds(f"{m}:{t}", b) for m, t, b in keys.to_numpy()])


@st.composite
def programs(draw):
    """A small network with 3 to 5 planned sites, 1 (pinned) to 3 candidates each, and perhaps two tied sites."""
    products = draw(st.sampled_from(NETWORKS))
    names = list(dict.fromkeys(name for product in products for name in product))
    numel = {name: draw(st.integers(1, 10 ** draw(st.integers(0, 7)))) for name in names}
    macs = [draw(st.integers(1, 10 ** draw(st.integers(0, 10)))) for _ in products]
    sites = draw(st.lists(st.sampled_from(names), min_size=3, max_size=min(5, len(names)), unique=True))
    candidates = {n: draw(st.sets(st.sampled_from((2, 3, 4, 8)), min_size=1, max_size=3)) for n in sites}
    tied = draw(st.booleans())
    if tied:
        candidates[sites[1]] = candidates[sites[0]]
    score = st.floats(-1, 1).map(lambda value: round(value, 6))
    scores = {(n, b): draw(score) for n in sites for b in sorted(candidates[n])}
    offset = tuple(n for n in sites if draw(st.booleans()))
    return products, numel, macs, sites, candidates, scores, offset, tied


@settings(max_examples=150)
@given(program=programs(), kinds=st.sets(st.sampled_from(KINDS)), anchor=st.integers(0, 10**6), slack=st.booleans())
def test_the_plan_is_the_best_of_all_assignments(program, kinds, anchor, slack):
    """Enumeration of every assignment finds no better one, for any mix of budgets, with edges, ties and pins.

    The budgets are exactly what some assignment costs, or a little more, so the boundary itself is tried.
    """
    products, numel, macs, sites, candidates, scores, offset, tied = program
    parameters = sum(numel.values()) + 10
    every = [
        dict(zip(sites, choice, strict=True))
        for choice in itertools.product(*(sorted(candidates[n]) for n in sites))
        if not tied or choice[0] == choice[1]
    ]
    costs = [spent(bits, products, numel, macs, parameters, offset) for bits in every]
    limits = {kind: costs[anchor % len(every)][kind] for kind in kinds}
    limits = {kind: limit + (limit // 10 if slack else 0) for kind, limit in limits.items() if limit}
    if "latency_ms" in limits:  # both sides count in whole units, ours in picoseconds
        limits["latency_ms"] = round(limits["latency_ms"], 3) + 1e-6
    within = [all(c[kind] <= limit for kind, limit in limits.items()) for c in costs]
    totals = [math.fsum(scores[item] for item in bits.items()) for bits in every]
    best = min(total for total, fits in zip(totals, within, strict=True) if fits)

    options = option_frame(scores, offset)
    solution = plan_bits(
        options,
        cost_frame(products, numel, macs),
        latency=latency_frame(options),
        budget=PlanBudget(**limits),
        stored=parameters,
        ties=[tuple(Site.parse(name) for name in sites[:2])] if tied else (),
        relative_gap=0.0,
    )
    chosen = {str(site): bits for site, bits in solution.bits.items()}
    spent_by_plan = costs[every.index(chosen)]
    assert all(spent_by_plan[kind] <= limit for kind, limit in limits.items())
    assert solution.objective == pytest.approx(best, abs=1e-7)
    assert solution.lower_bound <= best + 1e-9
    assert solution.objective - solution.lower_bound < 1e-6
    assert solution.status == "optimal"
    assert solution.totals.bitops == spent_by_plan["bitops"]
    assert solution.totals.size_bytes == spent_by_plan["size_bytes"]
    assert solution.totals.activation_bytes == spent_by_plan["activation_bytes"]
    assert solution.totals.latency_ms == pytest.approx(spent_by_plan["latency_ms"])


@pytest.mark.parametrize("kind", KINDS)
def test_more_budget_never_hurts(kind):
    """Along a rising budget the total score never rises, and no plan exceeds its budget."""
    options, cost, parameters = chain(8)
    latency = latency_frame(options)

    def plan(table: pd.DataFrame, **budget: Any) -> PlanSolution:
        return plan_bits(table, cost, budget=PlanBudget(**budget), stored=parameters, latency=latency)

    low = plan(options[options["bit_width"] == 2]).totals
    high = plan(options[options["bit_width"] == 8]).totals
    objectives = []
    for budget in np.linspace(getattr(low, kind), getattr(high, kind), 12):
        solution = plan(options, **{kind: float(budget) if kind.endswith(("_bits", "_ms")) else int(budget)})
        limit = float(budget)
        assert getattr(solution.totals, kind) <= limit
        objectives.append(solution.objective)
    assert all(after <= before + 1e-8 for before, after in itertools.pairwise(objectives))
    assert objectives[-1] < objectives[0]


def test_the_certificate_of_a_large_plan_holds():
    """A hundred sites under three budgets: within each, to the asked gap, with a bound below the objective."""
    options, cost, parameters = chain(50)
    solution = plan_bits(
        options,
        cost,
        budget=PlanBudget(weight_bits=3.0, activation_bits=4.0, size_bytes=parameters // 2),
        stored=parameters,
        relative_gap=1e-4,
    )
    assert solution.totals.weight_bits <= 3.0
    assert solution.totals.activation_bits <= 4.0
    assert solution.totals.size_bytes <= parameters // 2
    assert solution.lower_bound <= solution.objective
    assert 0 <= solution.gap < 1.1e-4
    assert [str(planned.site) for planned in solution.sites] == list(cost["module"] + ":" + cost["tensor"])


def test_sites_without_a_budget_take_their_least_score():
    """Where no budget reaches, the least score is chosen, and the larger bit-width of equals."""
    scores = {("a:weight", 2): 5.0, ("a:weight", 8): 1.0, ("a:input", 2): 1.0, ("a:input", 4): -1.0}
    scores |= {("a:input", 8): 0.5, ("b:input", 2): 0.0, ("b:input", 4): -2.0, ("b:input", 8): -2.0}
    numel = dict.fromkeys(("a:weight", "a:input", "b:weight", "b:input"), 10)
    cost = cost_frame(NETWORKS[0], numel, [7, 7])
    solution = plan_bits(option_frame(scores), cost, budget=PlanBudget(weight_bits=3), stored=20)
    bits = {str(site): bits for site, bits in solution.bits.items()}
    assert bits == {"a:weight": 2, "a:input": 4, "b:input": 8}
    assert (solution.objective, solution.gap, solution.status) == (2.0, 0.0, "optimal")


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            {"weight_bits": 1.5},
            r"within 1\.5 mean weight bits: the cheapest has 2, the most expensive 8, with these pins",
        ),
        ({"activation_bits": 1}, r"within 1 mean activation bits: the cheapest has 2, the most expensive 8"),
        ({"size_bytes": 1024}, r"within 1,024 bytes: the cheapest has [\d,]+, the most expensive [\d,]+, "),
        (
            {"activation_bytes": 1},
            r"within 1 bytes of activations: the cheapest has [\d,]+, the most expensive [\d,]+, ",
        ),
        ({"bitops": 10**6}, r"within 0\.001 GBitOps: the cheapest has .*Raise the budget, offer a smaller bit-width"),
    ],
)
def test_an_unreachable_budget_names_the_cheapest_plan(budget, message):
    """A budget below every plan is an InputError with the least and the most that a plan can have."""
    options, cost, parameters = chain(3)
    with pytest.raises(InputError, match=message):
        plan_bits(options, cost, budget=PlanBudget(**budget), stored=parameters)


def test_the_named_cheapest_plan_can_be_had():
    """Asking for the figure that the message names succeeds, also where it is a long decimal fraction."""
    scores = {("a:weight", 2): 1.0, ("a:weight", 3): 0.0, ("b:weight", 3): 0.0}
    cost = cost_frame(NETWORKS[0], {"a:weight": 1, "a:input": 1, "b:weight": 2, "b:input": 1}, [1, 1])
    with pytest.raises(InputError, match=r"the cheapest has 2\.666667"):
        plan_bits(option_frame(scores), cost, budget=PlanBudget(weight_bits=2.6), stored=3)
    plan_bits(option_frame(scores), cost, budget=PlanBudget(weight_bits=2.666667), stored=3)


def test_unusable_options_are_refused():
    """NaN scores, a doubled or unknown site, no options, and a budget without its sites are each an InputError."""
    options, cost, parameters = chain(2)

    def plan(table: pd.DataFrame, **budget: float) -> None:
        plan_bits(table, cost, budget=PlanBudget(**budget), stored=parameters)  # type: ignore[arg-type]

    with pytest.raises(
        InputError, match=r"score of fc0:weight at 2 bits is nan, as are 15 more.*\(without labels: kl\)"
    ):
        plan(options.assign(score=math.nan))
    with pytest.raises(InputError, match="fc0:weight has two scores at 2 bits"):
        plan(pd.concat([options, options.iloc[:1]]))
    with pytest.raises(InputError, match="no site fc9:weight"):
        plan(options.replace({"module": {"fc1": "fc9"}}))
    with pytest.raises(InputError, match="no site to plan"):
        plan(options.iloc[:0])
    with pytest.raises(InputError, match="activation_bits=4 has no site to act on"):
        plan(options[options["tensor"] == "weight"], activation_bits=4)


def test_budgets_that_exclude_each_other_are_named():
    """Of three budgets the two that exclude each other are named, with what can be had of one within the other."""
    options = option_frame({("a:weight", 2): 0.0, ("a:weight", 3): 0.0, ("a:input", 2): 0.0, ("a:input", 8): 0.0})
    options["offset"] = [True, False, False, False]
    cost = cost_frame(NETWORKS[0], dict.fromkeys(("a:weight", "a:input", "b:weight", "b:input"), 8), [1, 1])
    budget = PlanBudget(weight_bits=2.5, activation_bits=4, size_bytes=54)
    with pytest.raises(InputError, match=r"within [\d,]+ bytes and 2\.5 mean weight bits at once.* can have 3 of the"):
        plan_bits(options, cost, budget=budget, stored=16)
    plan_bits(options, cost, budget=PlanBudget(weight_bits=3, activation_bits=4, size_bytes=54), stored=16)


def test_a_latency_budget_needs_its_table():
    """Without a table, or with a row missing, doubled or not a time, a latency budget is refused; the site is named."""
    options, cost, parameters = chain(2)
    table = latency_frame(options)

    def plan(latency: pd.DataFrame | None) -> PlanSolution:
        return plan_bits(options, cost, budget=PlanBudget(latency_ms=0.5), stored=parameters, latency=latency)

    assert (plan(table).totals.latency_ms or math.inf) <= 0.5
    with pytest.raises(InputError, match=r"latency_ms=0\.5 needs a latency table"):
        plan(None)
    with pytest.raises(InputError, match="no row for fc0:weight at 2 bits"):
        plan(table.iloc[1:])
    with pytest.raises(InputError, match="fc0:weight has two latencies at 2 bits"):
        plan(pd.concat([table, table.iloc[:1]]))
    for wrong in (math.nan, -1.0, "fast"):
        broken = table.astype({"milliseconds": object})
        broken.loc[0, "milliseconds"] = wrong
        with pytest.raises(InputError, match=r"latency of fc0:weight at 2 bits is .*; expected milliseconds"):
            plan(broken)
    with pytest.raises(InputError, match="no column milliseconds"):
        plan(table.drop(columns="milliseconds"))
