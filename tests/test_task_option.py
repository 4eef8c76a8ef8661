"""`--task`: the name of a ready-made task or a function of the user's, remembered by the run folder."""

import json

import pandas as pd
import pytest
import torch

from analysis.inputs.task_option import check_task, resolve_task
from analysis.session.setup import Setup, completed
from analysis.task import Task
from analysis.tasks import language_modeling, multilabel
from quant.choices import TASKS
from quant.errors import InputError
from tests.digits_vit import DATA, MODEL, qvw

OWN = """
import torch
from analysis.task import Task

def own():
    return Task(name="own", divergence=lambda output, reference: (output - reference).abs().mean(1))

def number():
    return 3

def broken():
    raise ZeroDivisionError("no such task")
"""


@pytest.fixture
def file(tmp_path):
    """A file of the user's with a task, and two functions that make none."""
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return path


@pytest.mark.parametrize("name", TASKS)
def test_each_name_makes_its_task(name):
    """The task has the name that was typed; a hyphen stands for an underscore."""
    assert resolve_task(name).name == name
    assert resolve_task(name.replace("_", "-")).name == name


def test_a_function_of_the_users_makes_a_task(file):
    """The function's task is used as it is."""
    task = resolve_task(f"{file}:own")
    assert isinstance(task, Task)
    assert task.divergence(torch.ones(2, 3), torch.zeros(2, 3)).tolist() == [1, 1]


def test_texts_that_make_no_task_are_refused(file):
    """An unknown name, a missing file or function before anything is executed; what a function returns, after."""
    for text in ("segmentaton", "", "resnet18", "gone.py:own", f"{file}:other", f"{file}"):
        with pytest.raises(InputError):
            check_task(text)
    for text, message in (("number", "must return a Task"), ("broken", "ZeroDivisionError")):
        check_task(f"{file}:{text}")  # only executing it tells
        with pytest.raises(InputError, match=message):
            resolve_task(f"{file}:{text}")


def test_a_run_folder_remembers_the_task(file, tmp_path, monkeypatch):
    """Measured by the user's divergence in one command; the next one uses it too, in another working directory."""
    run = tmp_path / "run"
    sweep = ["--images", 16, "--tensors", "weight", "--run", run, *DATA[2:]]
    monkeypatch.chdir(tmp_path)
    assert qvw("sensitivity", *MODEL, *DATA[:2], *sweep, "--bits", "8", "--task", "mine.py:own") == 0
    monkeypatch.chdir("/")
    assert qvw("sensitivity", *sweep, "--bits", "4") == 0
    record = json.loads((run / "run.json").read_text())
    assert record["data"]["task"] == f"{file}:own"
    assert record["steps"]["sensitivity"]["inputs"]["task"] == f"{file}:own"
    table = pd.read_parquet(run / "sensitivity.parquet")
    assert set(table["task"]) == {"own"}
    assert set(table["bit_width"]) == {4, 8}
    assert (table["divergence"] > 0).all()


def test_a_sweep_of_another_task_is_another_sweep(file, tmp_path, capfd):
    """Rows of two tasks do not mix."""
    run = tmp_path / "run"
    sweep = ["--images", 8, "--tensors", "weight", "--bits", "8", "--run", run, *DATA[2:]]
    assert qvw("sensitivity", *MODEL, *DATA[:2], *sweep) == 0
    assert qvw("sensitivity", *sweep, "--task", "regression") == 2
    assert "other inputs" in capfd.readouterr().err


def test_options_complete_a_setup_with_its_task(tmp_path):
    """A task that was typed wins; a name stays a name."""
    from analysis.runs import Run

    setup = completed(Setup(run=tmp_path, task="regression", data="digits"), Run(tmp_path))
    assert setup.task == "regression"


def test_tasks_refuse_what_they_are_not_meant_for():
    """Logits of other shapes are an InputError; class indices are no labels of a multilabel network."""
    with pytest.raises(InputError, match="vocabulary"):
        language_modeling().check(torch.zeros(2, 10), torch.zeros(2))
    task, logits = multilabel(), torch.zeros(2, 3)
    assert task.loss(logits, (logits, torch.tensor([0, 1]))).isnan().all()
    with pytest.raises(InputError, match="shape of the logits"):
        task.loss(logits, (logits, torch.zeros(2, 2)))
    assert task.loss(logits[:, 0], (logits, torch.tensor([0.0, 1.0]))).tolist() == pytest.approx([0.6931, 0.6931], 1e-3)
