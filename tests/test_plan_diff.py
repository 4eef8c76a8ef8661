"""`qvw plan-diff` and plan.csv tell what two plans, or one, give each site."""

import json
from dataclasses import replace
from itertools import pairwise

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from analysis.figures.panels import bits_figure
from analysis.planner import plan_bits
from analysis.planning import accounting
from analysis.planning.plan_csv import PLAN_CSV_COLUMNS, plan_frame
from analysis.statistics.names import shorten
from analysis.steps.plan_diff import DIFF_COLUMNS, plan_diff, run_plan_diff, totals_diff
from analysis.steps.plan_messages import unspent_budgets
from analysis.storage.plan_file import read_plan_file
from quant.bit_plan import BitPlan, PlanBudget, PlanModel, PlanSolver
from quant.errors import InputError
from tests.plan_frames import chain

OPTIONS, COST, PARAMETERS = chain(4)


def plan(weight_bits, options=OPTIONS, loss=0.5):
    """The best plan of a chain at a budget of mean weight bits."""
    solution = plan_bits(options, COST, budget=PlanBudget(weight_bits=weight_bits), stored=PARAMETERS)
    return BitPlan(
        model=PlanModel(name="chain", kwargs={}, weights_sha256="aa"),
        layout="strict",
        budget=PlanBudget(weight_bits=weight_bits),
        sites=solution.sites,
        totals=solution.totals,
        predicted_delta_loss=loss,
        solver=PlanSolver(name="highs", status=solution.status),
    )


def folder(path, plan, cost=COST):
    """A run folder with a plan and, if given, its costs."""
    path.mkdir()
    (path / "plan.json").write_text(plan.to_json())
    if cost is not None:
        cost.to_parquet(path / "cost.parquet")
    return path


def without(plan, *names):
    """A plan that leaves these sites in floating point."""
    sites = tuple(site for site in plan.sites if str(site.site) not in names)
    return replace(plan, sites=sites, totals=accounting.totals(sites, COST, PARAMETERS))


def test_each_site_has_its_bits_in_both():
    """Bits, their change and no note where all sites are in both; the network's order; no bytes without costs."""
    a, b = plan(3), plan(5)
    table = plan_diff(a, b)
    assert list(table.columns) == list(DIFF_COLUMNS)
    assert (table["module"] + ":" + table["tensor"]).tolist() == [str(site.site) for site in a.sites]
    assert table["bits_a"].tolist() == list(a.bits.values())
    assert table["bits_b"].tolist() == list(b.bits.values())
    assert (table["change"] == table["bits_b"] - table["bits_a"]).all()
    assert table["change"].sum() > 0
    assert (table["note"] == "").all()
    assert table[["bytes_a", "bytes_b", "bytes_change"]].isna().all(axis=None)


def test_bytes_of_sites_add_up_to_those_of_the_files():
    """The change of all sites' bytes is that of the totals, also where a weight is planned in one of them alone."""
    a, b = plan(3), without(plan(5), "fc1:weight", "fc2:input")
    table = plan_diff(a, b, COST, COST)
    assert int(table["bytes_change"].sum()) == b.totals.size_bytes - a.totals.size_bytes
    alone = table[table["module"].eq("fc1") & table["tensor"].eq("weight")].iloc[0]
    assert alone["bytes_b"] == 4 * COST.set_index(["module", "tensor"])["numel"]["fc1", "weight"]
    assert plan_diff(a, b, COST, None)["bytes_a"].isna().all()


def test_sites_of_one_plan_alone_keep_their_place():
    """They are noted, have no change, and stand where their own plan has them."""
    whole = plan(4)
    names = [str(site.site) for site in whole.sites]
    for first, last in ((names[0], names[-1]), (names[2], names[3])):
        for a, b, note in ((without(whole, first, last), whole, "only in B"), (whole, without(whole, first, last), "only in A")):  # fmt: skip # noqa: E501
            table = plan_diff(a, b)
            sites = table["module"] + ":" + table["tensor"]
            assert sites.tolist() == names
            alone = sites.isin([first, last])
            assert (table.loc[alone, "note"] == note).all()
            assert table.loc[alone, "change"].isna().all()
            assert (table.loc[~alone, "change"] == 0).all()
    disjoint = plan_diff(without(whole, *names[:4]), without(whole, *names[4:]))
    assert sorted(disjoint["module"] + ":" + disjoint["tensor"]) == sorted(names)


def test_other_scales_of_the_same_bits_are_noted():
    """Granularity, sign and offset are part of a plan."""
    a = plan(4)
    other = replace(a.sites[1], granularity="per_channel", signed=False, offset=True)
    table = plan_diff(a, replace(a, sites=(a.sites[0], other, *a.sites[2:])))
    assert table.loc[1, "note"] == "granularity: per_tensor to per_channel, signed: yes to no, offset: no to yes"
    assert (table["note"] != "").sum() == 1


def test_totals_stand_side_by_side():
    """The figures of both files and their difference; a figure that neither has is left out, of one alone is NaN."""
    a, b = plan(3), replace(plan(5), predicted_delta_loss=None)
    table = totals_diff(a, b).set_index("total")
    assert table.loc["size (bytes)"].tolist() == [
        a.totals.size_bytes, b.totals.size_bytes, b.totals.size_bytes - a.totals.size_bytes,
    ]  # fmt: skip
    assert table.loc["GBitOps", "A"] == a.totals.bitops / 1e9
    assert table.loc["predicted loss change", "A"] == 0.5
    assert table.loc["predicted loss change", ["B", "change"]].isna().all()
    assert "latency (ms)" not in table.index


def test_the_command_prints_what_differs_and_writes_all(tmp_path, capsys):
    """Run folders and files; sites that are the same are counted, not listed; the CSV has every site."""
    a, b = plan(3), plan(3.3)
    one, two = folder(tmp_path / "a", a), folder(tmp_path / "b", b)
    run_plan_diff(one, two, csv=tmp_path / "all.csv")
    said = capsys.readouterr()
    assert said.err == ""
    changed = [x for x, y in zip(a.sites, b.sites, strict=True) if x != y]
    assert f"{8 - len(changed)} of 8 sites are the same; these are not:" in said.out
    listed = said.out.partition("these are not:")[2]
    assert [site.module in listed for site in changed] == [True] * len(changed)
    table = pd.read_csv(tmp_path / "all.csv")
    assert len(table) == 8
    assert table["bytes_change"].sum() == b.totals.size_bytes - a.totals.size_bytes
    run_plan_diff(one, one / "plan.json")
    assert "8 of 8 sites are the same." in capsys.readouterr().out
    run_plan_diff(one, two, quiet=True)
    assert capsys.readouterr().out == ""


def test_a_long_list_is_cut_and_other_models_are_told(tmp_path, capsys):
    """The terminal shows 40 sites at most; a plan of another network, or of other weights, is a warning."""
    options, _, _ = chain(30)
    sites = [replace(plan(4).sites[0], module=module) for module in options["module"].unique()]
    files = []
    for name, prefix in (("a", "x"), ("b", "y")):
        content = json.loads(plan(4).to_json())
        content["model"]["name"] = name
        content["sites"] = [vars(site) | {"module": f"{prefix}.{site.module}"} for site in sites]
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(content))
    run_plan_diff(*files)
    said = capsys.readouterr()
    assert "... and 20 more; --csv FILE writes all." in said.out
    assert "A is a plan of a, B of b" in said.err
    trained = replace(plan(4), model=PlanModel(name="chain", kwargs={}, weights_sha256="bb"))
    run_plan_diff(folder(tmp_path / "run", plan(4)), folder(tmp_path / "trained", trained))
    assert "plans of other weights of chain" in capsys.readouterr().err


def test_what_is_no_plan_is_an_error(tmp_path):
    """A missing file, a folder without a plan, a file that is no plan, bytes that are no text: which one, and why."""
    good = tmp_path / "plan.json"
    good.write_text(plan(3).to_json())
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    for name, message in (
        ("none.json", r"none\.json cannot be read"),
        ("empty", r"empty/plan\.json cannot be read"),
        ("other.json", r"other\.json is not a bit plan"),
        ("binary.json", r"binary\.json cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            run_plan_diff(good, tmp_path / name)
    assert read_plan_file(tmp_path) == plan(3)


@pytest.mark.parametrize("field", ["size_bytes", "bitops", "activation_bytes", "latency_ms"])
def test_the_largest_numbers_of_a_file_are_compared(tmp_path, capsys, field):
    """Whatever a plan file may hold has a finite difference; what is larger is an error that names the place."""
    largest = {"latency_ms": 1e12}.get(field, 10**21)
    a = replace(plan(3), totals=replace(plan(3).totals, **{field: largest}), predicted_delta_loss=-1e200)
    b = replace(plan(3), totals=replace(plan(3).totals, **{field: 0}), predicted_delta_loss=1e200)
    table = totals_diff(a, b)
    assert np.isfinite(table["change"].dropna()).all()
    (tmp_path / "a.json").write_text(a.to_json())
    run_plan_diff(tmp_path / "a.json", folder(tmp_path / "b", b))
    assert max(map(len, capsys.readouterr().out.splitlines())) < 120
    absurd = json.loads(a.to_json())
    absurd["totals"][field] = 10**400
    (tmp_path / "a.json").write_text(json.dumps(absurd))
    with pytest.raises(InputError, match=rf"a\.json: totals\.{field}: "):
        run_plan_diff(tmp_path / "a.json", tmp_path / "b")


def test_damaged_costs_beside_a_plan_are_told(tmp_path):
    """The bytes of sites are not made of nonsense: the table is named, and what is wrong with it."""
    one, two = folder(tmp_path / "a", plan(3)), folder(tmp_path / "b", plan(5), COST.assign(numel=-1))
    with pytest.raises(InputError, match=r"b/cost\.parquet, row 0 \(fc0:weight\): numel is -1 \(and 7 more"):
        run_plan_diff(one, two)


def test_the_table_of_a_plan_has_every_site():
    """In network order, whatever the file's; bits as planned; bytes that add up with the parameters outside."""
    whole = plan(3)
    shuffled = replace(whole, sites=tuple(reversed(whole.sites)))
    frame = plan_frame(shuffled, COST)
    assert list(frame.columns) == list(PLAN_CSV_COLUMNS)
    assert (frame["module"] + ":" + frame["tensor"]).tolist() == (COST["module"] + ":" + COST["tensor"]).tolist()
    assert frame["bit_width"].tolist() == list(whole.bits.values())
    assert frame["numel"].tolist() == COST["numel"].tolist()
    weights = frame["tensor"] == "weight"
    outside = 4 * (PARAMETERS - frame.loc[weights, "numel"].sum())
    assert frame["bytes"].sum() + outside == whole.totals.size_bytes
    with pytest.raises(InputError, match="no site fc3:weight"):
        plan_frame(whole, COST[~COST["module"].eq("fc3")])


@pytest.mark.parametrize("modules", [1, 54, 55, 150])
def test_the_chart_names_every_module_of_a_long_network(modules):
    """Rows of the page, one below the other: each module named once, each bit-width written, one legend for all."""
    frame = pd.DataFrame(
        [
            {
                "module": f"layers.{i}.fc",
                "tensor": tensor,
                "bit_width": 8 if i == modules - 1 else 3,
                "order": 2 * i + j,
            }
            for i in range(modules)
            for j, tensor in enumerate(("input", "weight"))
        ]
    )
    figure = bits_figure(frame.sample(frac=1, random_state=0), "net")
    figure.canvas.draw()
    assert len(figure.axes) == -(-modules // 54)
    labels = [label for ax in figure.axes for label in ax.get_xticklabels()]
    assert [label.get_text() for label in labels] == [shorten(f"layers.{i}.fc") for i in range(modules)]
    boxes = [label.get_window_extent() for label in labels]
    assert not any(one.overlaps(two) for one, two in pairwise(boxes))
    digits = [text.get_text() for ax in figure.axes for text in ax.texts]
    assert sorted(digits) == ["3"] * (2 * modules - 2) + ["8"] * 2
    legends = [ax.get_legend() for ax in figure.axes]
    assert [text.get_text() for text in legends[0].get_texts()] == [f"{b} bit" for b in np.unique(frame["bit_width"])]
    assert legends[1:] == [None] * (len(legends) - 1)
    plt.close(figure)


def test_a_budget_that_a_proved_plan_leaves_is_told():
    """A tenth or more that is not spent is no mistake of the solver's: no more bits lower a score."""
    made = plan(5)
    spent = replace(made, budget=PlanBudget(weight_bits=made.totals.weight_bits))
    left = replace(made, budget=PlanBudget(weight_bits=2 * made.totals.weight_bits))
    assert unspent_budgets(spent) == []
    assert unspent_budgets(left)[0].startswith("50% of the budget of")
    assert unspent_budgets(replace(left, solver=PlanSolver(name="highs", status="time_limit"))) == []
