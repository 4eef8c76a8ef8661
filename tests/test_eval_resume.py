"""`qvw eval` that is stopped resumes after the last batch that it evaluated, to the row of an undisturbed one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from analysis.data import ChosenImages
from analysis.storage.files import RowLog
from tests.digits_vit import DATA, MODEL, qvw

ROOT = Path(__file__).parent.parent
IMAGES, BATCH = 46, 4  # the last batch is smaller
SMALL = [*MODEL, *DATA, "--images", IMAGES, "--batch-size", BATCH, "--calibration-images", 24]
UNIFORM = ["--uniform", "w4a4", "--estimator", "minmax"]


def rows_of(run):
    """The rows of verify.parquet."""
    return pd.read_parquet(run / "verify.parquet")


def logs_of(run):
    """The logs of unfinished evaluations."""
    return sorted(run.glob("eval-*.partial.jsonl"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run folder of `--uniform w4a4`, not to be changed."""
    run = tmp_path_factory.mktemp("undisturbed") / "vit"
    assert qvw("eval", *SMALL, *UNIFORM, "--run", run) == 0
    assert len(rows_of(run)) == 1
    return run


@pytest.fixture(scope="module")
def floating(tmp_path_factory):
    """The run folder of `--float`, not to be changed."""
    run = tmp_path_factory.mktemp("floating") / "vit"
    assert qvw("eval", *SMALL, "--float", "--run", run) == 0
    return run


@pytest.fixture
def evaluated_now(monkeypatch):
    """The images that evaluations in this process have read, by number; not those that set scales."""
    read, getitem = [], ChosenImages.__getitem__

    def counted(self, i):
        if len(self) == IMAGES:
            read.append(i)
        return getitem(self, i)

    monkeypatch.setattr(ChosenImages, "__getitem__", counted)
    return read


def interrupted(monkeypatch, batches, *arguments):
    """Run a command that is interrupted when so many batches are on the disk; 130."""
    append = RowLog.append

    def stop(self, rows):
        append(self, rows)
        if len(self.read()) == batches:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RowLog, "append", stop)
        return qvw(*arguments)


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import analysis.steps.eval_step  # loaded once for all that are forked
from analysis.cli import main
run, chance, lines = Path(sys.argv[1]), random.Random(int(sys.argv[2])), 0
for _ in range(3):
    process, until, ended = os.fork(), lines + chance.randrange(1, 60), (0, 0)
    if process == 0:
        main(sys.argv[3:])
    while lines < until and not ended[0]:
        time.sleep(chance.uniform(0, 0.01))
        lines = sum(log.read_bytes().count(b"\\n") for log in run.glob("*.partial.jsonl"))
        ended = os.waitpid(process, os.WNOHANG)
    assert not ended[0], "the evaluation ended before it could be killed"
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_killed_at_random_moments_it_ends_with_the_same_row(tmp_path):
    """SIGKILL three times, wherever the evaluation happens to be: the last start gives the row of one that was let be.

    What was on the disk was not evaluated again.
    """
    seed = time.time_ns()
    print(f"seed {seed}")  # pytest shows it where the test fails
    arguments = ["eval", *MODEL, *DATA, *UNIFORM, "--images", 350, "--batch-size", 1, "--calibration-images", 24]
    assert qvw(*arguments, "--run", tmp_path / "whole") == 0
    run = tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process: sums of floats depend on the threads
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(run), str(seed), *map(str, arguments), "--run", str(run)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (log,) = logs_of(run)
    numbers = [row["batch"] for row in RowLog(log).read()]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) >= 3
    assert not (run / "verify.parquet").exists()
    assert qvw(*arguments, "--run", run) == 0
    assert rows_of(run).equals(rows_of(tmp_path / "whole"))
    assert not logs_of(run)


@pytest.mark.parametrize("choice", [["--float"], UNIFORM], ids=["float", "uniform"])
def test_batches_that_are_on_the_disk_are_neither_read_nor_run(choice, tmp_path, monkeypatch, evaluated_now, capfd):
    """The interrupt says what is kept, the next start where it resumes; it reads the other images, each once."""
    assert qvw("eval", *SMALL, *choice, "--run", tmp_path / "whole") == 0
    evaluated_now.clear()
    arguments = ["eval", *SMALL, *choice, "--run", tmp_path / "vit"]
    assert interrupted(monkeypatch, 3, *arguments) == 130
    assert f"Kept: 12 of {IMAGES} images. Resume with the same command." in capfd.readouterr().err
    assert evaluated_now == list(range(12))
    evaluated_now.clear()
    assert qvw(*arguments) == 0
    assert f"resuming after 12 of {IMAGES} images" in capfd.readouterr().out
    assert evaluated_now == list(range(12, IMAGES))
    assert rows_of(tmp_path / "vit").equals(rows_of(tmp_path / "whole"))
    assert not logs_of(tmp_path / "vit")
    step = json.loads((tmp_path / "vit" / "run.json").read_text())["steps"]["eval"]
    assert (step["status"], step["files"]) == ("done", [])


def test_the_row_does_not_depend_on_where_it_was_stopped(undisturbed, tmp_path, monkeypatch):
    """After any number of batches, all of them and none included, and once more later: the same row to the bit."""
    for first, second in [(1, 2), (11, 12)]:
        arguments = ["eval", *SMALL, *UNIFORM, "--run", tmp_path / f"{first}"]
        assert interrupted(monkeypatch, first, *arguments) == 130
        assert interrupted(monkeypatch, second, *arguments) == 130
        assert qvw(*arguments) == 0
        assert rows_of(tmp_path / f"{first}").equals(rows_of(undisturbed))


def test_batchnorm_re_estimated_anew_is_the_same(tmp_path, monkeypatch):
    """Scales and BatchNorm's statistics of the second start are those of the first."""
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2),\n"
        "                         nn.Flatten(), nn.Linear(32, 10))\n"
    )
    few = ["--images", IMAGES, "--batch-size", BATCH, "--uniform", "w3a3", "--calibration-images", 24]
    for name in ("whole", "stopped"):
        arguments = ["eval", f"{tmp_path / 'net.py'}:net", *DATA, *few, "--run", tmp_path / name]
        if name == "stopped":
            assert interrupted(monkeypatch, 4, *arguments) == 130
        assert qvw(*arguments) == 0
    assert rows_of(tmp_path / "stopped").equals(rows_of(tmp_path / "whole"))
    assert list(rows_of(tmp_path / "whole")["batchnorm"]) == ["re_estimated"]


@pytest.mark.parametrize(
    "other",
    [["--float"], ["--uniform", "w4a8"], [*UNIFORM, "--layout", "strict"], [*UNIFORM, "--estimator", "percentile"],
     [*UNIFORM, "--calibration-images", 20]],
    ids=lambda choice: " ".join(str(part) for part in choice[-2:]),
)  # fmt: skip
def test_another_evaluation_takes_nothing_over(other, undisturbed, tmp_path, monkeypatch, evaluated_now):
    """It reads all images, and leaves what is unfinished for the one that was stopped."""
    run = tmp_path / "vit"
    assert interrupted(monkeypatch, 5, "eval", *SMALL, *UNIFORM, "--run", run) == 130
    evaluated_now.clear()
    assert qvw("eval", *SMALL, *other, "--run", run) == 0
    assert evaluated_now == list(range(IMAGES))
    assert len(logs_of(run)) == 1
    evaluated_now.clear()
    (run / "verify.parquet").unlink()
    assert qvw("eval", *SMALL, *UNIFORM, "--run", run) == 0
    assert evaluated_now == list(range(20, IMAGES))
    assert rows_of(run).equals(rows_of(undisturbed))


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A run folder with a plan."""
    run = tmp_path_factory.mktemp("planned") / "vit"
    swept = ["--images", 16, "--bits", "4,8", "--tensors", "weight"]
    assert qvw("sensitivity", *MODEL, *DATA, *swept, "--run", run) == 0
    assert qvw("plan", "--run", run, "--weight-bits", 6) == 0
    return run


def test_a_plan_file_of_other_content_takes_nothing_over(planned, monkeypatch, evaluated_now):
    """What counts is what the file says, not where it lies."""
    arguments = ["eval", "--run", planned, *DATA[2:], "--images", IMAGES, "--batch-size", BATCH]
    text = (planned / "plan.json").read_text()
    assert interrupted(monkeypatch, 5, *arguments, "--plan", planned / "plan.json") == 130
    edited = json.loads(text)
    edited["sites"][-1]["granularity"] = "per_channel"
    (planned / "plan.json").write_text(json.dumps(edited))
    (planned / "moved.json").write_text(text)
    evaluated_now.clear()
    assert qvw(*arguments, "--plan", planned / "plan.json") == 0
    assert evaluated_now == list(range(IMAGES))
    evaluated_now.clear()
    assert qvw(*arguments, "--plan", planned / "moved.json") == 0
    assert evaluated_now == list(range(20, IMAGES))


def test_a_model_trained_anew_takes_nothing_over(tmp_path, monkeypatch, evaluated_now):
    """The same folder with other weights in it is another model."""
    run = tmp_path / "vit"
    short = ["--images", 32, "--val-images", 20, "--set", "epochs=1", "--set", "batch_size=16"]

    def train(*settings):
        assert qvw("train", *MODEL, *DATA, *short, *UNIFORM[:2], "--run", run, *settings) == 0

    few = ["--images", IMAGES, "--batch-size", BATCH]
    arguments = ["eval", "--run", run, *DATA[2:], "--checkpoint", run / "qat", *few]
    train()
    assert interrupted(monkeypatch, 5, *arguments) == 130
    evaluated_now.clear()
    assert interrupted(monkeypatch, 7, *arguments) == 130
    assert evaluated_now == list(range(20, 28))
    train("--set", "learning_rate=0.01", "--overwrite")
    evaluated_now.clear()
    assert qvw(*arguments) == 0
    assert evaluated_now == list(range(IMAGES))


def test_other_images_are_refused_as_in_every_step(tmp_path, monkeypatch, capfd, evaluated_now):
    """What changed is told; `--overwrite` removes what is unfinished with the rest."""
    run, smaller = tmp_path / "vit", [*SMALL, "--batch-size", 2]
    assert interrupted(monkeypatch, 5, "eval", *SMALL, *UNIFORM, "--run", run) == 130
    assert interrupted(monkeypatch, 5, "eval", *SMALL, "--float", "--run", run) == 130
    assert qvw("eval", *smaller, "--float", "--run", run) == 2
    assert "holds eval with other inputs (batch_size: 4 -> 2)" in capfd.readouterr().err
    assert len(logs_of(run)) == 2
    evaluated_now.clear()
    assert qvw("eval", *smaller, "--float", "--run", run, "--overwrite") == 0
    assert evaluated_now == list(range(IMAGES))
    assert not logs_of(run)


@pytest.mark.parametrize("last", ["w8a8", "float"])
def test_overwrite_starts_this_evaluation_anew_and_keeps_the_others(last, tmp_path, monkeypatch, evaluated_now):
    """Rows and unfinished evaluations of the same images stay, whichever of them was stopped last."""
    run = tmp_path / "vit"
    assert qvw("eval", *SMALL, *UNIFORM, "--run", run) == 0
    stopped = [["--uniform", "w8a8"], ["--float"]]
    for choice in stopped if last == "float" else stopped[::-1]:
        assert interrupted(monkeypatch, 3, "eval", *SMALL, *choice, "--run", run) == 130
    evaluated_now.clear()
    assert qvw("eval", *SMALL, "--float", "--run", run, "--overwrite") == 0
    assert evaluated_now == list(range(IMAGES))
    assert list(rows_of(run)["plan"]) == ["uniform", "float"]
    assert len(logs_of(run)) == 1


def test_overwrite_removes_rows_of_other_images_alone(tmp_path, capfd):
    """Once; the next `--overwrite` on the same images keeps them, and so does one before which `eval` never ran."""
    run, fewer = tmp_path / "vit", [*SMALL, "--images", 8]
    assert qvw("eval", *fewer, "--float", "--run", run) == 0
    assert qvw("eval", *SMALL, "--float", "--run", run, "--overwrite") == 0
    assert "--overwrite removes 1 rows of verify.parquet, measured on other images" in capfd.readouterr().err
    assert qvw("eval", *SMALL, *UNIFORM, "--run", run, "--overwrite") == 0
    assert list(rows_of(run)["plan"]) == ["float", "uniform"]
    record = json.loads((run / "run.json").read_text())
    del record["steps"]["eval"]  # as where `train` and `plan --verify` made the rows
    (run / "run.json").write_text(json.dumps(record))
    assert qvw("eval", *SMALL, "--uniform", "w8a8", "--run", run, "--overwrite") == 0
    assert list(rows_of(run)["plan"]) == ["float", "uniform", "uniform-w8a8"]
    assert "measured on other images" not in capfd.readouterr().err


def test_a_forward_that_was_fixed_takes_nothing_over(tmp_path, monkeypatch, evaluated_now, capfd):
    """Its weights are equal, its answers are not."""
    file = tmp_path / "net.py"
    text = (
        "import torch\n"
        "def net():\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, 8), torch.nn.ReLU(),"
        " torch.nn.Linear(8, 10))\n"
    )
    file.write_text(text)
    data = ["--data", "digits", "--mean", 0.5, "--std", 0.5, "--input-size", "1,32,32", "--images", IMAGES]
    arguments = ["eval", f"{file}:net", *data, "--batch-size", BATCH, "--float", "--num-workers", 0]
    assert interrupted(monkeypatch, 3, *arguments, "--run", tmp_path / "run") == 130
    file.write_text(text.replace("ReLU", "Sigmoid"))
    evaluated_now.clear()
    assert qvw(*arguments, "--run", tmp_path / "run") == 0
    assert evaluated_now == list(range(IMAGES))
    assert "was begun with other inputs: what it lacks is evaluated again" in capfd.readouterr().err
    assert qvw(*arguments, "--run", tmp_path / "whole") == 0
    assert rows_of(tmp_path / "run").equals(rows_of(tmp_path / "whole"))


def cut_within_a_line(lines):
    """A kill, or a full disk."""
    return b"\n".join(lines)[:-30]


def garbage_in_the_middle(lines):
    """A line of other bytes."""
    return b"\n".join([*lines[:3], b"\x00\xff{", *lines[4:], b""])


def a_line_lost(lines):
    """The fourth batch is missing."""
    return b"\n".join([*lines[:3], *lines[4:], b""])


def a_digit_changed(lines):
    """A figure that could be one."""
    row = json.loads(lines[3])
    row["loss"][0] += 0.25
    return b"\n".join([*lines[:3], json.dumps(row).encode(), *lines[4:], b""])


def a_number_of_another_batch(lines):
    """The fourth line says that it is of the first batch."""
    return b"\n".join([*lines[:3], lines[3].replace(b'"batch": 3', b'"batch": 0'), *lines[4:], b""])


def lines_of_other_sorts(lines):
    """JSON that no evaluation writes."""
    return b"\n".join([*lines[:3], b"[]", b"7", b"{}", b'{"sha256": null}', b'{"batch": 3, "sha256": "0"}', b""])


def twice(lines):
    """Each line once more."""
    return b"\n".join([*lines, *lines, b""])


def emptied(lines):
    """Nothing is left."""
    return b""


@pytest.mark.parametrize(
    ("damage", "intact", "told"),
    [(cut_within_a_line, 5, False), (garbage_in_the_middle, 3, True), (a_line_lost, 3, False),
     (a_digit_changed, 3, True), (a_number_of_another_batch, 3, True), (lines_of_other_sorts, 3, True),
     (twice, 6, False), (emptied, 0, False)],
)  # fmt: skip
def test_a_damaged_log_is_used_up_to_the_damage(
    damage, intact, told, floating, tmp_path, monkeypatch, evaluated_now, capfd
):
    """Whatever is in it, the row is that of an undisturbed evaluation; also when it is stopped once more."""
    arguments = ["eval", *SMALL, "--float", "--run", tmp_path / "vit"]
    assert interrupted(monkeypatch, 6, *arguments) == 130
    (log,) = logs_of(tmp_path / "vit")
    log.write_bytes(damage(log.read_bytes().splitlines()))
    capfd.readouterr()
    evaluated_now.clear()
    append = RowLog.append
    with monkeypatch.context() as patch:
        patch.setattr(RowLog, "append", lambda self, rows: append(self, rows) or os.kill(os.getpid(), signal.SIGINT))
        assert qvw(*arguments) == 130
    assert (f"warning: {log} is damaged, or was begun with other inputs" in capfd.readouterr().err) == told
    assert evaluated_now == list(range(intact * BATCH, (intact + 1) * BATCH))
    evaluated_now.clear()
    assert qvw(*arguments) == 0
    assert evaluated_now[0] > intact * BATCH  # what was evaluated after the damage counts
    assert rows_of(tmp_path / "vit").equals(rows_of(floating))
    assert not logs_of(tmp_path / "vit")


def test_a_log_of_another_name_is_not_believed(undisturbed, tmp_path, monkeypatch, evaluated_now):
    """A line holds the hash of its evaluation: renaming the file does not make its figures those of another."""
    run = tmp_path / "vit"
    assert interrupted(monkeypatch, 3, "eval", *SMALL, "--float", "--run", run) == 130
    (floating,) = logs_of(run)
    assert interrupted(monkeypatch, 3, "eval", *SMALL, *UNIFORM, "--run", run) == 130
    (uniform,) = set(logs_of(run)) - {floating}
    floating.replace(uniform)
    evaluated_now.clear()
    assert qvw("eval", *SMALL, *UNIFORM, "--run", run) == 0
    assert evaluated_now == list(range(IMAGES))
    assert rows_of(run).equals(rows_of(undisturbed))


def test_a_log_without_a_record_is_refused(tmp_path, monkeypatch, capfd):
    """Of what run.json does not know nothing is taken over."""
    arguments = ["eval", *SMALL, *UNIFORM, "--run", tmp_path / "vit"]
    assert interrupted(monkeypatch, 3, *arguments) == 130
    (tmp_path / "vit" / "run.json").unlink()
    assert qvw(*arguments) == 2
    assert "holds an unfinished eval (eval-" in capfd.readouterr().err
    assert qvw(*arguments, "--overwrite") == 0


def test_a_kill_before_the_record_reads_no_image_again(undisturbed, tmp_path, monkeypatch, evaluated_now):
    """All batches are on the disk: the row is made of them."""
    arguments = ["eval", *SMALL, *UNIFORM, "--run", tmp_path / "vit"]
    assert interrupted(monkeypatch, 12, *arguments) == 130
    evaluated_now.clear()
    assert qvw(*arguments) == 0
    assert evaluated_now == []
    assert rows_of(tmp_path / "vit").equals(rows_of(undisturbed))


@pytest.fixture
def folder(tmp_path):
    """Images of two classes, six of each in each split."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in "ab":
            (tmp_path / "images" / split / label).mkdir(parents=True)
            for i in range(6):
                pixels = rng.integers(0, 256, (16, 16), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / label / f"{i}.png")
    return tmp_path / "images"


def of_folder(folder, run, *more):
    """The command that evaluates 4 bits on the images of a folder."""
    kwargs = json.loads(MODEL[2]) | {"num_classes": 2}
    model = [MODEL[0], "--model-kwargs", json.dumps(kwargs), *MODEL[3:]]
    return ["eval", *model, "--data", f"folder:{folder}", "--num-workers", "0", "--run", run, "--batch-size", 3,
            "--calibration-images", 8, *UNIFORM, *more]  # fmt: skip


@pytest.mark.parametrize("stop", [1, 3])
def test_broken_images_of_both_starts_are_told(folder, stop, tmp_path, monkeypatch, capfd):
    """The warning, run.json and the row are those of an undisturbed evaluation; a batch may be empty."""
    order = []
    getitem = ChosenImages.__getitem__
    with monkeypatch.context() as patch:
        patch.setattr(ChosenImages, "__getitem__", lambda self, i: (order.append(self.path(i)), getitem(self, i))[1])
        assert qvw(*of_folder(folder, tmp_path / "first")) == 0
    order = [path for path in order if "/val/" in path]
    for i in (0, 1, 2, 7):
        Path(order[i]).write_bytes(b"no image")
    told = []
    for name in ("whole", "stopped"):
        arguments = of_folder(folder, tmp_path / name, "--skip-broken")
        if name == "stopped":
            assert interrupted(monkeypatch, stop, *arguments) == 130
        capfd.readouterr()
        assert qvw(*arguments) == 0
        options = json.loads((tmp_path / name / "run.json").read_text())["steps"]["eval"]["options"]
        told.append((capfd.readouterr().err, options["skipped_images"]))
    assert told[0] == told[1]
    assert "4 of 12 images cannot be read" in told[0][0]
    assert rows_of(tmp_path / "stopped").equals(rows_of(tmp_path / "whole"))
    assert list(rows_of(tmp_path / "whole")["images"]) == [8]


def test_other_calibration_images_start_anew(folder, tmp_path, monkeypatch):
    """Other training images of the same names set other scales: what was measured with the old ones does not count."""
    run = tmp_path / "run"
    assert interrupted(monkeypatch, 2, *of_folder(folder, run)) == 130
    for path in (folder / "train").rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(path)) // 4).save(path)
    assert qvw(*of_folder(folder, run)) == 0
    assert qvw(*of_folder(folder, tmp_path / "whole")) == 0
    assert rows_of(run).equals(rows_of(tmp_path / "whole"))
