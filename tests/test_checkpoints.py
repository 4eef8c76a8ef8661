"""Checkpoints as training scripts save them: the weights come back to the bit, or one message says why not."""

import argparse
import io
import itertools
import pathlib
import re
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel

from analysis.inputs.model_options import MODEL_OPTIONS
from analysis.inputs.weights import load_weights_
from quant.errors import InputError
from tests.digits_vit import qvw


def network(seed=0):
    """Convolution, BatchNorm and a classifier with drawn weights."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 10))


SETTINGS = {
    "none": {},
    "timm": {"epoch": 3, "arch": "net", "args": argparse.Namespace(lr=0.1, data="x"), "version": 2, "metric": 71.2},
    "numpy": {"best_acc": np.float64(81.2), "epoch": np.int64(3), "ok": np.bool_(True), "kind": np.dtype("float32")},
    "optimizer": {"optimizer": {"state": {0: {"exp_avg": torch.ones(2), "step": torch.tensor(3.0)}}},
                  "lr_scheduler": {"last_epoch": 3}, "rng": torch.zeros(4, dtype=torch.uint8)},
    "paths": {"output": pathlib.Path("runs/x"), "classes": ("a", "b"), "seen": {1, 2}},
}  # fmt: skip
ENTRIES = [
    None,
    "state_dict",
    "model",
    "net",
    "model_state_dict",
    "module",
    "network",
    "state_dict_ema",
    "weights.inner",
]
PREFIXES = ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "model.backbone."]


@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".ckpt", ".pt", ".bin", ""])
@pytest.mark.parametrize("settings", SETTINGS)
def test_every_entry_and_prefix_comes_back_to_the_bit(tmp_path, suffix, settings):
    """Whatever the entry is called, the names start with and lies beside it: the same tensors, and where they were."""
    state = network(1).state_dict()
    for entry, prefix in itertools.product(ENTRIES, PREFIXES):
        content = {prefix + name: value for name, value in state.items()}
        for part in reversed(entry.split(".") if entry else []):
            content = {part: content}
        if entry is None and settings != "none":
            continue
        path = tmp_path / f"checkpoint{suffix}"
        torch.save({**content, **SETTINGS[settings]} if entry else content, path)
        model = network(2)
        told = load_weights_(model, path, MODEL_OPTIONS)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), (entry, prefix)
        assert (entry or "") in told
        assert all(part in told for part in prefix.split("."))


def test_raw_and_averaged_weights_are_asked_about(tmp_path, capsys):
    """Two sets that fit and differ: one must be named, nested ones by their path; equal ones need no question."""
    raw, average = network(1).state_dict(), network(2).state_dict()
    path = tmp_path / "last.pth.tar"
    torch.save({"state_dict": raw, "ema": {"module": average, "decay": 0.99}, "epoch": 2}, path)
    with pytest.raises(InputError, match=r"state_dict, ema\.module.*--weights-entry"):
        load_weights_(network(), path, MODEL_OPTIONS)
    for entry, state in (("state_dict", raw), ("ema.module", average)):
        model = network()
        load_weights_(model, path, MODEL_OPTIONS, entry)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(InputError, match="has no state dict 'teacher'"):
        load_weights_(network(), path, MODEL_OPTIONS, "teacher")
    torch.save({"state_dict": raw, "state_dict_ema": raw}, path)
    load_weights_(network(), path, MODEL_OPTIONS)


def test_counters_of_tools_are_left_out(tmp_path):
    """Thop's operations and torch's number of averaged models are no weights."""
    averaged = AveragedModel(network(1))
    state = averaged.state_dict() | {"total_ops": torch.zeros(1), "module.0.total_params": torch.zeros(1)}
    torch.save(state, tmp_path / "swa.pth")
    model = network()
    load_weights_(model, tmp_path / "swa.pth", MODEL_OPTIONS)
    assert torch.equal(model[0].weight, averaged.module[0].weight)


def test_other_parts_of_a_training_are_left_out_and_told(tmp_path):
    """A prefix that only the network's names have: what lies beside it is told."""
    state = {f"model.{name}": value for name, value in network(1).state_dict().items()}
    torch.save({"state_dict": state | {"criterion.weight": torch.ones(10)}}, tmp_path / "lightning.ckpt")
    told = load_weights_(network(), tmp_path / "lightning.ckpt", MODEL_OPTIONS)
    assert "criterion.weight" in told


class Tied(nn.Module):
    """An encoder and a decoder of one weight."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight


def test_tied_weights_need_one_name(tmp_path):
    """Safetensors' save_model leaves one of two tied names out; in a state dict both must be the same."""
    torch.manual_seed(1)
    trained, model = Tied(), Tied()
    save_model(trained, str(tmp_path / "tied.safetensors"))
    load_weights_(model, tmp_path / "tied.safetensors", MODEL_OPTIONS)
    assert torch.equal(model.decoder.weight, trained.encoder.weight)
    assert model.decoder.weight is model.encoder.weight
    torch.save(trained.state_dict() | {"decoder.weight": torch.zeros(4, 4)}, tmp_path / "untied.pth")
    with pytest.raises(InputError, match="one tensor in the model"):
        load_weights_(Tied(), tmp_path / "untied.pth", MODEL_OPTIONS)


def test_half_precision_is_read_and_told(tmp_path):
    """float16 and bfloat16 files fill a float32 model."""
    for kind in (torch.float16, torch.bfloat16):
        torch.save({n: x.to(kind) if x.is_floating_point() else x for n, x in network(1).state_dict().items()},
                   tmp_path / "half.pth")  # fmt: skip
        model = network()
        assert str(kind).removeprefix("torch.") in load_weights_(model, tmp_path / "half.pth", MODEL_OPTIONS)
        assert torch.equal(model[0].weight, network(1)[0].weight.to(kind).float())


class Custom:
    """A class that only the training script has."""


def test_what_needs_code_is_refused_for_that_reason(tmp_path):
    """Whole models and objects of a script's own are named, without escapes of the terminal; nothing is called cut."""
    for content in (network(), {"state_dict": network().state_dict(), "config": Custom()}):
        torch.save(content, tmp_path / "code.pth")
        with pytest.raises(InputError, match="without running code") as caught:
            load_weights_(network(), tmp_path / "code.pth", MODEL_OPTIONS)
        assert "\x1b" not in str(caught.value)
        assert re.search(r"Sequential|Custom", str(caught.value))


def torchscript():
    """A program of torch.jit."""
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def other_zip():
    """A zip file without weights."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("readme.txt", "no weights")
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:.*TorchScript|.*torch.jit")
@pytest.mark.parametrize(
    ("content", "word"),
    [
        (lambda: b"", "empty"),
        (lambda: b"<!DOCTYPE html><html>404</html>", "web page"),
        (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS"),
        (lambda: b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        (lambda: b"\x1f\x8b\x08" + bytes(100), "gzip"),
        (lambda: b"\x08\x07\x12\x07pytorch" + bytes(50), "no file of torch"),
        (torchscript, "TorchScript"),
        (other_zip, "cannot be read"),
        (lambda: b"\x80\x02rubbish", "cannot be read"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_of_other_kinds_are_told_by_their_content(tmp_path, content, word, suffix):
    """What the name says does not count."""
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content())
    with pytest.raises(InputError, match=word):
        load_weights_(network(), path, MODEL_OPTIONS)


def test_another_number_of_classes_is_named(tmp_path):
    """The commonest misfit: the head of another data set."""
    torch.manual_seed(0)
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 7))
    torch.save({"state_dict": other.state_dict()}, tmp_path / "seven.pth")
    with pytest.raises(InputError, match="head of 7 classes"):
        load_weights_(network(), tmp_path / "seven.pth", MODEL_OPTIONS)


def test_the_command_line_prints_the_entry_and_remembers_it(tmp_path, capsys):
    """`--weights-entry` is recorded in run.json, and later commands use it."""
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\ndef build():\n    torch.manual_seed(0)\n    return nn.Sequential("
        "nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))\n"
    )
    scope = {}
    exec((tmp_path / "net.py").read_text(), scope)
    raw = scope["build"]().state_dict()
    average = {name: value + 1 for name, value in raw.items()}
    torch.save({"state_dict": raw, "state_dict_ema": average}, tmp_path / "both.pth.tar")
    arguments = [f"{tmp_path / 'net.py'}:build", "--weights", tmp_path / "both.pth.tar", "--data", "digits",
                 "--num-workers", "0", "--run", tmp_path / "run"]  # fmt: skip
    assert qvw("stats", *arguments, "--images", 16) == 2
    assert "--weights-entry" in capsys.readouterr().err
    assert qvw("stats", *arguments, "--images", 16, "--weights-entry", "state_dict_ema") == 0
    assert "state_dict_ema" in capsys.readouterr().out
    assert '"weights_entry": "state_dict_ema"' in (tmp_path / "run" / "run.json").read_text()
    assert qvw("sensitivity", "--run", tmp_path / "run", "--images", 8, "--bits", "8", "--tensors", "weight") == 0
    assert "state_dict_ema" in capsys.readouterr().out
