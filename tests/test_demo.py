"""`qvw demo` for real: the whole path on the bundled digits, stopped in the middle and started again."""

import json
import re
import shutil

import pandas as pd
import pytest

from analysis.steps.demo import measure_demo
from quant.errors import InputError

BUDGETS = ["weight_bits", "activation_bits"]
pytestmark = pytest.mark.timeout(900)  # the first test that asks for the demo waits for it: minutes on a busy machine


@pytest.mark.parametrize(("name", "least"), [("resnet", 0.97), ("swin", 0.96)])
def test_the_models_are_trained_and_stay_usable_with_their_plan(demonstrated, name, least):
    """At least 97 and 96 % in floating point; the plan keeps its budget, stays far above chance, and training helps."""
    rows = pd.read_parquet(demonstrated / name / "verify.parquet").set_index("plan")
    assert list(rows.index) == [
        "float", "planned", "uniform", "greedy", "reverse", "random", "random-2", "random-3", "uniform-w2a2", "qat",
        "qat-w3a4", "qat-w2a2",
    ]  # fmt: skip
    destroyed = rows.loc["uniform-w2a2"]
    assert rows.loc["qat-w2a2", "top1"] > destroyed["top1"] + 0.2  # far above the accuracy without training
    assert rows.loc["qat-w2a2", "top1"] >= 0.9
    assert rows.loc["float", "top1"] >= least
    assert rows.loc["planned", "top1"] >= 0.85
    assert rows.loc[["qat", "qat-w3a4"], "top1"].min() >= least - 0.01
    assert (rows.loc[["qat", "qat-w3a4"], "loss"].to_numpy() < rows.loc[["planned", "uniform"], "loss"]).all()
    assert (rows.loc["planned", BUDGETS] <= rows.loc["uniform", BUDGETS]).all()
    assert rows.loc["uniform", "size_bytes"] < rows.loc["float", "size_bytes"] / 7  # the header has its share


@pytest.mark.parametrize("name", ["resnet", "swin"])
def test_the_plan_is_proved_beside_uniform_bits_of_its_cost(demonstrated, name):
    """Its KL is below that of the uniform bits whose budgets it has, and the page's summary says so."""
    table = pd.read_parquet(demonstrated / name / "verification.parquet").set_index("plan")
    assert table.loc["uniform", "kl_excess"] > 2 * table.loc["uniform", "kl_excess_se"]
    assert (table.loc["planned", BUDGETS] <= table.loc["uniform", BUDGETS]).all()
    page = (demonstrated / "report" / "index.html").read_text(encoding="utf-8")
    assert re.search(rf"Without training the plan of {name} is by top-1 .* by KL better than uniform bits", page)


@pytest.mark.parametrize("name", ["resnet", "swin"])
def test_every_step_left_its_tables_and_figures(demonstrated, name):
    """Statistics, single-site sensitivity at 2, 3, 4 and 8 bits of all tensors, the plan, and their figures."""
    folder = demonstrated / name
    table = pd.read_parquet(folder / "sensitivity.parquet")
    assert set(table["bit_width"]) == {2, 3, 4, 8}
    tensors = {"weight", "input"} | (
        {"weight.query", "query", "key", "value", "attention"} if name == "swin" else set()
    )
    assert tensors <= set(table["tensor"])
    assert set(table["batchnorm"]) == ({"stored", "re_estimated"} if name == "resnet" else {"none"})
    sweep = {"sensitivity.png", "sensitivity_loss.png", "sensitivity_sqnr.png", "sensitivity_ranks.png"}
    blocks = {"sensitivity_blocks.png"} if name == "swin" else set()
    assert {path.name for path in folder.glob("*.png")} == sweep | blocks | {
        "distribution.png",
        "plan.png",
        "verification.png",
    }
    steps = json.loads((folder / "run.json").read_text())["steps"]
    assert {step["status"] for step in steps.values()} == {"done"}


def test_the_two_models_are_compared(demonstrated):
    """One table with a column a model, figures over depth, and the report of both, with their trainings."""
    table = pd.read_csv(demonstrated / "report" / "comparison.csv")
    assert {"resnet", "swin", "reading"} <= set(table.columns)
    assert (demonstrated / "report" / "variation_weight.png").exists()
    assert "qat-w2a2" in (demonstrated / "report" / "index.html").read_text(encoding="utf-8")


def test_what_is_measured_is_not_measured_again(demonstrated):
    """On a folder that holds everything `measure_demo` returns the two runs and writes nothing."""
    before = {path: path.stat().st_mtime_ns for path in demonstrated.rglob("*")}
    assert measure_demo(demonstrated, quiet=True) == [demonstrated / "resnet", demonstrated / "swin"]
    assert {path: path.stat().st_mtime_ns for path in demonstrated.rglob("*")} == before


def test_what_is_missing_is_measured(demonstrated, tmp_path):
    """A table that is gone and a bit-width that was not swept are made, and come out as they were."""
    shutil.copytree(demonstrated, tmp_path / "demo")
    folder = tmp_path / "demo" / "swin"
    whole = pd.read_parquet(folder / "sensitivity.parquet")
    whole[whole["bit_width"] != 8].to_parquet(folder / "sensitivity.parquet", index=False)
    (folder / "cost.parquet").unlink()
    measure_demo(tmp_path / "demo", quiet=True)
    assert (folder / "cost.parquet").exists()
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "sensitivity.parquet"), whole)


@pytest.mark.parametrize("name", ["resnet", "swin"])
def test_the_networks_are_called_what_they_are(demonstrated, name):
    """Record, tables, plan and page name digits_resnet and digits_swin, and no network of ImageNet's size."""
    folder, called = demonstrated / name, f"digits_{name}"
    assert json.loads((folder / "run.json").read_text())["model"]["name"] == called
    assert set(pd.read_parquet(folder / "stats.parquet")["model"]) == {called}
    assert set(pd.read_parquet(folder / "sensitivity.parquet")["model"]) == {called}
    assert json.loads((folder / "plan.json").read_text())["model"]["name"].endswith(f":{called}")
    page = (demonstrated / "report" / "index.html").read_text(encoding="utf-8")
    assert called in page
    assert not re.search("resnet18|swin_tiny", page)


def test_a_folder_of_another_network_is_refused(tmp_path):
    """What an earlier version left under other names is not mixed with what this one makes, and nothing is trained."""
    record = {"typed": "resnet18", "name": "resnet18", "weights_sha256": "0", "parameters": 1}
    (tmp_path / "resnet").mkdir()
    (tmp_path / "resnet" / "run.json").write_text(json.dumps({"model": record}))
    with pytest.raises(InputError, match="holds results of resnet18"):
        measure_demo(tmp_path, quiet=True)
    assert [path.name for path in tmp_path.rglob("*.*")] == ["run.json"]
