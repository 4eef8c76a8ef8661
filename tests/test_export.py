"""`qvw export` as a person uses it: the file, what it takes, the same answers from it, and wrong input."""

import json
import re
import resource
import shutil
from contextlib import contextmanager

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from analysis.scoring import outputs_of
from analysis.session.open_run import open_run
from analysis.session.setup import Setup
from analysis.steps.export_step import load_checkpoint_
from quant.bit_plan import BitPlan
from quant.errors import InputError
from quant.packed_file import read_packed
from tests.digits_vit import DATA, qvw
from tests.digits_vit import MODEL as VIT
from tests.test_cli import MODEL as RESNET

SHORT = ["--images", "60", "--val-images", "60", "--set", "steps=2", "--set", "batch_size=20",
         "--set", "calibration_images=40"]  # fmt: skip
KEY = "qvw-packed-model"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders of a ViT with three trainings and of a ResNet, exported into their folders; not to be changed."""
    root = tmp_path_factory.mktemp("runs with a space")
    assert qvw("train", *VIT, *DATA, "--run", root / "vit", *SHORT, "--uniform", "w3a4") == 0
    assert qvw("train", "--run", root / "vit", *DATA, *SHORT, "--uniform", "w2a2", "--name", "w2") == 0
    assert qvw("train", "--run", root / "vit", *DATA, *SHORT, "--float", "--name", "float") == 0
    assert qvw("train", *RESNET, *DATA, "--run", root / "resnet", *SHORT, "--uniform", "w5a6") == 0
    for name in ("vit", "resnet"):
        assert qvw("export", "--run", root / name, "--out", root / name / "packed.safetensors") == 0
    return root


@pytest.fixture
def run(runs, tmp_path):
    """The ViT's run folder, for a test to change."""
    return shutil.copytree(runs / "vit", tmp_path / "vit")


def header_of(path):
    """The header of a safetensors file, read by hand, and how many bytes it takes."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), 8 + length


def opened(run, *, images=20):
    """A run folder's model and images."""
    return open_run(Setup(run=run, images=images, num_workers=0, quiet=True), needs_data=True)


def complaint(capfd):
    """What a refused command wrote: one or two lines, no traceback."""
    error = capfd.readouterr().err
    lines = [line for line in error.strip().splitlines() if "warning" not in line]
    assert 1 <= len(lines) <= 2, error
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_the_file_takes_what_the_plan_says(runs, name, tmp_path, capfd):
    """It is `size_bytes` of the plan, to the byte; the figures printed are those of the file."""
    runs = shutil.copytree(runs, tmp_path / "runs")
    out = tmp_path / "new folder" / "model.safetensors"
    assert qvw("export", "--run", runs / name, "--out", out) == 0
    printed = capfd.readouterr().out
    plan = BitPlan.from_json((runs / name / "qat" / "plan.json").read_text())
    length = header_of(out)[1]
    buffers = sum(x.nbytes for key, x in load_file(out).items() if key.startswith("buffer/"))
    assert out.stat().st_size == plan.totals.size_bytes
    assert (buffers > 0) == (name == "resnet")
    figures = dict(re.findall(r"^  (.*?)  +([\d,]+) bytes", printed, re.MULTILINE))
    figures = {what: int(value.replace(",", "")) for what, value in figures.items()}
    save_file(opened(runs / name).model.state_dict(), tmp_path / "float.safetensors")
    floating = (tmp_path / "float.safetensors").stat().st_size
    assert figures["size_bytes of the plan"] == plan.totals.size_bytes
    assert figures["buffers"] == buffers
    assert figures["header: names and layout"] == length
    assert figures["the file"] == out.stat().st_size
    assert figures["the model in floating point"] == floating
    ratio = re.search(r"([\d.]+) times smaller", printed)
    assert float(ratio[1]) == pytest.approx(floating / out.stat().st_size, abs=0.006)
    assert str(out) in printed
    layout, _ = read_packed(out)
    assert {(s.module, s.tensor): s.bit_width for s in layout.sites} == {
        (s.module, s.tensor): s.bit_width for s in plan.sites
    }


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_the_file_answers_as_the_trained_model(runs, name):
    """Into a model of other weights, the logits are those of the checkpoint within 1e-5: in fact to the bit."""
    logits = []
    for path in (runs / name / "qat", runs / name / "packed.safetensors"):
        it = opened(runs / name)
        with torch.no_grad():
            for x in it.model.state_dict().values():
                if path.is_file() and x.is_floating_point():
                    x.uniform_(0.1, 1)
        load_checkpoint_(it, path)
        assert not it.model.training
        data = list(it.stream(it.images("val", 20), "images"))
        logits.append(torch.cat(outputs_of(it.network, data, it.task)))
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-5)
    assert torch.equal(logits[1], logits[0])


def test_eval_measures_it_as_a_checkpoint(run, tmp_path):
    """A row of its own with the same figures; in a run of untrained weights too, for the file has all of them."""
    assert qvw("eval", "--run", run, "--checkpoint", run / "packed.safetensors", "--images", 60) == 0
    rows = pd.read_parquet(run / "verify.parquet").set_index("plan")
    assert list(rows.index) == ["qat", "qat-w2", "qat-float", "packed.safetensors"]
    pd.testing.assert_series_equal(rows.loc["packed.safetensors"], rows.loc["qat"], check_names=False)
    other = tmp_path / "untrained"
    arguments = [*VIT, *DATA, "--run", other, "--images", 60, "--seed", 7]
    assert qvw("eval", *arguments, "--float") == 0
    shutil.copy(run / "packed.safetensors", other / "model.safetensors")  # a name that folders of `train` have too
    assert qvw("eval", *arguments, "--checkpoint", other / "model.safetensors") == 0
    row = pd.read_parquet(other / "verify.parquet").iloc[1]
    assert row["weight_bits"] == rows.loc["qat", "weight_bits"]


def test_exporting_again_gives_the_same_bytes(run):
    """An earlier packed file is replaced, with the same content; run.json tells how it was made."""
    out = run / "packed.safetensors"
    before = out.read_bytes()
    assert qvw("export", "--run", run, "--out", out, "--quiet") == 0
    assert out.read_bytes() == before
    assert qvw("export", "--run", run, "--name", "w2", "--out", out) == 0
    assert len(out.read_bytes()) < len(before)
    step = json.loads((run / "run.json").read_text())["steps"]["export"]
    assert (step["status"], step["files"], step["options"]["name"]) == ("done", ["packed.safetensors"], "w2")


@contextmanager
def files_of_at_most(size):
    """No file of this process can grow beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_earlier_file(run, capfd):
    """One message, exit code 2, nothing half-written; with room the same command does it."""
    out = run / "packed.safetensors"
    before, files = out.read_bytes(), sorted(path.name for path in run.iterdir())
    with files_of_at_most(len(before) - 1000):
        assert qvw("export", "--run", run, "--out", out) == 2
    assert re.search(r"packed.safetensors cannot be written", complaint(capfd))
    assert out.read_bytes() == before
    assert sorted(path.name for path in run.iterdir()) == files
    assert qvw("export", "--run", run, "--out", out) == 0


@pytest.fixture(scope="module")
def vit(runs):
    """The opened ViT and the bytes of its packed file."""
    return opened(runs / "vit"), (runs / "vit" / "packed.safetensors").read_bytes()


@given(st.data())
def test_no_flipped_bit_and_no_cut_goes_unseen(vit, tmp_path_factory, data):
    """Wherever it is, in the length, the header, the plan or the tensors: an InputError that names the file."""
    it, whole = vit
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    header = 8 + int.from_bytes(whole[:8], "little")
    place = data.draw(st.integers(0, 7) | st.integers(8, header - 1) | st.integers(header, len(whole) - 1))
    damaged = bytearray(whole)
    if data.draw(st.booleans()):
        damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del damaged[place:]
    path.write_bytes(damaged)
    with pytest.raises(
        InputError, match=r"damaged\.safetensors:? (cannot be read|is damaged or was|is not a packed|version is)"
    ):
        load_checkpoint_(it, path)


def changed(path, change):
    """The packed file with another header, its tensors as they are."""
    content = json.loads(header_of(path)[0]["__metadata__"][KEY])
    change(content)
    save_file(load_file(path), path, metadata={KEY: json.dumps(content)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_trained_model_that_was_spoilt_is_refused(value, run, capfd):
    """NaN or Inf in a weight: no file of codes that stand for nothing, no figures of it."""
    path = run / "qat" / "model.safetensors"
    tensors, metadata = load_file(path), header_of(path)[0]["__metadata__"]
    tensors["head.weight"][0, 0] = value
    save_file(tensors, path, metadata=metadata)
    message = r"qat/model.safetensors: head.weight holds NaN or Inf. The file cannot be used; train again"
    assert qvw("export", "--run", run, "--out", run / "corrupt.safetensors") == 2
    assert re.search(message, complaint(capfd))
    assert not (run / "corrupt.safetensors").exists()
    assert qvw("eval", "--run", run, "--checkpoint", run / "qat", "--images", 60) == 2
    assert re.search(message, complaint(capfd))


DAMAGE = {
    "another plan": (lambda run: changed(run / "packed.safetensors", lambda c: c["sites"].reverse()),
                     "packed.safetensors is damaged or was changed"),
    "no plan": (lambda run: changed(run / "packed.safetensors", lambda c: c.pop("sites")), "is damaged or was changed"),
    "another version": (lambda run: changed(run / "packed.safetensors", lambda c: c.update(version=1)),
                        "packed.safetensors: version is 1, expected 2. Export the model again"),
    "a table": (lambda run: shutil.copy(run / "verify.parquet", run / "packed.safetensors"), "cannot be read"),
    "a trained model": (lambda run: shutil.copy(run / "qat" / "model.safetensors", run / "packed.safetensors"),
                        "is not a packed model. Name a file of `qvw export`, or a folder of `qvw train`"),
    "nothing": (lambda run: (run / "packed.safetensors").unlink(), "packed.safetensors' does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_file_that_cannot_be_used_is_named(case, run, capfd):
    """One message and exit code 2; verify.parquet stays as it was."""
    damage, message = DAMAGE[case]
    before = (run / "verify.parquet").read_bytes()
    damage(run)
    assert qvw("eval", "--run", run, "--checkpoint", run / "packed.safetensors", "--images", 60) == 2
    assert re.search(message, complaint(capfd))
    assert (run / "verify.parquet").read_bytes() == before


def test_a_file_of_another_network_is_refused(runs, run, tmp_path, capfd):
    """Of other layers, or of the same ones in another width: the message names the network and the first difference."""
    assert qvw("eval", "--run", run, "--checkpoint", runs / "resnet" / "packed.safetensors", "--images", 60) == 2
    assert re.search("is of another network: VisionTransformer has no module 'conv1'", complaint(capfd))
    wide = [VIT[0], VIT[1], VIT[2].replace('"embed_dim": 24', '"embed_dim": 48'), *VIT[3:]]
    arguments = ["eval", *wide, *DATA, "--run", tmp_path / "wide", "--images", 60]
    assert qvw(*arguments, "--checkpoint", run / "packed.safetensors") == 2
    message = r"is of another network or plan: codes/patch_embed.proj:weight is 384 bytes"
    assert re.search(message, complaint(capfd))


def unfinished(run):
    """A training that was stopped."""
    (run / "qat-w4" / "checkpoints").mkdir(parents=True)


WRONG = {
    "an untrained run": (lambda run: shutil.rmtree(run / "qat"), [], "no trained model qat. It has float, w2: give"),
    "no training at all": (lambda run: [shutil.rmtree(path) for path in run.glob("qat*")], [],
                           "vit has no trained model qat. Train it first, `qvw train`"),
    "an unknown name": (lambda run: None, ["--name", "w9"], "has no trained model qat-w9. It has float, w2"),
    "a training that has not ended": (unfinished, ["--name", "w4"], "has not finished. Run the same `qvw train` again"),
    "a float training": (lambda run: None, ["--name", "float"], "was trained in floating point: there is nothing to p"),
    "another suffix": (lambda run: None, ["--out", "x.bin"], "x.bin is not the name of a packed model"),
    "another file in its place": (lambda run: (run / "mine.safetensors").write_text("mine"), [],
                                  "mine.safetensors exists and is not a packed model: it is not replaced"),
    "a folder in its place": (lambda run: (run / "mine.safetensors").mkdir(), [], "mine.safetensors' is a directory"),
    "no name of a file": (lambda run: None, [], "Missing option '--out'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_clear_message_and_exit_code_2(case, run, capfd):
    """No traceback, and no file is written or replaced."""
    change, arguments, message = WRONG[case]
    change(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    out = [] if case == "no name of a file" else ["--out", run / "mine.safetensors"]
    assert qvw("export", "--run", run, *out, *arguments) == 2
    assert re.search(message, complaint(capfd))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_shared_weight_is_packed_once(tmp_path):
    """A weight that two layers share is quantized in both, and the file holds it once."""
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class Tied(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.stem, self.first, self.second, self.head = (torch.nn.Linear(*s) for s in ((64, 16), (16, 16),\n"
        "                                                         (16, 16), (16, 10)))\n"
        "        self.second.weight = self.first.weight\n"
        "    def forward(self, x):\n"
        "        return self.head(self.second(self.first(self.stem(x.flatten(1)).relu()).relu()))\n"
    )
    run = ["--run", tmp_path / "run"]
    size = ["--input-size", "1,8,8", "--mean", "0.5", "--std", "0.5"]
    assert qvw("train", f"{tmp_path / 'mine.py'}:Tied", *size, *DATA, *run, *SHORT, "--uniform", "w4a4") == 0
    assert qvw("export", *run, "--out", tmp_path / "tied.safetensors") == 0
    assert qvw("eval", *run, "--checkpoint", tmp_path / "tied.safetensors", "--images", 60) == 0
    rows = pd.read_parquet(tmp_path / "run" / "verify.parquet")
    assert rows["loss"].nunique() == 1
    assert len(rows) == 2
