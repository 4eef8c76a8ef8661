"""`qvw demo` for real: the whole path on the bundled digits, stopped in the middle and started again."""

import json

import pandas as pd
import pytest

from analysis import demo
from analysis.plan_step import run_plan


@pytest.fixture(scope="module")
def demonstrated(tmp_path_factory):
    """The demo's folder after an interruption before the second model's plan, and a second start."""
    folder = tmp_path_factory.mktemp("demo")
    calls = []

    def stopped(path, request):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        run_plan(path, request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "run_plan", stopped)
        with pytest.raises(KeyboardInterrupt):
            demo.run_demo(folder, quiet=True)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/weights.safetensors")}
    assert len(before) == 2
    demo.run_demo(folder, quiet=True)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # trained once
    return folder


@pytest.mark.parametrize(("name", "least"), [("resnet", 0.97), ("swin", 0.96)])
def test_the_models_are_trained_and_stay_usable_with_their_plan(demonstrated, name, least):
    """At least 97 and 96 % in floating point; the plan keeps its budget and stays far above chance."""
    rows = pd.read_parquet(demonstrated / name / "verify.parquet").set_index("plan")
    assert set(rows.index) == {"float", "planned", "uniform"}
    assert rows.loc["float", "top1"] >= least
    assert rows.loc["planned", "top1"] >= 0.85
    assert rows.loc["planned", "weight_bits"] <= 3
    assert rows.loc["planned", "activation_bits"] <= 4
    assert rows.loc["planned", "size_bytes"] < rows.loc["uniform", "size_bytes"] < rows.loc["float", "size_bytes"] / 8


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
    assert {path.name for path in folder.glob("*.png")} == {"sensitivity.png", "distribution.png", "plan.png"}
    steps = json.loads((folder / "run.json").read_text())["steps"]
    assert {step["status"] for step in steps.values()} == {"done"}


def test_the_two_models_are_compared(demonstrated):
    """One table with a column a model, and figures over depth."""
    table = pd.read_csv(demonstrated / "compare" / "comparison.csv")
    assert {"resnet", "swin", "reading"} <= set(table.columns)
    assert (demonstrated / "compare" / "variation_weight.png").exists()
