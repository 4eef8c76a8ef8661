"""Networks that are no classifiers, through every command; heads that are no logits are refused."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from analysis import evaluate, tasks
from tests.digits_vit import qvw

pytestmark = pytest.mark.filterwarnings("ignore:the float network has")  # random weights have large logits

NETWORKS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, n, end):
        super().__init__()
        self.c, self.norm, self.d = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3, 2, 1)
        self.fc, self.end = nn.Linear(16, n), end

    def forward(self, x):
        return self.end(self.fc(self.d(self.norm(self.c(x)).relu()).relu().mean((2, 3))) * 20)

def make(n, end=nn.Identity()):
    torch.manual_seed(0)
    return Net(n, end)

def one(): return make(1)
def logits(): return make(10)
def softmax(): return make(10, nn.Softmax(dim=1))
def sigmoid(): return make(10, nn.Sigmoid())
def embedding_net(): return make(6)
def segmenter(): return nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
"""
PREPROCESSING = ["--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25", "--input-size", "3,16,16", "--num-workers", 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Networks, and 40 pictures in ten folders."""
    root, generator = tmp_path_factory.mktemp("tasks"), np.random.default_rng(0)
    (root / "net.py").write_text(NETWORKS)
    for i in range(40):
        file = root / "data" / str(i % 10) / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    return root


def measured(folder, run, name, *more):
    """Exit code of a small sweep of a network of the file."""
    return qvw("sensitivity", f"{folder / 'net.py'}:{name}", "--data", f"folder:{folder / 'data'}", *PREPROCESSING,
               "--images", 16, "--bits", "2,4,8", "--run", run, "--quiet", *more)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "hint"), [("one", "multilabel"), ("softmax", "probabilities"), ("sigmoid", "multilabel")]
)
def test_heads_that_are_no_logits_are_refused_with_the_task_to_name(folder, tmp_path, capfd, name, hint):
    """Before anything is measured: a softmax of them would give a KL of 0, or one many times too small."""
    assert measured(folder, tmp_path / "run", name) == 2
    told = capfd.readouterr().err
    assert hint in told
    assert "--task" in told
    assert not (tmp_path / "run" / "sensitivity.parquet").exists()


def test_logits_pass(folder, tmp_path):
    """The same network without the softmax."""
    assert measured(folder, tmp_path / "run", "logits") == 0
    table = pd.read_parquet(tmp_path / "run" / "sensitivity.parquet")
    assert (table["kl"] > 0).all()
    assert table["kl"].equals(table["divergence"])


def test_an_embedding_goes_through_every_command(folder, tmp_path):
    """No class is read of its output: loss, score and top-1 are NaN, the divergence is measured and planned with."""
    run = tmp_path / "run"
    assert measured(folder, run, "embedding_net", "--task", "embedding") == 0
    table = pd.read_parquet(run / "sensitivity.parquet")
    assert set(table["task"]) == {"embedding"}
    assert (table["divergence"] > 0).all()
    assert table[["loss", "delta_loss", "score", "top1", "kl"]].isna().all(axis=None)
    few = ["--run", run, "--num-workers", 0, "--quiet"]
    assert qvw("stats", *few, "--images", 16) == 0
    assert qvw("plan", *few[:2], "--weight-bits", 4, "--activation-bits", 5, "--layout", "strict", "--verify",
               "--num-workers", 0, "--quiet") == 0  # fmt: skip
    verify = pd.read_parquet(run / "verify.parquet").set_index("plan")
    assert verify.loc["float", "divergence"] == 0
    assert (verify.drop("float")["divergence"] > 0).all()
    assert verify[["loss", "score", "top1", "metric"]].isna().all(axis=None)
    assert qvw("eval", *few, "--uniform", "w4a4", "--layout", "strict") == 0
    row = pd.read_parquet(run / "verify.parquet").iloc[-1]
    assert row["plan"] == "uniform-w4a4"  # other bits than those of the verification
    assert row["divergence"] > 0
    assert row["divergence_se"] > 0
    assert qvw("report", run, "--out", tmp_path / "report") == 0
    record = json.loads((run / "run.json").read_text())
    assert {record["steps"][step]["inputs"]["task"] for step in ("stats", "sensitivity", "eval")} == {"embedding"}


@pytest.mark.parametrize(
    ("name", "task"),
    [("segmenter", "segmentation"), ("one", "regression"), ("embedding_net", "multilabel"), ("one", "multilabel"),
     ("embedding_net", "detection")],
)  # fmt: skip
def test_class_indices_are_no_targets_of_other_tasks(folder, tmp_path, name, task):
    """Folders bring class indices: no loss or score is made of them, and the divergence is measured."""
    run = tmp_path / "run"
    assert measured(folder, run, name, "--task", task) == 0
    table = pd.read_parquet(run / "sensitivity.parquet")
    assert table[["loss", "score", "metric"]].isna().all(axis=None)
    assert (table["divergence"] > 0).all()
    assert table["note"].str.contains("no labels").all() == (task != "detection")  # which has no loss at all
    assert qvw("eval", "--run", run, "--uniform", "w4a4", "--num-workers", 0, "--quiet") == 0
    assert pd.read_parquet(run / "verify.parquet")["divergence"].item() > 0


def test_the_divergence_of_eval_is_that_of_evaluate(folder, tmp_path):
    """The command line and the library measure the same plan on the same images."""
    from analysis.data import batches, load_data
    from analysis.inputs.listing import InputConfig

    run = tmp_path / "run"
    arguments = [f"{folder / 'net.py'}:embedding_net", "--data", f"folder:{folder / 'data'}", *PREPROCESSING]
    assert qvw("eval", *arguments, "--task", "regression", "--uniform", "w4a4", "--run", run, "--quiet") == 0
    row = pd.read_parquet(run / "verify.parquet").iloc[0]
    config = InputConfig(
        input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.25,) * 3, crop_pct=1.0, interpolation="bilinear"
    )
    splits = {}
    for split in ("train", "val"):
        data = load_data(
            f"folder:{folder / 'data'}", split=split, images=None, seed=0, input_config=config, num_classes=None,
            holdout=0.5,
        )  # fmt: skip
        splits[split] = list(batches(data, batch_size=64))
    scope: dict = {}
    exec(NETWORKS, scope)
    table = evaluate(scope["embedding_net"](), splits["val"], {"w4a4": "w4a4"}, calibration=splits["train"],
                     task=tasks.regression())  # fmt: skip
    assert row["divergence"] == pytest.approx(table["divergence"].item(), rel=1e-4)
    assert row["size_bytes"] == table["size_bytes"].item()
    assert torch.isfinite(torch.tensor(row["divergence"]))


def test_old_verify_tables_are_read(tmp_path):
    """One of before tasks has top-1 as its score, and no divergence."""
    from analysis.runs import Run
    from analysis.storage.columns import VERIFY_COLUMNS

    row = {"plan": "float", "weight_bits": 32.0, "activation_bits": 32.0, "size_bytes": 10, "bitops": 10, "loss": 1.0,
           "loss_se": 0.1, "top1": 0.5, "top1_se": 0.1, "images": 4, "estimator": "none",
           "batchnorm": "none"}  # fmt: skip
    run = Run(tmp_path)
    run.write_table("verify", pd.DataFrame([row]))
    table = run.read_table("verify", VERIFY_COLUMNS)
    assert table["score"].tolist() == [0.5]
    assert table["divergence"].isna().all()
