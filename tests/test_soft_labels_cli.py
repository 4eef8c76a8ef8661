"""`qvw soft-labels` and `qvw train --soft-labels` as a person uses them: exact views, kills, resuming, wrong input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from analysis.data import load_data
from analysis.inputs.listing import InputConfig
from analysis.inputs.training_data import TrainingImages, stored_crops_of, training_batches
from analysis.models import ModelSource, load_model
from analysis.storage.locks import exclusive
from quant.config import QATConfig
from quant.errors import InputError
from quant.label_compression import compress
from quant.soft_label_format import UNREADABLE
from quant.soft_label_writer import partial_of
from quant.soft_labels import SoftLabels
from quant.step_batches import StepBatches
from tests.test_cli import KWARGS, MODEL, ROOT, VIT_KWARGS, forks, qvw

VIT = ["vit_tiny_patch16_224", "--model-kwargs", VIT_KWARGS]
DATA = ["--data", "digits", "--num-workers", "0"]
IMAGES, CROPS = 60, 6
SHORT = ["--images", IMAGES, "--val-images", "40", "--set", "batch_size=12", "--set", "crops_per_image=3",
         "--set", "log_every=1", "--set", "gradient_norms_every=2", "--set", "checkpoint_every=2",
         "--set", "calibration_images=20", "--uniform", "w3a4"]  # fmt: skip
SIZE = {"digits": (1, 32, 32), "folder": (3, 24, 16)}
TEACHER = """
import torch
SEEN = []
class Teacher(torch.nn.Module):
    num_classes = {classes}
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d({channels}, 8, 5, stride=2)
        self.head = torch.nn.Linear(8, {classes})
    def forward(self, x):
        if len(x) > 2:
            SEEN.append(x.clone())
        return self.head(self.conv(x).relu().mean(dim=(2, 3)) * 10)
def build():
    return Teacher()
"""


def make(out, *arguments, teacher=MODEL, data=DATA, images=IMAGES):
    """Exit code of the making of soft labels."""
    return qvw("soft-labels", *teacher, *data, "--images", images, "--crops", CROPS, "--out", out, *arguments)


def train(run, *arguments, student=VIT):
    """Exit code of a short training."""
    return qvw("train", *student, *DATA, "--run", run, *SHORT, *arguments)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Soft labels of a ResNet on digits; tests copy before they change."""
    out = tmp_path_factory.mktemp("labels with a space") / "resnet.soft"
    assert make(out) == 0
    return out


@pytest.fixture
def labels(made, tmp_path):
    """A file of soft labels that a test may change."""
    return shutil.copy(made, tmp_path / "labels.soft")


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    """A run folder of a ViT taught by the ResNet's stored labels."""
    run = tmp_path_factory.mktemp("runs") / "vit"
    assert train(run, "--soft-labels", made) == 0
    return run


@pytest.fixture
def folder(tmp_path):
    """Twelve image files of several sizes, two classes."""
    rng = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + 3 * i, 50 - 2 * i, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def asked(kind, out, tmp_path, *arguments, folder=None):
    """Make soft labels by a teacher that keeps what it sees; its model, the views (images * crops, ...), the data."""
    channels, height, width = SIZE[kind]
    classes, images = (10, 16) if kind == "digits" else (2, 12)
    (tmp_path / "mine.py").write_text(TEACHER.format(channels=channels, classes=classes))
    spec = "digits" if kind == "digits" else f"folder:{folder}"
    prepared = ["--input-size", f"{channels},{height},{width}", "--mean", "0.4", "--std", "0.3", "--holdout", "0"]
    source = f"{tmp_path / 'mine.py'}:build"
    data = ["--data", spec, "--num-workers", "0", *prepared]
    assert make(out, "--batch-size", 8, *arguments, teacher=[source], data=data, images=images) == 0
    seen = torch.cat(sys.modules["qvw_user_mine"].SEEN)
    config = InputConfig(input_size=SIZE[kind], mean=(0.4,) * channels, std=(0.3,) * channels,
                         interpolation="bilinear" if kind == "digits" else "bicubic")  # fmt: skip
    chosen = load_data(spec, split="train", images=images, seed=0, input_config=config, num_classes=classes,
                       holdout=0.0, skip_broken="--skip-broken" in arguments)  # fmt: skip
    return load_model(ModelSource(model=source)), seen, chosen, config


@pytest.mark.parametrize("kind", sorted(SIZE))
def test_the_student_gets_what_the_teacher_saw(kind, tmp_path, folder):
    """To the bit, and the teacher's answer to it compresses to what is stored: for all crops, over several epochs."""
    out = tmp_path / "labels.soft"
    teacher, seen, data, config = asked(kind, out, tmp_path, folder=folder)
    labels = SoftLabels(out)
    assert len(seen) == data.images * CROPS
    assert len(torch.unique(seen, dim=0)) == len(seen)  # no two views are the same
    with torch.inference_mode():
        answers = [compress(teacher(part), compression="marginal_smoothing", top_k=labels.header.top_k)
                   for part in seen.split(8)]  # fmt: skip
    kept, classes = (torch.cat(parts) for parts in zip(*answers, strict=True))
    images = TrainingImages(data, QATConfig(crops_per_image=2), config, labels)
    found = set()
    for epoch in range(CROPS // 2):
        for i in range(data.images):
            item = images[(epoch, i)]
            assert item.label == data.dataset.labels[i]
            for view, stored, crop in zip(
                item.views, item.stored, stored_crops_of(0, epoch, i, crops=2, stored=CROPS), strict=True
            ):
                assert torch.equal(view, seen[i * CROPS + crop])
                assert torch.equal(torch.tensor(stored.kept, dtype=torch.float16), kept[i * CROPS + crop])
                assert list(stored.classes) == classes[i * CROPS + crop].tolist()
                found.add((i, crop))
    assert len(found) == len(seen)  # in CROPS / 2 epochs every crop once


def test_crops_are_those_that_were_asked_for(tmp_path, folder):
    """Areas and shapes within their bounds, about half mirrored; another seed draws others."""
    out = tmp_path / "labels.soft"
    _, _, data, _ = asked("folder", out, tmp_path, "--scale", "0.2,0.5", "--ratio", "0.5,2", folder=folder)
    labels = SoftLabels(out)
    crops = [labels.crop(i, j).crop for i in range(data.images) for j in range(CROPS)]
    sizes = [data.dataset.raw(i).size for i in range(data.images) for _ in range(CROPS)]
    for (top, left, height, width, _), (w, h) in zip(crops, sizes, strict=True):
        assert 0 <= top <= h - height
        assert 0 <= left <= w - width
        assert 0.15 < height * width / (w * h) < 0.6  # rounded to whole pixels
        assert 0.4 < width / height < 2.4
    assert 0.3 < sum(crop.flip for crop in crops) / len(crops) < 0.7
    asked("folder", tmp_path / "other", tmp_path, "--crop-seed", 1, "--flip", 0, folder=folder)
    other = SoftLabels(tmp_path / "other")
    others = [other.crop(i, j).crop for i in range(data.images) for j in range(CROPS)]
    assert not set(crops) & set(others)
    assert not any(crop.flip for crop in others)


@given(seed=st.integers(0, 2**32 - 1), image=st.integers(0, 10**6), stored=st.integers(1, 20), data=st.data())
def test_a_crop_is_seen_again_only_when_all_were(seed, image, stored, data):
    """Never twice in a step; over stored // crops epochs, whose union is without repetition; a function of its keys."""
    crops = data.draw(st.integers(1, stored))
    turns = stored // crops
    first = data.draw(st.integers(0, 3)) * turns
    seen = [n for epoch in range(first, first + turns)
            for n in stored_crops_of(seed, epoch, image, crops=crops, stored=stored)]  # fmt: skip
    assert len(set(seen)) == len(seen) == turns * crops
    assert set(seen) <= set(range(stored))
    again = stored_crops_of(seed, first, image, crops=crops, stored=stored)
    assert again == seen[:crops]


def test_epochs_images_and_seeds_draw_their_own_crops():
    """Forty orders of 20 crops are forty."""
    keys = [(seed, epoch, image) for seed in (0, 1) for epoch in (0, 1) for image in range(10)]
    assert len({tuple(stored_crops_of(*key, crops=20, stored=20)) for key in keys}) == 40


def batches_of(made, config, **options):
    """The batches of a training with stored crops on digits."""
    labels, workers = SoftLabels(made), options.pop("num_workers", 0)
    input_config = InputConfig(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,), interpolation="bilinear")
    data = load_data("digits", split="train", images=IMAGES, seed=0, input_config=input_config, num_classes=10)
    sampler = StepBatches(IMAGES, batch_size=4, steps=20, seed=0, **options)
    return list(training_batches(TrainingImages(data, config, input_config, labels), sampler, data,
                                 num_workers=workers))  # fmt: skip


@forks
def test_processes_and_workers_share_the_same_batches(made):
    """Two processes get the halves of each batch, worker processes change nothing; labels stay with their views."""
    config = QATConfig(crops_per_image=3)
    whole = batches_of(made, config)
    for one, other in zip(whole, batches_of(made, config, num_workers=2), strict=True):
        assert all(map(torch.equal, one, other))
    parts = [batches_of(made, config, rank=rank, world=2) for rank in (0, 1)]
    for step, (x, labels, soft) in enumerate(whole):
        assert (len(x), len(labels), tuple(soft.shape)) == (12, 12, (12, 10))
        for rank in (0, 1):
            mine = [n for i in range(rank, 4, 2) for n in range(3 * i, 3 * i + 3)]
            assert all(map(torch.equal, parts[rank][step], (x[mine], labels[mine], soft[mine])))


def test_several_views_need_no_stored_labels(tmp_path):
    """Augmented again by a function of seed, epoch and image, the first as if it were the only one."""
    input_config = InputConfig(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))
    data = load_data("digits", split="train", images=10, seed=0, input_config=input_config, num_classes=10)
    one, three = (TrainingImages(data, QATConfig(crop_area=0.3, crops_per_image=n), input_config) for n in (1, 3))
    views = three[(2, 5)].views
    assert torch.equal(views[:1], one[(2, 5)].views)
    assert torch.equal(views, three[(2, 5)].views)
    assert len(torch.unique(views, dim=0)) == 3


def test_a_training_learns_from_stored_labels(trained, made):
    """The term `soft` takes the place of `kd`; run.json tells the file's hash and header."""
    history = pd.read_parquet(trained / "qat" / "history.parquet")
    rows = history[history["split"] == "train"]
    assert rows["kd"].isna().all()
    assert (rows["soft"] > 0).all()
    assert (rows["grad_soft"].dropna() > 0).all()
    assert rows["grad_soft"].notna().sum() >= 3
    np.testing.assert_allclose(
        rows["loss"], rows[["task", "soft", "obr_distance", "obr_variance"]].sum(axis=1), rtol=1e-5
    )
    assert rows["step"].max() == IMAGES // 12  # an epoch is as many crops as there are images
    step = json.loads((trained / "run.json").read_text())["steps"]["qat"]
    assert step["inputs"]["soft_labels_sha256"] == SoftLabels(made).sha256
    assert step["options"]["soft_labels_header"]["crops"] == CROPS


def test_a_stopped_training_ends_with_the_same_bits(trained, made, tmp_path, monkeypatch, capfd):
    """Interrupted at a checkpoint; other soft labels are refused, the same resume to the same weights."""
    import quant.train

    run, saved = tmp_path / "run", quant.train.save_checkpoint

    def stop(folder, step, **state):
        saved(folder, step, **state)
        raise KeyboardInterrupt

    monkeypatch.setattr(quant.train, "save_checkpoint", stop)
    assert train(run, "--soft-labels", made) == 130
    monkeypatch.setattr(quant.train, "save_checkpoint", saved)
    assert make(tmp_path / "other", "--crop-seed", 1) == 0
    assert train(run, "--soft-labels", tmp_path / "other") == 2
    assert "with other inputs (other soft labels)" in capfd.readouterr().err
    assert train(run, "--soft-labels", made) == 0
    state, expected = (load_file(path / "qat" / "model.safetensors") for path in (run, trained))
    assert all(torch.equal(value, expected[key]) for key, value in state.items())


def test_making_them_is_killed_and_goes_on_to_the_same_bytes(made, tmp_path):
    """SIGKILL in the middle; the same command then ends with the file of one go, its partial gone."""
    out = tmp_path / "labels.soft"
    command = [sys.executable, "-m", "analysis", "soft-labels", *MODEL, *DATA, "--images", str(IMAGES), "--crops",
               str(CROPS), "--out", out]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    deadline, partial = time.monotonic() + 120, partial_of(out)
    while process.poll() is None and time.monotonic() < deadline:
        if partial.exists() and partial.stat().st_size > 1000:
            break
        time.sleep(0.001)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert not errors.strip().replace(b"qvw: warning: resnet18 has untrained weights: give --pretrained or --weights "
                                      b"FILE for trained ones.", b"")  # fmt: skip  # no terminal: no progress bar
    assert not out.exists()
    assert make(out) == 0
    assert out.read_bytes() == made.read_bytes()
    assert not partial.exists()
    assert not list(tmp_path.glob(".*"))


def test_interrupted_it_says_so(tmp_path, monkeypatch, capfd):
    """Ctrl-C: exit code 130, what was done is kept; other crops are refused until --overwrite."""
    import analysis.steps.soft_label_step as step

    class Stopping(step.SoftLabelWriter):
        def append(self, *parts):
            super().append(*parts)
            if self.done == 192:
                raise KeyboardInterrupt

    out = tmp_path / "labels.soft"
    with monkeypatch.context() as patch:
        patch.setattr(step, "SoftLabelWriter", Stopping)
        assert make(out) == 130
    assert f"Kept: 128 of {IMAGES * CROPS} crops. Resume with the same command" in capfd.readouterr().err
    assert make(out, "--flip", 0) == 2
    assert "begun with other inputs (flip: 0.5 -> 0.0)" in capfd.readouterr().err
    assert make(out) == 0
    assert f"resuming after 128 of {IMAGES * CROPS} crops" in capfd.readouterr().out


def test_what_is_there_is_not_made_again(labels, capfd):
    """The same command says so; other inputs are refused by name; --overwrite makes the file again."""
    before = labels.read_bytes()
    assert make(labels) == 0
    assert "holds these soft labels already" in capfd.readouterr().out
    assert make(labels, "--crop-seed", 1) == 2
    assert "holds soft labels with other inputs (seed: 0 -> 1)" in capfd.readouterr().err
    with exclusive(labels.with_name(".labels.soft.lock"), "it"):
        assert make(labels, "--crop-seed", 1, "--overwrite") == 2
        assert re.search("Another process runs the making of .*choose another `--out`", capfd.readouterr().err)
    assert labels.read_bytes() == before
    assert make(labels, "--crop-seed", 1, "--overwrite", "--quiet") == 0
    assert capfd.readouterr().out == ""
    assert SoftLabels(labels).header.seed == 1


def test_a_run_folder_tells_images_and_teacher(trained, tmp_path):
    """With --run alone its own network is asked, of the images of its training, and the run stays as it was."""
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    out = tmp_path / "labels.soft"
    assert qvw("soft-labels", "--run", trained, "--images", IMAGES, "--num-workers", 0, "--crops", 3, "--out", out) == 0
    header = SoftLabels(out).header
    assert (header.teacher, header.images) == ("vit_tiny_patch16_224", IMAGES)
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before
    assert not list(tmp_path.glob("*.run"))


UNFIT = {
    "other images": (["--images", 50], [], "is of other images: it has 50 of split 'train', this training 60"),
    "another choice of them": (["--seed", 5], [], "has 60 of split 'train', this training 60 .*, and not the same"),
    "another temperature": (["--temperature", 2], [], "kd_temperature=1, but .* was made with the temperature 2"),
    "a temperature of its own": ([], ["--set", "kd_temperature=3"], "kd_temperature=3, but .* the temperature 1"),
    "a negative temperature": ([], ["--set", "kd_temperature=-1"], "kd_temperature=-1: should be greater than 0"),
    "a negative lambda": ([], ["--set", "kd_weight=-1"], "kd_weight=-1: should be greater than or equal to 0"),
    "nothing distilled": ([], ["--set", "kd_weight=0"], "--soft-labels was given, but kd_weight is 0"),
    "a teacher too": ([], ["--teacher", VIT[0]], "holds a teacher's answers already. Leave out --teacher"),
    "weights of a teacher": ([], ["--teacher-pretrained"], "needs --teacher MODEL"),
    "more crops than stored": ([], ["--set", "crops_per_image=12"], "crops_per_image=12, but .* has 6 crops"),
    "a batch of parts": ([], ["--set", "crops_per_image=5"], r"batch_size=12 cannot be shared .*a multiple of 5"),
    "crops drawn twice": ([], ["--set", "crop_area=0.5"], r"crop_area=0.5 was set, but .* \(scale 0.08,0.936"),
    "flips drawn twice": ([], ["--set", "horizontal_flip=0.5"], "horizontal_flip=0.5 was set, but the crops are"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(UNFIT))
def test_labels_that_do_not_fit_are_refused(case, made, tmp_path, capfd):
    """Exit code 2, one or two lines that name what came; no results."""
    options, arguments, message = UNFIT[case]
    labels = made
    if options:
        labels = tmp_path / "labels.soft"
        assert make(labels, *options) == 0
    assert train(tmp_path / "run", "--soft-labels", labels, *arguments) == 2
    refused(message, tmp_path / "run", capfd)


def test_a_teacher_prepares_its_images_otherwise(tmp_path, folder):
    """The crops are places in the images: mean, deviation and size of student and teacher are their own affairs."""
    labels = tmp_path / "labels.soft"
    network = ["resnet18", "--model-kwargs", '{"num_classes": 2}']
    data = ["--data", f"folder:{folder}", "--num-workers", "0", "--holdout", "0"]
    assert make(labels, "--input-size", "3,32,24", teacher=network, data=data, images=12) == 0  # timm's mean and std
    student = [*data, "--mean", "0.5", "--std", "0.25", "--input-size", "3,48,48"]
    settings = ["--images", 12, "--val-images", 12, "--set", "batch_size=6", "--set", "crops_per_image=2", "--set",
                "steps=1", "--set", "calibration_images=6", "--uniform", "w8a8"]  # fmt: skip
    assert qvw("train", *network, *student, "--run", tmp_path / "run", *settings, "--soft-labels", labels) == 0


DAMAGED = {
    "cut short": (lambda content: content[:-100], "cut short or damaged: .*--overwrite"),
    "a flipped byte": (lambda content: content[:3000] + bytes([content[3000] ^ 4]) + content[3001:], "damaged: "),
    "another file": (lambda content: b"PK" + content, "labels.soft is no file of soft labels: `qvw soft-labels"),
    "an earlier version": (
        lambda content: content.replace(b'"version": 2', b'"version": 1', 1),
        "labels.soft was made by another version.*--overwrite",
    ),
    "empty": (lambda content: b"", "is no file of soft labels"),
    "absent": (None, "File '.*labels.soft' does not exist"),
}


@pytest.mark.parametrize("case", sorted(DAMAGED))
def test_a_damaged_file_is_refused(case, labels, tmp_path, capfd):
    """Before anything is written; a damaged one is not taken for a finished one by its maker either."""
    change, message = DAMAGED[case]
    if change is None:
        labels.unlink()
    else:
        labels.write_bytes(change(labels.read_bytes()))
    assert train(tmp_path / "run", "--soft-labels", labels) == 2
    refused(message, tmp_path / "run", capfd)
    if case in ("cut short", "a flipped byte"):
        assert make(labels) == 2
        assert re.search(message, capfd.readouterr().err)
        assert make(labels, "--overwrite") == 0
        assert SoftLabels(labels).header.images == IMAGES


def test_labels_of_other_classes_are_refused(made, tmp_path, capfd):
    """The student's head and the labels are of the same classes."""
    student = ["vit_tiny_patch16_224", "--model-kwargs", VIT_KWARGS.replace('"num_classes": 10', '"num_classes": 7')]
    data = ["--data", "digits", "--num-workers", "0"]
    (tmp_path / "map.txt").write_text("".join(f"{digit},{digit % 7}\n" for digit in range(10)))
    assert qvw("train", *student, *data, "--run", tmp_path / "run", *SHORT, "--class-map", tmp_path / "map.txt",
               "--soft-labels", made) == 2  # fmt: skip
    refused("has soft labels of 10 classes, vit_tiny_patch16_224 has 7", tmp_path / "run", capfd)


def test_crops_that_would_all_be_the_same_are_refused(tmp_path, capfd):
    """Several crops of an image need stored ones, or random ones."""
    assert train(tmp_path / "run") == 2
    refused("crops_per_image=3, but all would be the whole image. Give --soft-labels", tmp_path / "run", capfd)
    assert train(tmp_path / "run", "--set", "crop_area=0.5") == 0


def refused(message, run, capfd):
    """Standard error tells it in one or two lines; there is no run folder."""
    error = capfd.readouterr().err
    lines = [line for line in error.strip().splitlines() if "warning" not in line]
    assert 1 <= len(lines) <= 2, error
    assert "Traceback" not in error
    assert re.search(message, error), error
    assert not run.exists()


WRONG = {
    "no teacher": ([], DATA, [], "soft labels need a teacher: MODEL, or --run"),
    "no images": (MODEL, [], [], "soft labels need images: --data D, or --run"),
    "scale the wrong way": (MODEL, DATA, ["--scale", "0.9,0.1"], "--scale 0.9,0.1: expected two numbers above 0"),
    "scale above 1": (MODEL, DATA, ["--scale", "0.5,1.5"], "--scale 0.5,1.5: expected"),
    "no ratio": (MODEL, DATA, ["--ratio", "0,1"], "--ratio 0,1: expected two numbers from 0.001 to 1000, the"),
    "an endless ratio": (MODEL, DATA, ["--ratio", "1,inf"], "--ratio 1,inf: expected two numbers from 0.001 to 1000"),
    "no number": (MODEL, DATA, ["--temperature", "nan"], "--temperature nan: expected a finite number of at least 1e-"),
    "an endless temperature": (MODEL, DATA, ["--temperature", "inf"], "--temperature inf: expected a finite number of"),
    "hardly a temperature": (MODEL, DATA, ["--temperature", "1e-300"], "--temperature 1e-300: expected a finite numbe"),
    "no probability": (MODEL, DATA, ["--flip", "nan"], "--flip nan: expected a probability, from 0 to 1"),
    "no scale": (MODEL, DATA, ["--scale", "nan,nan"], "--scale nan,nan: expected two numbers above 0 at most 1"),
    "one number": (MODEL, DATA, ["--scale", "0.5"], "has 1 values, expected 2"),
    "more than all classes": (MODEL, DATA, ["--top-k", "11"], "--top-k 11, but resnet18 has 10 classes"),
    "a negative temperature": (MODEL, DATA, ["--temperature", "-1"], "'--temperature': -1.0 is not in the range"),
    "an unknown compression": (MODEL, DATA, ["--compression", "zip"], "'zip' is not one of 'hard', 'smoothing'"),
    "a file of another kind": (MODEL, DATA, ["--out", "KEPT"], "exists and is not a file of soft labels"),
    "a folder": (MODEL, DATA, ["--out", "FOLDER"], "is a folder. Name a file, such as"),
    "no such network": (["resnet1"], DATA, [], "timm has no model 'resnet1'"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(WRONG))
def test_wrong_input_is_one_clear_message_and_exit_code_2(case, tmp_path, capfd):
    """What came, what was expected; nothing is written."""
    teacher, data, arguments, message = WRONG[case]
    (tmp_path / "kept").write_text("mine")
    places = {"KEPT": tmp_path / "kept", "FOLDER": tmp_path}
    arguments = [places.get(argument, argument) for argument in arguments]
    assert make(tmp_path / "labels.soft", *arguments, "--overwrite", teacher=teacher, data=data) == 2
    error = capfd.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "mine"


def test_a_teacher_of_nothing_is_refused(tmp_path, capfd):
    """NaN is no label."""
    (tmp_path / "mine.py").write_text(
        f"import timm, torch\ndef build():\n    model = timm.create_model('resnet18', **{json.loads(KWARGS)!r})\n"
        "    torch.nn.init.constant_(model.fc.bias, float('nan'))\n    return model\n"
    )
    assert make(tmp_path / "labels", teacher=[f"{tmp_path / 'mine.py'}:build"]) == 2
    assert "answers with NaN or Inf. Look for other weights" in capfd.readouterr().err
    assert not (tmp_path / "labels").exists()


def test_an_image_that_changed_is_named(tmp_path, folder):
    """Same name, same label, other pixels: the box would be another view, and --skip-broken does not pass over it."""
    out = tmp_path / "labels.soft"
    _, _, data, config = asked("folder", out, tmp_path, "--skip-broken", folder=folder)
    name = data.dataset.path(4)
    with Image.open(name) as image:
        image.rotate(180).save(name)
    images = TrainingImages(data, QATConfig(), config, SoftLabels(out))
    with pytest.raises(InputError, match=rf"{re.escape(name)} is not the image that .*labels\.soft was made of"):
        list(training_batches(images, StepBatches(12, batch_size=12, steps=1, seed=0), data, num_workers=0))


def test_a_broken_image_is_named_or_left_out(tmp_path, folder, capfd):
    """Without --skip-broken an error; with it a mark in the file, and another image in its place in training."""
    out = tmp_path / "labels.soft"
    (folder / "a" / "4.png").write_bytes(b"no image")
    with pytest.raises(AssertionError, match="assert 2 == 0"):
        asked("folder", out, tmp_path, folder=folder)
    assert "4.png cannot be read" in capfd.readouterr().err
    _, _, data, config = asked("folder", tmp_path / "skipped", tmp_path, "--skip-broken", folder=folder)
    assert "1 of 12 images cannot be read and were left out" in capfd.readouterr().err
    labels, broken = SoftLabels(tmp_path / "skipped"), data.dataset.names.index("a/4.png")
    assert [i for i in range(12) if labels.crop(i, 0).crop == UNREADABLE] == [broken]
    good = np.random.default_rng(1).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    Image.fromarray(good).save(folder / "a" / "4.png")  # fixed since, but no teacher has seen it
    images = TrainingImages(data, QATConfig(crops_per_image=2), config, labels)
    sampler = StepBatches(12, batch_size=12, steps=1, seed=0)
    ((x, _, soft),) = training_batches(images, sampler, data, num_workers=0)
    assert (len(x), len(soft)) == (24, 24)
    assert data.skipped == ["a/4.png"]
