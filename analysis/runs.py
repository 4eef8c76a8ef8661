"""The run folder: tables, files and the record of how each was made; written whole or not at all."""

import json
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter, ValidationError

from analysis.storage.files import json_scalar, remove_unfinished, write_atomic, writing
from analysis.storage.locks import exclusive, taking_turns
from analysis.storage.run_record import ModelRecord, RunRecord, StepRecord, git_commit, versions
from analysis.storage.step_inputs import input_changes, plain
from quant.errors import InputError, first_line

if TYPE_CHECKING:  # a wrong path or model is reported without pandas, and without the rules of tables
    import pandas as pd

_MADE_BY = {
    "stats": "qvw stats", "channels": "qvw stats", "histograms": "qvw stats", "variation": "qvw stats --data DATA",
    "sensitivity": "qvw sensitivity", "sensitivity_images": "qvw sensitivity", "cost": "qvw sensitivity",
    "proxies": "qvw sensitivity --proxies", "proxy_images": "qvw sensitivity --proxies",
    "proxy_correlation": "qvw sensitivity --proxies", "plan": "qvw plan", "pareto": "qvw plan --pareto",
    "pareto_uniform": "qvw plan --pareto", "verification": "qvw plan --verify", "verify": "qvw eval",
    "history": "qvw train", "oscillation": "qvw train", "bins": "qvw train", "config": "qvw train",
}  # fmt: skip


class Run:
    """A run folder: it keeps tables and figures of one model on one set of data, and resumes what was interrupted.

    It is created on the first write. Functions take it, or its path, as `run=`. Raises InputError for a path that is a
    file.

    >>> Run("runs/mine").path.name
    'mine'
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"The run folder {self.path} is a file. Choose another `run`.")

    @property
    def record(self) -> RunRecord:
        """What run.json holds now; empty where there is none."""
        if not (self.path / "run.json").exists():
            return RunRecord()
        try:
            return TypeAdapter(RunRecord).validate_python(self.read_json("run"))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the whole"
            raise InputError(
                f"{self.path / 'run.json'} is not a record of a run: {where}: {first['msg']}. "
                "Fix it, or choose another `run`."
            ) from error

    def set_model(self, record: ModelRecord, *, overwrite: bool = False) -> None:
        """Note the model; raises InputError where the folder holds another one's results.

        With `overwrite` the other model's results are removed, unless another process runs one of its steps.
        """
        now = self.record
        if now.model is not None:
            keys = ("name", "kwargs", "parameters", "weights_sha256")
            changes = input_changes({k: getattr(now.model, k) for k in keys}, {k: getattr(record, k) for k in keys})
            if changes and now.steps:
                if not overwrite:
                    raise InputError(
                        f"{self.path} holds the results of another model ({changes}). "
                        "Choose another `run`, or remove those results with `overwrite=True`."
                    )
                with ExitStack() as held:
                    for name in now.steps:
                        held.enter_context(self._lock(name))
                    unfinished = (path.name for path in self.path.glob("*.partial*"))
                    of_steps = (file for step in now.steps.values() for file in step.files)
                    self.remove(["verify.parquet", *of_steps, *unfinished])
                    self.edit(lambda _: RunRecord(model=record))
        if self.record.model != record:
            self.edit(lambda latest: replace(latest, model=record))

    def set_data(self, options: Mapping[str, Any]) -> None:
        """Note the options that name the images, for later steps that leave them out; none changes nothing."""
        if options and self.record.data != plain(options):
            self.edit(lambda now: replace(now, data=plain(options)))

    def is_done(self, name: str, inputs: Mapping[str, Any]) -> bool:
        """Whether the step was finished with these inputs and what it wrote is still there."""
        step = self.record.steps.get(name)
        if step is None or step.status != "done" or input_changes(step.inputs, inputs):
            return False
        return all((self.path / file).exists() for file in step.files)

    @contextmanager
    def start_step(
        self,
        name: str,
        *,
        command: str,
        options: Mapping[str, Any],
        inputs: Mapping[str, Any],
        seed: int,
        device: str,
        files: Sequence[str],
        temporary: Sequence[str] = (),
        instead: str = "run",
        overwrite: bool = False,
        renew: bool = False,
    ) -> Iterator[None]:
        """Note that a step runs; the context notes how it ended: done, interrupted or failed.

        `inputs` is all that fixes the result. Where the folder holds the step with other inputs, finished or not,
        raises InputError that lists them. `overwrite` removes what the step left; `renew` keeps it until it writes
        again. `files` are all that it may write, relative to the run folder; `temporary` are there for resuming alone,
        and removed when the step is done: without a record of the step they are refused. `instead` is the option that
        keeps both results. While the context runs no other process can start the same step.
        """
        with self._lock(name):
            old = self.record.steps.get(name)
            changes = input_changes(old.inputs, inputs) if old is not None else ""
            if changes and not (overwrite or renew):
                raise InputError(
                    f"{self.path} holds {name} with other inputs ({changes}). "
                    f"Choose another `{instead}`, or start the step from scratch with `overwrite=True`, which removes "
                    "its results."
                )
            unknown = [file for file in temporary if old is None and (self.path / file).exists()]
            if unknown and not (overwrite or renew):
                raise InputError(
                    f"{self.path} holds an unfinished {name} ({', '.join(unknown)}), but run.json has no record of the "
                    "inputs that it began with. Put run.json back, or start from scratch with `overwrite=True`."
                )
            remove_unfinished(self.path)
            files = [*files, *temporary]
            if overwrite:
                self.remove([*files, *(old.files if old is not None else [])])
            earlier = [] if old is None or overwrite or renew else list(dict.fromkeys([*old.earlier, old.command]))
            step = StepRecord(
                command=command,
                earlier=[other for other in earlier if other != command],
                options=plain(options),
                inputs=plain(inputs),
                files=files,
                seed=seed,
                versions=versions(),
                device=device,
                git_commit=git_commit(),
                status="running",
                started=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            self.note_step(name, step)
            with self._watched(name, step, temporary):
                yield

    def _lock(self, name: str) -> AbstractContextManager[None]:
        """While it is held no other process runs the step; InputError where one does."""
        return exclusive(self._inside(f".{name}.lock"), f"{name} in {self.path}")

    def write_table(self, name: str, frame: "pd.DataFrame") -> None:
        """Write NAME.parquet."""
        write_atomic(
            self.path / f"{name}.parquet", lambda path: frame.to_parquet(path, index=False, write_page_checksum=True)
        )

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> "pd.DataFrame":
        """The table of NAME.parquet, checked by analysis/storage/tables.py; it has `columns`, or all where None.

        InputError where it is missing, unreadable, lacks a column, or holds what the sort of table cannot.
        """
        path, sort = self.existing(f"{name}.parquet"), Path(name).name
        import pandas as pd

        from analysis.storage.old_tables import upgraded
        from analysis.storage.table_checks import Table, checked
        from analysis.storage.tables import TABLES

        try:
            table = pd.read_parquet(path, page_checksum_verification=True)
        except (OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:  # pyarrow's, of damaged files
            raise InputError(f"{path} cannot be read: {first_line(error)}. {_remedy(sort)}") from error
        table = upgraded(sort, table)
        known = TABLES.get(sort, Table(columns={}))
        required = known.required if columns is None else columns
        return checked(table, known, required, source=str(path), remedy=_remedy(sort))

    def write_json(self, name: str, value: Any) -> None:
        """Write NAME.json, indented, keys in the order given."""
        text = json.dumps(value, indent=1, default=json_scalar) + "\n"
        write_atomic(self.path / f"{name}.json", lambda path: path.write_text(text, encoding="utf-8"))

    def read_json(self, name: str) -> Any:
        """The content of NAME.json; raises InputError where it is missing or unreadable, with the line."""
        path = self.existing(f"{name}.json")
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is not JSON: line {error.lineno}: {error.msg}. {_remedy(name)}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} cannot be read: {first_line(error)}. {_remedy(name)}") from error

    def existing(self, file: str) -> Path:
        """The path of a file of the run folder; InputError names the command that makes it where it is missing."""
        path = self.path / file
        if not path.is_file():
            raise InputError(f"{self.path} has no {file}. Make it first: {_maker(path.stem)}.")
        return path

    def edit(self, change: Callable[[RunRecord], RunRecord]) -> None:
        """Write what `change` makes of run.json as it stands; steps that run at the same time take turns."""
        with self.taking_turns():
            self.write_json("run", asdict(change(self.record)))

    def note_step(self, name: str, step: StepRecord, **changes: Any) -> None:
        """Let run.json tell of a step, the other steps kept; `changes` are other fields of the record."""
        self.edit(lambda now: replace(now, steps={**now.steps, name: step}, **changes))

    def taking_turns(self) -> AbstractContextManager[None]:
        """A context for changing a file that several steps write: others wait. Not to be nested, `edit` included."""
        return taking_turns(self.path / ".run.lock")

    @contextmanager
    def _watched(self, name: str, step: StepRecord, temporary: Sequence[str]) -> Iterator[None]:
        start = time.monotonic()

        def finish(status: Literal["done", "interrupted", "failed"]) -> None:
            left = [file for file in step.files if file not in temporary and (self.path / file).exists()]
            files = left if status == "done" else step.files
            ended = replace(
                step, status=status, files=files, finished=datetime.now(UTC).isoformat(timespec="seconds"),
                seconds=round(time.monotonic() - start, 3),
            )  # fmt: skip
            self.note_step(name, ended)

        try:
            yield
        except BaseException as error:
            with suppress(InputError):  # a full disk must not hide why the step ended
                finish("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            raise
        finish("done")
        self.remove(temporary)  # after the record: were it the other way round, a kill between them would lose all

    def remove(self, files: Sequence[str]) -> None:
        """Delete files and folders, named relative to the run folder, where they are there."""
        for file in files:
            path = self._inside(file)
            with writing(path):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)

    def _inside(self, file: str) -> Path:
        """The path of a file of the run folder; InputError where run.json was edited so that it names another."""
        path = self.path / file
        folder, own = path.parent.resolve(), self.path.resolve()  # of a link its own place counts
        if path.name in ("", ".", "..") or own not in (folder, *folder.parents):
            raise InputError(f"{self.path / 'run.json'} names {file!r}, which lies outside the run folder. Fix it.")
        return path


def _remedy(name: str) -> str:
    """What to do about a damaged file of the run folder."""
    if name == "run":
        return "Fix it, or choose another `run`."
    if name == "cost":
        return "Make it again: the same `qvw sensitivity` once more, which keeps what was measured."
    if name == "verify":
        return "Delete it, and measure again: `qvw eval`."
    again = "" if _maker(name).startswith("`qvw plan") else " with `overwrite=True`"
    return f"Make it again: {_maker(name)}{again}."


def _maker(name: str) -> str:
    """The command that makes a file of the run folder."""
    return f"`{_MADE_BY.get(name, 'the step that writes it')}`"


def reportable_run(folder: Path) -> Run:
    """The run in a folder; InputError where there is no such folder, or nothing in it that a report could show."""
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a run folder: there is no such folder. Make one with `qvw stats --run {folder}`."
        )
    names = ("stats.parquet", "sensitivity.parquet", "verify.parquet", "plan.json", "qat*")
    if not any(True for name in names for _ in folder.glob(name)):
        raise nothing_to_report(folder)
    return Run(folder)


def nothing_to_report(folder: Path, told: str = "") -> InputError:
    """The error for a run folder without results; `told` is what else to say in place of the command to start with."""
    remedy = told or f"Measure a model first: `qvw stats MODEL --run {folder}`."
    return InputError(f"{folder} holds nothing to report. {remedy}")


def run_with_stats(folder: Path) -> Run:
    """The run in a folder that has finished statistics; InputError where it has none."""
    run = Run(folder)
    step = run.record.steps.get("stats")
    if step is not None and step.status != "done":
        raise InputError(f"the statistics of {folder} were not finished: run `qvw stats --run {folder}` again.")
    run.existing("stats.parquet")
    return run


def run_names(folders: Sequence[Path], *, reserved: Collection[str] = ()) -> list[str]:
    """By what several run folders are distinguished: their own names, which the user chose, no two alike.

    Folders above are added where a name is taken, or `reserved`. InputError for a folder given more than twice.
    """
    names: list[str] = []
    for folder in folders:
        parts = folder.resolve().parts
        candidates = ("/".join(parts[-n:]) for n in range(1, len(parts)))
        name = next((each for each in candidates if each not in (*names, *reserved)), None)
        if name is None or sum(other.resolve() == folder.resolve() for other in folders) > 2:
            raise InputError(f"the run folder {folder} was given several times. Give each once.")
        names.append(name)
    return names
