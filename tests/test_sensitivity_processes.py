"""`qvw sensitivity` by several processes, and killed at any moment: the tables of one undisturbed process."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch is built without gloo, by which processes on CPUs talk",
)
ROOT = Path(__file__).parents[1]
KWARGS = {"img_size": 16, "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 24, "depth": 2,
          "num_heads": 3}  # fmt: skip
COMMAND = ["-m", "analysis", "sensitivity", "vit_tiny_patch16_224", "--model-kwargs", json.dumps(KWARGS),
           "--data", "digits", "--input-size", "1,16,16", "--mean", "0.5", "--std", "0.5", "--batch-size", "8",
           "--images", "48", "--bits", "2,4", "--num-workers", "0"]  # fmt: skip
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
TABLES = ("sensitivity", "sensitivity_images", "cost", "proxies", "proxy_images", "proxy_correlation")


def command(run, *options):
    """The words of a sweep of 60 rows or so into `run`."""
    return [*COMMAND, "--run", str(run), "--proxies", *options]


def rows_of(run):
    """How many rows the logs of a sweep in work hold."""
    return sum(path.read_bytes().count(b"\n") for path in run.glob("sensitivity.partial*.jsonl"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A sweep by one process on one thread."""
    run = tmp_path_factory.mktemp("sweep") / "one"
    done = subprocess.run([sys.executable, *command(run)], capture_output=True, text=True, env=ENVIRONMENT, timeout=200)
    assert done.returncode == 0, done.stderr
    return run


def assert_same_tables(run, expected):
    """Every table to the last bit."""
    for name in TABLES:
        frames = [pd.read_parquet(folder / f"{name}.parquet") for folder in (run, expected)]
        pd.testing.assert_frame_equal(*frames, check_exact=True)
    assert not list(run.glob("*partial*"))


@needs_gloo
def test_two_processes_share_the_sites(undisturbed, tmp_path):
    """The tables of one process, to the bit; one table is printed."""
    run = tmp_path / "two"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "--"]
    done = subprocess.run(
        [sys.executable, *torchrun, *command(run)[1:]], capture_output=True, text=True, env=ENVIRONMENT, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Most sensitive at 2 bits") == 1
    assert_same_tables(run, undisturbed)
    step = json.loads((run / "run.json").read_text())["steps"]["sensitivity"]
    assert step["options"]["processes"] == 2


def test_killed_at_random_moments_it_ends_with_the_same_tables(undisturbed, tmp_path):
    """SIGKILL twice, wherever the sweep happens to be; a row that is on the disk stays there."""
    seed = time.time_ns()
    print(f"seed {seed}")  # pytest shows it where the test fails
    run, seconds = tmp_path / "killed", random.Random(seed)
    kept = []
    for _ in range(2):
        process = subprocess.Popen([sys.executable, *command(run)], env=ENVIRONMENT, stderr=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL)  # fmt: skip
        already = rows_of(run)
        while rows_of(run) == already and process.poll() is None:
            time.sleep(0.01)
        time.sleep(seconds.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept.append(rows_of(run))
    assert 1 <= kept[0] <= kept[1]
    done = subprocess.run([sys.executable, *command(run)], capture_output=True, text=True, env=ENVIRONMENT, timeout=200)
    assert done.returncode == 0, done.stderr
    assert_same_tables(run, undisturbed)
