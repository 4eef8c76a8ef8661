"""`qvw stats` by several processes: the tables of one, and one message where one of them cannot resume."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from analysis.cli import main
from analysis.data import load_data
from analysis.inputs.listing import InputConfig

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch is built without gloo, by which processes on CPUs talk",
)
ROOT = Path(__file__).parents[1]
KWARGS = {"img_size": 16, "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 24, "depth": 2,
          "num_heads": 3}  # fmt: skip
COMMAND = ["stats", "vit_tiny_patch16_224", "--model-kwargs", json.dumps(KWARGS), "--mean", "0.5", "--std", "0.5",
           "--batch-size", "8"]  # fmt: skip
BROKEN = 12  # in the second batch, which is the first of the second process
SCRIPT = """
import json, sys
from analysis.cli import main

first, second = json.loads(sys.argv[1])
try:
    main(first)
except SystemExit as stop:
    assert stop.code == 0
print("NEXT", file=sys.stderr)
main(second)
"""


class Ended(NamedTuple):
    """What two commands left: the folder of their runs, the file that is cut, and what they printed."""

    folder: Path
    broken: str
    returncode: int
    stdout: str
    stderr: list[str]  # of each command
    before: dict[str, bytes]  # the second command's run folder as it was before


def alone(*arguments):
    """Exit code of a command in this process."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


def files(folder):
    """The files of a run folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Two commands, one after the other, in two processes of `torchrun`, on 70 digits of which one file is cut.

    The first skips it, the second does not. One start of `torchrun` for both: importing torch takes longest.
    """
    root = tmp_path_factory.mktemp("processes")
    pixels, labels = load_digits(return_X_y=True)
    for i in range(70):
        folder = root / "digits" / str(labels[i])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels[i] * 15.9).astype(np.uint8).reshape(8, 8)).save(folder / f"{i}.png")
    data = f"folder:{root / 'digits'}"
    config = InputConfig(input_size=(1, 16, 16), mean=(0.5,), std=(0.5,))
    chosen = load_data(data, split="train", images=None, seed=0, input_config=config, num_classes=10)
    assert chosen.images == 35  # 5 batches: three for the first process, two for the second
    broken = root / "digits" / chosen.dataset.names[BROKEN]
    broken.write_bytes(broken.read_bytes()[:60])

    assert alone(*COMMAND, "--run", root / "failed") == 0  # the weights alone
    before = files(root / "failed")
    commands = [
        [*COMMAND, "--data", data, "--skip-broken", "--run", str(root / "two"), "--num-workers", "1"],
        [*COMMAND, "--data", data, "--overwrite", "--run", str(root / "failed"), "--num-workers", "0"],
    ]
    (root / "both.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, root / "both.py", json.dumps(commands)], capture_output=True, text=True, timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    parts = re.split("NEXT\n", done.stderr)
    assert len(parts) == 3, done.stderr  # both processes have said it
    return Ended(root, chosen.dataset.names[BROKEN], done.returncode, done.stdout, [parts[0], parts[2]], before)


def figures(frame):
    """The columns of numbers as an array."""
    return frame.select_dtypes("number").to_numpy(dtype=float)


def test_two_processes_give_the_tables_of_one(ended):
    """Counts, extremes and histograms are equal, moments and what is read off the histograms within 1e-9."""
    data = ["--data", f"folder:{ended.folder / 'digits'}", "--skip-broken", "--num-workers", 0]
    assert alone(*COMMAND, *data, "--run", ended.folder / "one") == 0
    one, two = (pd.read_parquet(ended.folder / run / "stats.parquet") for run in ("one", "two"))
    assert {"weight.query", "attention", "input", "output"} <= set(one["tensor"])
    exact = ["model", "module", "kind", "order", "tensor", "numel", "count", "min", "max", "note"]
    pd.testing.assert_frame_equal(two[exact], one[exact], check_exact=True)
    np.testing.assert_allclose(figures(two), figures(one), rtol=1e-9, atol=1e-12)
    inputs = one[(one["module"] == "patch_embed.proj") & (one["tensor"] == "input")]
    assert inputs["count"].item() == 34 * 16 * 16  # the images of both, but for the broken one
    for table in ("channels", "histograms"):
        one, two = (pd.read_parquet(ended.folder / run / f"{table}.parquet") for run in ("one", "two"))
        assert one.shape == two.shape
        np.testing.assert_allclose(figures(two), figures(one), rtol=1e-9, atol=1e-12)
    steps = [json.loads((ended.folder / run / "run.json").read_text())["steps"]["stats"] for run in ("one", "two")]
    assert [step["options"]["processes"] for step in steps] == [1, 2]
    assert [step["options"]["skipped_images"] for step in steps] == [[ended.broken], [ended.broken]]
    assert steps[0]["inputs"] == steps[1]["inputs"]


def test_only_the_first_process_speaks(ended):
    """The table, and what only the second process has met: an image that was left out, come once."""
    assert ended.stdout.count("Heaviest tails") == 1
    assert ended.stderr[0].count(f"1 of 35 images cannot be read and were left out: {ended.broken}.") == 1
    assert ended.stderr[0].count("untrained weights") == 1


def test_an_error_in_the_second_process_ends_both_with_one_message(ended):
    """An image that the second process alone reads is named once, by the first, which ends with exit code 2.

    Results of an earlier run, which --overwrite would have replaced, stay as they were, and so does their record.
    """
    assert ended.returncode != 0
    assert ended.stderr[1].count("qvw: error:") == 1, ended.stderr[1]
    assert f"qvw: error: The image {ended.folder / 'digits' / ended.broken} cannot be read" in ended.stderr[1]
    assert "interrupted" not in ended.stderr[1]
    cause = re.search(r"Root Cause.*?rank +: (\d).*?exitcode +: (-?\d+)", ended.stderr[1], re.DOTALL)
    assert cause.groups() == ("0", "2")
    assert files(ended.folder / "failed") == ended.before
