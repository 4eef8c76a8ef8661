"""`qvw` as a person uses it: the whole path on bundled digits, wrong input, interruptions."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import jsonschema
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from analysis.cli import main
from analysis.storage.files import RowLog

ROOT = Path(__file__).parents[1]
KWARGS = json.dumps(
    {"layers": [1, 1, 1, 1], "num_classes": 10, "in_chans": 1, "stem_width": 8, "channels": [8, 8, 16, 16],
     "zero_init_last": False}
)  # fmt: skip
VIT_KWARGS = json.dumps(
    {"img_size": 32, "patch_size": 8, "in_chans": 1, "num_classes": 10, "embed_dim": 32, "depth": 2, "num_heads": 4}
)
MODEL = ["resnet18", "--model-kwargs", KWARGS]
DATA = ["--data", "digits", "--num-workers", "0", "--batch-size", "32"]
SWEEP = ["--images", "48", "--bits", "2,8", "--bn", "stored"]


# Python 3.12 and newer warn where a process with threads forks, as torch's loader does.
forks = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")


def qvw(*arguments):
    """Exit code of a command, as the shell would see it."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run folders of a ResNet and a ViT after stats, sensitivity and plan; tests copy before they change."""
    root = tmp_path_factory.mktemp("runs with a space")
    for name, model in (("resnet", MODEL), ("vit", ["vit_tiny_patch16_224", "--model-kwargs", VIT_KWARGS])):
        run = ["--run", root / name]
        assert qvw("stats", *model, *DATA, *run, "--images", 64) == 0
        assert qvw("sensitivity", *run, *DATA[2:], *SWEEP) == 0
        assert qvw("plan", *run, "--weight-bits", 4, "--activation-bits", 5) == 0
    return root


@pytest.fixture
def run(finished, tmp_path):
    """A run folder of the ResNet that a test may change."""
    return shutil.copytree(finished / "resnet", tmp_path / "run")


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_the_path_leaves_the_tables_of_the_design(finished, name):
    """Every file of the run folder is there, the figures too, and run.json knows how each step was made."""
    folder = finished / name
    for file in ("stats", "channels", "histograms", "sensitivity", "cost"):
        assert len(pd.read_parquet(folder / f"{file}.parquet"))
    for figure in ("distribution", "sensitivity", "plan"):
        assert (folder / f"{figure}.png").stat().st_size > 5000
    record = json.loads((folder / "run.json").read_text())
    assert {name: step["status"] for name, step in record["steps"].items()} == {
        "stats": "done", "sensitivity": "done", "plan": "done",
    }  # fmt: skip
    for step in (record["steps"][name] for name in ("stats", "sensitivity")):
        assert {"command", "options", "inputs", "seed", "versions", "device", "git_commit"} <= set(step)
        assert len(step["inputs"]["images_sha256"]) == 64
    assert record["model"]["typed"] == ("resnet18" if name == "resnet" else "vit_tiny_patch16_224")
    assert len(record["model"]["weights_sha256"]) == 64


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_the_plan_passes_its_schema_and_keeps_its_budgets(finished, name):
    """The file is valid, its totals are within the budget, first layer and classifier have 8 bits."""
    plan = json.loads((finished / name / "plan.json").read_text())
    jsonschema.validate(plan, json.loads((files("quant") / "bit_plan.schema.json").read_text()))
    assert plan["totals"]["weight_bits"] <= 4
    assert plan["totals"]["activation_bits"] <= 5
    assert plan["solver"]["status"] == "optimal"
    ends = {"conv1", "fc", "patch_embed.proj", "head"}
    assert {site["bit_width"] for site in plan["sites"] if site["module"] in ends} == {8}
    assert {site["bit_width"] for site in plan["sites"] if site["module"] not in ends} == {2, 8}


def test_eval_measures_float_plan_and_uniform(run, capsys):
    """Three rows of one accounting; 16 bits everywhere is next to the floating-point model."""
    common = ["--run", run, "--images", 90, *DATA[2:], "--calibration-images", 64]
    assert qvw("eval", *common, "--float") == 0
    assert qvw("eval", *common, "--plan", run / "plan.json") == 0
    assert qvw("eval", *common, "--uniform", "w16a16", "--layout", "strict", "--bn", "stored") == 0
    rows = pd.read_parquet(run / "verify.parquet").set_index("plan")
    assert list(rows.index) == ["float", "planned", "uniform"]
    assert rows.loc["float", "weight_bits"] == 32
    totals = json.loads((run / "plan.json").read_text())["totals"]
    for name in ("weight_bits", "activation_bits", "size_bytes", "bitops"):
        assert rows.loc["planned", name] == totals[name]
    assert rows.loc["uniform", "loss"] == pytest.approx(rows.loc["float", "loss"], abs=1e-3)
    assert "verify.parquet" in capsys.readouterr().out


def test_compare_writes_a_table_and_figures(finished, tmp_path):
    """A row a measure with a column a model and a sentence; figures as PNG and SVG."""
    out = tmp_path / "compared"
    assert qvw("compare", finished / "resnet", finished / "vit", "--out", out) == 0
    table = pd.read_csv(out / "comparison.csv")
    assert list(table.columns) == ["tensor", "measure", "resnet", "vit", "reading"]
    assert table["reading"].str.len().min() > 10
    figures = {"variation_weight.png", "variation_input.svg", "variation_weight.csv"}
    assert {path.name for path in out.iterdir()} >= figures


def test_compare_takes_runs_of_weights_only(finished, tmp_path):
    """A run without images has no activations: their measures are empty, the weights' are compared."""
    assert qvw("stats", *MODEL, "--run", tmp_path / "weights") == 0
    out = tmp_path / "compared"
    assert qvw("compare", tmp_path / "weights", finished / "vit", "--out", out) == 0
    table = pd.read_csv(out / "comparison.csv").set_index(["tensor", "measure"])
    assert table.loc[("weight", "sdam"), "weights"] > 0
    assert pd.isna(table.loc[("input", "sdam"), "weights"])
    assert qvw("compare", tmp_path / "weights", tmp_path / "weights", "--out", tmp_path / "same") == 0


def test_a_step_repeated_takes_the_images_it_took_before(run):
    """`qvw stats --run RUN` again, without --images, is the same step, and finds itself done."""
    assert qvw("stats", "--run", run, *DATA[2:]) == 0
    assert json.loads((run / "run.json").read_text())["steps"]["stats"]["inputs"]["images"] == 64


def test_excluded_modules_stay_excluded_in_every_later_step(tmp_path):
    """Patterns of the first command hold for sensitivity, plan and uniform bits, also after the plan."""
    run = ["--run", tmp_path / "run"]
    assert qvw("stats", *MODEL, *DATA, *run, "--images", 32, "--exclude", "*downsample*") == 0
    assert (
        qvw("sensitivity", *run, *DATA[2:], "--images", 32, "--bits", "8", "--bn", "stored", "--tensors", "weight") == 0
    )
    assert qvw("plan", *run, "--weight-bits", 8) == 0
    common = [*run, *DATA[2:], "--images", 32, "--calibration-images", 32]
    for choice in (["--plan", tmp_path / "run" / "plan.json"], ["--uniform", "w8a16"]):
        assert qvw("eval", *common, *choice) == 0
    assert not pd.read_parquet(tmp_path / "run" / "sensitivity.parquet")["module"].str.contains("downsample").any()
    rows = pd.read_parquet(tmp_path / "run" / "verify.parquet")
    # The uniform row has besides the scales of the inputs, two numbers at most for each of some twenty, with names.
    assert 0 < rows["size_bytes"].iloc[1] - rows["size_bytes"].iloc[0] <= 20 * 2 * (4 + 100)


def test_a_factory_of_ones_own_with_weights(finished, tmp_path):
    """A function in a file and a safetensors file give the run of the same timm model; images as a CSV list."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    names = []
    for i in range(60):
        names.append(f"{i}.png")
        Image.fromarray((digits.images[i] * 15.9).astype("uint8")).resize((32, 32)).save(tmp_path / names[-1])
    pd.DataFrame({"file": names, "class_index": digits.target[:60]}).to_csv(tmp_path / "list.csv", index=False)
    factory = tmp_path / "mine.py"
    factory.write_text(
        f"import json, timm\ndef build():\n    return timm.create_model('resnet18', **json.loads('{KWARGS}'))\n"
    )
    from analysis.models import ModelSource, load_model

    source = load_model(ModelSource(model="resnet18", kwargs=json.loads(KWARGS), seed=5))
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    arguments = [f"{factory}:build", "--weights", tmp_path / "w.safetensors", "--data", f"csv:{tmp_path / 'list.csv'}",
                 "--mean", "0.5", "--std", "0.5", "--input-size", "1,32,32", "--num-workers", 0]  # fmt: skip
    assert qvw("stats", *arguments, "--run", tmp_path / "r") == 0
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    assert record["model"]["factory"] == f"{factory}:build"
    assert record["steps"]["stats"]["inputs"]["images"] == 30
    assert "holdout" in record["steps"]["stats"]["inputs"]["split_note"]
    assert qvw("eval", "--run", tmp_path / "r", "--float", "--num-workers", 0) == 0


def broken_weights(tmp_path, change):
    """A weights file of the small ResNet with one thing wrong."""
    from analysis.models import ModelSource, load_model

    state = load_model(ModelSource(model="resnet18", kwargs=json.loads(KWARGS))).state_dict()
    path = tmp_path / "weights.safetensors"
    if change == "nan":
        state["layer1.0.conv2.weight"][0, 0, 0, 0] = float("nan")
    elif change == "shape":
        state["layer3.0.conv1.weight"] = state["layer3.0.conv1.weight"][:4].clone()
    save_file(state, path)
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    assert change == "cut" or load_file(path)
    return path


GREY = ["--mean", "0.5", "--std", "0.5"]
WRONG = {
    "unknown model": (["stats", "resnet81", "--run", "RUN"], "no model 'resnet81'.*resnet1?8"),
    "missing factory file": (["stats", "nowhere.py:build", "--run", "RUN"], "no file nowhere.py"),
    "no such function": (["stats", f"{ROOT / 'tests' / 'conftest.py'}:build", "--run", "RUN"], "no function 'build'"),
    "weights with NaN": (["stats", *MODEL, "--weights", "nan", "--run", "RUN"], "layer1.0.conv2.weight"),
    "weights of another shape": (["stats", *MODEL, "--weights", "shape", "--run", "RUN"],
                                 r"layer3.0.conv1.weight.*\(4, 8, 3, 3\).*\(16, 8, 3, 3\)"),
    "weights cut short": (["stats", *MODEL, "--weights", "cut", "--run", "RUN"], "weights.safetensors"),
    "empty data folder": (["stats", *MODEL, *GREY, "--data", "folder:EMPTY", "--run", "RUN"],
                          "EMPTY has no class folders with images"),
    "unknown data": (["stats", *MODEL, *GREY, "--data", "digitz", "--run", "RUN"], "digitz"),
    "normalisation of other channels": (["stats", *MODEL, "--data", "folder:EMPTY", "--run", "RUN"],
                                        "mean is .*1 channel"),
    "model kwargs that are no JSON": (["stats", "resnet18", "--model-kwargs", "{x", "--run", "RUN"], "valid JSON"),
    "bits out of range": (["sensitivity", *MODEL, *DATA, "--bits", "2,9", "--run", "RUN"], "9 is not offered"),
    "more images than there are": (["stats", *MODEL, *DATA, "--images", "5000", "--run", "RUN"], "1347|1,347"),
    "no model at all": (["stats", "--run", "RUN"], "No model is recorded"),
    "no data at all": (["sensitivity", *MODEL, "--run", "RUN"], "No images are recorded"),
    "no sensitivity yet": (["plan", "--weight-bits", "3", "--run", "RUN"], "qvw sensitivity"),
    "unknown option": (["stats", "--budget", "3", "--run", "RUN"], "No such option.*--help"),
    "a device that is not there": (["stats", *MODEL, "--device", "cuda:77", "--run", "RUN"], "cuda:77"),
    "no choice in eval": (["eval", *MODEL, *DATA, "--run", "RUN"], "--uniform wXaY, --checkpoint PATH and --float"),
    "uniform that is not understood": (["eval", *MODEL, *DATA, "--uniform", "4bit", "--run", "RUN"], "'4bit'.*w4a4"),
    "one run to compare": (["compare", "RUN", "--out", "OUT"], "at least two"),
    "weights without a model": (["stats", "--pretrained", "--run", "RUN"], "name the model"),
    "an objective that is none": (["plan", "--weight-bits", "4", "--objective", "sqnr_db", "--run", "FINISHED"],
                                  "'sqnr_db' is unknown.*kl"),
    "a budget that is no number": (["plan", "--size", "nan", "--run", "FINISHED"], "--size"),
    "a pin that is not understood": (["plan", "--weight-bits", "4", "--pin", "fc", "--run", "FINISHED"],
                                     "PATTERN=BITS"),
    "nothing left": (["stats", *MODEL, "--exclude", "*", "--run", "RUN"], "nothing|no convolution or linear is left"),
    "a tensor that is none": (["sensitivity", *MODEL, *DATA, "--tensors", "bias", "--run", "RUN"], "'bias' is not"),
    "a model that takes other channels": (["stats", "resnet18", *DATA, "--run", "RUN"], r"1, 32, 32|in_chans|channels"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(WRONG))
def test_wrong_input_is_one_clear_message_and_exit_code_2(case, tmp_path, finished, capfd):
    """Standard error has one or two lines that name what came; no traceback, and no results are left behind."""
    arguments, message = WRONG[case]
    (tmp_path / "EMPTY").mkdir()
    replacements = {
        "FINISHED": finished / "resnet", "RUN": tmp_path / "run", "OUT": tmp_path / "out",
        "folder:EMPTY": f"folder:{tmp_path / 'EMPTY'}",
    }  # fmt: skip
    for change in ("nan", "shape", "cut"):
        if change in arguments:
            replacements[change] = broken_weights(tmp_path, change)
    assert qvw(*[replacements.get(a, a) for a in arguments]) == 2
    error = capfd.readouterr().err
    assert 1 <= len(error.strip().splitlines()) <= 2
    assert "Traceback" not in error
    assert re.search(message, error), error
    assert not list((tmp_path / "run").glob("*.parquet"))


def test_plans_that_do_not_belong_are_refused(run, finished, tmp_path, capfd):
    """Another model's plan names the nearest site; a file that is no plan, or no JSON, is said to be so."""
    assert qvw("eval", "--run", run, "--plan", finished / "vit" / "plan.json", *DATA[2:]) == 2
    assert "no site patch_embed.proj:weight" in capfd.readouterr().err
    text = (run / "plan.json").read_text()
    for content, message in (
        ("{", "JSON"),
        ("[]", "not a bit plan"),
        (text.replace('"bit_width": 2', '"bit_width": 9'), "bit_width"),
    ):
        (tmp_path / "bad.json").write_text(content)
        assert qvw("eval", "--run", run, "--plan", tmp_path / "bad.json", *DATA[2:]) == 2
        assert message in capfd.readouterr().err
    assert not (run / "verify.parquet").exists()


def test_a_plan_of_other_shapes_is_refused(run, tmp_path, capfd):
    """The same sites in a wider network: the totals do not fit, which is told before any image is read."""
    other = ["resnet18", "--model-kwargs", KWARGS.replace("[8, 8, 16, 16]", "[8, 8, 16, 24]")]
    assert qvw("eval", *other, *DATA, "--run", tmp_path / "wide", "--plan", run / "plan.json") == 2
    assert "other shapes or heads, or edited" in capfd.readouterr().err
    assert not (tmp_path / "wide" / "verify.parquet").exists()


def test_a_plan_of_other_weights_is_used_with_a_warning(run, tmp_path, capfd):
    """The same sites but other weights: that is said, and the evaluation resumes."""
    plan = json.loads((run / "plan.json").read_text())
    plan["model"]["weights_sha256"] = "0" * 64
    (tmp_path / "p.json").write_text(json.dumps(plan))
    arguments = ["--run", run, "--images", 32, "--calibration-images", 32, *DATA[2:]]
    assert qvw("eval", "--plan", tmp_path / "p.json", *arguments) == 0
    assert "was made for other weights of resnet18 than these" in capfd.readouterr().err


def test_an_unreachable_budget_names_the_cheapest_and_keeps_the_old_plan(run, capfd):
    """Below the pinned layers' bits no plan exists: the message says what is the least."""
    before = (run / "plan.json").read_text()
    assert qvw("plan", "--run", run, "--weight-bits", 1.5) == 2
    assert "cheapest" in capfd.readouterr().err
    assert (run / "plan.json").read_text() == before


def test_a_second_plan_elsewhere_leaves_the_first(run, tmp_path):
    """--out writes another file; plan.json of the run stays what it was, and a new plan takes its place whole."""
    before = (run / "plan.json").read_bytes()
    assert qvw("plan", "--run", run, "--weight-bits", 6, "--out", tmp_path / "other.json") == 0
    assert (run / "plan.json").read_bytes() == before
    assert (tmp_path / "other.png").exists()
    assert qvw("plan", "--run", run, "--weight-bits", 6) == 0
    assert (run / "plan.json").read_bytes() == (tmp_path / "other.json").read_bytes() != before


def test_another_models_run_folder_is_refused(run, capfd):
    """Results of two models are not mixed; --overwrite removes the old ones."""
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    other = ["resnet18", "--model-kwargs", KWARGS.replace("[8, 8, 16, 16]", "[8, 8, 16, 24]")]
    assert qvw("stats", *other, *DATA, "--run", run, "--images", 32) == 2
    assert "another model" in capfd.readouterr().err
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert qvw("stats", *other, *DATA, "--run", run, "--images", 32, "--overwrite") == 0
    assert not (run / "sensitivity.parquet").exists()


def test_changed_inputs_of_a_step_are_named(run, capfd):
    """Other images of the same data are another step; what changed is said."""
    assert qvw("sensitivity", "--run", run, *DATA[2:], "--images", 60, "--bits", "2", "--bn", "stored") == 2
    assert "images: 48 -> 60" in capfd.readouterr().err


def test_other_bit_widths_are_added_to_the_table(run):
    """Rows that are there are kept to the bit; the new ones come between them in order."""
    before = pd.read_parquet(run / "sensitivity.parquet")
    assert qvw("sensitivity", "--run", run, *DATA[2:], "--images", 48, "--bits", "4", "--bn", "stored") == 0
    after = pd.read_parquet(run / "sensitivity.parquet")
    assert list(after["bit_width"][:3]) == [2, 4, 8]
    assert after[after["bit_width"] != 4].reset_index(drop=True).equals(before)


def test_a_sweep_stopped_after_any_row_ends_with_the_same_table(run, tmp_path, monkeypatch, capfd):
    """Interrupted with Ctrl-C: exit code 130, finished rows kept, and the same table to the bit at the end."""
    whole = pd.read_parquet(run / "sensitivity.parquet")
    append, seen = RowLog.append, []

    def stop_after_five(self, rows):
        append(self, rows)
        seen.extend(rows)
        if len(seen) == 5:
            raise KeyboardInterrupt

    fresh = ["sensitivity", *MODEL, *DATA, *SWEEP, "--run", tmp_path / "fresh"]
    monkeypatch.setattr(RowLog, "append", stop_after_five)
    assert qvw(*fresh) == 130
    kept = re.search(r"Kept: 5 of (\d+) rows", capfd.readouterr().err)
    assert kept
    assert json.loads((tmp_path / "fresh" / "run.json").read_text())["steps"]["sensitivity"]["status"] == "interrupted"
    monkeypatch.setattr(RowLog, "append", append)
    assert qvw(*fresh) == 0
    assert f"5 of {kept[1]} rows are there already" in capfd.readouterr().out
    assert pd.read_parquet(tmp_path / "fresh" / "sensitivity.parquet").equals(whole)
    assert not (tmp_path / "fresh" / "sensitivity.partial.jsonl").exists()


def test_a_killed_process_loses_at_most_the_row_in_work(run, tmp_path, monkeypatch):
    """SIGKILL in the middle of a sweep, then the same command again: the table of an undisturbed sweep."""
    command = [sys.executable, "-m", "analysis", "sensitivity", *MODEL, *DATA, *SWEEP, "--run", str(tmp_path / "k")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process: sums of floats depend on the threads
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "k" / "sensitivity.partial.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_bytes().count(b"\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert log.read_bytes().count(b"\n") >= 3
    whole = pd.read_parquet(run / "sensitivity.parquet")
    append, measured = RowLog.append, []
    monkeypatch.setattr(RowLog, "append", lambda self, rows: (measured.extend(rows), append(self, rows)))
    assert qvw(*command[3:]) == 0
    assert len(measured) <= len(whole) - 3  # the rows of the killed process were not measured again
    assert pd.read_parquet(tmp_path / "k" / "sensitivity.parquet").equals(whole)


def test_models_lists_timm_names(capsys):
    """A part of a name is enough."""
    assert qvw("models", "swin_tiny") == 0
    assert "swin_tiny_patch4_window7_224" in capsys.readouterr().out.splitlines()


def test_no_space_left_is_told_and_keeps_earlier_results(run, monkeypatch, capfd):
    """A full disk while the table is written: one message, exit code 2, the rows stay in the partial log."""
    import errno

    before = (run / "sensitivity.parquet").read_bytes()

    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    assert qvw("sensitivity", "--run", run, *DATA[2:], "--images", 48, "--bits", "4", "--bn", "stored") == 2
    assert "No space left" in capfd.readouterr().err
    assert (run / "sensitivity.parquet").read_bytes() == before
    assert (
        len(RowLog(run / "sensitivity.partial.jsonl").read()) == len(pd.read_parquet(run / "sensitivity.parquet")) / 2
    )


ODD_MODELS = """
import timm, torch
from torch import nn

def net():
    return timm.create_model("resnet18", layers=[1, 1, 1, 1], num_classes=10, in_chans=1, stem_width=8,
                             channels=[8, 8, 16, 16], zero_init_last=False)

class Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()
    def forward(self, x):
        return self.net(x) + torch.randn(())

class Pair(Random):
    def forward(self, x):
        return self.net(x), x

class Listed(Random):
    def forward(self, x):
        return [self.net(x)]

class Named(Random):
    def forward(self, x):
        return {"logits": self.net(x), "input": x, "step": 3}

class Plain(Random):
    def forward(self, x):
        return self.net(x)

class RandomPair(Random):
    def forward(self, x):
        return x, self.net(x) + torch.randn(())

class NotANumber(Random):
    def forward(self, x):
        return self.net(x) / 0 * 0

class Raises(Random):
    def forward(self, x):
        assert x.shape[1] == 7

class Nothing(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :10]

class Writes(Plain):
    def forward(self, x):
        return super().forward(x.mul_(0.5))

class Trains(Plain):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
    def train(self, mode=True):
        return super().train(True)
    def forward(self, x):
        return super().forward(self.norm(x))

class Large(Plain):
    def forward(self, x):
        if len(x) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(x)
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [("Random", "two answers"), ("RandomPair", "two answers"), ("NotANumber", "NaN or Inf"), ("Writes", "writes into"),
     ("Trains", "of Trains, a BatchNorm2d, stays in training mode"), ("Raises", "does not run.*--input-size"),
     ("Nothing", "no convolution and no linear|expected logits")],
)  # fmt: skip
def test_models_that_cannot_be_measured_are_told(name, message, tmp_path, capfd):
    """A random forward, NaN logits, a failing assertion, no layer at all: exit code 2 and the reason."""
    (tmp_path / "odd.py").write_text(ODD_MODELS)
    arguments = [f"{tmp_path / 'odd.py'}:{name}", *DATA, *SWEEP, "--mean", "0.5", "--std", "0.5"]
    assert qvw("sensitivity", *arguments, "--run", tmp_path / "run") == 2
    error = capfd.readouterr().err
    assert re.search(message, error), error
    assert len(error.strip().splitlines()) <= 2


def test_memory_that_runs_out_halves_the_batches(tmp_path, capfd):
    """The sweep resumes with fewer images at a time, keeps its rows, notes the size, and has the same figures."""
    (tmp_path / "odd.py").write_text(ODD_MODELS)
    tables = {}
    for name in ("Plain", "Large"):
        arguments = [f"{tmp_path / 'odd.py'}:{name}", *DATA, *SWEEP, "--images", 64, "--batch-size", 64, "--seed", 3]
        assert qvw("sensitivity", *arguments, "--run", tmp_path / name) == 0
        tables[name] = pd.read_parquet(tmp_path / name / "sensitivity.parquet")
    assert "16 samples at a time" in capfd.readouterr().out
    assert tables["Large"]["note"].str.contains("16 samples at a time: memory ran out with more").all()
    np.testing.assert_allclose(tables["Large"]["kl"], tables["Plain"]["kl"], rtol=0.05, atol=1e-5)


def test_logits_are_found_in_what_a_network_returns(tmp_path):
    """Of a tuple, list or dictionary the tables are those of the network that returns the logits alone."""
    (tmp_path / "odd.py").write_text(ODD_MODELS)
    tables = {}
    for name in ("Plain", "Pair", "Listed", "Named"):
        arguments = [f"{tmp_path / 'odd.py'}:{name}", *DATA, "--images", 32, "--run", tmp_path / name]
        assert qvw("stats", *arguments) == 0
        assert qvw("sensitivity", *arguments, "--bits", 2) == 0
        tables[name] = [pd.read_parquet(tmp_path / name / f"{table}.parquet").drop(columns="model")
                        for table in ("stats", "sensitivity")]  # fmt: skip
    for name in ("Pair", "Listed", "Named"):
        pd.testing.assert_frame_equal(tables[name][0], tables["Plain"][0], check_exact=True)
        same = [table.drop(columns=["logit_nmse", "note"]) for table in (tables[name][1], tables["Plain"][1])]
        pd.testing.assert_frame_equal(*same)


OVERFLOWS = """
import torch
from torch import nn

class Overflows(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.middle, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 10)
        self.bad = torch.load("BAD")
    def forward(self, x):
        found = (x[:, None] == self.bad).all((2, 3, 4)).any(1).view(-1, 1, 1, 1)
        x = self.stem(x)
        x = torch.where(found, (x + 10) * 1e38, x)
        return self.head(self.middle(x.relu()).mean((2, 3)))
"""


def test_an_overflow_names_the_first_site_and_the_image(tmp_path, capfd):
    """Inf in the third batch: the first site that holds it, the image, exit code 2; an earlier run's results stand."""
    from analysis.data import load_data
    from analysis.inputs.listing import InputConfig

    config = InputConfig(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))
    digits = load_data("digits", split="train", images=96, seed=0, input_config=config, num_classes=10)
    for number, bad in enumerate(([70], [70, 75, 80])):
        torch.save(torch.stack([digits.dataset[i][0] for i in bad]), tmp_path / f"{number}.pt")
        (tmp_path / f"m{number}.py").write_text(OVERFLOWS.replace("BAD", str(tmp_path / f"{number}.pt")))
    run = ["--run", tmp_path / "run"]
    assert qvw("stats", f"{tmp_path / 'm0.py'}:Overflows", *DATA, "--images", 64, *run) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    capfd.readouterr()
    assert qvw("stats", *run, *DATA[2:], "--images", 96, "--overwrite") == 2
    error = capfd.readouterr().err.strip()
    name = re.escape(digits.dataset.names[70])
    assert re.search(
        rf"^qvw: error: middle:input holds NaN or Inf \(0 NaN and \d+ infinite .*\) on the image {name}; no site "
        r"before it does\. Look at that image, and at middle\.$", error
    ), error  # fmt: skip
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert qvw("stats", *run, *DATA[2:]) == 0  # the earlier step finds itself done
    capfd.readouterr()
    assert qvw("stats", f"{tmp_path / 'm1.py'}:Overflows", *DATA, "--images", 96, "--run", tmp_path / "new") == 2
    assert f"{digits.dataset.names[70]} and 2 more of its batch of 32; no site" in capfd.readouterr().err
    assert json.loads((tmp_path / "new" / "run.json").read_text())["steps"]["stats"]["status"] == "failed"


def test_nan_in_the_output_alone_is_told_by_stats(tmp_path, capfd):
    """`sensitivity` sends its user to `stats` for NaN logits: where no site holds any, it says so."""
    (tmp_path / "odd.py").write_text(ODD_MODELS)
    arguments = [f"{tmp_path / 'odd.py'}:NotANumber", *DATA, "--images", 40]
    assert qvw("stats", *arguments, "--run", tmp_path / "run") == 2
    error = capfd.readouterr().err
    assert re.search(
        r"the network's output holds NaN or Inf on the image digits/\d+ and all others of its batch", error
    )
    assert len(error.strip().splitlines()) == 1


@pytest.fixture
def pictures(tmp_path):
    """A folder of forty digits as PNG files, and how a command names it."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i in range(40):
        folder = tmp_path / "pictures" / str(i % 10)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[i] * 15.9).astype(np.uint8)).resize((32, 32)).save(folder / f"{i}.png")
    look = [*GREY, "--input-size", "1,32,32", "--batch-size", "8", "--holdout", "0"]
    return tmp_path / "pictures", [*MODEL, "--data", f"folder:{tmp_path / 'pictures'}", *look]


@forks
def test_a_truncated_file_is_named_or_skipped_and_counted(pictures, tmp_path, capfd):
    """Also with worker processes, which change nothing in the table; run.json names and keeps what was skipped."""
    folder, common = pictures
    broken = folder / "5" / "15.png"
    broken.write_bytes(broken.read_bytes()[:200])
    for workers in (0, 2):
        failed = ["--run", tmp_path / f"failed{workers}", "--num-workers", workers]
        for command in (["stats"], ["sensitivity", "--bits", "8", "--bn", "stored", "--tensors", "attention,weight"]):
            assert qvw(*command, *common, *failed) == 2
            error = capfd.readouterr().err.strip().splitlines()[-1]
            assert error.startswith(f"qvw: error: The image {broken} cannot be read: ")
            assert "--skip-broken" in error
            assert not list((tmp_path / f"failed{workers}").glob("*.parquet"))
        run = ["--run", tmp_path / f"run{workers}", "--num-workers", workers, "--skip-broken"]
        assert qvw("stats", *common, *run) == 0
        assert "1 of 40 images cannot be read and were left out: 5/15.png.\n" in capfd.readouterr().err
    one, two = (pd.read_parquet(tmp_path / name / "stats.parquet") for name in ("run0", "run2"))
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    seen = one[(one["module"] == "conv1") & (one["tensor"] == "input")]["count"].item()
    assert seen == 39 * 32 * 32
    sweep = ["sensitivity", *run, "--batch-size", "8", "--bits", "8", "--bn", "stored", "--tensors", "weight"]
    for _ in range(2):  # the second finds its rows, and reads no image
        assert qvw(*sweep) == 0
        steps = json.loads((tmp_path / "run2" / "run.json").read_text())["steps"]
        assert {name: step["options"]["skipped_images"] for name, step in steps.items()} == {
            "stats": ["5/15.png"], "sensitivity": ["5/15.png"],
        }  # fmt: skip
    assert set(pd.read_parquet(tmp_path / "run2" / "sensitivity.parquet")["images"]) == {39}


@pytest.mark.parametrize("command", [["stats"], ["sensitivity"], ["eval", "--float"]])
def test_fewer_images_than_asked_for_is_an_error_everywhere(pictures, command, tmp_path, capfd):
    """Both numbers are told, and nothing is written; without --images a step takes what there is."""
    _, common = pictures
    run = ["--run", tmp_path / "run", "--num-workers", 0]
    assert qvw(*command, *common, *run, "--images", 41) == 2
    split = "val" if command[0] == "eval" else "train"
    assert re.search(rf"`--images` 41, but folder:\S+ has 40 in its split '{split}'", capfd.readouterr().err)
    assert not (tmp_path / "run").exists()
    if command == ["stats"]:
        assert qvw(*command, *common, *run) == 0
        assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"]["stats"]["inputs"]["images"] == 40


def test_refused_images_are_not_remembered(pictures, run, capfd):
    """A step of other images is refused, and later commands still take the run's own."""
    folder, _ = pictures
    before = (run / "run.json").read_bytes()
    other = ["--data", f"folder:{folder}", *GREY, "--input-size", "1,32,32", "--num-workers", 0]
    assert qvw("stats", "--run", run, *other, "--images", 20) == 2
    assert "holds stats with other inputs" in capfd.readouterr().err
    assert qvw("stats", "--run", run, *other) == 2  # as many as before, which there are not
    assert re.search(r"holds stats of 64 images, folder:\S+ has 20 in its split 'train'\.", capfd.readouterr().err)
    assert (run / "run.json").read_bytes() == before


def test_a_wrong_data_string_is_not_remembered(run, capfd):
    """What cannot be read must not take the place of what could."""
    before = (run / "run.json").read_bytes()
    assert qvw("stats", "--run", run, "--data", "folder:/no/such/folder", *GREY, "--input-size", "1,32,32") == 2
    assert (run / "run.json").read_bytes() == before
    assert "/no/such/folder" in capfd.readouterr().err


def test_a_kill_before_the_log_is_removed_doubles_nothing(run):
    """Rows that are in the table and in the partial log are the same measurement."""
    table = pd.read_parquet(run / "sensitivity.parquet")
    RowLog(run / "sensitivity.partial.jsonl").append(table.to_dict("records"))
    assert qvw("sensitivity", "--run", run, *DATA[2:], "--images", 48, "--bits", "2,8", "--bn", "stored") == 0
    assert pd.read_parquet(run / "sensitivity.parquet").equals(table)
    assert not (run / "sensitivity.partial.jsonl").exists()


def test_a_missing_figure_or_cost_table_is_made_again(run):
    """A sweep that finds its rows finished still leaves every file that it promises."""
    for name in ("cost.parquet", "sensitivity.png"):
        (run / name).unlink()
    assert qvw("sensitivity", "--run", run, *DATA[2:], "--images", 48, "--bits", "2,8", "--bn", "stored") == 0
    assert (run / "cost.parquet").exists()
    assert (run / "sensitivity.png").exists()


@pytest.mark.parametrize("granularity", ["per_tensor", "per_head"])
def test_a_plan_may_choose_another_granularity(finished, tmp_path, granularity):
    """The activation is sampled in the groups of the plan, and the scales are counted."""
    run = shutil.copytree(finished / "vit", tmp_path / "vit")
    plan = json.loads((run / "plan.json").read_text())
    for site in plan["sites"]:
        if site["tensor"] == "query":
            site["granularity"] = granularity
    (tmp_path / "p.json").write_text(json.dumps(plan))
    common = ["--run", run, "--images", 32, "--calibration-images", 32, *DATA[2:]]
    assert qvw("eval", *common, "--plan", tmp_path / "p.json") == 0
    bytes_now = pd.read_parquet(run / "verify.parquet")["size_bytes"].iloc[0]
    fewer_scales = 2 * (4 - 1) * 4 if granularity == "per_tensor" else 0
    assert bytes_now == plan["totals"]["size_bytes"] - fewer_scales


def test_options_of_a_step_are_recorded(run):
    """run.json alone can repeat an evaluation: estimator, BatchNorm and images of the calibration are there."""
    arguments = ["--run", run, "--images", 32, "--uniform", "w4a8", "--estimator", "minmax", "--calibration-images", 40]
    assert qvw("eval", *arguments, *DATA[2:]) == 0
    options = json.loads((run / "run.json").read_text())["steps"]["eval"]["options"]
    assert (options["uniform"], options["estimator"], options["calibration_images"]) == ("w4a8", "minmax", "40")


def test_seed_and_holdout_may_be_given_as_their_default(run):
    """A value that equals the default is still what the user said."""
    assert qvw("eval", "--run", run, "--float", "--images", 32, "--seed", 3, *DATA[2:]) == 0
    assert qvw("eval", "--run", run, "--float", "--images", 32, "--seed", 0, *DATA[2:]) == 2


def test_a_run_whose_images_have_moved_goes_on(tmp_path):
    """The same images elsewhere are the same images; the preprocessing need not be said again."""
    rng = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{i}.png")
    run, workers = tmp_path / "run", ["--num-workers", "0"]
    kwargs = json.dumps(json.loads(KWARGS) | {"in_chans": 3, "num_classes": 2})
    look = ["--mean", "0.4", "--std", "0.3", "--input-size", "3,32,32"]
    model = ["resnet18", "--model-kwargs", kwargs]
    assert qvw("eval", *model, "--data", f"folder:{tmp_path / 'images'}", *look, "--run", run, "--float", *workers) == 0
    before = pd.read_parquet(run / "verify.parquet")
    (tmp_path / "images").rename(tmp_path / "moved")
    assert qvw("eval", "--run", run, "--float", *workers) == 2
    assert qvw("eval", "--data", f"folder:{tmp_path / 'moved'}", "--run", run, "--float", *workers) == 0
    pd.testing.assert_frame_equal(pd.read_parquet(run / "verify.parquet"), before)


def test_evaluating_other_images_says_what_overwrite_removes(run, capfd):
    """Rows of other images are not mixed: refused at first, and with --overwrite their removal is told."""
    few = ["--num-workers", "0", "--calibration-images", "32"]
    for choice in (["--float"], ["--uniform", "w8a8"]):
        assert qvw("eval", "--run", run, *choice, "--images", 40, *few) == 0
    assert qvw("eval", "--run", run, "--float", "--images", 50, *few) == 2
    assert "images: 40 -> 50" in capfd.readouterr().err
    assert len(pd.read_parquet(run / "verify.parquet")) == 2
    assert qvw("eval", "--run", run, "--float", "--images", 40, *few, "--overwrite") == 0
    assert len(pd.read_parquet(run / "verify.parquet")) == 2  # the same images: only its own row is made again
    assert qvw("eval", "--run", run, "--float", "--images", 50, *few, "--overwrite") == 0
    assert "removes 2 rows of verify.parquet" in capfd.readouterr().err
    assert list(pd.read_parquet(run / "verify.parquet")["images"]) == [50]
