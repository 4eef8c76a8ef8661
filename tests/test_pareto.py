"""The Pareto front: every point the best of all plans, the front monotone, its price and its knee."""

import itertools
import math
from dataclasses import replace

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt

from analysis.figures.pareto_plots import pareto_figure, plot_pareto
from analysis.planner import plan_bits
from analysis.planning import accounting
from analysis.planning.budget_kinds import budget_words
from analysis.planning.frontier import PARETO_COLUMNS, TOTALS, UNIFORM_COLUMNS, knee, pareto_front, uniform_points
from quant.bit_plan import PlanBudget, PlannedSite
from quant.errors import InputError
from quant.site import Site
from tests.plan_frames import NETWORKS, chain, cost_frame, option_frame


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def every_plan(options, cost, parameters, tied=()):
    """Score and costs of every assignment, by nothing but the accounting: a frame with TOTALS and score."""
    by_site = [list(rows.itertuples()) for _, rows in options.groupby(["module", "tensor"], sort=False)]
    rows = []
    for choice in itertools.product(*by_site):
        bits = {f"{row.module}:{row.tensor}": row.bit_width for row in choice}
        if len({bits[name] for name in tied}) > 1:
            continue
        sites = [
            PlannedSite(module=row.module, tensor=row.tensor, bit_width=row.bit_width, granularity=row.granularity,
                        signed=row.signed, offset=row.offset)
            for row in choice
        ]  # fmt: skip
        totals = accounting.totals(sites, cost, parameters)
        rows.append({name: getattr(totals, name) for name in TOTALS} | {"score": math.fsum(r.score for r in choice)})
    return pd.DataFrame(rows)


@st.composite
def programs(draw):
    """Options and cost of a small network, its parameters, and perhaps two tied sites."""
    products = draw(st.sampled_from(NETWORKS))
    names = list(dict.fromkeys(name for product in products for name in product))
    numel = {name: draw(st.integers(1, 5000)) for name in names}
    macs = [draw(st.integers(1, 10**6)) for _ in products]
    tied = tuple(names[:2]) if draw(st.booleans()) else ()
    widths = {name: (2, 4, 8) if name in tied else draw(st.sampled_from(((2, 4, 8), (3, 4), (8,)))) for name in names}
    score = st.floats(-1, 1).map(lambda value: round(value, 6))
    options = option_frame({(name, b): draw(score) for name in names for b in widths[name]})
    return options, cost_frame(products, numel, macs), sum(numel.values()) + 10, tied


@settings(max_examples=15)
@given(program=programs(), kind=st.sampled_from(TOTALS), held=st.booleans())
def test_each_point_is_the_best_of_all_plans(program, kind, held):
    """Enumeration finds no better plan within a row's budget and all others, and the ends are the two extreme plans.

    Also where tied sites share a choice and another budget stays in force.
    """
    options, cost, parameters, tied = program
    plans = every_plan(options, cost, parameters, tied)
    other = "bitops" if kind != "bitops" else "size_bytes"
    limit = int(plans[other].median())
    plans = plans[plans[other] <= limit] if held else plans
    budget = PlanBudget(**{other: limit}) if held else None
    ties = [[Site.parse(name) for name in tied]] if tied else []
    front = pareto_front(
        options, cost, stored=parameters, kinds=[kind], budget=budget, ties=ties, points=6, relative_gap=0.0
    )
    assert list(front.columns) == list(PARETO_COLUMNS)
    assert front["budget"].iloc[0] == plans[kind].min()
    for row in front.itertuples():
        within = plans[plans[kind] <= row.budget]
        assert row.objective == pytest.approx(within["score"].min(), abs=1e-6)
        assert row.lower_bound <= within["score"].min() + 1e-9
        assert getattr(row, kind) <= row.budget
        assert not held or getattr(row, other) <= limit
        assert ((plans[list(TOTALS)] == [getattr(row, name) for name in TOTALS]).all(axis=1)).any()
    assert front["objective"].iloc[-1] == pytest.approx(plans["score"].min(), abs=1e-6)


def test_the_front_falls_and_its_bounds_with_it():
    """Budgets rise; neither loss nor bound rises; each row is within its gap; every kind has its curve."""
    options, cost, parameters = chain(6)
    front = pareto_front(options, cost, stored=parameters, points=9, relative_gap=0.05)
    assert front["budget_kind"].drop_duplicates().tolist() == list(TOTALS)
    for kind, curve in front.groupby("budget_kind"):
        assert len(curve) == 9
        assert (np.diff(curve["budget"]) > 0).all()
        assert (np.diff(curve[kind]) >= 0).all()
        assert (np.diff(curve["objective"]) <= 0).all()
        assert (np.diff(curve["lower_bound"]) <= 0).all()
    assert (front["lower_bound"] <= front["objective"]).all()
    assert front["gap"].between(0, 0.05).all()
    assert (front["status"] == "optimal").all()


def test_a_loose_solver_is_repaired(monkeypatch):
    """Where a larger budget came back with a worse plan, the better one of the smaller budget stands for both."""
    options, cost, parameters = chain(6)

    def loose(options, cost, *, budget, **settings):
        solution = plan_bits(options, cost, budget=budget, **settings)
        worse = 0.02 if budget.weight_bits and 2.6 < budget.weight_bits < 4 else 0.0
        return replace(solution, objective=solution.objective + worse, gap=1.0, status="time_limit")

    exact = pareto_front(options, cost, stored=parameters, kinds=["weight_bits"], points=15)
    monkeypatch.setattr("analysis.planning.frontier.plan_bits", loose)
    front = pareto_front(options, cost, stored=parameters, kinds=["weight_bits"], points=15)
    kept = exact[exact["budget"].isin(front["budget"])]
    assert 0 < len(front) < len(exact)  # the rows that would have risen are gone
    np.testing.assert_array_equal(front["objective"], kept["objective"])
    assert (np.diff(front["objective"]) < 0).all()
    assert not front["budget"].between(2.6, 4, inclusive="neither").any()
    assert (front["status"] == "optimal").all()  # the bound of a larger budget closes the gap


def test_a_larger_budget_that_buys_nothing_has_no_row():
    """Neighbouring rows are different plans, so that no shadow price before the last row is 0."""
    options, cost, parameters = chain(2)
    front = pareto_front(options, cost, stored=parameters, kinds=["weight_bits"], points=40)
    assert len(front) < 40
    assert (front["shadow_price"].to_numpy()[:-1] > 0).all()
    assert front["shadow_price"].iloc[-1] == 0


def test_the_shadow_price_is_the_finite_difference():
    """Price times the step of the budget is the fall of the loss to the next row; there is none after the last."""
    options, cost, parameters = chain(5)
    front = pareto_front(options, cost, stored=parameters, points=8)
    for _, curve in front.groupby("budget_kind"):
        fall = curve["shadow_price"].to_numpy()[:-1] * np.diff(curve["budget"])
        loss = curve["objective"].to_numpy()
        np.testing.assert_allclose(loss[:-1] - fall, loss[1:], rtol=0, atol=1e-12)
        assert (curve["shadow_price"] >= 0).all()
        assert curve["shadow_price"].iloc[-1] == 0


def test_the_budget_asked_for_is_a_point_and_the_others_hold():
    """The front passes through the very plan that the budgets give; every row is within the budgets of other kinds."""
    options, cost, parameters = chain(5)
    budget = PlanBudget(weight_bits=3.0, activation_bits=4.5)
    calls = []
    front = pareto_front(options, cost, stored=parameters, budget=budget, points=4, solved=lambda: calls.append(1))
    assert len(calls) >= len(front)
    plan = plan_bits(options, cost, budget=budget, stored=parameters)
    for kind, limit in budget.as_dict().items():
        own = front[(front["budget_kind"] == kind) & (front["budget"] == limit)]
        assert own["objective"].tolist() == pytest.approx([plan.objective])
        assert (front.loc[front["budget_kind"] != kind, kind] <= limit).all()


def test_uniform_bits_lie_on_the_front_or_above():
    """No uniform plan beats the front at its own cost; those outside the other budgets are left out."""
    options, cost, parameters = chain(4)
    budget = PlanBudget(activation_bits=4.0)
    uniform = uniform_points(options, cost, stored=parameters, budget=budget)
    assert list(uniform.columns) == list(UNIFORM_COLUMNS)
    assert uniform.loc[uniform["budget_kind"] == "weight_bits", "bit_width"].tolist() == [2, 3, 4, 8]
    assert uniform.loc[uniform["budget_kind"] == "bitops", "bit_width"].tolist() == [2, 3, 4]
    for row in uniform.itertuples():
        held = {"activation_bits": 4.0} if row.budget_kind != "activation_bits" else {}
        limit = getattr(row, row.budget_kind)
        limit = int(limit) if row.budget_kind in ("size_bytes", "bitops") else limit
        best = plan_bits(options, cost, budget=PlanBudget(**held, **{row.budget_kind: limit}), stored=parameters)
        assert row.objective >= best.objective - 1e-9
    own = uniform[uniform["budget_kind"] == "weight_bits"]
    assert own["weight_bits"].tolist() == own["bit_width"].tolist()


def test_a_latency_budget_stays_in_force():
    """Every point of every curve but that of the latency is within the time that the user's table gives it."""
    options, cost, parameters = chain(3)
    latency = options[["module", "tensor", "bit_width"]].assign(milliseconds=options["bit_width"] / 4)
    budget = PlanBudget(latency_ms=6.0)
    front = pareto_front(options, cost, stored=parameters, budget=budget, latency=latency, points=3)
    free = pareto_front(options, cost, stored=parameters, points=3)
    assert front["budget_kind"].drop_duplicates().tolist() == [*TOTALS, "latency_ms"]
    front = front[front["budget_kind"] != "latency_ms"]
    assert (front.groupby("budget_kind")["objective"].min() > free["objective"].min()).all()
    best = plan_bits(options, cost, budget=budget, stored=parameters, latency=latency)
    last = front.groupby("budget_kind").last()
    assert last["objective"].tolist() == pytest.approx([best.objective] * 4)


@pytest.mark.parametrize("kind", ["activation_bytes", "latency_ms"])
def test_a_budget_of_bytes_or_time_has_its_own_curve(kind):
    """From the fastest (smallest) plan, which may have more bits, to the best; each point as enumeration has it."""
    options, cost, parameters = chain(2, bit_widths=(2, 4, 8))
    generator = np.random.default_rng(0)
    latency = options[["module", "tensor", "bit_width"]].assign(milliseconds=generator.uniform(0.1, 2, len(options)))
    plans = []
    for choice in itertools.product(*(list(rows.index) for _, rows in options.groupby(["module", "tensor"]))):
        one = options.loc[list(choice)]
        spent = plan_bits(one, cost, budget=PlanBudget(**{kind: 10**9}), stored=parameters, latency=latency)
        plans.append((getattr(spent.totals, kind), spent.objective))
    least = min(spent for spent, _ in plans)
    front = pareto_front(
        options, cost, stored=parameters, budget=PlanBudget(**{kind: 10**9}), latency=latency, points=6
    )
    own = front[front["budget_kind"] == kind]
    assert own["budget"].iloc[0] == least
    for row in own.itertuples():
        assert row.objective == pytest.approx(min(loss for spent, loss in plans if spent <= row.budget))
    uniform = uniform_points(options, cost, stored=parameters, kinds=[kind], latency=latency)
    assert uniform["bit_width"].tolist() == [2, 4, 8]
    ax = plot_pareto(front, kind=kind, uniform=uniform)
    assert ax.get_xlabel() == {"activation_bytes": "activations (MiB)", "latency_ms": "latency (ms)"}[kind]


def test_a_pinned_network_has_one_plan():
    """Where nothing is left to choose, the front is that plan alone, without a price and without a knee."""
    options, cost, parameters = chain(2, bit_widths=(4,))
    front = pareto_front(options, cost, stored=parameters)
    assert len(front) == 4
    assert (front["shadow_price"] == 0).all()
    assert knee(front).empty
    assert uniform_points(options, cost, stored=parameters).empty
    assert pareto_figure(front, "pinned").axes


def test_wrong_requests_are_refused():
    """A kind without sites or that is none, a curve without two ends, other budgets that no plan can meet."""
    options, cost, parameters = chain(2)
    weights = options[options["tensor"] == "weight"]
    front = pareto_front(weights, cost, stored=parameters, points=3)
    assert set(front["budget_kind"]) == {"weight_bits", "size_bytes", "bitops"}
    assert front["activation_bits"].isna().all()
    with pytest.raises(InputError, match="activation_bits has no site"):
        pareto_front(weights, cost, stored=parameters, kinds=["activation_bits"])
    with pytest.raises(InputError, match="no budget 'watts'"):
        pareto_front(options, cost, stored=parameters, kinds=["watts"])
    with pytest.raises(InputError, match="needs a latency table"):
        pareto_front(options, cost, stored=parameters, kinds=["latency_ms"])
    with pytest.raises(InputError, match="1 points has no two ends"):
        pareto_front(options, cost, stored=parameters, points=1)
    with pytest.raises(InputError, match=r"No plan is within 1\.5 mean weight bits"):
        pareto_front(options, cost, stored=parameters, kinds=["bitops"], budget=PlanBudget(weight_bits=1.5))


def curve(bits, loss):
    """A front over mean weight bits with these losses."""
    return pd.DataFrame(
        {"budget_kind": "weight_bits", "budget": bits, "weight_bits": bits, "objective": loss, "gap": 0.0,
         "lower_bound": loss, "status": "optimal", "shadow_price": 0.0}
    )  # fmt: skip


def test_the_knee_of_a_known_curve():
    """On 1/b from 1 to 4 the tangent is parallel to the chord at b = 2, whatever the unit of the loss."""
    bits = np.linspace(1, 4, 301)
    for unit in (1.0, 1e-6):
        found = knee(curve(bits, unit / bits + 5 * unit))
        assert found["weight_bits"].tolist() == [pytest.approx(2.0)]
    corner = curve([1, 2, 3, 9], [10.0, 1.0, 0.9, 0.0])
    bulging = corner.assign(budget_kind="bitops", bitops=[1, 8.9, 8.95, 9])
    assert knee(pd.concat([corner, bulging]))["budget"].tolist() == [2]
    for loss in (4 - bits, np.sqrt(4 - bits), np.zeros(301)):  # straight, concave, flat
        assert knee(curve(bits, loss)).empty


def test_the_figure_holds_the_points():
    """Each panel has the plans, the uniform crosses and the ringed knee in the units of its axis."""
    options, cost, parameters = chain(3)
    front = pareto_front(options, cost, stored=parameters, points=5)
    uniform = uniform_points(options, cost, stored=parameters)
    figure = pareto_figure(front, "net", uniform=uniform, objective="kl")
    figure.canvas.draw()
    units = {"weight_bits": 1, "activation_bits": 1, "size_bytes": 2**20, "bitops": 1e9}
    labels = ["mean weight bits", "mean activation bits", "size (MiB)", "GBitOps per image"]
    assert [ax.get_xlabel() for ax in figure.axes] == labels
    for ax, (kind, unit) in zip(figure.axes, units.items(), strict=True):
        assert ax.get_ylabel() == "predicted KL of the logits (nats)"
        lines = {line.get_label().partition(" at ")[0]: line.get_xydata() for line in ax.lines}
        for label, frame in (("best plan", front), ("uniform bits", uniform), ("knee", knee(front))):
            rows = frame[frame["budget_kind"] == kind]
            np.testing.assert_allclose(lines[label], np.c_[rows[kind] / unit, rows["objective"]])
        marks = [text.get_text() for text in ax.get_legend().get_texts()]
        assert marks[-1].endswith("(on linear axes)")  # of the chord; the figure's are not
        box = ax.get_tightbbox()
        assert min(box.x0, box.y0) >= 0
        assert (box.x1, box.y1) <= (figure.bbox.x1, figure.bbox.y1)


def test_budgets_are_said_in_units_that_people_read():
    """Each kind in its unit, those that are set alone."""
    budget = PlanBudget(weight_bits=3.0698123, size_bytes=3 * 2**19, bitops=538541800)
    assert budget_words(budget) == "3.07 mean weight bits, 1.5 MiB and 0.5385 GBitOps"
    assert budget_words(PlanBudget(latency_ms=12.5)) == "12.5 ms"
    assert budget_words(PlanBudget(activation_bytes=2**20)) == "1 MiB of activations"
    assert budget_words(PlanBudget()) == ""


def test_the_scale_fits_the_sign_of_the_loss():
    """Logarithmic above 0, symmetric-log across it, linear below; a wide gap shows its bound; no empty curve."""
    bits = [2.0, 3.0, 4.0, 8.0]
    scales = {"log": [1.0, 0.2, 0.05, 0.01], "symlog": [1.0, 0.2, 0.0, -0.01], "linear": [-0.1, -0.2, -0.3, -0.4]}
    for scale, loss in scales.items():
        assert plot_pareto(curve(bits, loss), kind="weight_bits").get_yscale() == scale
    wide = curve(bits, scales["log"]).assign(gap=0.5, lower_bound=[0.5, 0.1, 0.02, 0.005])
    ax = plot_pareto(wide, kind="weight_bits")
    bound = next(line for line in ax.lines if line.get_label() == "lower bound")
    assert bound.get_ydata().tolist() == wide["lower_bound"].tolist()
    assert ax.get_ylim()[0] < 0.005
    with pytest.raises(ValueError, match="no row of bitops"):
        plot_pareto(wide, kind="bitops")
