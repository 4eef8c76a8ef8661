"""A plan is a file to be edited: bits count, totals follow, and rows of several plans have names of their own."""

import json
import shutil

import pandas as pd
import pytest

from quant.bit_plan import BitPlan
from tests.digits_vit import qvw

MODEL = ["vit_tiny_patch16_224", "--model-kwargs",
         '{"img_size": 32, "patch_size": 8, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2, '
         '"num_classes": 10}']  # fmt: skip
DATA = ["--data", "digits", "--num-workers", "0"]
SHORT = ["--images", "16", "--num-workers", "0", "--calibration-images", "16", "--quiet"]


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A run folder with a plan; tests copy before they change."""
    run = tmp_path_factory.mktemp("edited") / "run"
    assert qvw("sensitivity", *MODEL, *DATA, "--images", 16, "--bits", "2,8", "--run", run, "--quiet") == 0
    assert qvw("plan", "--run", run, "--weight-bits", 6, "--activation-bits", 6, "--quiet") == 0
    return run


@pytest.fixture
def run(planned, tmp_path):
    """A run folder that a test may change."""
    return shutil.copytree(planned, tmp_path / "run")


def edited(run, name, change):
    """A copy of the plan after `change`."""
    content = json.loads((run / "plan.json").read_text())
    change(content)
    path = run.parent / name
    path.write_text(json.dumps(content))
    return path


def flip(content, site=3):
    """Give one site the other bit-width."""
    content["sites"][site]["bit_width"] = 10 - content["sites"][site]["bit_width"]


def test_totals_are_those_of_the_sites_whatever_the_file_says(run, capfd):
    """Stale, left out or right: the row's costs are those of a plan that was made with these bits."""
    stale = edited(run, "stale.json", flip)

    def without(content):
        flip(content)
        for name in ("totals", "predicted_delta_loss", "solver"):
            del content[name]

    bare = edited(run, "bare.json", without)
    for path in (stale, bare):
        assert qvw("eval", "--run", run, "--plan", path, *SHORT) == 0
        assert "was edited" in capfd.readouterr().err
    rows = pd.read_parquet(run / "verify.parquet").set_index("plan")
    assert list(rows.index) == ["plan-stale", "plan-bare"]
    costs = ["weight_bits", "activation_bits", "size_bytes", "bitops", "loss"]
    assert rows.loc["plan-stale", costs].equals(rows.loc["plan-bare", costs])
    assert rows["weight_bits"].iloc[0] != json.loads((run / "plan.json").read_text())["totals"]["weight_bits"]
    assert qvw("eval", "--run", run, "--plan", run / "plan.json", *SHORT) == 0
    assert "edited" not in capfd.readouterr().err


def test_an_edited_plan_is_trained(run, capfd):
    """The trained model's own plan has the totals of its sites."""
    path = edited(run, "mine.json", flip)
    settings = ["--set", "steps=1", "--set", "batch_size=8", "--set", "calibration_images=16", "--val-images", "16"]
    assert qvw("train", "--run", run, "--plan", path, "--images", 16, "--num-workers", 0, *settings, "--quiet") == 0
    trained = BitPlan.load(run / "qat" / "plan.json")
    assert trained.bits == BitPlan.load(path).bits
    assert trained.predicted_delta_loss is None
    assert trained.totals.weight_bits != json.loads(path.read_text())["totals"]["weight_bits"]
    assert qvw("export", "--run", run, "--out", run / "edited.safetensors") == 0
    assert trained.totals.size_bytes == (run / "edited.safetensors").stat().st_size


def test_a_stale_plan_of_other_weights_is_refused(run, capfd):
    """It may be of other shapes or heads; without totals its bits are used, with a warning."""

    def other(content):
        flip(content)
        content["model"]["weights_sha256"] = "0" * 64

    assert qvw("eval", "--run", run, "--plan", edited(run, "other.json", other), *SHORT) == 2
    assert "other shapes or heads" in capfd.readouterr().err
    assert qvw("eval", "--run", run, "--plan", edited(run, "bare.json", lambda c: (other(c), c.pop("totals"))),
               *SHORT) == 0  # fmt: skip
    assert "other weights" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["sites"][2].update(bit_width=9), ["sites.2", "bit"]),
        (lambda c: c["sites"][2].update(module="blocks.0.mpl.fc1"), ["blocks.0.mpl.fc1", "nearest"]),
        (lambda c: c["sites"].append(c["sites"][0]), ["named twice"]),
        (lambda c: c["sites"][2].update(bits=4), ["sites.2", "bits"]),
    ],
)
def test_a_slip_is_named(run, change, words, capfd):
    """Another bit-width, module or key: the message says which entry."""
    assert qvw("eval", "--run", run, "--plan", edited(run, "slip.json", change), *SHORT) == 2
    error = capfd.readouterr().err
    assert all(word in error for word in words)


def test_no_two_rows_share_a_name(run):
    """Plans, uniform bits and treatments, evaluated in any order; a plan made later takes the name `planned`."""
    for what in (["--plan", run / "plan.json"], ["--uniform", "w4a4"], ["--uniform", "w2a8"],
                 ["--plan", run / "plan.json", "--estimator", "minmax"], ["--float"]):  # fmt: skip
        assert qvw("eval", "--run", run, *what, *SHORT) == 0
    assert qvw("plan", "--run", run, "--weight-bits", 7, "--activation-bits", 5, "--quiet") == 0
    assert qvw("eval", "--run", run, "--plan", run / "plan.json", *SHORT) == 0
    assert qvw("eval", "--run", run, "--uniform", "w2a8", *SHORT) == 0
    rows = pd.read_parquet(run / "verify.parquet")
    assert list(rows["plan"]) == [
        "earlier-planned", "uniform", "uniform-w2a8", "earlier-planned-minmax", "float", "planned"
    ]  # fmt: skip
    new = BitPlan.load(run / "plan.json").totals
    assert rows.set_index("plan").loc["planned", "bitops"] == new.bitops


def test_plan_diff_and_report_count_an_edited_plan(run, capfd):
    """In the run folder itself: totals beside each other and on the page are those of the bits."""
    before = BitPlan.load(run / "plan.json")
    shutil.copy(run / "plan.json", run.parent / "before.json")
    (run / "plan.json").write_text(edited(run, "edited.json", flip).read_text())
    capfd.readouterr()
    assert qvw("plan-diff", run.parent / "before.json", run) == 0
    shown = capfd.readouterr()
    assert "was edited" in shown.err
    line = next(text for text in shown.out.splitlines() if "mean weight bits" in text)
    assert float(line.split()[-1]) != 0
    assert f"{before.totals.weight_bits:.4g}"[:4] in line
    assert qvw("report", run, "--out", run.parent / "page", "--quiet") == 0
    assert "was edited" in (run.parent / "page" / "index.html").read_text()
