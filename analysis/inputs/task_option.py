"""The option `--task`: the name of a ready-made task, or a function of the user's that makes one."""

import difflib
from typing import TYPE_CHECKING

from analysis.inputs.model_source import check_factory, factory_of
from quant.choices import TASKS
from quant.errors import InputError, first_line

if TYPE_CHECKING:  # it brings torch, which the check of a name does not need
    from analysis.task import Task


def check_task(text: str) -> None:
    """Raise InputError for a text that names no task; a file is looked at, not executed."""
    factory = factory_of(text)
    if factory is not None:
        check_factory(*factory, f"the task {text!r}")
    elif text.replace("-", "_") not in TASKS:
        near = difflib.get_close_matches(text, TASKS, n=1)
        hint = f" The nearest is {near[0]}." if near else ""
        raise InputError(
            f"There is no task {text!r}.{hint} Choose from {', '.join(TASKS)}, or name a function of yours that "
            "returns a Task: path/to/file.py:function."
        )


def resolve_task(text: str) -> "Task":
    """The task that `text` names: `segmentation`, or `path/to/file.py:function`, where the function returns a Task.

    Raises InputError for an unknown name, a file that is not there or raises, and a function that returns no Task.

    >>> resolve_task("regression").name
    'regression'
    """
    from analysis import tasks
    from analysis.models import users_function
    from analysis.task import Task

    check_task(text)
    factory = factory_of(text)
    if factory is None:
        task: Task = getattr(tasks, text.replace("-", "_"))()
        return task
    with users_function(*factory) as make:
        try:
            made = make()
        except (Exception, SystemExit) as error:
            raise InputError(f"{text} raised {type(error).__name__}: {first_line(error)}.") from error
    if not isinstance(made, Task):
        raise InputError(f"{text} must return a Task (analysis.Task), got {type(made).__name__}.")
    return made
