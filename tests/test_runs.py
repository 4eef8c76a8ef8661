"""Laws of the run folder: files whole or untouched, no mixing of results, resumable rows."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.runs import Run
from analysis.storage.files import RowLog, write_atomic, write_bytes
from analysis.storage.locks import exclusive
from analysis.storage.run_record import ModelRecord, typed_command
from analysis.storage.step_inputs import input_changes
from quant.errors import InputError

MODEL = ModelRecord(typed="resnet18", name="resnet18", weights_sha256="aa", parameters=11, kwargs={"num_classes": 10})


def start(
    run, name="stats", *, inputs=None, files=("stats.parquet",), overwrite=False, command="qvw stats", temporary=()
):
    """Start a step of the run with the arguments that do not matter here filled in."""
    return run.start_step(
        name, command=command, options={"images": 4, "mean": (0.5, 0.25)}, inputs=inputs or {"images": 4}, seed=0,
        device="cpu", files=files, overwrite=overwrite, temporary=temporary,
    )  # fmt: skip


def raiser(error):
    """A writer that leaves half a file and then fails."""

    def write(path):
        path.write_bytes(b"half")
        raise error

    return write


def test_write_atomic_replaces_the_file_and_leaves_nothing_else(tmp_path):
    """After a write the folder holds the new content under the name and no temporary file; folders are made."""
    path = tmp_path / "a" / "b" / "table.txt"
    write_bytes(path, b"old")
    write_atomic(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["table.txt"]


def test_the_temporary_file_keeps_the_suffix(tmp_path):
    """Writers that choose the format by the suffix see that of the final name."""
    seen = []
    write_atomic(tmp_path / "x.npz", lambda temporary: (seen.append(temporary), np.savez(temporary, a=np.ones(2))))
    assert seen[0].suffix == ".npz"
    assert seen[0].parent == tmp_path
    np.testing.assert_array_equal(np.load(tmp_path / "x.npz")["a"], np.ones(2))


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), OSError(errno.EIO, "broken disk")])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, error):
    """Whatever ends a write, the earlier file stays, the half one goes, and the exception is the caller's own."""
    path = tmp_path / "plan.json"
    path.write_text("old")
    with pytest.raises(type(error)) as caught:
        write_atomic(path, raiser(error))
    assert caught.value is error
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"No space left to write .*plan\.json\. Free some"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "No space left to write"),
        (
            PermissionError(errno.EACCES, "Permission denied"),
            r"plan\.json cannot be written: Permission denied\. Check",
        ),
    ],
)
def test_no_space_and_no_permission_are_told(tmp_path, error, message):
    """A full disk and missing permission name the path and what to do; the earlier file stays as it was."""
    path = tmp_path / "plan.json"
    path.write_text("old")
    with pytest.raises(InputError, match=message) as caught:
        write_atomic(path, raiser(error))
    assert caught.value.__cause__ is error
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full: a disk that is always full")
def test_a_full_device_is_told(tmp_path):
    """The error of a device that really is full is understood."""
    with pytest.raises(InputError, match="No space left to write"):
        write_atomic(tmp_path / "x", lambda _: Path("/dev/full").write_bytes(b"0" * 100_000))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full: a disk that is always full")
def test_a_table_on_a_full_device_is_told(tmp_path):
    """Arrow's writer reports a full device in a form that is understood too."""
    frame = pd.DataFrame({"x": np.arange(1000.0)})
    with pytest.raises(InputError, match="No space left to write"):
        write_atomic(tmp_path / "x.parquet", lambda _: frame.to_parquet("/dev/full"))


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    """A file where a folder should be is named as the user's matter, for writes and as the run folder itself."""
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_bytes(tmp_path / "file" / "run" / "x.json", b"")
    with pytest.raises(InputError, match=r"is a file\. Choose another `run`"):
        Run(tmp_path / "file")


def test_tables_and_json_round_trip(tmp_path):
    """What is read equals what was written, to the last bit, with NaN; NumPy scalars become numbers."""
    run = Run(tmp_path / "run")
    frame = pd.DataFrame({"module": ["a", "b"], "std": [0.1 + 0.2, math.nan], "shape": [[1, 2], [3]]})
    run.write_table("mine", frame)
    read = run.read_table("mine")
    pd.testing.assert_frame_equal(read[["module", "std"]], frame[["module", "std"]], check_exact=True)
    assert [list(shape) for shape in read["shape"]] == [[1, 2], [3]]
    run.write_json("variation", {"sdam": np.float32(0.1), "n": np.int64(3), "path": Path("x")})
    assert run.read_json("variation") == {"sdam": float(np.float32(0.1)), "n": 3, "path": "x"}


def test_missing_files_name_the_command_that_makes_them(tmp_path):
    """Reading what is not there says which command writes it."""
    run = Run(tmp_path)
    with pytest.raises(InputError, match=r"has no sensitivity\.parquet\. Make it first: `qvw sensitivity`"):
        run.read_table("sensitivity")
    with pytest.raises(InputError, match=r"has no plan\.json\. Make it first: `qvw plan`"):
        run.read_json("plan")


def test_damaged_files_are_told(tmp_path):
    """A file that cannot be read is named, JSON with its line."""
    (tmp_path / "stats.parquet").write_bytes(b"PAR1 cut")
    (tmp_path / "plan.json").write_text('{\n "a": 1,\n "b": oops\n}')
    (tmp_path / "variation.json").write_bytes(b"\xff\xfe\x00")
    run = Run(tmp_path)
    with pytest.raises(InputError, match=r"stats\.parquet cannot be read: .*Make it again: `qvw stats`"):
        run.read_table("stats")
    with pytest.raises(InputError, match=r"plan\.json is not JSON: line 3: "):
        run.read_json("plan")
    with pytest.raises(InputError, match=r"variation\.json cannot be read"):
        run.read_json("variation")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"steps": {},\n', r"run\.json is not JSON: line 2"),
        ("[]", r"run\.json is not a record of a run: the whole"),
        ('{"model": {"typed": "x"}}', r"not a record of a run: model\.name"),
        ('{"version": 2}', r"not a record of a run: version"),
    ],
)
def test_an_unreadable_run_json_is_told(tmp_path, text, message):
    """run.json that is no JSON or no record is named, with the place and the next step."""
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(InputError, match=message + r".*[Ff]ix it"):
        _ = Run(tmp_path).record


def test_a_run_creates_its_folder_on_the_first_write(tmp_path):
    """Opening and reading makes nothing; the first record makes the folder, and reads back equal."""
    run = Run(tmp_path / "runs" / "a")
    assert run.record.model is None
    assert not run.path.exists()
    run.set_model(MODEL)
    run.set_data({"data": "digits", "mean": (0.5,)})
    run.set_data({})
    assert Run(run.path).record.model == MODEL
    assert Run(run.path).record.data == {"data": "digits", "mean": [0.5]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights_sha256": "bb"}, "other weights"),
        ({"name": "resnet34"}, r'name: "resnet18" -> "resnet34"'),
        ({"kwargs": {"num_classes": 7}}, r'kwargs: \{"num_classes": 10\} -> \{"num_classes": 7\}'),
    ],
)
def test_another_models_results_are_refused(tmp_path, change, message):
    """A folder with results takes no other model unless they are to be removed; the same model is welcome."""
    run = Run(tmp_path)
    other = ModelRecord(**{**vars(MODEL), **change})
    run.set_model(MODEL)
    with start(run):
        write_bytes(tmp_path / "stats.parquet", b"x")
    run.set_model(ModelRecord(**{**vars(MODEL), "typed": "./resnet18"}))
    with pytest.raises(InputError, match=rf"results of another model \({message}\)"):
        run.set_model(other)
    assert (tmp_path / "stats.parquet").exists()
    run.set_model(other, overwrite=True)
    assert run.record.model == other
    assert run.record.steps == {}
    assert not (tmp_path / "stats.parquet").exists()


def test_a_step_that_runs_is_not_overwritten_by_another_model(tmp_path):
    """Nothing is removed while a process works on the old model's results; afterwards they go."""
    run = Run(tmp_path)
    run.set_model(MODEL)
    other = ModelRecord(**{**vars(MODEL), "weights_sha256": "bb"})
    with start(run):
        write_bytes(tmp_path / "stats.parquet", b"x")
        with pytest.raises(InputError, match=r"Another process runs stats in .* choose another `run`"):
            Run(tmp_path).set_model(other, overwrite=True)
        assert (tmp_path / "stats.parquet").exists()
        assert run.record.model == MODEL
    run.set_model(other, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_an_unfinished_step_without_its_record_is_refused(tmp_path):
    """What serves resuming alone is not taken up where nothing tells of what inputs it is; --overwrite removes it."""
    run = Run(tmp_path)

    def step(**options):
        return start(run, "qat", temporary=["qat/checkpoints", "qat/rows.jsonl"], **options)

    def interrupted():
        with step():
            write_bytes(tmp_path / "qat" / "checkpoints" / "step_1", b"x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    (tmp_path / "run.json").unlink()
    with pytest.raises(InputError, match=r"an unfinished qat \(qat/checkpoints\), but run.json has no"):
        step(inputs={"images": 5}).__enter__()
    assert (tmp_path / "qat" / "checkpoints" / "step_1").exists()
    with step(inputs={"images": 5}, overwrite=True):
        assert not (tmp_path / "qat" / "checkpoints").exists()


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path):
    """Though a child that it forked, as a loader's worker is, still lives."""
    program = (
        "import os, sys, time; from pathlib import Path; from analysis.storage.locks import exclusive\n"
        "with exclusive(Path(sys.argv[1]), 'it'):\n"
        "    child = os.fork()\n"
        "    if not child: print(os.getpid(), flush=True)\n"  # by the child: what it does after a fork is done
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        try:
            with pytest.raises(InputError, match="Another process runs it"), exclusive(tmp_path / "lock", "it"):
                pass
            process.kill()
            process.wait()
            os.kill(child, 0)  # it is there
            with exclusive(tmp_path / "lock", "it"):
                pass
        finally:
            process.kill()
            os.kill(child, signal.SIGKILL)


def test_a_finished_step_is_recorded_and_known(tmp_path):
    """The record of a finished step has its versions, device, times and files; is_done holds for the same inputs."""
    run = Run(tmp_path)
    inputs = {"images": 4, "mean": (0.5, 0.25), "limit": math.nan}
    with start(run, inputs=inputs, files=["stats.parquet", "stats.partial.jsonl"]):
        assert run.record.steps["stats"].status == "running"
        assert not run.is_done("stats", inputs)
        write_bytes(tmp_path / "stats.parquet", b"x")
    step = run.record.steps["stats"]
    assert (step.status, step.device, step.files) == ("done", "cpu", ["stats.parquet"])
    assert {"python", "torch", "timm", "numpy", "pandas", "scipy"} <= set(step.versions)
    assert step.finished is not None
    assert step.finished >= step.started
    assert step.seconds >= 0
    assert run.is_done("stats", inputs)
    assert not run.is_done("stats", {**inputs, "images": 5})
    assert not run.is_done("plan", inputs)
    (tmp_path / "stats.parquet").unlink()
    assert not run.is_done("stats", inputs)


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), "interrupted"), (RuntimeError("boom"), "failed"), (None, "done")]
)
def test_how_a_step_ended_is_recorded(tmp_path, error, status):
    """An interrupt is told from a failure, and both reach the caller."""
    run = Run(tmp_path)

    def body():
        with start(run):
            if error is not None:
                raise error

    if error is None:
        body()
    else:
        with pytest.raises(type(error)):
            body()
    assert run.record.steps["stats"].status == status


def test_changed_inputs_are_refused_or_overwritten(tmp_path):
    """A step's results do not mix with those of other inputs: each changed key is listed; --overwrite removes them."""
    run = Run(tmp_path)

    def interrupted():
        with start(run, inputs={"images": 4, "batch_size": 8}, files=["stats.parquet", "qat"]):
            write_bytes(tmp_path / "stats.parquet", b"x")
            write_bytes(tmp_path / "qat" / "history.parquet", b"x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(InputError, match=r"images: 4 -> 5, batch_size: 8 -> absent\).*`overwrite=True`"):
        start(run, inputs={"images": 5}).__enter__()
    assert (tmp_path / "stats.parquet").exists()
    with start(run, inputs={"images": 4, "batch_size": 8}):
        assert (tmp_path / "stats.parquet").exists()  # the same inputs resume
    with start(run, inputs={"images": 5}, files=["stats.parquet", "qat"], overwrite=True):
        assert not (tmp_path / "stats.parquet").exists()
        assert not (tmp_path / "qat").exists()
    assert run.record.steps["stats"].inputs == {"images": 5}


def test_hashes_are_told_in_words():
    """A person is told what is another one, not by which hash; another number of images says it already."""
    a, b = "a" * 64, "b" * 64
    old = {"weights_sha256": a, "images": 4, "images_sha256": a, "plan": "w3a4", "teacher_sha256": None, "bits": (2, 3)}
    assert input_changes(old, old | {"bits": [2, 3]}) == ""
    assert input_changes(old, old | {"images_sha256": b, "weights_sha256": b}) == "other weights, other images"
    assert input_changes(old, old | {"images_sha256": b, "images": 5}) == "images: 4 -> 5"
    assert input_changes(old, old | {"plan": b, "teacher_sha256": b}) == "another plan, another teacher"
    assert input_changes(old, old | {"plan": "w2a2"}) == 'plan: "w3a4" -> "w2a2"'


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["/usr/bin/qvw", "plan", "--run", "my runs"], "qvw plan --run 'my runs'"),
        (["/home/me/analysis/__main__.py", "stats"], "qvw stats"),
        (["/opt/ipykernel_launcher.py", "-f", "kernel.json"], "called from ipykernel_launcher.py"),
    ],
)
def test_only_what_was_typed_is_called_a_command(monkeypatch, arguments, command):
    """A step that a notebook or a script made does not claim a command that nobody can repeat."""
    monkeypatch.setattr("sys.argv", arguments)
    assert typed_command() == command


def test_commands_that_added_to_a_step_are_kept(tmp_path):
    """Each once, in their order; those of results that were removed are forgotten."""
    run = Run(tmp_path)
    for command in ("qvw a", "qvw a", "qvw a --bits 3", "qvw a"):
        with start(run, command=command):
            pass
    assert (run.record.steps["stats"].earlier, run.record.steps["stats"].command) == (["qvw a --bits 3"], "qvw a")
    with start(run, command="qvw b", overwrite=True):
        pass
    assert run.record.steps["stats"].earlier == []


def test_steps_at_the_same_time_lose_no_record(tmp_path):
    """Eight writers with steps of their own, each with a run of its own on the same folder: every record is there."""

    def work(writer):
        for i in range(10):
            with start(Run(tmp_path), f"qat-{writer}-{i}", files=()):
                pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    steps = Run(tmp_path).record.steps
    assert set(steps) == {f"qat-{writer}-{i}" for writer in range(8) for i in range(10)}
    assert {step.status for step in steps.values()} == {"done"}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_overwrite_deletes_nothing_outside_the_folder(tmp_path):
    """A run.json that names a file elsewhere is refused before anything there is removed."""
    victim = tmp_path / "victim"
    victim.write_text("keep")
    run = Run(tmp_path / "run")
    with start(run):
        write_bytes(run.path / "stats.parquet", b"x")
    text = (run.path / "run.json").read_text()
    (run.path / "run.json").write_text(text.replace('"stats.parquet"', '"../victim"'))
    with pytest.raises(InputError, match="lies outside the run folder"):
        start(run, overwrite=True).__enter__()
    assert victim.read_text() == "keep"


ROWS = [
    {"module": "layer1.0", "bits": 2, "loss": 0.1 + 0.2, "note": ""},
    {"module": "größe\n", "bits": 3, "loss": math.nan, "note": "x"},
    {"module": "head", "bits": 4, "loss": -math.inf, "note": None},
]


def same(rows, expected):
    """Whether two lists of rows are equal to the bit, NaN included."""
    return json.dumps(rows) == json.dumps(expected)


def test_row_log_round_trips(tmp_path):
    """Rows come back as they went in: floats to the bit, NaN and infinities, NumPy scalars as numbers."""
    log = RowLog(tmp_path / "sweep" / "rows.jsonl")
    assert log.read() == []
    log.append(ROWS[:2])
    log.append([])
    log.append(ROWS[2:])
    assert same(RowLog(log.path).read(), ROWS)
    log.append([{"x": np.float32(0.1), "n": np.int64(7)}])
    assert log.read()[-1] == {"x": float(np.float32(0.1)), "n": 7}
    log.remove()
    log.remove()
    assert log.read() == []


@pytest.mark.parametrize("read_first", [True, False])
def test_row_log_survives_a_cut_at_every_byte(tmp_path, read_first):
    """Whatever byte the log is cut at, the whole rows are read and rows appended after it are valid."""
    log = RowLog(tmp_path / "rows.jsonl")
    log.append(ROWS)
    whole = log.path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        log.path.write_bytes(whole[:cut])
        kept = ROWS[: sum(end <= cut for end in ends)]
        if read_first:
            assert same(log.read(), kept)
        log.append(ROWS[:1])
        assert same(log.read(), [*kept, ROWS[0]])


def test_a_damaged_row_is_told(tmp_path):
    """A line in the middle that is no row is the file's damage, not the end of an interrupted write."""
    log = RowLog(tmp_path / "rows.jsonl")
    log.append(ROWS)
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(lines[0] + b"\xff\xfe{\n" + lines[2])
    with pytest.raises(InputError, match=r"rows\.jsonl is damaged at line 2.*overwrite=True"):
        log.read()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full: a disk that is always full")
def test_row_log_on_a_full_device_is_told(tmp_path):
    """No space left while appending is the user's matter."""
    (tmp_path / "rows.jsonl").symlink_to("/dev/full")
    with pytest.raises(InputError, match="No space left to write"):
        RowLog(tmp_path / "rows.jsonl").append(ROWS)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of a file")
def test_row_log_that_ran_out_of_space_keeps_its_rows(tmp_path):
    """When only a part of the rows fits, none of them stays, and the earlier rows are as they were."""
    import resource
    import signal

    log = RowLog(tmp_path / "rows.jsonl")
    log.append(ROWS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # else the signal ends the process
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 50, limits[1]))
        with pytest.raises(InputError, match="No space left to write"):
            log.append(ROWS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert same(log.read(), ROWS)


def test_what_killed_writes_have_left_is_removed(tmp_path):
    """By the next step, if no process of that number runs and the file is a minute old; other hidden files stay."""
    (tmp_path / "run").mkdir()
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    number = int(dead.stdout)
    left, young, running, other = (
        tmp_path / "run" / name
        for name in (f".stats.{number}.tmp.parquet", f".run.{number}.tmp.json", f".plan.{os.getpid()}.tmp.json", ".tmp")
    )
    for path in (left, young, running, other):
        path.write_bytes(b"half")
        if path != young:
            os.utime(path, (0, 0))
    with start(Run(tmp_path / "run"), inputs={}, files=[]):
        assert not left.exists()
    assert [path.exists() for path in (young, running, other)] == [True, True, True]


def test_a_link_in_place_of_a_file_is_removed_itself(tmp_path):
    """Wherever it leads, or nowhere; a name outside of the folder is refused as before."""
    run = Run(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_bytes(b"x")
    for name, target in (
        ("nowhere", "missing"),
        ("folder", tmp_path / "elsewhere"),
        ("file", tmp_path / "elsewhere/file"),
    ):
        (tmp_path / "run" / name).symlink_to(target)
    run.remove(["nowhere", "folder", "file"])
    assert not list((tmp_path / "run").iterdir())
    assert (tmp_path / "elsewhere" / "file").exists()
    for outside in ("../elsewhere", "..", ".", "a/../../elsewhere"):
        with pytest.raises(InputError, match="lies outside the run folder"):
            run.remove([outside])
