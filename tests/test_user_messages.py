"""What a new user meets first: help pages, slips of the pen told at once, and few images said."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from PIL import Image

from analysis.cli import cli
from tests.digits_vit import DATA, MODEL, qvw

ROOT = Path(__file__).parents[1]
COMMANDS = [name for name in sorted(cli.commands) if name not in ("plan", "plan-diff")]
SLIPS = {
    "uniform of eval": (["eval", "--run", "R", "--uniform", "w3b4"], "'w3b4' is not understood; write w4a4"),
    "uniform of train": (["train", "--run", "R", "--uniform", "3x"], "'3x' is not understood; write w4a4"),
    "nothing to evaluate": (["eval", "--run", "R"], "give one of --plan FILE"),
    "a bit-width": (["sensitivity", "--run", "R", "--bits", "2,9"], "'--bits': 9 is not offered; choose from 1, 2"),
    "a tensor": (["sensitivity", "--run", "R", "--tensors", "wieght"], "'wieght' is not offered; choose from weight"),
    "a setting": (["train", "--run", "R", "--set", "learning_rte=1"], "the nearest is learning_rate"),
    "a setting's value": (["train", "--run", "R", "--set", "epochs=-1"], "--set: epochs=-1: should be greater"),
    "a size": (["stats", "resnet18", "--run", "R", "--input-size", "0,32,32"], "'0,32,32' has values that are not abo"),
    "two of three": (["stats", "resnet18", "--run", "R", "--input-size", "3,32"], "'3,32' has 2 values, expected 3"),
    "a deviation": (["stats", "resnet18", "--run", "R", "--std", "0"], "'0' has values that are not above 0"),
    "weights": (["stats", "resnet18", "--run", "R", "--weights", "w.pt"], "'--weights': File 'w.pt' does not exist"),
    "a plan": (["eval", "--run", "R", "--plan", "p.json"], "'--plan': File 'p.json' does not exist"),
    "a checkpoint": (["eval", "--run", "R", "--checkpoint", "q"], "'--checkpoint': Path 'q' does not exist"),
    "a run to export": (["export", "--run", "R", "--out", "a.safetensors"], "'--run': Directory 'R' does not exist"),
    "an ablation": (["ablate", "a.yaml", "--out", "R"], "File 'a.yaml' does not exist"),
    "a crop": (["soft-labels", "resnet18", "--data", "digits", "--out", "F", "--scale", "2,1"], "--scale 2,1: exp"),
}  # fmt: skip
SCRIPT = """
import json, sys
from analysis.cli import main

for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as stop:
        print("code", stop.code, "torch", "torch" in sys.modules, file=sys.stderr)
"""


def test_slips_of_the_pen_are_told_before_torch_is_imported(tmp_path):
    """Each has one line that names it and exit code 2, nothing is written, and torch, which takes seconds, not met."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([arguments for arguments, _ in SLIPS.values()])], cwd=tmp_path,
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=100,
    )  # fmt: skip
    lines = done.stderr.splitlines()
    assert len(lines) == 2 * len(SLIPS), done.stderr
    for (_, message), error, end in zip(SLIPS.values(), lines[::2], lines[1::2], strict=True):
        assert error.startswith("qvw: error: ")
        assert message in error
        assert end == "code 2 torch False", error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_80_columns_and_tells_defaults(name, monkeypatch, capfd):
    """No line is wider than a terminal; each option that takes a value says its default, or that it needs none."""
    monkeypatch.setenv("COLUMNS", "80")
    assert qvw(*filter(None, [name]), "--help") == 0
    assert max(map(len, capfd.readouterr().out.splitlines())) <= 80
    # Without these nothing is read or set, and other options take their place.
    named = {"weights", "class_map", "data_root", "plan_file", "uniform", "checkpoint", "config_file", "settings",
             "teacher_weights", "soft_labels", "run"}  # fmt: skip
    for option in cli.commands[name].params if name else []:
        if isinstance(option, click.Option) and not (option.is_flag or option.required or option.name in named):
            assert option.show_default, f"{name} --{option.name}"


def test_help_takes_no_torch_and_no_pandas():
    """A help page is there at once: nothing large is imported for it."""
    started = time.monotonic()
    large = ("torch", "pandas", "timm", "scipy")
    code = f"import sys; import analysis.cli; print([name for name in {large} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert time.monotonic() - started < 30  # on a busy machine; a second elsewhere


def test_a_misspelt_pattern_of_models_names_the_nearest(capfd):
    """A pattern without a match is told with names like it."""
    assert qvw("models", "resnett18") == 2
    assert "no timm model matches 'resnett18'. The nearest: resnet18" in capfd.readouterr().err


def test_fewer_images_to_calibrate_on_are_told(tmp_path, capfd):
    """`eval --calibration-images` takes what there is, and says how many that is."""
    for i in range(20):
        folder = tmp_path / "data" / str(i % 10)
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), 12 * i).save(folder / f"{i}.png")
    data = ["--data", f"folder:{tmp_path / 'data'}", *DATA[2:]]
    command = ["eval", *MODEL, *data, "--run", tmp_path / "run", "--uniform", "w4a4"]
    assert qvw(*command, "--calibration-images", 40) == 0
    assert (
        "10 training images set the scales, all that can be read; --calibration-images is 40" in capfd.readouterr().err
    )
    assert qvw(*command, "--calibration-images", 10) == 0
    assert "training images" not in capfd.readouterr().err
