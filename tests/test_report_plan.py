"""The page's sections on the Pareto front and on the verification of a plan: figures of the tables, and the verdict."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis.page.cells import DASH
from analysis.page.content import belongs, read_run
from analysis.page.plan_section import (
    MOST_ROWS,
    front_sentences,
    front_tables,
    objective,
    other_plan,
    verification_sentences,
    verification_table,
)
from analysis.page.summary_section import deciding, evaluated, evaluations, readings
from analysis.planning.frontier import knee
from analysis.report import report_html, sections
from analysis.steps import plan_step as plan_step
from quant.errors import InputError
from tests.digits_vit import DATA, MODEL, qvw

MINUS = "\N{MINUS SIGN}"


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A run folder with a plan, its front and its verification; not to be changed."""
    run = tmp_path_factory.mktemp("reports") / "vit"
    assert qvw("sensitivity", *MODEL, *DATA, "--images", 16, "--bits", "2,4,8", "--run", run) == 0
    options = ["--weight-bits", 3.5, "--activation-bits", 4.5, "--pareto", "--verify", "--images", 40]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_step, "POINTS", 6)
        assert qvw("plan", "--run", run, *options, "--num-workers", 0, "--quiet") == 0
    return run


@pytest.fixture
def run(planned, tmp_path):
    """A copy that a test may change, without the sweep, whose figures take the most time."""
    return shutil.copytree(planned, tmp_path / "run", ignore=shutil.ignore_patterns("s*.parquet"))


@pytest.fixture
def content(planned):
    """What the folder holds, without the sweep."""
    return replace(read_run(planned, "mine"), sweep=None, sensitivity=None, stats=None)


def columns(table):
    """A table's cells by column."""
    return {name: [row[i] for row in table.rows] for i, name in enumerate(table.columns)}


def by_id(content):
    """The sections of a page of one run."""
    return {section.id: section for section in sections([replace(content, sweep=None, stats=None)])}


def test_a_run_has_the_sections_that_it_has_tables_for(run):
    """Neither section, heading nor link without the table, whatever else is there; each alone with its own."""
    texts = {}
    for file in ("verification.parquet", "pareto.parquet"):
        (run / file).rename(run / "aside")
        texts[file] = report_html([run])
        (run / "aside").rename(run / file)
    front, verification = 'href="#front">Pareto front<', 'href="#verification">Verification<'
    assert front in texts["verification.parquet"]
    assert verification in texts["pareto.parquet"]
    assert "erification" not in texts["verification.parquet"].partition("How it was made</h2>")[0]
    assert "Pareto" not in texts["pareto.parquet"].partition("How it was made</h2>")[0]
    page = report_html([run])
    assert page.index('id="plan"') < page.index('id="front"') < page.index('id="verification"')


def test_the_front_is_in_units_that_people_read(content):
    """A table a kind, its rows those of pareto.parquet in bits, MiB and GBitOps; knee and plan are marked."""
    units = {"mean weight bits": ("weight_bits", 1), "mean activation bits": ("activation_bits", 1),
             "size (MiB)": ("size_bytes", 2**20), "GBitOps per image": ("bitops", 1e9)}  # fmt: skip
    tables = front_tables(content)
    assert len(tables) == 4
    for table, (label, (kind, unit)) in zip(tables, units.items(), strict=True):
        curve = content.front[content.front["budget_kind"] == kind]
        cells = columns(table)
        assert table.caption.endswith(f"the best plans for {len(curve)} budgets of {label}")
        assert [cell.key for cell in cells[f"budget: {label}"]] == (curve["budget"] / unit).tolist()
        for other, (cost, of) in units.items():
            assert [cell.key for cell in cells[other]] == (curve[cost] / of).tolist()
        assert [c.key for c in cells["predicted KL of the logits (nats)"]] == curve["objective"].tolist()
        price = next(name for name in cells if name.startswith("shadow price (nats a"))
        np.testing.assert_allclose([cell.key for cell in cells[price]], curve["shadow_price"] * unit)
        marks = {index: cell.text for index, cell in zip(curve.index, cells["point"], strict=True) if cell.text}
        limit = content.plan.budget.as_dict().get(kind)
        expected = {index: ["knee"] for index in knee(curve).index}
        for index in curve.index[curve["budget"] == limit]:
            expected.setdefault(index, []).append("plan")
        assert {index: mark.split(",\N{NO-BREAK SPACE}") for index, mark in marks.items()} == expected


def test_a_long_curve_is_thinned(content):
    """Evenly, ends, knee and plan kept, and the caption says how many there were."""
    weights = content.front[content.front["budget_kind"] == "weight_bits"]
    budgets = np.linspace(weights["budget"].min(), weights["budget"].max(), 301)
    values = {
        name: np.interp(budgets, weights["budget"], weights[name])
        for name in ("weight_bits", "activation_bits", "size_bytes", "bitops", "objective", "shadow_price")
    }
    long = pd.DataFrame(values | {"budget": budgets}).assign(
        budget_kind="weight_bits", gap=0.0, plan_sha256=content.front["plan_sha256"].iloc[0]
    )
    (table,) = front_tables(replace(content, front=long))
    cells = columns(table)["budget: mean weight bits"]
    assert MOST_ROWS <= len(cells) <= MOST_ROWS + 2
    keys = [cell.key for cell in cells]
    assert keys == sorted(keys)
    assert (keys[0], keys[-1]) == (budgets[0], budgets[-1])
    assert knee(long)["budget"].iloc[0] in keys
    assert f"{len(cells)} of 301 budgets" in table.caption


def test_knee_and_price_are_said_in_a_sentence_each(content):
    """The knee of every curve in its unit, and what the next unit saves at the budgets that the plan has."""
    knees, prices = front_sentences(content)
    for row in knee(content.front).itertuples():
        small = row.budget_kind == "size_bytes" and row.budget < 2**20
        unit = {"size_bytes": 2**20, "bitops": 1e9}.get(row.budget_kind, 1)
        assert (f"{row.budget:,.0f} bytes" if small else f"{row.budget / unit:.4g} ") in knees
    for kind, limit, words in (
        ("weight_bits", 3.5, "nats a weight bit on average"),
        ("activation_bits", 4.5, "nats an activation bit on average"),
    ):
        at = content.front[(content.front["budget_kind"] == kind) & (content.front["budget"] == limit)]
        assert f"{at['shadow_price'].iloc[0]:.3g} {words}" in prices
    assert "MiB" not in prices  # no such budget
    flat = content.front.assign(objective=1.0, shadow_price=0.0)
    assert front_sentences(replace(content, front=flat, plan=None)) == (
        "No curve has a knee: more budget saves at an even pace, or nothing.",
    )


def test_a_front_of_another_plan_is_no_statement_on_this_one(content):
    """Its objective and budgets are not taken from plan.json; the page says so; without the hash nothing is said."""
    assert belongs(content, content.front)
    assert objective(content) == "KL of the logits (nats)"
    other = replace(content, plan=replace(content.plan, predicted_delta_loss=1.0))
    assert objective(other) == "change"
    assert "At the knee the next unit saves" in front_sentences(other)[1]
    assert "nats" not in "".join(table.columns[5] for table in front_tables(other))
    (sentence,) = other_plan(other, other.front, "Pareto front", "--pareto")
    assert sentence.startswith("The Pareto front is of another plan, not of plan.json as it is now")
    (elsewhere,) = other_plan(replace(content, plan=None), content.front, "Pareto front", "--pareto")
    assert "written elsewhere" in elsewhere
    earlier = content.front.drop(columns="plan_sha256")
    assert other_plan(content, earlier, "Pareto front", "--pareto") == ()


def test_the_verification_has_the_figures_of_its_table(content):
    """A row a plan; top-1 and paired differences in points with their errors; nothing to compare the plan with."""
    frame = content.verification
    cells = columns(verification_table(content))
    assert [cell.text for cell in cells["plan"]][:4] == ["planned", "uniform", "greedy", "worst-first"]
    for name, column, scale in (
        ("top-1 (%)", "top1", 0.01), ("measured KL (nats)", "measured_kl", 1),
        ("predicted KL (nats)", "predicted_kl", 1),
        ("weight bits", "weight_bits", 1), ("activation bits", "activation_bits", 1), ("GBitOps", "bitops", 1e9),
        ("size (MiB)", "size_bytes", 2**20),
    ):  # fmt: skip
        keys = [math.nan if cell.key is None else cell.key for cell in cells[name]]
        assert keys == pytest.approx((frame[column] / scale).tolist(), nan_ok=True)
    ahead = cells["planned ahead (points)"]
    assert (ahead[0].text, ahead[0].key) == (DASH, None)
    for cell, row in zip(ahead[1:], frame.iloc[1:].itertuples(), strict=True):
        sign = MINUS if row.planned_ahead < 0 else "+"
        assert cell.text == f"{sign}{abs(100 * row.planned_ahead):.2f} ± {100 * row.planned_ahead_se:.2f}"


def test_the_verdict_is_by_two_standard_errors(content):
    """Worse, equal and better plans are named, by accuracy and by KL; a difference of two errors is none."""
    frame = content.verification.head(4).assign(
        planned_ahead=[0.0, 0.05, -0.02, -0.05], planned_ahead_se=[0.0, 0.01, 0.01, 0.01],
        kl_excess=[0.0, 1.0, 1.0, 1.0], kl_excess_se=[0.0, 0.1, 0.1, 0.1],
    )  # fmt: skip
    by_top1, by_kl = verification_sentences(replace(content, verification=frame))[:2]
    assert by_top1 == (
        "By top-1 the plan is worse than worst-first; within two standard errors of greedy; better than uniform."
    )
    assert by_kl == "By KL the plan is better than uniform, greedy and worst-first."
    cells = columns(verification_table(replace(content, verification=frame)))["the plan is"]
    assert [cell.text for cell in cells] == [DASH, "better", "not significantly different", "worse"]


def test_the_images_are_named(content):
    """Those of the accuracy with their split, and those of the sweep."""
    sentence = verification_sentences(content)[-1]
    assert "Accuracy: 40 images, val of digits." in sentence
    assert "the 16 images of the sweep (train)" in sentence
    bare = replace(content, record=replace(content.record, steps={}))
    assert len(verification_sentences(bare)) == len(verification_sentences(content)) - 1


def test_without_labels_the_kl_decides(run):
    """No accuracy: dashes, the verdict by KL alone, and a page all the same."""
    names = ["top1", "top1_se", "planned_ahead", "planned_ahead_se", "predicted_delta_loss", "measured_delta_loss",
             "measured_delta_loss_se"]  # fmt: skip
    frame = pd.read_parquet(run / "verification.parquet").assign(**dict.fromkeys(names, math.nan))
    frame.to_parquet(run / "verification.parquet")
    content = read_run(run, "mine")
    cells = columns(verification_table(content))
    assert {cell.text for cell in (*cells["top-1 (%)"], *cells["the plan is"])} == {DASH}
    sentences = verification_sentences(content)
    assert sentences[0].startswith("By KL the plan is ")
    assert not [sentence for sentence in sentences if "top-1" in sentence]
    assert ">nan" not in report_html([run])


def test_a_verification_of_an_earlier_plan_says_so(planned, run):
    """After another plan in the same folder, without --verify; not while plan.json is the one that was measured."""
    assert other_plan(read_run(run, "mine"), read_run(run, "mine").verification, "verification", "--verify") == ()
    shutil.copy(planned / "sensitivity.parquet", run)
    assert qvw("plan", "--run", run, "--weight-bits", 5, "--activation-bits", 5, "--quiet") == 0
    content = read_run(run, "mine")
    shown = by_id(content)
    for section, option in (("verification", "--verify"), ("front", "--pareto")):
        (sentence,) = shown[section].parts[0].missing
        assert "is of another plan, not of plan.json as it is now" in sentence
        assert f"`{option}`" in sentence


@pytest.mark.parametrize("file", ["pareto.parquet", "pareto_uniform.parquet", "verification.parquet"])
def test_damaged_tables_are_named(run, file):
    """A table that was cut short is an input error with its name."""
    whole = (run / file).read_bytes()
    (run / file).write_bytes(whole[:100])
    with pytest.raises(InputError, match=f"{file} cannot be read"):
        report_html([run])


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("pareto.parquet", "qvw plan --pareto"),
        ("pareto_uniform.parquet", "qvw plan --pareto"),
        ("verification.parquet", "qvw plan --verify"),
    ],
)
def test_a_table_of_another_version_is_left_out(run, file, command):
    """The section is there and says what makes it anew; the rest of the page stands."""
    pd.DataFrame({"a": [1]}).to_parquet(run / file)
    text = report_html([run])
    assert text.count(f"{file} lacks the column") == 1
    assert f"<code>{command}</code>" in text
    assert "evaluated networks" in text


def test_a_verification_of_before_interactions_is_shown(run):
    """The page does without the columns that were added since."""
    frame = pd.read_parquet(run / "verification.parquet")
    new = ["predicted_kl_pairs", "kl_excess", "kl_excess_se"]
    frame.drop(columns=new).to_parquet(run / "verification.parquet")
    content = read_run(run, "mine")
    cells = columns(verification_table(content))
    assert {cell.text for cell in cells["KL above the plan's (nats)"]} == {DASH}
    assert verification_sentences(content)[0].startswith("By top-1 the plan is ")


def test_the_float_line_is_of_the_same_images(content):
    """Drawn where verify.parquet still has the row of the plan that was verified."""
    from analysis.page.figures import _float_top1

    top1 = content.verify.set_index("plan")["top1"]
    assert _float_top1(content) == top1["float"]
    assert _float_top1(replace(content, verify=content.verify.assign(top1=lambda f: f["top1"] + 0.001))) is None
    assert _float_top1(replace(content, verify=content.verify[content.verify["plan"] != "float"])) is None
    assert _float_top1(replace(content, verify=None)) is None


def test_the_chart_of_bits_has_the_budget_in_its_title(planned):
    """As plan.svg shows it: the budgets in words, as in the plan file."""
    plan = json.loads((planned / "plan.json").read_text())
    assert plan["budget"] == {"weight_bits": 3.5, "activation_bits": 4.5}
    svg = (planned / "plan.svg").read_text()
    assert "bits by site, budget 3.5 mean weight bits and 4.5 mean activation bits" in svg


def test_a_row_of_another_plan_is_not_told_as_the_plan_s(planned):
    """Where plan.json was written anew the page says whose the old rows are, and judges by none of them."""
    content = read_run(planned, "mine")
    assert "planned" in {row["plan"] for row in evaluations(content)}
    (told,) = readings([content])
    assert told.startswith("Without training the plan of mine is by")
    totals = replace(content.plan.totals, size_bytes=content.plan.totals.size_bytes + 1)
    anew = replace(content, plan=replace(content.plan, totals=totals))
    assert {"planned", "other"} & {row["plan"] for row in evaluations(anew)} == {"other"}
    assert "bits of another plan, without training" in {row[0].text for row in evaluated(anew).rows}
    assert readings([anew]) == ()
    figures = {row[0].text for row in deciding([anew]).rows}
    assert not [name for name in figures if name.startswith(("top-1 of the plan", "plan ahead"))]
    missing = [line for section in sections([anew]) for part in section.parts for line in part.missing]
    assert [line for line in missing if line.startswith("The plan was not evaluated yet")]
