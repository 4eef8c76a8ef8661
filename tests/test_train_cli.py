"""`qvw train` as a person uses it: results, evaluation in a new process, kills, and wrong input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from analysis.storage.columns import BINS_COLUMNS, HISTORY_COLUMNS, OSCILLATION_COLUMNS
from analysis.storage.locks import exclusive
from quant.bit_plan import BitPlan
from quant.config import QATConfig
from tests.test_cli import MODEL, ROOT, VIT_KWARGS, qvw

VIT = ["vit_tiny_patch16_224", "--model-kwargs", VIT_KWARGS]
DATA = ["--data", "digits", "--num-workers", "0"]
SHORT = ["--images", "200", "--val-images", "100", "--set", "batch_size=20", "--set", "log_every=2",
         "--set", "checkpoint_every=2", "--set", "calibration_images=40", "--set", "obr_weight=0.1"]  # fmt: skip


def train(run, *arguments, model=VIT):
    """Exit code of a short training into `run`."""
    return qvw("train", *model, *DATA, "--run", run, *SHORT, *arguments)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder of a ViT with three trainings; tests copy before they change."""
    run = tmp_path_factory.mktemp("runs with a space") / "vit"
    assert train(run, "--uniform", "w3a4") == 0
    assert train(run, "--uniform", "w8a8", "--name", "w8") == 0
    assert train(run, "--float", "--name", "float") == 0
    return run


@pytest.fixture
def run(trained, tmp_path):
    """A run folder that a test may change."""
    return shutil.copytree(trained, tmp_path / "run")


def test_a_training_leaves_the_files_of_the_design(trained):
    """Tables with the promised columns, configuration, model with its plan; no checkpoint is left over."""
    for name in ("qat", "qat-w8", "qat-float"):
        folder = trained / name
        history = pd.read_parquet(folder / "history.parquet")
        assert list(history.columns) == list(HISTORY_COLUMNS)
        assert history["step"].max() == 10
        assert set(history["split"]) == {"train", "val"}
        oscillation = pd.read_parquet(folder / "oscillation.parquet")
        assert list(oscillation.columns) == list(OSCILLATION_COLUMNS)
        assert (len(oscillation) > 0) == (name == "qat")  # nothing of at most 4 bits in the others
        bins = pd.read_parquet(folder / "bins.parquet")
        assert list(bins.columns) == list(BINS_COLUMNS)
        assert set(bins["step"]) == ({0, 5, 10} if name == "qat" else set())
        assert set(bins["kind"]) == ({"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"} if name == "qat" else set())
        config = json.loads((folder / "config.json").read_text())
        assert (config["batch_size"], config["learning_rate"]) == (20, 2e-4)
        assert load_file(folder / "model.safetensors")["blocks.0.attn.qkv.weight"].shape == (96, 32)
        assert (folder / "plan.json").exists() == (name != "qat-float")
        assert not (folder / "checkpoints").exists()
        assert not list(folder.glob("*.jsonl"))
    plan = BitPlan.from_json((trained / "qat" / "plan.json").read_text())
    assert {site.bit_width for site in plan.sites} == {3, 4, 8}
    assert plan.solver.name == "uniform"
    rows = pd.read_parquet(trained / "verify.parquet").set_index("plan")
    assert list(rows.index) == ["qat", "qat-w8", "qat-float"]
    assert rows.loc["qat", "size_bytes"] < rows.loc["qat-w8", "size_bytes"] < rows.loc["qat-float", "size_bytes"]
    assert rows.loc["qat", "weight_bits"] == plan.totals.weight_bits


@pytest.mark.parametrize("name", ["qat", "qat-float"])
def test_a_new_process_measures_the_same_to_the_last_digit(run, name):
    """`eval --checkpoint` from the files alone gives loss and top-1 of the training's end, bit for bit."""
    before = pd.read_parquet(run / "verify.parquet").set_index("plan").loc[name]
    (run / "verify.parquet").unlink()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "analysis", "eval", "--run", run, "--checkpoint", run / name, "--images", "100",
         "--num-workers", "0"], cwd=ROOT, env=environment, check=True, capture_output=True,
    )  # fmt: skip
    after = pd.read_parquet(run / "verify.parquet").set_index("plan").loc[name]
    pd.testing.assert_series_equal(after, before, check_exact=True)


def test_the_runs_own_plan_is_the_default(tmp_path):
    """After sensitivity and plan, `train` takes plan.json, and leaves the plan as it was."""
    run = tmp_path / "run"
    assert qvw("sensitivity", *MODEL, *DATA, "--run", run, "--images", 40, "--bits", "2,8", "--bn", "stored") == 0
    assert qvw("plan", "--run", run, "--weight-bits", 4, "--activation-bits", 5) == 0
    assert qvw("train", "--run", run, *SHORT) == 0
    assert (run / "qat" / "plan.json").read_text() == (run / "plan.json").read_text()
    state = load_file(run / "qat" / "model.safetensors")
    assert any(key.endswith("running_mean") and value.any() for key, value in state.items())


def test_a_finished_training_is_not_repeated(run, capfd):
    """The same command says that it is done; another setting is refused by name until --overwrite."""
    before = (run / "qat" / "model.safetensors").read_bytes()
    assert train(run, "--uniform", "w3a4") == 0
    assert "--overwrite trains again" in capfd.readouterr().out
    assert train(run, "--uniform", "w3a4", "--set", "learning_rate=0.002") == 2
    assert "config.learning_rate: 0.0002 -> 0.002" in capfd.readouterr().err
    assert train(run, "--uniform", "w2a4") == 2
    assert 'plan: "w3a4" -> "w2a4"' in capfd.readouterr().err
    assert (run / "qat" / "model.safetensors").read_bytes() == before
    assert train(run, "--uniform", "w3a4", "--set", "learning_rate=0.002", "--overwrite") == 0
    assert (run / "qat" / "model.safetensors").read_bytes() != before


def test_killed_trainings_end_with_the_same_weights(trained, tmp_path):
    """Killed (SIGKILL) at two steps, each time started again: the final tensors and the tables are those of one go."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "analysis", "train", *VIT, *DATA, "--run", run, *SHORT, "--uniform", "w3a4"]
    log = run / "qat" / "history.partial.jsonl"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for step in (3, 7):
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            steps = [int(n) for n in re.findall(r'"step": (\d+)', log.read_text())] if log.exists() else []
            if steps and max(steps) >= step:
                break
            time.sleep(0.005)
        assert process.poll() is None, "the training ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (run / "qat" / "model.safetensors").exists()
    assert train(run, "--uniform", "w3a4") == 0
    state, expected = (load_file(folder / "qat" / "model.safetensors") for folder in (run, trained))
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in state.items())
    for table in ("history", "oscillation", "bins"):
        one, other = (pd.read_parquet(folder / "qat" / f"{table}.parquet") for folder in (run, trained))
        columns = one.columns.drop("seconds", errors="ignore")
        pd.testing.assert_frame_equal(one[columns], other[columns], check_exact=True)


def test_an_interrupted_training_says_so_and_refuses_another_configuration(tmp_path, monkeypatch, capfd):
    """Ctrl-C: exit code 130; going on with other settings is refused with what differs; a cut checkpoint is named."""
    import quant.train

    run, saved = tmp_path / "run", quant.train.save_checkpoint

    def stop_after_four(folder, step, **state):
        saved(folder, step, **state)
        if step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(quant.train, "save_checkpoint", stop_after_four)
    assert train(run, "--uniform", "w3a4") == 130
    assert "Kept: the training up to step 4 of 10. Resume with the same command." in capfd.readouterr().err
    monkeypatch.setattr(quant.train, "save_checkpoint", saved)
    assert train(run, "--uniform", "w3a4", "--set", "kd_weight=0.5") == 2
    assert "config.kd_weight: 1.0 -> 0.5" in capfd.readouterr().err
    optimizer = run / "qat" / "checkpoints" / "step_00000004" / "optimizer.pt"
    whole = optimizer.read_bytes()
    optimizer.write_bytes(whole[: len(whole) // 2])
    assert train(run, "--uniform", "w3a4") == 2
    assert "step_00000004 is damaged or cut short: optimizer.pt" in capfd.readouterr().err
    shutil.rmtree(optimizer.parent)
    assert train(run, "--uniform", "w3a4") == 0
    assert "resuming after 2 of 10 steps" in capfd.readouterr().out


def test_an_interrupt_before_the_first_checkpoint_promises_nothing(tmp_path, monkeypatch, capfd):
    """Where nothing can be gone on from, the message says so."""
    import quant.train

    def stop(*_arguments, **_state):
        raise KeyboardInterrupt

    monkeypatch.setattr(quant.train, "save_checkpoint", stop)
    assert train(tmp_path / "run", "--uniform", "w3a4") == 130
    assert "interrupted. Nothing new was kept: the same command starts where this one did." in capfd.readouterr().err
    monkeypatch.undo()
    assert train(tmp_path / "run", "--uniform", "w3a4", "--quiet") == 0
    assert not capfd.readouterr().out


OTHER_SIZE = VIT_KWARGS.replace('"img_size": 32', '"img_size": 64')
WRONG = {
    "two choices": (["--uniform", "w4a4", "--float"], "at most one of --plan"),
    "no plan": ([], "plan.json does not exist: make it with `qvw plan`, or give"),
    "bits that are not offered": (["--uniform", "w9a4"], "'w9a4' is not understood"),
    "a plan that quantizes nothing": (["--plan", "EMPTY"], "plans no site: nothing would be quantized"),
    "a negative temperature": (["--float", "--set", "kd_temperature=-1"], "kd_temperature=-1: should be gr"),
    "a negative lambda": (["--float", "--set", "obr_weight=-1"], "obr_weight=-1: should be greater than or equal to 0"),
    "an unknown setting": (["--float", "--set", "lr=1"], "'lr' is no setting of a training; the nearest is"),
    "a folder's name that is none": (["--float", "--name", "../x"], "is no name of a folder"),
    "a teacher of other classes": (["--float", "--teacher", VIT[0], "--teacher-kwargs", VIT_KWARGS.replace("10", "7")],
                                   "answers with 7 classes, vit_tiny_patch16_224 has 10"),
    "a teacher of another size": (["--float", "--teacher", VIT[0], "--teacher-kwargs", OTHER_SIZE],
                                  r"does not take images of size \(1, 32, 32\)"),
    "a teacher that does not exist": (["--float", "--teacher", "resnet1"], "timm has no model 'resnet1'"),
    "a teacher of nothing": (["--float", "--set", "kd_weight=0", "--teacher", VIT[0]], "nothing is distilled"),
    "a teacher of two weights": (["--float", "--teacher", VIT[0], "--teacher-pretrained", "--teacher-weights", "EMPTY"],
                                 "`--teacher-pretrained` and `--teacher-weights` were both given"),
    "a teacher of wrong arguments": (["--float", "--teacher", VIT[0], "--teacher-kwargs", '{"nothing": 1}'],
                                     f"{VIT[0]} refuses `--teacher-kwargs`"),
    "more to validate on than there are": (["--float", "--val-images", "451"], "--val-images 451, but digits has 450"),
    "no loss": (["--float", "--set", "kd_weight=0", "--set", "task_weight=0"], "nothing is learned from the images"),
    "an optimizer that cannot run here": (["--float", "--set", "optimizer=fusedadam"], "cannot be trained with"),
    "teacher weights without a teacher": (["--float", "--teacher-pretrained"], "needs --teacher MODEL"),
    "more in a batch than there are": (["--float", "--set", "batch_size=300"], "batch_size=300, but there are 200"),
    "an optimizer that is none": (["--float", "--set", "optimizer=sdg"], "timm has no optimizer 'sdg'"),
    "no such option": (["--float", "--steps", "8"], "--steps"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(WRONG))
def test_wrong_input_is_one_clear_message_and_exit_code_2(case, tmp_path, trained, capfd):
    """Standard error has one or two lines that name what came; no traceback, no results."""
    arguments, message = WRONG[case]
    content = json.loads((trained / "qat" / "plan.json").read_text()) | {"sites": []}
    (tmp_path / "empty.json").write_text(json.dumps(content))
    arguments = [str(tmp_path / "empty.json") if a == "EMPTY" else a for a in arguments]
    assert train(tmp_path / "run", *arguments) == 2
    error = capfd.readouterr().err
    lines = [line for line in error.strip().splitlines() if "warning" not in line]
    assert 1 <= len(lines) <= 2, error
    assert "Traceback" not in error
    assert re.search(message, error), error
    assert not (tmp_path / "run" / "qat" / "model.safetensors").exists()


UNTRAINABLE = {
    "frozen": ("for p in model.parameters(): p.requires_grad_(False)", "every parameter of the model is frozen"),
    "a tuple in training": ("model.head = Doubled()", r"in training mode the model returned tuple"),
    "in place": ("model.head = torch.nn.Sequential(Softened(), model.head)", "one step on a copy raised RuntimeError"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(UNTRAINABLE))
def test_a_network_that_cannot_be_trained_is_told_before_anything_is_written(case, tmp_path, capfd):
    """One step is tried on a copy first: what it raises is told in one line."""
    change, message = UNTRAINABLE[case]
    (tmp_path / "mine.py").write_text(
        "import timm, torch\n"
        "class Doubled(torch.nn.Linear):\n"
        "    def __init__(self): super().__init__(32, 10)\n"
        "    def forward(self, x):\n"
        "        y = super().forward(x)\n"
        "        return (y, y) if self.training else y\n"
        "class Softened(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        y = x.exp()\n"
        "        z = y * 2\n"
        "        y.mul_(0.5) if self.training else None\n"
        "        return z + y\n"
        f"def build():\n    model = timm.create_model('vit_tiny_patch16_224', **{json.loads(VIT_KWARGS)!r})\n"
        f"    {change}\n    return model\n"
    )
    assert train(tmp_path / "run", "--float", model=[f"{tmp_path / 'mine.py'}:build"]) == 2
    error = capfd.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_wrong_settings_leave_an_earlier_training_whole(run, capfd):
    """--overwrite removes nothing before the new training is known to be possible, and then its row too."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert train(run, "--uniform", "w3a4", "--overwrite", "--set", "optimizer=sdg") == 2
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert train(run, "--uniform", "w2a2", "--overwrite") == 0
    assert sorted(pd.read_parquet(run / "verify.parquet")["plan"]) == ["qat", "qat-float", "qat-w8"]
    assert train(run, "--uniform", "w3a4", "--overwrite", "--set", "learning_rate=1e14", "--set", "warmup=0") == 2
    assert sorted(pd.read_parquet(run / "verify.parquet")["plan"]) == ["qat-float", "qat-w8"]


def test_a_model_of_another_run_has_a_row_of_its_own(run, trained, tmp_path):
    """Measured in this run, it does not take the place of this run's own."""
    before = pd.read_parquet(run / "verify.parquet")
    assert qvw("eval", "--run", run, "--checkpoint", trained / "qat", "--images", 100) == 0
    after = pd.read_parquet(run / "verify.parquet")
    pd.testing.assert_frame_equal(after.iloc[:-1], before)
    assert after["plan"].iloc[-1] == str((trained / "qat").resolve())


def test_two_processes_do_not_train_into_one_folder(run, capfd):
    """While one holds the lock of a training the other is refused; another name is free."""
    with exclusive(run / ".qat.lock", "qat"):
        assert train(run, "--uniform", "w2a2", "--overwrite") == 2
        assert "Another process runs qat" in capfd.readouterr().err
        assert (run / "qat" / "model.safetensors").exists()
        assert train(run, "--uniform", "w2a2", "--name", "other") == 0
    assert not (run / ".qat.lock").exists()


@pytest.mark.parametrize("damage", ["5\n", "[" * 100_000 + "\n", "gone"])
def test_a_damaged_history_is_told_on_resuming(damage, tmp_path, monkeypatch, capfd):
    """Lines that are no rows, or rows that are missing up to the checkpoint: refused, not shortened in silence."""
    import quant.train

    run, saved = tmp_path / "run", quant.train.save_checkpoint

    def stop(folder, step, **state):
        saved(folder, step, **state)
        raise KeyboardInterrupt

    monkeypatch.setattr(quant.train, "save_checkpoint", stop)
    assert train(run, "--uniform", "w3a4") == 130
    log = run / "qat" / "history.partial.jsonl"
    if damage == "gone":
        log.unlink()
    else:
        log.write_text(damage + log.read_text())
    assert train(run, "--uniform", "w3a4") == 2
    assert re.search("is damaged|lacks rows of its history", capfd.readouterr().err)


def test_validation_images_that_are_gone_are_told(tmp_path, capfd):
    """As many as before, where the command does not say; an option that was not typed is not to blame."""
    for i in range(40):
        path = tmp_path / "images" / ("train", "val")[i % 2] / str(i // 4) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (32, 32), 6 * i).save(path)
    options = [
        "--data",
        f"folder:{tmp_path / 'images'}",
        "--input-size",
        "1,32,32",
        "--mean",
        "0.5",
        "--std",
        "0.5",
        "--num-workers",
        "0",
        "--float",
        "--set",
        "steps=1",
        "--set",
        "batch_size=8",
        "--run",
        tmp_path / "run",
    ]
    assert qvw("train", *VIT, *options, "--val-images", 20) == 0
    path.unlink()
    capfd.readouterr()
    assert qvw("train", *VIT, *options) == 2
    error = capfd.readouterr().err
    assert re.search(r"run holds qat validated on 20 images, \S+ has 19 in its split 'val'", error), error
    assert qvw("train", *VIT, *options, "--val-images", 20) == 2
    assert re.search(r"--val-images 20, but \S+ has 19 in its split 'val'", capfd.readouterr().err)


def test_one_image_a_batch_needs_a_network_without_batchnorm(tmp_path, capfd):
    """BatchNorm has no variance of one image."""
    assert train(tmp_path / "run", "--float", "--set", "batch_size=1", model=MODEL) == 2
    assert "BatchNorm cannot be trained on one image at a time" in capfd.readouterr().err


def test_a_diverging_training_stops_and_says_what_is_kept(tmp_path, capfd):
    """Exit code 2; no model is written, the history up to there stays."""
    run = tmp_path / "run"
    assert train(run, "--uniform", "w3a4", "--set", "learning_rate=1e14", "--set", "warmup=0") == 2
    assert re.search(r"diverged at step \d+: .*Lower --set learning_rate .*--overwrite", capfd.readouterr().err)
    assert not (run / "qat" / "model.safetensors").exists()
    assert (run / "qat" / "history.partial.jsonl").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", "model.safetensors cannot be loaded"),
        ("absent", "has no model.safetensors"),
        ("another plan", "was trained with another plan than the one beside it"),
        ("another network", "The model has no site"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_cannot_be_used_is_named(damage, message, run, tmp_path, capfd):
    """EntryPoint short, not there, with a changed plan, or of another network."""
    folder, target = run / "qat", run
    if damage == "cut":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "absent":
        folder = tmp_path
    elif damage == "another plan":
        content = json.loads((folder / "plan.json").read_text())
        content["sites"][0]["signed"] = not content["sites"][0]["signed"]  # the same cost
        (folder / "plan.json").write_text(json.dumps(content))
    else:
        target = tmp_path / "other"
        assert train(target, "--float", model=MODEL) == 0
    assert qvw("eval", "--run", target, "--checkpoint", folder, "--images", 100) == 2
    error = capfd.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error


def test_help_lists_every_setting_with_its_default(capfd):
    """What --set takes is told by --help, as the configuration has it."""
    assert qvw("train", "--help") == 0
    text = " ".join(capfd.readouterr().out.split())
    for name, value in asdict(QATConfig()).items():
        assert f"{name}={'none' if value is None else value}" in text


def test_the_seed_is_that_of_the_training(run):
    """--seed is the setting `seed`: run.json and the configuration say it, and the training is another one."""
    assert train(run, "--uniform", "w3a4", "--name", "seeded", "--seed", "3") == 0
    assert json.loads((run / "qat-seeded" / "config.json").read_text())["seed"] == 3
    steps = json.loads((run / "run.json").read_text())["steps"]
    assert (steps["qat-seeded"]["seed"], steps["qat"]["seed"]) == (3, 0)
    first, other = (load_file(run / name / "model.safetensors") for name in ("qat", "qat-seeded"))
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert steps["qat-seeded"]["inputs"]["images_sha256"] == steps["qat"]["inputs"]["images_sha256"]


def test_a_training_that_does_harm_says_so(tmp_path, capfd):
    """Where the validation loss ends above its start, beyond its error, both are told and what to change."""
    run = tmp_path / "run"
    assert train(run, "--float", "--set", "learning_rate=0.5", "--set", "kd_weight=0") == 0
    told = capfd.readouterr()
    assert re.search(r"10 steps took top-1 from .* and the loss from [\d.]+ to [\d.]+ \(± [\d.]+\)", told.out)
    assert re.search(r"loss rose by more than two standard errors: .*Lower learning_rate", told.err)


def test_a_training_that_has_not_ended_is_no_model(trained, tmp_path, capfd):
    """Its folder is told from one that never was."""
    (tmp_path / "qat" / "checkpoints").mkdir(parents=True)
    assert qvw("eval", "--run", trained, "--checkpoint", tmp_path / "qat", "--images", 100) == 2
    assert "has not finished. Run the same `qvw train` again" in capfd.readouterr().err
