"""Wrong input is reported before torch, timm and pandas, which take seconds, are imported; so is every help page."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from analysis.cli import cli

ROOT = Path(__file__).parents[1]
DIGITS = ["--data", "digits"]
MODEL = ["resnet18"]
PLAN = ["plan", "--run", "swept"]
WRONG = {
    # names and paths of models
    "a name that timm lacks": (["stats", "resnet19", "--run", "r"], "no model 'resnet19'"),
    "a factory's file": (["sensitivity", "gone.py:build", *DIGITS, "--run", "r"], "There is no file gone.py"),
    "a factory's function": (["stats", "net.py:bild", "--run", "r"], "no function 'bild'. It has: build"),
    "a name beside --weights": (["eval", *MODEL, *DIGITS, "--float", "--run", "r", "--weights", "w.txt"],
                              "no file of torch"),
    "weights that are gone": (["stats", *MODEL, "--weights", "gone.safetensors", "--run", "r"], "does not exist"),
    "two sorts of weights": (["train", *MODEL, *DIGITS, "--run", "r", "--float", "--pretrained", "--weights", "w.pt"],
                             "both given"),
    "no model": (["stats", "--run", "r"], "No model is recorded in r"),
    "no model in eval": (["eval", *DIGITS, "--float", "--run", "r"], "No model is recorded in r"),
    "no model in train": (["train", *DIGITS, "--float", "--run", "r"], "No model is recorded in r"),
    "a model that was moved": (["stats", "--run", "moved"], "It is recorded in moved: if it has moved"),
    "a damaged record": (["sensitivity", "--run", "damaged"], "run.json is not JSON"),
    "a run folder that is a file": (["stats", *MODEL, "--run", "w.txt"], "is a file"),
    "an unknown pattern": (["models", "no_such_net"], "no timm model matches"),
    "a teacher": (["train", *MODEL, *DIGITS, "--run", "r", "--float", "--teacher", "resnet19"], "no model 'resnet19'"),
    "a teacher's file": (["train", *MODEL, *DIGITS, "--run", "r", "--uniform", "w4a4", "--teacher", "t.py:f"], "t.py"),
    # images
    "no images": (["sensitivity", *MODEL, "--run", "r"], "No images are recorded in r"),
    "a folder of images": (["stats", *MODEL, "--data", "folder:gone", "--run", "r"], "There is no folder"),
    "a split of the folder": (["eval", *MODEL, "--data", "folder:trained", "--float", "--run", "r"], "no val/"),
    "a list of images": (["eval", *MODEL, "--data", "csv:gone.csv", "--float", "--run", "r"], "gone.csv cannot be"),
    "a list without files": (["stats", *MODEL, "--data", "csv:scores.csv", "--run", "r"], "expected `file`"),
    "another kind of data": (["sensitivity", *MODEL, "--data", "digitz", "--run", "r"], "'digitz' is unknown"),
    "a data root": (["train", *MODEL, "--data", "torch/cifar10", "--run", "r", "--float"], "--data-root"),
    "a class map": (["stats", *MODEL, *DIGITS, "--class-map", "map.txt", "--run", "r"], "names a class twice"),
    "a mean of 255": (["stats", *MODEL, "--mean", "120", "--run", "r"], "from 0 to 255"),
    "means of other channels": (["stats", *MODEL, "--mean", "0.5,0.5", "--input-size", "3,32,32", "--run", "r"],
                                "each of 3 channels"),
    "a device": (["stats", *MODEL, "--device", "gpu", "--run", "r"], "device 'gpu' is unknown"),
    # tasks
    "a task": (["eval", *MODEL, *DIGITS, "--float", "--run", "r", "--task", "clasification"], "is classification"),
    "a task's file": (["sensitivity", *MODEL, *DIGITS, "--run", "r", "--task", "gone.py:own"], "(from the task"),
    "a task's function": (["stats", *MODEL, *DIGITS, "--run", "r", "--task", "net.py:own"], "no function 'own'"),
    # bits and settings
    "bits": (["sensitivity", *MODEL, *DIGITS, "--run", "r", "--bits", "2-9"], "9 is not offered"),
    "a tensor": (["sensitivity", *MODEL, *DIGITS, "--run", "r", "--tensors", "wieght"], "'wieght'"),
    "uniform bits of eval": (["eval", "--run", "r", "--uniform", "w3b4"], "write w4a4"),
    "uniform bits of train": (["train", "--run", "r", "--uniform", "3w4a"], "write w4a4"),
    "a setting": (["train", "--run", "r", "--set", "learning_rte=1"], "nearest is learning_rate"),
    "a setting's value": (["train", "--run", "r", "--set", "epochs=-1"], "epochs=-1"),
    "a file of settings": (["train", "--run", "r", "--config", "bad.yaml"], "bad.yaml"),
    "no such file of settings": (["train", "--run", "r", "--config", "gone.yaml"], "does not exist"),
    # plans
    "a plan of no run": (["plan", "--run", "nope", "--weight-bits", "3"], "nope has no sensitivity.parquet"),
    "a plan of no sweep": (["plan", "--run", "empty", "--weight-bits", "3"], "empty has no sensitivity.parquet"),
    "a plan of no model": (["plan", "--run", "modelless", "--weight-bits", "3"], "No model is recorded in"),
    "no budget": (PLAN, "no budget was given"),
    "like": (["plan", "--run", "nope", "--like", "3w4a"], "--like '3w4a' is not understood"),
    "like and a budget": ([*PLAN, "--like", "w3a4", "--weight-bits", "3"], "leave out --weight-bits"),
    "a pin": ([*PLAN, "--like", "w3a4", "--pin", "head"], "PATTERN=BITS"),
    "a pin's bits": ([*PLAN, "--like", "w3a4", "--pin", "head=9"], "9 is not offered"),
    "bounds": ([*PLAN, "--like", "w3a4", "--bounds", "head=8-4"], "write the lower bits first"),
    "a tie": ([*PLAN, "--like", "w3a4", "--tie", "a:input,"], "--tie"),
    "candidates": ([*PLAN, "--like", "w3a4", "--candidates", "2;4"], "2,4,8 or 2-8"),
    "candidates of a kind": ([*PLAN, "--like", "w3a4", "--candidates-of", "mlp.fc2"], "KIND=BITS"),
    "an objective": ([*PLAN, "--like", "w3a4", "--objective", "speed"], "choose from divergence, kl"),
    "scores": ([*PLAN, "--like", "w3a4", "--scores", "gone.csv"], "gone.csv cannot be read"),
    "scores of other columns": ([*PLAN, "--like", "w3a4", "--scores", "scores.csv"], "no column 'module'"),
    "latencies": ([*PLAN, "--latency-ms", "3", "--latency", "gone.csv"], "gone.csv cannot be read"),
    "a latency without its table": ([*PLAN, "--latency-ms", "3"], "need each other"),
    "a device to verify on": ([*PLAN, "--like", "w3a4", "--verify", "--device", "gpu"], "device 'gpu'"),
    "a plan's name": ([*PLAN, "--like", "w3a4", "--out", "plan.txt"], "end it with .json"),
    "a plan in the place of another file": ([*PLAN, "--like", "w3a4", "--out", "bad.json"], "not readable as JSON"),
    "a plan that is no JSON": (["eval", *MODEL, *DIGITS, "--plan", "bad.json", "--run", "r"], "not readable as JSON"),
    "a plan that is none": (["train", *MODEL, *DIGITS, "--plan", "other.json", "--run", "r"], "is not a bit plan"),
    "a plan that is gone": (["eval", *MODEL, *DIGITS, "--plan", "gone.json", "--run", "r"], "does not exist"),
    "no plan to train with": (["train", *MODEL, *DIGITS, "--run", "r"], "plan.json does not exist"),
    "a plan to compare": (["plan-diff", "gone.json", "bad.json"], "gone.json cannot be read"),
    "two plans to compare": (["plan-diff", "bad.json", "bad.json"], "not readable as JSON"),
    # trained models
    "a checkpoint": (["eval", *MODEL, *DIGITS, "--checkpoint", "empty", "--run", "r"], "has no model.safetensors"),
    "a packed file": (["eval", *MODEL, *DIGITS, "--checkpoint", "w.txt", "--run", "r"], "not a packed model"),
    "nothing trained": (["export", "--run", "swept", "--out", "a.safetensors"], "has no trained model qat"),
    "an unfinished training": (["export", "--run", "training", "--out", "a.safetensors"], "has not finished"),
    "an exported file's name": (["export", "--run", "swept", "--out", "a.bin"], "end it with .safetensors"),
    "an exported file over another": (["export", "--run", "swept", "--out", "w.safetensors"], "not a packed model"),
    "soft labels over another file": (["soft-labels", *MODEL, *DIGITS, "--out", "w.txt"], "w.txt exists"),
    "soft labels of no model": (["soft-labels", *DIGITS, "--out", "s"], "need a teacher"),
    "an ablation's model": (["ablate", "ablation.yaml", "--out", "o"], "network net: timm has no model 'resnet19'"),
    "an ablation": (["ablate", "bad.yaml", "--out", "o"], "bad.yaml"),
    # results
    "a run to report": (["report", "nope", "--out", "o"], "nope is not a run folder"),
    "nothing to report": (["report", "empty", "--out", "o"], "empty holds nothing to report"),
    "a report over a file": (["report", "swept", "--out", "w.txt"], "is a file"),
    "one run to compare": (["compare", "swept", "--out", "o"], "at least two"),
    "runs to compare": (["compare", "nope", "empty", "--out", "o"], "nope has no stats.parquet"),
    "a demo in a file": (["demo", "--run", "w.txt"], "is a file"),
    "a demo over a damaged run": (["demo", "--run", "demo"], "run.json is not JSON"),
}  # fmt: skip
DRIVER = """
import json, sys
from analysis.cli import main

for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as stop:
        large = [name for name in ("torch", "timm", "pandas", "matplotlib", "scipy") if name in sys.modules]
        print("code", stop.code, *large, file=sys.stderr)
"""


def run_all(commands, folder):
    """Exit code, modules and lines of standard error of each command, all in one process."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(commands)], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=100,
    )  # fmt: skip
    *parts, rest = done.stderr.split("code ")
    endings = [part.partition("\n")[0] for part in [*parts[1:], rest]]
    texts = [parts[0] if parts else "", *(part.partition("\n")[2] for part in parts[1:])]
    return list(zip(endings, texts, strict=True)), done.stdout


@pytest.fixture
def folder(tmp_path):
    """A working directory with files of the wrong sort, and run folders that lack something."""
    record = {"typed": "n.py:f", "name": "f", "weights_sha256": "0", "parameters": 1, "factory": "/gone/n.py:f"}
    texts = {
        "w.txt": "x", "w.pt": "x", "w.safetensors": "x" * 50, "bad.json": "{", "other.json": "{}", "bad.yaml": "a: [1",
        "map.txt": "a\na\n", "scores.csv": "layer,score\n", "net.py": "def build():\n    pass\n",
        "ablation.yaml": "baseline: a\narms: {a: {title: A}}\nsubjects: {net: {model: resnet19, data: digits}}\n",
        "moved/run.json": json.dumps({"model": record}), "damaged/run.json": "{", "demo/resnet/run.json": "{",
        "modelless/run.json": "{}", "swept/run.json": json.dumps({"model": record}), "empty/notes.txt": "",
        **{f"{run}/{table}.parquet": "" for run in ("swept", "modelless") for table in ("sensitivity", "cost")},
        "training/qat/checkpoints/step": "", "trained/train/a/1.png": "",
    }  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_wrong_input_is_reported_before_torch_is_imported(folder):
    """Each command has exit code 2 and one or two lines; nothing large is imported, nothing is written."""
    before = sorted(folder.rglob("*"))
    outcomes, _ = run_all([arguments for arguments, _ in WRONG.values()], folder)
    assert len(outcomes) == len(WRONG)
    for (name, (_, message)), (ending, text) in zip(WRONG.items(), outcomes, strict=True):
        assert ending == "2", (name, ending, text)
        assert message in text, (name, text)
        assert text.startswith("qvw: error: ")
        assert len(text.strip().splitlines()) <= 2, (name, text)
    assert sorted(folder.rglob("*")) == before


def test_every_help_page_is_there_before_torch_is_imported(tmp_path):
    """`qvw --help` and that of each command import nothing large."""
    commands = [["--help"], *([name, "--help"] for name in cli.commands), ["models", "resnet18*"], ["--version"]]
    outcomes, printed = run_all(commands, tmp_path)
    assert [ending for ending, _ in outcomes] == ["0"] * len(commands)
    assert printed.count("Usage: qvw") == len(commands) - 2


def test_every_command_has_a_first_word():
    """No command is forgotten above; a new one gets its wrong inputs."""
    assert {arguments[0] for arguments, _ in WRONG.values()} == set(cli.commands)
