"""A teacher gets images as it was trained with them, whatever its student's preprocessing."""

import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from analysis.inputs.listing import InputConfig
from analysis.training.teacher import PreparedTeacher
from tests.digits_vit import qvw

fractions = st.floats(0.05, 0.95)


@settings(max_examples=50)
@given(st.tuples(*[fractions] * 6), st.tuples(*[fractions] * 6))
def test_pixels_are_those_of_the_teachers_own_preprocessing(means, deviations):
    """From one normalization to the other, the pixels are the same as normalized from the picture (float64 oracle)."""
    pixels = np.random.default_rng(0).random((2, 3, 4, 4))
    configs = [
        InputConfig(input_size=(3, 4, 4), mean=means[part], std=deviations[part]) for part in (slice(3), slice(3, 6))
    ]
    normal = [(pixels - np.array(c.mean)[:, None, None]) / np.array(c.std)[:, None, None] for c in configs]
    seen = PreparedTeacher(nn.Identity(), *configs)(torch.tensor(normal[0], dtype=torch.float32))
    np.testing.assert_allclose(seen.numpy(), normal[1], atol=2e-4)


def test_a_teacher_of_another_size_gets_it():
    """A constant picture stays constant; the size is the teacher's."""
    student = InputConfig(input_size=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    own = InputConfig(input_size=(3, 12, 16), mean=(0.25,) * 3, std=(0.5,) * 3)
    seen = PreparedTeacher(nn.Identity(), student, own)(torch.zeros(1, 3, 8, 8))
    assert seen.shape == (1, 3, 12, 16)
    torch.testing.assert_close(seen, torch.full_like(seen, 0.5))


@pytest.fixture(scope="module")
def images(shared, tmp_path_factory):
    """A hundred images of CIFAR-10 to train on, a hundred to validate."""
    root = tmp_path_factory.mktemp("cifar")
    tool = shared / "tools" / "unpack_cifar10.py"
    subprocess.run([sys.executable, str(tool), str(root), "--train", "40", "--val", "200"], check=True)
    return root


@pytest.mark.parametrize(
    ("arguments", "low", "high"),
    [
        (["--teacher-mean", "0.485,0.456,0.406", "--teacher-std", "0.229,0.224,0.225"], 79, 84),
        ([], 20, 40),  # a factory that says nothing gets the student's images, and it shows
    ],
)
def test_the_teachers_accuracy_is_that_of_its_own_images(shared, images, tmp_path, capsys, arguments, low, high):
    """ResNet-20 as the teacher of a ViT with pixels from 0 to 1: right with its own preprocessing alone."""
    models, weights = shared / "models.py", shared / "weights"
    student = [f"{models}:cifar10_vit_d128_l4", "--weights", weights / "cifar10_vit_d128_l4.safetensors"]
    preparation = ["--mean", "0,0,0", "--std", "1,1,1", "--input-size", "3,32,32", "--num-workers", "0"]
    teacher = ["--teacher", f"{models}:cifar10_resnet20", "--teacher-weights", weights / "cifar10_resnet20.safetensors"]
    command = [*student, "--data", f"folder:{images}", *preparation, *teacher, *arguments, "--uniform", "w8a8",
               "--set", "steps=1", "--set", "batch_size=8", "--set", "calibration_images=16",
               "--run", tmp_path / "run"]  # fmt: skip
    assert qvw("train", *command) == 0
    printed = capsys.readouterr()
    accuracy = float(re.search(r"teacher ([\d.]+) %", printed.out)[1])
    assert low <= accuracy <= high
    assert "float student" in printed.out
    recorded = (tmp_path / "run" / "run.json").read_text()
    assert ("0.485" in recorded) == bool(arguments)
    assert len(pd.read_parquet(tmp_path / "run" / "verify.parquet")) == 1


def test_a_timm_teacher_brings_its_preprocessing(tmp_path, capsys, images):
    """Timm's configuration is used: mean, deviation and size of the published network; said, and part of the inputs."""
    student = ["resnet10t", "--model-kwargs", '{"num_classes": 10}', "--mean", "0,0,0", "--std", "1,1,1",
               "--input-size", "3,32,32", "--num-workers", "0", "--data", f"folder:{images}"]  # fmt: skip
    command = [*student, "--uniform", "w8a8", "--teacher", "resnet10t", "--teacher-kwargs", '{"num_classes": 10}',
               "--images", "16", "--val-images", "8", "--set", "steps=1", "--set", "batch_size=8",
               "--set", "calibration_images=8", "--run", tmp_path / "run"]  # fmt: skip
    assert qvw("train", *command) == 0
    assert "mean 0.485,0.456,0.406" in capsys.readouterr().out
    assert qvw("train", *command, "--teacher-mean", "0.5,0.5,0.5") == 2  # other inputs are another training
    assert "teacher_mean" in capsys.readouterr().err
    assert qvw("train", *student, "--float", "--teacher-std", "1,1,1", "--run", tmp_path / "other") == 2
    assert "--teacher MODEL" in capsys.readouterr().err
