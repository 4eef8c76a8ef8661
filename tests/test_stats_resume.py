"""`qvw stats` stopped at any moment resumes after the last batch that was kept, to the bits of an undisturbed pass."""

import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from analysis.cli import main
from analysis.data import ChosenImages
from analysis.running_stats import RunningStats
from analysis.runs import Run
from analysis.statistics.stats_file import Passed, UnusableStatsError, load_stats, save_stats
from analysis.steps import unfinished_stats as stats_in_work
from quant.site import Site

ROOT = Path(__file__).parents[1]
KEPT = "stats.partial.safetensors"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
# A small network of convolution, norm and attention. It sends its own process a signal in the middle of the batch whose
# number, from 1, is in the file `alarm`: what was measured of that batch must not be kept. With a file `slow` beside it
# there is time to kill it.
NETWORK = """
import signal, time
from pathlib import Path

from timm.models.vision_transformer import Block
from torch import nn


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.act = nn.Conv2d(1, 16, 4, 4), nn.BatchNorm2d(16), nn.ReLU()
        self.block, self.head = Block(16, 2), nn.Linear(16, 10)
        self.alarm, self.batches = Path(__file__).with_name("alarm"), 0

    def forward(self, x):
        x = self.act(self.norm(self.stem(x))).flatten(2).transpose(1, 2) + 5
        self.batches += len(x) > 2
        if self.alarm.exists() and len(x) > 2 and self.batches == int(self.alarm.read_text()):
            signal.raise_signal(signal.SIGTERM if self.batches % 2 else signal.SIGINT)
        if self.alarm.with_name("slow").exists():
            time.sleep(0.1)
        return self.head(self.block(x).mean(1))


def build():
    return Network()
"""
KILLED = """
import json, os, signal, sys, time
from pathlib import Path

import analysis.tensor_stats
from analysis.cli import main
from analysis.steps import unfinished_stats as stats_in_work

stats_in_work.SECONDS, stats_in_work.SHARE = 0, 1e9  # a save after each batch
kept, moments, command = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
for moment in moments:
    before = kept.read_bytes() if kept.exists() else None
    child = os.fork()  # importing torch once for all takes a third of the time
    if child == 0:
        main(command)
    while not kept.exists() or kept.read_bytes() == before:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before it could be killed"
        time.sleep(0.005)
    time.sleep(moment)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""


class Subject(NamedTuple):
    """A network's file, what a command says of its images, and the run folder of an undisturbed pass."""

    network: Path
    data: list[str]
    whole: Path

    def command(self, run, *options):
        """The words after `qvw` of a pass of ten batches into `run`."""
        model = [f"{self.network}:build", "--input-size", "1,16,16", "--mean", "0.5", "--std", "0.5"]
        words = ["stats", *model, *self.data, "--batch-size", 8, "--num-workers", 0, "--run", run, *options]
        return [str(word) for word in words]

    def stopped(self, run, batch, *options):
        """Exit code of a pass that is interrupted in the middle of the batch of that number, from 1."""
        alarm = self.network.with_name("alarm")
        alarm.write_text(str(batch))
        try:
            return qvw(*self.command(run, *options))
        finally:
            alarm.unlink()


def qvw(*arguments):
    """Exit code of a command, as the shell would see it."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """A pass over 78 digits."""
    root = tmp_path_factory.mktemp("subject")
    (root / "network.py").write_text(NETWORK)
    subject = Subject(root / "network.py", ["--data", "digits", "--images", "78"], root / "whole")
    assert qvw(*subject.command(subject.whole, "--quiet")) == 0
    return subject


@pytest.fixture(scope="module")
def unfinished(subject, tmp_path_factory):
    """The run folder of a pass that was interrupted in its fifth batch; to be copied."""
    run = tmp_path_factory.mktemp("unfinished") / "run"
    assert subject.stopped(run, 5, "--quiet") == 130
    return run


@pytest.fixture
def run(unfinished, tmp_path):
    """A copy of it of one's own."""
    return Path(shutil.copytree(unfinished, tmp_path / "run"))


def assert_same_tables(run, expected):
    """Every table to the last bit, and nothing left of what served resuming."""
    for name in ("stats", "channels", "histograms"):
        frames = [pd.read_parquet(folder / f"{name}.parquet") for folder in (run, expected)]
        pd.testing.assert_frame_equal(*frames, check_exact=True)
    assert (run / "variation.json").read_bytes() == (expected / "variation.json").read_bytes()
    assert {path.name for path in run.iterdir()} == {path.name for path in expected.iterdir()}
    assert json.loads((run / "run.json").read_text())["steps"]["stats"]["status"] == "done"


def test_interrupted_twice_within_a_batch_it_ends_with_the_same_tables(subject, tmp_path, capfd):
    """SIGINT, then SIGTERM: whole batches are kept, the one in work is not, and the message says how many."""
    run = tmp_path / "run"
    assert subject.stopped(run, 4) == 130
    assert "interrupted. Kept: 24 of 78 images. Resume with the same command." in capfd.readouterr().err
    assert (run / KEPT).exists()
    assert subject.stopped(run, 3) == 130  # the third batch of this start is the sixth of all
    printed = capfd.readouterr()
    assert "resuming after 24 of 78 images\n" in printed.out
    assert "Kept: 40 of 78 images." in printed.err
    assert subject.stopped(run, 1) == 130  # nothing new, but that is still there
    assert "Kept: 40 of 78 images." in capfd.readouterr().err
    assert qvw(*subject.command(run)) == 0
    assert "resuming after 40 of 78 images\n" in capfd.readouterr().out
    assert_same_tables(run, subject.whole)


def test_an_interrupt_of_the_first_batch_keeps_nothing(subject, tmp_path, capfd):
    """And says so."""
    assert subject.stopped(tmp_path / "run", 1) == 130
    assert "Nothing new was kept" in capfd.readouterr().err
    assert not (tmp_path / "run" / KEPT).exists()


def test_an_interrupt_after_the_last_batch_loses_none(subject, tmp_path, monkeypatch, capfd):
    """While the tables are written all batches are kept, and the next start measures none."""
    from analysis.steps import stats_step

    with monkeypatch.context() as patch:
        patch.setattr(stats_step, "variation", lambda _: signal.raise_signal(signal.SIGINT))
        assert qvw(*subject.command(tmp_path / "run")) == 130
    assert "Kept: 78 of 78 images." in capfd.readouterr().err
    assert qvw(*subject.command(tmp_path / "run")) == 0
    assert_same_tables(tmp_path / "run", subject.whole)


def test_killed_at_random_moments_it_ends_with_the_same_tables(subject, tmp_path, capfd):
    """SIGKILL twice, wherever the pass happens to be, with a save after each batch."""
    seed = time.time_ns()
    print(f"seed {seed}")  # pytest shows it where the test fails
    seconds, run = random.Random(seed), tmp_path / "killed"
    moments = [seconds.uniform(0, 0.25) for _ in range(2)]
    slow = subject.network.with_name("slow")
    slow.touch()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(run / KEPT), json.dumps(moments), *subject.command(run)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    slow.unlink()
    assert done.returncode == 0, done.stderr
    assert "resuming after" in done.stdout
    assert qvw(*subject.command(run)) == 0
    assert "resuming after" in capfd.readouterr().out
    assert_same_tables(run, subject.whole)


def test_skipped_images_are_remembered(subject, tmp_path, capfd):
    """One that was left out before the interrupt is counted and named after it, as where nothing was interrupted."""
    for i in range(40):
        file = tmp_path / "images" / str(i % 10) / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16), dtype=np.uint8)).save(file)
    data = ["--data", f"folder:{tmp_path / 'images'}", "--holdout", "0", "--skip-broken"]
    subject = subject._replace(data=data, whole=tmp_path / "whole")
    for broken in (tmp_path / "images").glob("*/*5.png"):
        broken.write_bytes(b"\x89PNG")
    assert qvw(*subject.command(subject.whole)) == 0
    told = "4 of 40 images cannot be read and were left out: "
    assert told in capfd.readouterr().err
    assert subject.stopped(tmp_path / "run", 4) == 130
    assert qvw(*subject.command(tmp_path / "run")) == 0
    assert told in capfd.readouterr().err
    assert_same_tables(tmp_path / "run", subject.whole)
    records = [json.loads((folder / "run.json").read_text()) for folder in (tmp_path / "run", subject.whole)]
    skipped = [record["steps"]["stats"]["options"]["skipped_images"] for record in records]
    assert len(skipped[0]) == 4
    assert skipped[0] == skipped[1]


def test_changed_inputs_are_refused(subject, run, capfd):
    """As everywhere: what changed is told, and nothing is touched; --overwrite starts from scratch."""
    (run / ".stats.partial.77.tmp.safetensors").write_bytes(b"of a save that was killed")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert qvw(*subject.command(run, "--batch-size", "16")) == 2
    assert "holds stats with other inputs (batch_size: 8 -> 16)" in capfd.readouterr().err
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert qvw(*subject.command(run, "--overwrite")) == 0
    assert "resumes" not in capfd.readouterr().out
    assert_same_tables(run, subject.whole)


def test_an_unfinished_pass_without_its_record_is_refused(subject, run, capfd):
    """As a sweep or a training: nothing tells with what options it was begun."""
    (run / "run.json").unlink()
    assert qvw(*subject.command(run)) == 2
    assert f"holds an unfinished stats ({KEPT}), but run.json has no record" in capfd.readouterr().err


def test_a_network_that_was_fixed_starts_again(unfinished, subject, tmp_path, capfd):
    """Equal weights, another forward: what the old one gave is not mixed with what the new one gives."""
    run = Path(shutil.copytree(unfinished, tmp_path / "run"))
    original = subject.network.read_text()
    try:
        subject.network.write_text(original.replace("+ 5", "+ 6"))
        assert qvw(*subject.command(run)) == 0
        printed = capfd.readouterr()
        assert f"{run / KEPT} was begun with other inputs (another factory): the" in printed.err
        assert "resumes" not in printed.out
    finally:
        subject.network.write_text(original)
    means = [pd.read_parquet(folder / "stats.parquet").set_index(["module", "tensor"])["mean"]
             for folder in (run, subject.whole)]  # fmt: skip
    # Of the pass before half the images had been measured; attention and MLP see no difference behind their norms.
    assert means[0]["block", "output"] - means[1]["block", "output"] == pytest.approx(1, abs=1e-3)


def test_an_interrupt_of_overwrite_leaves_earlier_results_alone(subject, tmp_path, capfd):
    """Their tables and record are as before, and no part of another pass lies beside them."""
    run = Path(shutil.copytree(subject.whole, tmp_path / "run"))
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert subject.stopped(run, 5, "--overwrite") == 130
    assert "Nothing new was kept" in capfd.readouterr().err
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_an_interrupted_overwrite_goes_on_without_it(subject, tmp_path, capfd):
    """Where there were no results before; the message says that --overwrite would start from scratch."""
    assert subject.stopped(tmp_path / "run", 5, "--overwrite") == 130
    assert "Kept: 32 of 78 images. Resume with the same command without --overwrite." in capfd.readouterr().err
    assert subject.stopped(tmp_path / "run", 1) == 130
    assert "resuming after 32 of 78 images\n" in capfd.readouterr().out


def test_a_full_disk_costs_no_statistics(subject, tmp_path, monkeypatch, capfd):
    """Where only the copy finds no space, one warning tells of it and the tables come out."""
    monkeypatch.setattr(stats_in_work, "SECONDS", 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        assert qvw(*subject.command(tmp_path / "run")) == 0
        told = capfd.readouterr().err
        assert subject.stopped(tmp_path / "stopped", 5) == 130
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert told.count(f"{KEPT} cannot be written") == 1
    assert "an interrupt would lose what is measured from here" in told
    assert_same_tables(tmp_path / "run", subject.whole)
    assert "Nothing new was kept" in capfd.readouterr().err
    assert not list((tmp_path / "stopped").glob("*partial*"))


def flipped(path):
    """One bit of the last counts is another."""
    content = bytearray(path.read_bytes())
    content[-5] ^= 16
    path.write_bytes(content)


class Runs:
    """What runs code when it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise AssertionError('code of the file was run')",))


DAMAGES = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-50]),
    "a bit": flipped,
    "empty": lambda path: path.write_bytes(b""),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Runs())),
    "a torch file": lambda path: torch.save({"groups": Runs()}, path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "other metadata": lambda path: save_file({"groups": np.zeros(3)}, path, {"format": "pt"}),
    "no metadata": lambda path: save_file({"groups": np.zeros(3)}, path),
}


@pytest.mark.parametrize("damage", ["a bit", "a pickle", "a folder"])
def test_a_damaged_file_starts_anew_with_a_warning(damage, subject, run, capfd):
    """Never a traceback, never other tables."""
    DAMAGES[damage](run / KEPT)
    assert qvw(*subject.command(run)) == 0
    printed = capfd.readouterr()
    assert f"qvw: warning: {run / KEPT} is damaged (" in printed.err
    assert "): the statistics start from scratch.\n" in printed.err
    assert "resumes" not in printed.out
    assert_same_tables(run, subject.whole)


SITES = {Site("a", "input"): 3, Site("b", "output"): 1, Site("c", "query"): 2}


def fresh():
    """Statistics of three sites that have seen nothing."""
    return {site: RunningStats(groups) for site, groups in SITES.items()}


@pytest.fixture
def file(tmp_path):
    """What was kept of two of the three sites."""
    running = fresh()
    for site in list(SITES)[:2]:
        running[site].update(torch.randn(4, SITES[site], 50, generator=torch.Generator().manual_seed(0)))
    running[Site("c", "query")].reason = "holds int64, no real numbers"
    save_stats(tmp_path / "kept", {"images": 4}, Passed(batches=1, images=4, skipped=("x",)), running)
    return tmp_path / "kept"


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told(damage, file):
    """Of every sort, and no code of the file is run."""
    DAMAGES[damage](file)
    with pytest.raises(UnusableStatsError, match="is damaged"):
        load_stats(file, {"images": 4}, fresh())


def forge(path, change, header=None):
    """Write the file with other arrays and another header, and with the checksum that goes with them."""
    with safe_open(path, framework="numpy") as opened:
        metadata, arrays = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(arrays)
    text = metadata["header"] if header is None else header(metadata["header"])
    digest = hashlib.sha256(text.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    save_file(arrays, path, {"header": text, "sha256": digest.hexdigest()})


def nothing(_):
    """Change nothing."""


FORGERIES = {
    "another site": (lambda a: a.update(groups=a["groups"][:2]), "not of 3 sites"),
    "more groups": (lambda a: a["groups"].__setitem__(0, 2**60), "groups of a:input, expected 3"),
    "no groups": (lambda a: a["groups"].__setitem__(0, 0), "groups of a:input, expected 3"),
    "other numbers": (lambda a: a.update(groups=a["groups"].astype(np.float32)), "groups is float32"),
    "an array less": (lambda a: a.pop("counts"), "it holds centres"),
    "moments cut": (lambda a: a.update(moments=a["moments"][:, :2].copy()), "moments of a:input are cut short"),
    "moments left over": (lambda a: a.update(moments=np.ones((8, 9))), "contradict|more than its sites have"),
    "fields": (lambda a: a.update(moments=a["moments"][:7].copy()), "not of 3 sites"),
    "shape of counts": (lambda a: a.update(counts=a["counts"][:, :1].copy()), "counts have the shape"),
    "an octave twice": (lambda a: a["exponents"].__setitem__(1, a["exponents"][0]), "an octave twice"),
    "octaves cut": (lambda a: a["octaves"].__setitem__(1, 200), "histogram of b:output is cut short"),
    "an octave of no float": (lambda a: a["exponents"].__setitem__(0, -3), "figures of a:input contradict"),
    "other counts": (lambda a: a["counts"].__setitem__((0, 0, 0), 10**6), "figures of a:input contradict"),
    "a centre": (lambda a: a["centres"].__setitem__(2, np.nan), "a centre is no float32"),
    "NaN": (lambda a: a["moments"].__setitem__((1, 0), np.nan), "figures of a:input contradict"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_file_is_told(forgery, file):
    """With a checksum that fits: whatever cannot be statistics of these sites is not taken for them."""
    change, message = FORGERIES[forgery]
    forge(file, change)
    with pytest.raises(UnusableStatsError, match=message):
        load_stats(file, {"images": 4}, fresh())


@pytest.mark.parametrize(
    "header",
    [
        lambda _: "[" * 100_000,
        lambda _: "null",
        lambda text: text.replace('"batches": 1', '"batches": "many"'),
        lambda text: text.replace('"reasons": [', '"reasons": [1, '),
    ],
)
def test_a_forged_header_is_told(header, file):
    """The same of the metadata."""
    forge(file, nothing, header)
    with pytest.raises(UnusableStatsError, match="is damaged"):
        load_stats(file, {"images": 4}, fresh())


def test_the_forger_of_these_tests_can_write_a_good_file(file):
    """Where nothing is changed the file is taken: what the tests above change is what is refused."""
    forge(file, nothing)
    passed, running = load_stats(file, {"images": 4}, fresh())
    assert passed == Passed(batches=1, images=4, skipped=("x",))
    assert running[Site("a", "input")].count == 600
    assert running[Site("c", "query")].note == "holds int64, no real numbers"


def test_another_identity_is_told(file):
    """By what differs."""
    with pytest.raises(UnusableStatsError, match=r"was begun with other inputs \(images: 4 -> 5\)"):
        load_stats(file, {"images": 5}, fresh())


def test_a_copy_stands_alone():
    """What is added to statistics does not reach their copy, nor the other way round."""
    stats = RunningStats(3)
    stats.update(torch.randn(5, 3, 40))
    copy, rows = stats.copy(), (stats.row(), stats.group_rows(), stats.histogram_rows())
    stats.update(torch.randn(5, 3, 40) * 100)
    assert (copy.row(), copy.group_rows(), copy.histogram_rows()) == rows
    before = stats.row()
    copy.merge(stats)
    assert stats.row() == before
    assert copy.count == 3 * 600


TWO_PROCESSES = """
import json, os, shutil, sys
from pathlib import Path
import torch
from analysis.cli import main

torch.set_num_threads(1)
rank, folder, command = os.environ["RANK"], Path(sys.argv[1]), json.loads(sys.argv[2])
alarm = folder / "alarm"

def qvw(run, batch=None):
    if rank == "0":
        alarm.unlink(missing_ok=True)
        if batch is not None:
            alarm.write_text(str(batch))
    torch.distributed.is_initialized() and torch.distributed.barrier()
    try:
        main([*command, "--run", str(folder / run)])
    except SystemExit as stop:
        print(f"{run} {rank} {batch} {stop.code}", file=sys.stderr, flush=True)
    torch.distributed.barrier()

qvw("two")
qvw("resumed", 2)
if rank == "1":
    shutil.copy(folder / "resumed/stats.partial.1.safetensors", folder / "early")
qvw("resumed", 3)
if rank == "0":
    shutil.copytree(folder / "resumed", folder / "alone")
    shutil.move(folder / "early", folder / "resumed/stats.partial.1.safetensors")
qvw("resumed")
"""


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch is built without gloo, by which processes on CPUs talk",
)
def test_two_processes_go_on_to_the_same_tables(subject, tmp_path, capfd):
    """Also where one kept fewer batches than the other; with another number of processes it starts from scratch."""
    (tmp_path / "network.py").write_text(NETWORK)
    own = subject._replace(network=tmp_path / "network.py")
    (tmp_path / "both.py").write_text(TWO_PROCESSES)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = own.command("RUN")
    done = subprocess.run(
        [*torchrun, tmp_path / "both.py", str(tmp_path), json.dumps(words[: words.index("--run")])],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rank in "01":
        assert f"resumed {rank} 2 130\n" in done.stderr
        assert f"resumed {rank} None 0\n" in done.stderr
    assert "Kept: 16 of 78 images." in done.stderr
    assert "Kept: 48 of 78 images." in done.stderr
    assert done.stdout.count("resuming after 48 of 78 images\n") == 1
    assert_same_tables(tmp_path / "resumed", tmp_path / "two")

    assert {path.name for path in (tmp_path / "alone").glob("stats.*")} == {KEPT, "stats.partial.1.safetensors"}
    assert qvw(*own.command(tmp_path / "alone")) == 0
    printed = capfd.readouterr()
    assert "was begun with other inputs (processes: 2 -> 1): the statistics start from scratch." in printed.err
    assert "resumes" not in printed.out
    assert_same_tables(tmp_path / "alone", subject.whole)


def test_results_stay_valid_until_an_overwrite_has_measured_all(subject, tmp_path, monkeypatch):
    """A kill at any batch finds tables and record as they were."""
    run = Path(shutil.copytree(subject.whole, tmp_path / "run"))
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    seen = []

    def noted(self, passed):
        seen.append({path.name: path.read_bytes() for path in run.iterdir()})

    with monkeypatch.context() as patch:
        patch.setattr(stats_in_work.StatsInWork, "note", noted)
        assert qvw(*subject.command(run, "--overwrite", "--batch-size", 16)) == 0
    assert len(seen) == 5
    assert all(files == before for files in seen)
    assert json.loads((run / "run.json").read_text())["steps"]["stats"]["inputs"]["batch_size"] == 16


@pytest.mark.parametrize("table", ["channels", "stats"])
def test_an_interrupt_among_the_tables_costs_no_image(table, subject, tmp_path, monkeypatch, capfd):
    """With finished results before or without: all that was measured is kept, and the next start writes the tables."""
    write = Run.write_table

    def interrupted(self, name, frame):
        if name == table:
            raise KeyboardInterrupt
        write(self, name, frame)

    again = Path(shutil.copytree(subject.whole, tmp_path / "again"))
    for run, options in ((again, ["--overwrite"]), (tmp_path / "new", [])):
        with monkeypatch.context() as patch:
            patch.setattr(Run, "write_table", interrupted)
            assert qvw(*subject.command(run, *options)) == 130
        assert "Kept: 78 of 78 images" in capfd.readouterr().err
        with monkeypatch.context() as patch:
            patch.setattr(ChosenImages, "__getitem__", None)  # no image is read
            assert qvw(*subject.command(run)) == 0
        assert_same_tables(run, subject.whole)
