"""The head's width is that of the output, and labels that cannot be right are told."""

import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import analysis
from analysis.scoring import label_doubts
from quant.errors import InputError
from tests.digits_vit import qvw

COLOURS = torch.tensor(
    [(230, 30, 30), (30, 230, 30), (30, 30, 230), (230, 230, 30), (230, 30, 230), (30, 230, 230), (128, 128, 128),
     (10, 10, 10), (245, 245, 245), (128, 60, 10)]
)  # fmt: skip
FACTORY = """
import torch
from torch import nn
P = torch.tensor({colours}).float() / 255
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 3, 1), nn.Linear(3, 10)
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(3)[:, :, None, None]); self.conv.bias.zero_()
            self.fc.weight.copy_(40 * P); self.fc.bias.copy_(-20 * P.square().sum(1))
    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))
def build(): return Net()
def headless():
    import timm
    return timm.create_model("resnet10t", num_classes=0)
"""
PREPARED = ["--mean", "0,0,0", "--std", "1,1,1", "--input-size", "3,16,16", "--num-workers", "0", "--quiet"]


@pytest.fixture
def three_of_ten(tmp_path):
    """A network of ten colours that says nothing of its classes, and images of three of them."""
    (tmp_path / "net.py").write_text(FACTORY.format(colours=COLOURS.tolist()))
    for name, place in (("cat", 3), ("dog", 5), ("ship", 8)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (16, 16), tuple(COLOURS[place].tolist())).save(tmp_path / "data" / name / f"{i}.png")
    (tmp_path / "map.csv").write_text("cat,3\ndog,5\nship,8\n")
    return tmp_path


def test_some_of_the_classes_need_a_map(three_of_ten, capsys):
    """The output has ten columns: three folders are refused without a class map, and right with one, everywhere."""
    shared = [f"{three_of_ten / 'net.py'}:build", "--data", f"folder:{three_of_ten / 'data'}", *PREPARED]
    assert qvw("eval", *shared, "--float", "--run", three_of_ten / "refused") == 2
    assert "3 classes, the model's head has 10" in capsys.readouterr().err
    mapped = [*shared, "--class-map", three_of_ten / "map.csv", "--run", three_of_ten / "run"]
    assert qvw("eval", *mapped, "--float") == 0
    assert pd.read_parquet(three_of_ten / "run" / "verify.parquet")["top1"].tolist() == [1.0]
    assert qvw("sensitivity", *mapped, "--bits", "2,8", "--tensors", "weight", "--images", 12) == 0
    assert qvw("plan", "--run", three_of_ten / "run", "--weight-bits", 8, "--verify", "--num-workers", 0) == 0
    verified = pd.read_parquet(three_of_ten / "run" / "verify.parquet").set_index("plan")["top1"]
    assert verified["float"] == 1


def test_features_are_no_logits(three_of_ten, capsys):
    """A timm network without a head is refused, at the command line and in Python."""
    shared = [f"{three_of_ten / 'net.py'}:headless", "--data", f"folder:{three_of_ten / 'data'}", *PREPARED]
    assert qvw("eval", *shared, "--float", "--run", three_of_ten / "run") == 2
    assert "no head" in capsys.readouterr().err
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    model.num_classes = 0
    with pytest.raises(InputError, match="no head"):
        analysis.evaluate(model, [(torch.randn(4, 3, 2, 2), torch.arange(4))], {"float": None})


@given(st.integers(2, 1000), st.integers(1, 10_000), st.floats(0, 1), st.floats(0, 20))
def test_doubts_come_with_loss_or_accuracy_alone(classes, samples, accuracy, loss):
    """At or above chance, and no worse than guessing by two nats, nothing is said; far beyond it always is."""
    text = label_doubts(loss, accuracy, samples, classes)
    error = math.sqrt((1 / classes) * (1 - 1 / classes) / samples)
    if loss <= math.log(classes) + 2 and accuracy >= 1 / classes - 3 * error:
        assert not text
    else:
        assert text


def test_wrong_labels_are_warned_about(three_of_ten, capsys):
    """Shifted labels: a warning in the library and at the command line; right ones: none."""
    colours = (COLOURS.float() / 255)[:, :, None, None].expand(-1, -1, 4, 4)
    labels = torch.arange(10)
    scope = {}
    exec(FACTORY.format(colours=COLOURS.tolist()), scope)
    model = scope["build"]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        analysis.evaluate(model, [(colours, labels)], {"float": None})
    with pytest.warns(UserWarning, match="labels"):
        table = analysis.evaluate(model, [(colours, labels.roll(1))], {"float": None})
    assert table["score"].tolist() == [0.0]
    with pytest.warns(UserWarning, match="labels"):
        analysis.measure_sensitivity(model, [(colours, labels.roll(1))], bits=(4,), sites=("weight",))
    (three_of_ten / "map.csv").write_text("cat,4\ndog,6\nship,9\n")
    arguments = [f"{three_of_ten / 'net.py'}:build", "--data", f"folder:{three_of_ten / 'data'}", *PREPARED, "--float"]
    assert qvw("eval", *arguments, "--class-map", three_of_ten / "map.csv", "--run", three_of_ten / "run") == 0
    assert "labels" in capsys.readouterr().err
    assert np.allclose(pd.read_parquet(three_of_ten / "run" / "verify.parquet")["top1"], 0)
