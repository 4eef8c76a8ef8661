"""The bit planner: the proven optimum, within every budget, for whatever network."""

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.planner import apply_pins, isotonic, layout_pins, plan_bits, tied_sites, uniform_bits
from quant.bit_plan import PlanBudget
from quant.errors import InputError
from quant.site import Site

KINDS = ("weight_bits", "activation_bits", "size_bytes", "bitops")
# Networks as lists of products: weight x input, one input with three weights, and the two products of attention.
NETWORKS = (
    (("a:weight", "a:input"), ("b:weight", "b:input")),
    (("a:weight", "a:input"), ("b:weight", "b:input"), ("c:weight", "c:input")),
    (("qkv:weight.query", "qkv:input"), ("qkv:weight.key", "qkv:input"), ("qkv:weight.value", "qkv:input")),
    (("attn:query", "attn:key"), ("attn:attention", "attn:value"), ("proj:weight", "proj:input")),
)


def cost_frame(products: Any, numel: dict[str, int], macs: list[int], pinned: tuple[str, ...] = ()) -> pd.DataFrame:
    """cost.parquet of a network: each product is told from both of its sides."""
    rows = []
    for order, name in enumerate(dict.fromkeys(name for product in products for name in product)):
        mine = [i for i, product in enumerate(products) if name in product]
        site = Site.parse(name)
        rows.append(
            {
                "module": site.module,
                "tensor": site.tensor,
                "numel": numel[name],
                "elements_per_image": math.nan if site.is_weight else float(numel[name]),
                "macs": sum(macs[i] for i in mine),
                "edges": [other for i in mine for other in products[i] if other != name],
                "channels": 3,
                "heads": 2,
                "kind": "other",
                "order": order,
                "pinned": name in pinned,
            }
        )
    return pd.DataFrame(rows)


def option_frame(scores: dict[tuple[str, int], float], offset: tuple[str, ...] = ()) -> pd.DataFrame:
    """The options of a plan from scores by (module:tensor, bit_width)."""
    return pd.DataFrame(
        [
            {
                "module": Site.parse(name).module,
                "tensor": Site.parse(name).tensor,
                "bit_width": bit_width,
                "score": score,
                "granularity": "per_channel" if "weight" in name else "per_tensor",
                "signed": True,
                "offset": name in offset,
            }
            for (name, bit_width), score in scores.items()
        ]
    )


def spent(
    bits: dict[str, int], products: Any, numel: dict[str, int], macs: list[int], parameters: int, offset: Any
) -> dict[str, float]:
    """The four costs of an assignment, written out a second time and without frames."""
    weights = {name: b for name, b in bits.items() if "weight" in name}
    inputs = {name: b for name, b in bits.items() if "weight" not in name}
    size = 4 * (parameters - sum(numel[name] for name in weights))
    size += sum(-(-numel[name] * b // 8) for name, b in weights.items())
    size += sum(4 * (3 if name in weights else 1) * (2 if name in offset else 1) for name in bits)
    return {
        "weight_bits": sum(numel[n] * b for n, b in weights.items()) / max(sum(numel[n] for n in weights), 1),
        "activation_bits": sum(numel[n] * b for n, b in inputs.items()) / max(sum(numel[n] for n in inputs), 1),
        "size_bytes": size,
        "bitops": sum(m * bits.get(a, 32) * bits.get(b, 32) for (a, b), m in zip(products, macs, strict=True)),
    }


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
    within = [all(c[kind] <= limit for kind, limit in limits.items()) for c in costs]
    totals = [math.fsum(scores[item] for item in bits.items()) for bits in every]
    best = min(total for total, fits in zip(totals, within, strict=True) if fits)

    solution = plan_bits(
        option_frame(scores, offset),
        cost_frame(products, numel, macs),
        budget=PlanBudget(**limits),
        parameters=parameters,
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


def chain(
    length: int, bit_widths: tuple[int, ...] = (2, 3, 4, 8), seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame, int]:
    """Options and cost of `length` linear layers with scores that fall about fourfold a bit, with noise."""
    generator = np.random.default_rng(seed)
    names = [(f"fc{i}:weight", f"fc{i}:input") for i in range(length)]
    numel = {name: int(10 ** generator.uniform(2, 6)) for pair in names for name in pair}
    macs = [int(10 ** generator.uniform(6, 9)) for _ in names]
    scores = {}
    for name in numel:
        size = 10 ** generator.uniform(-3, 0)
        scores.update({(name, b): size * 4.0**-b + 1e-4 * size * generator.normal() for b in bit_widths})
    weights = sum(count for name, count in numel.items() if "weight" in name)
    return option_frame(scores), cost_frame(names, numel, macs), weights + 1000


@pytest.mark.parametrize("kind", KINDS)
def test_more_budget_never_hurts(kind):
    """Along a rising budget the total score never rises, and no plan exceeds its budget."""
    options, cost, parameters = chain(8)
    low = plan_bits(options[options["bit_width"] == 2], cost, budget=PlanBudget(), parameters=parameters).totals
    high = plan_bits(options[options["bit_width"] == 8], cost, budget=PlanBudget(), parameters=parameters).totals
    objectives = []
    for budget in np.linspace(getattr(low, kind), getattr(high, kind), 12):
        limit = float(budget) if kind.endswith("_bits") else int(budget)
        solution = plan_bits(options, cost, budget=PlanBudget(**{kind: limit}), parameters=parameters)
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
        parameters=parameters,
        relative_gap=1e-4,
    )
    assert solution.totals.weight_bits <= 3.0
    assert solution.totals.activation_bits <= 4.0
    assert solution.totals.size_bytes <= parameters // 2
    assert solution.lower_bound <= solution.objective
    assert 0 <= solution.gap < 1.1e-4
    assert [str(planned.site) for planned in solution.sites] == list(cost["module"] + ":" + cost["tensor"])


@pytest.mark.parametrize("small", [3, 14])
def test_the_budget_holds_where_the_solver_cannot_see(small):
    """A layer of 10^12 weights hides single weights in the solver's tolerance; the plan keeps the budget all the same.

    The budget lets the large layer have 3 bits and one single weight 8, yet every one of them wants 8.
    """
    names = [("big:weight", "big:input"), *((f"s{i}:weight", f"s{i}:input") for i in range(small))]
    numel = {name: 10**12 if name.startswith("big") else 1 for pair in names for name in pair}
    weights = [pair[0] for pair in names]
    scores = {(name, b): (-100.0 if name == "big:weight" else -1.0) * (b > 2) for name in weights for b in (2, 8)}
    scores = {(name, 3 if name == "big:weight" and b == 8 else b): score for (name, b), score in scores.items()}
    limit = (3 * 10**12 + 2 * small + 6) / (10**12 + small)
    solution = plan_bits(
        option_frame(scores),
        cost_frame(names, numel, [1] * len(names)),
        budget=PlanBudget(weight_bits=limit),
        parameters=10**12 + small,
    )
    assert solution.totals.weight_bits <= limit
    assert solution.lower_bound <= -101
    if small == 3:
        assert solution.objective == -101
    else:
        assert solution.status == "feasible"


def test_sites_without_a_budget_take_their_least_score():
    """Where no budget reaches, the least score is chosen, and the larger bit-width of equals."""
    scores = {("a:weight", 2): 5.0, ("a:weight", 8): 1.0, ("a:input", 2): 1.0, ("a:input", 4): -1.0}
    scores |= {("a:input", 8): 0.5, ("b:input", 2): 0.0, ("b:input", 4): -2.0, ("b:input", 8): -2.0}
    numel = dict.fromkeys(("a:weight", "a:input", "b:weight", "b:input"), 10)
    cost = cost_frame(NETWORKS[0], numel, [7, 7])
    solution = plan_bits(option_frame(scores), cost, budget=PlanBudget(weight_bits=3), parameters=20)
    bits = {str(site): bits for site, bits in solution.bits.items()}
    assert bits == {"a:weight": 2, "a:input": 4, "b:input": 8}
    assert (solution.objective, solution.gap, solution.status) == (2.0, 0.0, "optimal")


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            {"weight_bits": 1.5},
            r"within 1\.5 mean weight bits: the cheapest has 2, the dearest 8, pinned sites counted",
        ),
        ({"activation_bits": 1}, r"within 1 mean activation bits: the cheapest has 2, the dearest 8"),
        ({"size_bytes": 1024}, r"within 0\.0009765625 MiB: the cheapest has [\d.]+, the dearest [\d.]+, "),
        ({"bitops": 10**6}, r"within 0\.001 GBitOps: the cheapest has .*Raise the budget or offer a smaller bit-width"),
    ],
)
def test_an_unreachable_budget_names_the_cheapest_plan(budget, message):
    """A budget below every plan is an InputError with what the cheapest and the dearest plan have, in its own unit."""
    options, cost, parameters = chain(3)
    with pytest.raises(InputError, match=message):
        plan_bits(options, cost, budget=PlanBudget(**budget), parameters=parameters)


def test_the_named_cheapest_plan_can_be_had():
    """Asking for the figure that the message names succeeds, also where it is a long decimal fraction."""
    scores = {("a:weight", 2): 1.0, ("a:weight", 3): 0.0, ("b:weight", 3): 0.0}
    cost = cost_frame(NETWORKS[0], {"a:weight": 1, "a:input": 1, "b:weight": 2, "b:input": 1}, [1, 1])
    with pytest.raises(InputError, match=r"the cheapest has 2\.666667"):
        plan_bits(option_frame(scores), cost, budget=PlanBudget(weight_bits=2.6), parameters=3)
    plan_bits(option_frame(scores), cost, budget=PlanBudget(weight_bits=2.666667), parameters=3)


def test_budgets_that_exclude_each_other_are_refused():
    """An option that is cheap in one budget and dear in another can leave no plan: an InputError says so."""
    options = option_frame({("a:weight", 2): 0.0, ("a:weight", 3): 0.0})
    options["offset"] = [True, False]
    cost = cost_frame(NETWORKS[0], dict.fromkeys(("a:weight", "a:input", "b:weight", "b:input"), 8), [1, 1])
    with pytest.raises(InputError, match="No plan is within all budgets at once"):
        plan_bits(options, cost, budget=PlanBudget(weight_bits=2.5, size_bytes=50), parameters=16)


def test_unusable_options_are_refused():
    """NaN scores, a doubled or unknown site, no options, and a budget without its sites are each an InputError."""
    options, cost, parameters = chain(2)

    def plan(table: pd.DataFrame, **budget: float) -> None:
        plan_bits(table, cost, budget=PlanBudget(**budget), parameters=parameters)  # type: ignore[arg-type]

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


def test_ties_that_overlap_are_one_and_need_a_common_bit_width():
    """Two ties with a site in common bind all three sites; without a common bit-width they are refused."""
    options, cost, parameters = chain(3)
    a, b, c = (Site(f"fc{i}", "weight") for i in range(3))
    bits = plan_bits(
        options, cost, budget=PlanBudget(weight_bits=4.5), parameters=parameters, ties=[(a, b), (b, c)]
    ).bits
    assert bits[a] == bits[b] == bits[c] == 4
    pinned = apply_pins(options, [("fc0:weight", 2), ("fc1:weight", 3)], {})
    with pytest.raises(InputError, match="fc0:weight, fc1:weight have no bit-width in common"):
        plan_bits(pinned, cost, budget=PlanBudget(), parameters=parameters, ties=[(a, b)])


def test_a_product_of_two_tied_sites_grows_with_the_square_of_their_bits():
    """Of two layers of 10^9 MACs one is planned, weight and input tied at 2 or 4 bits: 4 or 16 GBitOps beside 1024."""
    scores = {(name, b): -float(b) for name in ("a:weight", "a:input") for b in (2, 4)}
    cost = cost_frame(NETWORKS[0], dict.fromkeys(("a:weight", "a:input", "b:weight", "b:input"), 8), [10**9] * 2)
    tie = (Site("a", "weight"), Site("a", "input"))

    def plan(gbitops: int) -> dict[Site, int]:
        budget = PlanBudget(bitops=gbitops * 10**9)
        return plan_bits(option_frame(scores), cost, budget=budget, parameters=16, ties=[tie]).bits

    assert plan(1040) == dict.fromkeys(tie, 4)
    assert plan(1039) == plan(1028) == dict.fromkeys(tie, 2)
    with pytest.raises(InputError, match="the cheapest has 1028, the dearest 1040"):
        plan(1027)


def test_tie_patterns_are_resolved_over_sites():
    """One group per pattern, over `module:tensor`; a pattern without a match is refused with the nearest site."""
    sites = [Site("qkv", "weight.query"), Site("qkv", "weight.key"), Site("qkv", "input")]
    assert tied_sites(["qkv:weight.*", "*"], sites) == [tuple(sites[:2]), tuple(sites)]
    with pytest.raises(InputError, match=r"The tie 'qk:\*' matches no measured site\. The nearest is qkv:"):
        tied_sites(["qk:*"], sites)


@given(scores=st.lists(st.floats(-10, 10), min_size=2, max_size=6), random=st.randoms())
def test_isotonic_scores_never_rise(scores, random):
    """Smoothed scores never rise with the bit-width and keep their sum; falling ones stay, in any row order."""
    rows = option_frame({("a:weight", b + 2): score for b, score in enumerate(scores)})
    order = list(range(len(scores)))
    random.shuffle(order)
    smooth = isotonic(rows.iloc[order])
    assert smooth["score_measured"].tolist() == [scores[i] for i in order]
    by_bits = smooth.sort_values("bit_width")["score"].to_numpy()
    assert (np.diff(by_bits) <= 1e-12).all()
    assert by_bits.sum() == pytest.approx(sum(scores), abs=1e-9)
    falling = rows.assign(score=sorted(scores, reverse=True))
    assert isotonic(falling)["score"].tolist() == pytest.approx(falling["score"].tolist(), rel=1e-12)


def test_isotonic_scores_are_made_per_site():
    """A rise from one site to the next is no noise: only a site's own rise from 2 to 3 bits is averaged out."""
    scores = {("a:weight", 2): 1.0, ("a:weight", 3): 3.0, ("b:weight", 2): 9.0, ("b:weight", 3): 1.0}
    assert isotonic(option_frame(scores))["score"].tolist() == [2.0, 2.0, 9.0, 1.0]
    with pytest.raises(InputError, match="is nan"):
        isotonic(option_frame(scores).assign(score=math.nan))


def test_pins_leave_one_option():
    """A pin keeps one row per site; later pins win, and any over the layout's; candidates bind the other sites."""
    options, _, _ = chain(3)
    layout = {Site("fc0", "weight"): 8, Site("fc0", "input"): 8, Site("gone", "weight"): 8}
    kept = apply_pins(options, [("fc*:input", 4), ("fc2", 3)], layout, candidates=(2, 4))
    offered = kept.groupby(["module", "tensor"])["bit_width"].agg(list).to_dict()
    assert offered == {
        ("fc0", "weight"): [8],
        ("fc0", "input"): [4],
        ("fc1", "weight"): [2, 4],
        ("fc1", "input"): [4],
        ("fc2", "weight"): [3],
        ("fc2", "input"): [3],
    }


def test_pins_that_cannot_be_kept_are_refused():
    """A pattern without a match, or a bit-width that was not measured, is an InputError that names what there is."""
    options, _, _ = chain(2)
    with pytest.raises(InputError, match=r"The pin 'fcc0' matches no measured site\. The nearest is fc0\."):
        apply_pins(options, [("fcc0", 8)], {})
    with pytest.raises(
        InputError, match=r"fc0:weight is to have 5 bits by the pin fc0=5, but was measured at \[2, 3, 4, 8\]"
    ):
        apply_pins(options, [("fc0", 5)], {})
    with pytest.raises(InputError, match="fc1:input is to have 16 bits by the layout"):
        apply_pins(options, [], {Site("fc1", "input"): 16})
    with pytest.raises(InputError, match=r"is to have one of \[5, 6\] bits"):
        apply_pins(options, [], {}, candidates=(6, 5))


def test_uniform_bits_keep_the_layout():
    """Layout `paper` keeps pinned sites at 8 bits, `strict` none; a side without bits stays in floating point."""
    numel = dict.fromkeys(("a:weight", "a:input", "b:weight", "b:input"), 1)
    cost = cost_frame(NETWORKS[0], numel, [1, 1], pinned=("a:weight", "a:input"))
    a, b = Site("a", "weight"), Site("b", "weight")
    a_in, b_in = Site("a", "input"), Site("b", "input")
    assert uniform_bits(cost, 4, 3, "paper") == {a: 8, a_in: 8, b: 4, b_in: 3}
    assert uniform_bits(cost, 4, 3, "strict") == {a: 4, a_in: 3, b: 4, b_in: 3}
    assert uniform_bits(cost, 4, None, "paper") == {a: 8, b: 4}
    assert layout_pins(cost, "paper") == {a: 8, a_in: 8}
    with pytest.raises(InputError, match="layout 'Paper' is unknown"):
        uniform_bits(cost, 4, 3, "Paper")
    with pytest.raises(InputError, match="bit-width of 9 is not allowed"):
        uniform_bits(cost, 9, 3, "paper")
