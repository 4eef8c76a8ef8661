"""`qvw plan` as a person uses it: budgets, objectives, exceptions, and the proof by measurement."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest

from analysis.planning.interactions import SHARE
from analysis.runs import Run
from analysis.steps import verify_step as verify_step
from quant.bit_plan import BitPlan
from tests.digits_vit import DATA, MODEL, qvw


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A run folder after a sweep with proxies."""
    run = tmp_path_factory.mktemp("plans") / "vit"
    options = ["--images", 64, "--bits", "2,3,4,8", "--proxies"]
    assert qvw("sensitivity", *MODEL, *DATA, *options, "--run", run) == 0
    return run


@pytest.fixture
def run(swept, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(swept, tmp_path / "run")


def plan_of(run):
    """The plan file of a run, and its bits by site."""
    plan = json.loads((run / "plan.json").read_text())
    return plan, {(s["module"], s["tensor"]): s["bit_width"] for s in plan["sites"]}


def test_like_uniform_bits_gives_their_budget(run):
    """The mean bits of uniform w3a4 in the layout, its 8-bit layers counted, are what the plan may spend."""
    assert qvw("plan", "--run", run, "--like", "w3a4") == 0
    plan, bits = plan_of(run)
    cost = pd.read_parquet(run / "cost.parquet").set_index(["module", "tensor"])
    numel = {site: int(cost.loc[site, "numel"]) for site in bits}
    pinned = {site: bool(cost.loc[site, "pinned"]) for site in bits}
    for name, weights, width in (("weight_bits", True, 3), ("activation_bits", False, 4)):
        sites = [site for site in bits if site[1].startswith("weight") == weights]
        uniform = sum((8 if pinned[site] else width) * numel[site] for site in sites)
        assert plan["budget"][name] == uniform / sum(numel[site] for site in sites)
        assert plan["totals"][name] <= plan["budget"][name]


def test_query_key_and_value_can_be_tied(run):
    """In each attention the three parts of the weight share their bits, and so do the three tensors."""
    assert qvw("plan", "--run", run, "--weight-bits", 3.3, "--activation-bits", 4.2, "--tie", "qkv") == 0
    _, bits = plan_of(run)
    for block in range(2):
        attention = f"blocks.{block}.attn"
        assert len({bits[f"{attention}.qkv", f"weight.{part}"] for part in ("query", "key", "value")}) == 1
        assert len({bits[attention, part] for part in ("query", "key", "value")}) == 1


def test_bounds_and_candidates_of_a_kind_are_kept(run):
    """Limits per module and bit-widths per kind; the layout's pins stay."""
    arguments = ["--weight-bits", 4, "--bounds", "blocks.0.*=3-4", "--candidates-of", "mlp.fc2=4,8"]
    assert qvw("plan", "--run", run, *arguments) == 0
    _, bits = plan_of(run)
    assert {b for (module, _), b in bits.items() if module.startswith("blocks.0.")} <= {3, 4}
    assert bits["blocks.0.mlp.fc2", "weight"] == 4
    assert bits["blocks.1.mlp.fc2", "weight"] in (4, 8)
    assert bits["head", "weight"] == 8


def test_a_proxy_or_own_scores_can_be_minimised(run, tmp_path, capfd):
    """The plan names what it minimised; scores that are the measured KL give the plan of the measured KL."""
    assert qvw("plan", "--run", run, "--weight-bits", 3.5, "--objective", "fisher") == 0
    assert plan_of(run)[0]["solver"]["objective"] == "fisher"
    assert qvw("plan", "--run", run, "--weight-bits", 3.5) == 0
    _, by_kl = plan_of(run)
    rows = pd.read_parquet(run / "sensitivity.parquet")
    mine = tmp_path / "mine.csv"
    rows.drop(columns="score").rename(columns={"kl": "score"})[["module", "tensor", "bit_width", "score"]].to_csv(
        mine, index=False
    )
    assert qvw("plan", "--run", run, "--weight-bits", 3.5, "--scores", mine) == 0
    plan, bits = plan_of(run)
    assert plan["solver"]["objective"] == "scores of mine.csv"
    assert bits == by_kl
    assert qvw("plan", "--run", run, "--weight-bits", 3.5, "--robust") == 0
    assert plan_of(run)[0]["solver"]["objective"] == "kl, upper 95 % bound"
    capfd.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bounds", "blocks.0.*=5"], "write PATTERN=LOW-HIGH"),
        (["--bounds", "nothing*=2-4"], "matches no measured site"),
        (["--bounds", "blocks.0.*=5-7"], "no bit-width of blocks.0.attn.qkv:.* is left"),
        (["--candidates-of", "mlp.fc2=4;8"], "write KIND=BITS"),
        (["--candidates-of", "mlp.fc9=4"], "The kinds are patch_embed, .*mlp.fc1, mlp.fc2"),
        (["--bounds", "head=8-4"], "write the lower bits first"),
        (["--like", "w3"], "write w4a4"),
        (["--like", "w3a4"], "leave out"),
        (["--objective", "speed"], "choose from"),
        (["--scores", "none.csv"], "cannot be read"),
        (["--interactions", "--pareto"], "--pareto is of the sum over sites"),
        (["--interactions", "--objective", "loss"], "interactions are in"),
        (["--scores", "none.csv", "--objective", "loss"], "--scores takes the place of --objective"),
    ],
)
def test_a_wrong_request_is_told(run, arguments, message, capfd):
    """Exit code 2, one message, and no plan file."""
    budget = [] if arguments in (["--like", "w3"],) else ["--weight-bits", 3.5]
    assert qvw("plan", "--run", run, *budget, *arguments) == 2
    error = capfd.readouterr().err
    assert re.search(message, error), error
    assert len(error.strip().splitlines()) <= 2
    assert not (run / "plan.json").exists()


def test_verify_measures_every_plan_at_the_budget(run, capfd):
    """Rows of verify.parquet within the budget; predictions are sums of the sweep; the paired difference is exact."""
    arguments = ["--like", "w3a4", "--verify", "--images", 90, "--num-workers", 0]
    assert qvw("plan", "--run", run, *arguments) == 0
    out = capfd.readouterr().out
    assert "planned_ahead" in out
    plan, _ = plan_of(run)
    verify, table = pd.read_parquet(run / "verify.parquet"), pd.read_parquet(run / "verification.parquet")
    assert set(verify["plan"]) == {"float", "planned", "uniform", "greedy", "reverse", "random", "random-2", "random-3"}
    assert table["plan"].tolist() == ["planned", "uniform", "greedy", "reverse", "random", "random", "random"]
    assert (verify["images"] == 90).all()
    for name in ("weight_bits", "activation_bits"):
        assert (table[name] <= plan["budget"][name] + 1e-12).all()
    rows = pd.read_parquet(run / "sensitivity.parquet").set_index(["module", "tensor", "bit_width"])
    sites = [(s["module"], s["tensor"], s["bit_width"]) for s in plan["sites"]]
    assert table["predicted_kl"].iloc[0] == pytest.approx(rows.loc[sites, "kl"].sum())
    assert table["planned_ahead"].to_numpy() == pytest.approx(table["top1"].iloc[0] - table["top1"].to_numpy())
    assert np.isfinite(table["measured_kl"]).all()
    capfd.readouterr()
    assert qvw("plan", "--run", run, "--like", "w3a4") == 0
    assert "is of an earlier plan" not in capfd.readouterr().err
    assert qvw("plan", "--run", run, "--weight-bits", 2.7) == 0
    assert "verification.parquet is of an earlier plan" in capfd.readouterr().err


def test_another_plan_leaves_the_run_s_own_alone(run, capfd):
    """--out FILE.json with front and verification: own tables in plan-FILE/, own steps; plan.json's stay."""
    assert qvw("plan", "--run", run, "--like", "w3a4", "--verify", "--images", 20, "--num-workers", 0) == 0
    before = {name: (run / name).read_bytes() for name in ("plan.json", "plan.csv", "verification.parquet")}
    steps = json.loads((run / "run.json").read_text())["steps"]
    capfd.readouterr()
    arguments = ["--weight-bits", 2.7, "--out", run / "small.json"]
    assert qvw("plan", "--run", run, *arguments) == 0
    assert "earlier plan" not in capfd.readouterr().err
    assert qvw("plan", "--run", run, *arguments, "--pareto", "--verify", "--images", 20, "--num-workers", 0) == 0
    assert {name: (run / name).read_bytes() for name in before} == before
    now = json.loads((run / "run.json").read_text())["steps"]
    assert {name: now[name] for name in steps} == steps
    assert set(now) - set(steps) == {"plan-small", "verify-small"}
    small = BitPlan.from_json((run / "small.json").read_text(), source="small.json")
    for name in ("verification", "pareto"):
        table = pd.read_parquet(run / "plan-small" / f"{name}.parquet")
        assert table["plan_sha256"].iloc[0] == small.sha256
        assert (run / "plan-small" / f"{name}.png").exists()
    assert not (run / "pareto.parquet").exists()


def test_uniform_bits_need_no_sweep(run, capfd):
    """3 bits between 2 and 8 were not measured: --like still takes them, and the verification compares with them."""
    table = pd.read_parquet(run / "sensitivity.parquet")
    table[table["bit_width"] != 3].to_parquet(run / "sensitivity.parquet", index=False)
    assert qvw("plan", "--run", run, "--like", "w3a8", "--verify", "--images", 20, "--num-workers", 0) == 0
    assert "uniform is w3a8 and takes 100 % of the budget of" in capfd.readouterr().out
    rows = pd.read_parquet(run / "verification.parquet").set_index("plan")
    assert np.isnan(rows.loc["uniform", "predicted_kl"])
    assert np.isfinite(rows.loc["uniform", "measured_kl"])


def test_a_budget_that_binds_nothing_is_told(run, capfd):
    """400 million GBitOps and 2 bits: the one is kept by the most bits, the other is not; neither is an error."""
    assert qvw("plan", "--run", run, "--gbitops", 4e8, "--weight-bits", 2.7) == 0
    error = capfd.readouterr().err
    assert "the budget of 4e+08 GBitOps binds nothing" in error
    assert "mean weight bits binds nothing" not in error


def test_scores_of_the_wrong_sign_are_told(run, tmp_path, capfd):
    """More bits raise nearly every score: the plan is made, and the sign questioned."""
    table = pd.read_parquet(run / "sensitivity.parquet")
    reversed_ = table.groupby(["module", "tensor", "bit_width"], as_index=False)["kl"].first()
    reversed_.assign(score=-reversed_["kl"]).to_csv(tmp_path / "mine.csv", index=False)
    assert qvw("plan", "--run", run, "--weight-bits", 3, "--scores", tmp_path / "mine.csv") == 0
    assert "Is the sign reversed" in capfd.readouterr().err


def test_interactions_are_counted_and_compared_with_the_sum_alone(run):
    """The plan's value is no larger than that of the plan of the sum, whose row stands beside it."""
    budget = ["--weight-bits", 3.2, "--activation-bits", 3.9]
    assert qvw("plan", "--run", run, *budget) == 0
    alone, bits = plan_of(run)
    assert qvw("plan", "--run", run, *budget, "--interactions", "--verify", "--images", 20, "--num-workers", 0) == 0
    plan, others = plan_of(run)
    assert plan["solver"] == {"name": "highs", "status": "local_search", "gap": None, "lower_bound": None,
                              "objective": "kl, with interactions"}  # fmt: skip
    for name, limit in plan["budget"].items():
        assert plan["totals"][name] <= limit
    products = {
        (row.module, row.tensor, row.bit_width): row.products
        for row in pd.read_parquet(run / "proxy_images.parquet").itertuples()
    }
    scores = pd.read_parquet(run / "sensitivity.parquet").set_index(["module", "tensor", "bit_width"])["kl"]

    def value(chosen):
        keys = [(*site, width) for site, width in chosen.items()]
        table = np.array([products[key] for key in keys], dtype=float)
        alone = scores[keys].clip(lower=0).to_numpy()
        table *= np.sqrt(2 * alone / np.mean(table**2, axis=1))[:, None]
        return alone.sum() + SHARE * (np.mean(table.sum(axis=0) ** 2) / 2 - alone.sum())

    assert value(others) <= value(bits) + 1e-5  # scores were evened out
    table = pd.read_parquet(run / "verification.parquet")
    assert table["plan"].tolist()[:2] == ["planned", "additive"]
    assert table["predicted_kl"].iloc[1] == pytest.approx(scores[[(*s, b) for s, b in bits.items()]].sum())
    assert alone["totals"]["weight_bits"] == pytest.approx(table["weight_bits"].iloc[1])
    assert table["predicted_kl_pairs"].iloc[:2].tolist() == pytest.approx([value(others), value(bits)], rel=1e-3)


def test_interactions_need_products_of_this_treatment_of_batchnorm(run, capfd):
    """Products of stored statistics say nothing of re-estimated ones; without products the step to make is named."""
    rows = pd.read_parquet(run / "sensitivity.parquet")
    rows.assign(batchnorm="re_estimated").to_parquet(run / "sensitivity.parquet")
    assert qvw("plan", "--run", run, "--weight-bits", 3.5, "--interactions") == 2
    assert "know nothing of re-estimated BatchNorm" in capfd.readouterr().err
    rows.to_parquet(run / "sensitivity.parquet")
    (run / "proxy_images.parquet").unlink()
    assert qvw("plan", "--run", run, "--weight-bits", 3.5, "--interactions") == 2
    assert "--proxies" in capfd.readouterr().err


def test_a_verification_goes_on_where_it_was_interrupted(run, monkeypatch, capfd):
    """The plans that were measured are not measured again, the table is that of an uninterrupted one."""
    arguments = ["plan", "--run", run, "--like", "w3a4", "--verify", "--images", 40, "--num-workers", 0]
    measure, calls = verify_step._measured, []

    def stop_at_the_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(verify_step, "_measured", stop_at_the_third)
    assert qvw(*arguments) == 130
    assert Run(run).record.steps["verify"].status == "interrupted"
    interrupted = len(calls)
    assert qvw(*arguments) == 0
    table = pd.read_parquet(run / "verification.parquet")
    assert not (run / "verification.partial.jsonl").exists()
    again = len(calls) - interrupted
    calls.clear()
    calls.extend([None] * 3)
    assert qvw(*arguments) == 0
    assert len(calls) - 3 == again + interrupted - 1
    pd.testing.assert_frame_equal(pd.read_parquet(run / "verification.parquet"), table)


def test_a_verification_needs_the_images_of_the_sweep(run, capfd):
    """Predicted and measured changes of different images would not be comparable."""
    record = Run(run).read_json("run")
    record["steps"]["sensitivity"]["inputs"]["images_sha256"] = "0" * 64
    Run(run).write_json("run", record)
    assert qvw("plan", "--run", run, "--like", "w3a4", "--verify", "--images", 40, "--num-workers", 0) == 2
    assert "does not hold the images of the sweep any more" in capfd.readouterr().err


def test_the_measured_kl_of_a_plan_is_that_of_the_quantized_network(run):
    """A plan of one site alone is the row of the sweep: same images, same quantizer."""
    rows = pd.read_parquet(run / "sensitivity.parquet")
    site = rows[(rows["module"] == "blocks.1.mlp.fc1") & (rows["tensor"] == "weight")]
    mine = run / "mine.csv"
    site.drop(columns="score").rename(columns={"kl": "score"})[["module", "tensor", "bit_width", "score"]].to_csv(
        mine, index=False
    )
    arguments = ["--weight-bits", 3, "--scores", mine, "--verify", "--images", 20, "--num-workers", 0]
    assert qvw("plan", "--run", run, *arguments) == 0
    table = pd.read_parquet(run / "verification.parquet").iloc[0]
    assert table["weight_bits"] == 3
    assert table["measured_kl"] == pytest.approx(table["predicted_kl"], rel=1e-5)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("sensitivity.parquet", "end it with .json"),
        ("plan.csv", "end it with .json"),
        ("sensitivity.json", "would replace sensitivity.png"),
        ("run.json", "would replace run.json"),
    ],
)
def test_a_plan_replaces_nothing_of_the_run(run, out, message, capfd):
    """Neither the table nor a figure of another step, nor the record; the files stay as they were."""
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert qvw("plan", "--run", run, "--weight-bits", 3.5, "--out", run / out) == 2
    assert message in capfd.readouterr().err
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_plan_goes_into_no_other_run_and_over_no_other_file(run, tmp_path, capfd):
    """A run folder of its own, and a JSON file that is no plan, are left alone."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "run.json").write_text("{}")
    assert qvw("plan", "--run", run, "--weight-bits", 3.5, "--out", other / "plan.json") == 2
    assert "run folder of another" in capfd.readouterr().err
    (tmp_path / "mine.json").write_text("{}")
    assert qvw("plan", "--run", run, "--weight-bits", 3.5, "--out", tmp_path / "mine.json") == 2
    assert (tmp_path / "mine.json").read_text() == "{}"
    assert qvw("plan", "--run", run, "--weight-bits", 3.5, "--out", tmp_path / "new.json") == 0
    assert (tmp_path / "new.csv").exists()


def test_bounds_beside_pins(run, capfd):
    """The layout's pins stay, with a warning; a pin of the user's outside the bounds is refused."""
    assert qvw("plan", "--run", run, "--weight-bits", 4, "--bounds", "head*=2-4") == 0
    assert re.search("head:(weight|input) keeps the 8 bits of the layout", capfd.readouterr().err)
    pin = ["--pin", "blocks.0.mlp.fc1=2", "--bounds", "blocks.0.*=4-8"]
    assert qvw("plan", "--run", run, "--weight-bits", 4, *pin) == 2
    assert "no bit-width of blocks.0.mlp.fc1:" in capfd.readouterr().err
    assert qvw("plan", "--run", run, "--weight-bits", 4, "--candidates", "3", "--bounds", "blocks.*=4-8") == 2


def test_scores_of_some_sites_alone_are_told(run, tmp_path, capfd):
    """What has no score stays in floating point, and a warning says so; unmeasured bit-widths have no prediction."""
    rows = pd.read_parquet(run / "sensitivity.parquet")
    rows = rows[rows["module"] != "blocks.1.mlp.fc2"].replace({"bit_width": {3: 5}})
    mine = tmp_path / "mine.csv"
    rows.drop(columns="score").rename(columns={"kl": "score"})[["module", "tensor", "bit_width", "score"]].to_csv(
        mine, index=False
    )
    arguments = ["--weight-bits", 5.3, "--scores", mine, "--verify", "--images", 20, "--num-workers", 0]
    assert qvw("plan", "--run", run, *arguments) == 0
    assert "2 measured sites have no score and stay in floating point" in capfd.readouterr().err
    table = pd.read_parquet(run / "verification.parquet")
    assert table["predicted_kl"].isna().any()
    assert table["measured_kl"].notna().all()
