"""`qvw train`, `ablate` and `soft-labels` by two processes: the loss curves, and the file, of one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.test_ablation import written
from tests.test_cli import MODEL, ROOT, VIT_KWARGS, qvw

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch is built without gloo, by which processes on CPUs talk",
)
DATA = ["--data", "digits", "--num-workers", "0"]
IMAGES, BROKEN = 60, 9
TRAIN = ["train", "vit_tiny_patch16_224", "--model-kwargs", VIT_KWARGS, *DATA, "--images", IMAGES, "--val-images", 40,
         "--uniform", "w4a4", "--set", "batch_size=12", "--set", "epochs=2", "--set", "log_every=1",
         "--set", "gradient_norms_every=1", "--set", "calibration_images=20", "--set", "obr_weight=0.1",
         "--set", "dampening_weight=0.1", "--set", "kurtosis_weight=0.1"]  # fmt: skip
LABELS = ["soft-labels", *MODEL, *DATA, "--images", IMAGES, "--crops", 3, "--batch-size", 20]
SOFT = ["--set", "crops_per_image=3"]
SCRIPT = """
import json, sys
from analysis.cli import main

*others, last = json.loads(sys.argv[1])
for command in others:
    try:
        main(command)
    except SystemExit as stop:
        assert stop.code == 0, command
print("LAST", file=sys.stderr, flush=True)
main(last)
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The folder and the end of five commands in two processes of one `torchrun`, the first four run by one too.

    The last meets an image that cannot be read, in the second process alone.
    """
    root = tmp_path_factory.mktemp("processes")
    rng = np.random.default_rng(0)
    for i in range(20):
        path = root / "images" / str(i % 10) / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32), dtype=np.uint8)).save(path)
        if i == BROKEN:
            path.write_bytes(b"no image")
    folder = ["--data", f"folder:{root / 'images'}", "--num-workers", "0", "--input-size", "1,32,32", "--mean", "0.5",
              "--std", "0.5", "--holdout", "0"]  # fmt: skip
    arms = written(root, seeds=[0], **{"subjects.vit.arms": ["lsq", "obr", "plan"]})
    commands = {name: [
        [*LABELS, "--out", root / f"{name}.soft"],
        [*TRAIN, "--run", root / f"{name}-kd"],
        [*TRAIN, *SOFT, "--run", root / f"{name}-soft", "--soft-labels", root / "one.soft"],
        ["ablate", arms, "--out", root / f"{name}-arms", "--num-workers", 0],
    ] for name in ("one", "two")}  # fmt: skip
    for command in commands["one"]:
        assert qvw(*command) == 0
    last = ["soft-labels", *MODEL, *folder, "--crops", 1, "--batch-size", 1, "--out", root / "broken.soft"]
    words = [[str(word) for word in command] for command in (*commands["two"], last)]
    (root / "commands.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", root / "commands.py",
         json.dumps(words)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stderr.count("LAST\n") == 2, done.stderr
    return root, done


def history(run: Path, split: str) -> pd.DataFrame:
    """The rows of a training without those columns that tell the time, or nothing."""
    table = pd.read_parquet(run / "qat" / "history.parquet")
    return table[table["split"] == split].drop(columns=["seconds", "split"]).dropna(axis=1)


@pytest.mark.parametrize("kind", ["kd", "soft"])
def test_two_processes_give_the_loss_curve_of_one(ended, kind):
    """Every term and its gradient within 1e-4, the validation loss and the weights too: sums round otherwise.

    The same global batch, with an online teacher and with stored labels; a network without BatchNorm.
    """
    root, _ = ended
    one, two = (history(root / f"{name}-{kind}", "train") for name in ("one", "two"))
    assert {"task", kind, "obr_distance", "obr_variance", "dampening", "kurtosis", f"grad_{kind}"} <= set(one)
    assert len(one) == 10
    assert one["loss"].iloc[-1] < one["loss"].max()
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-6)
    one, two = (history(root / f"{name}-{kind}", "val") for name in ("one", "two"))
    np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-4)
    states = [load_file(root / f"{name}-{kind}" / "qat" / "model.safetensors") for name in ("one", "two")]
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-3, atol=1e-4)


def test_two_processes_share_each_training_of_an_ablation(ended):
    """The results of one process, and one voice: each line of it once, the table and the tables' files whole."""
    root, done = ended
    one, two = (pd.read_csv(root / f"{name}-arms" / "ablation.csv") for name in ("one", "two"))
    times = ["seconds", "images_per_second"]
    assert list(two["arm"]) == ["lsq", "obr", "plan"]
    pd.testing.assert_frame_equal(two.drop(columns=times), one.drop(columns=times), rtol=1e-4)
    for line in ("== 1 of 3: vit, LSQ, seed 0", "== 3 of 3: vit, planned, seed 0", "the ablation is in"):
        assert done.stdout.count(line) == 1, done.stdout
    steps = json.loads((root / "two-arms" / "vit" / "run.json").read_text())["steps"]
    assert {steps[name]["options"]["processes"] for name in ("qat-lsq-0", "qat-plan-0", "sensitivity")} == {2}


def test_two_processes_make_the_same_soft_labels(ended):
    """To the byte, though every second batch was asked by the other; a last batch without a partner is there too."""
    root, done = ended
    assert -(-3 * IMAGES // 20) % 2 == 1
    assert (root / "two.soft").read_bytes() == (root / "one.soft").read_bytes()
    assert done.stdout.count("are in " + str(root / "two.soft")) == 1


def test_an_image_that_one_process_cannot_read_ends_both_with_one_message(ended):
    """Exit code 2 of the first, which names it; what was asked before is kept."""
    root, done = ended
    last = done.stderr.split("LAST\n")[-1]
    assert last.count("qvw: error:") == 1, last
    assert re.search(r"qvw: error: The image \S*09\.png cannot be read", last), last
    assert not (root / "broken.soft").exists()
    assert done.returncode != 0
