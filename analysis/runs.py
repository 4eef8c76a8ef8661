"""The run folder: tables, files and the record of how each was made; written whole or not at all."""

import json
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import TypeAdapter, ValidationError

from analysis.files import json_scalar, write_atomic, writing
from analysis.locks import exclusive
from quant.errors import InputError, first_line

_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "numpy",
    "pandas",
    "scipy",
    "quantization-variation-workbench",
)
_MADE_BY = {
    "stats": "qvw stats", "channels": "qvw stats", "histograms": "qvw stats", "variation": "qvw stats --data DATA",
    "sensitivity": "qvw sensitivity", "cost": "qvw sensitivity", "proxies": "qvw sensitivity --proxies",
    "plan": "qvw plan", "pareto": "qvw plan --pareto", "verify": "qvw eval", "history": "qvw train",
    "oscillation": "qvw train", "config": "qvw train",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """The model that a run folder's results belong to."""

    typed: str  # as the user typed it
    name: str  # what the tables call it
    weights_sha256: str  # of the state dict: analysis.models.weights_sha256
    parameters: int
    factory: str | None = None  # file:function with its absolute path; None for a timm name
    kwargs: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    weights: str | None = None  # the file's path
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """How one step was run, and how it ended."""

    command: str
    options: dict[str, Any]
    inputs: dict[str, Any]  # all that fixes the result
    files: list[str]  # while it runs all that it may write, afterwards what it left, relative to the run folder
    seed: int
    versions: dict[str, str]
    device: str
    git_commit: str | None  # of the project's checkout, `-dirty` where it has changes
    status: Literal["running", "done", "interrupted", "failed"]
    started: str  # ISO 8601, UTC
    finished: str | None = None
    seconds: float | None = None  # of the last start, where a step was resumed


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What run.json holds."""

    format: Literal["qvw-run"] = "qvw-run"
    version: Literal[1] = 1
    model: ModelRecord | None = None
    data: dict[str, Any] = field(default_factory=dict)  # the options that name the images, as last given
    steps: dict[str, StepRecord] = field(default_factory=dict)


class Run:
    """A run folder; it is created on the first write."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"The run folder {self.path} is a file. Choose another `--run`.")

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
                "Mend it, or choose another `--run`."
            ) from error

    def set_model(self, record: ModelRecord, *, overwrite: bool = False) -> None:
        """Note the model; raises InputError where the folder holds another one's results.

        With `overwrite` the other model's results are removed.
        """
        now = self.record
        if now.model is not None:
            keys = ("name", "kwargs", "parameters", "weights_sha256")
            changes = _changes({k: getattr(now.model, k) for k in keys}, {k: getattr(record, k) for k in keys})
            if changes and now.steps:
                if not overwrite:
                    raise InputError(
                        f"{self.path} holds the results of another model ({changes}). "
                        "Choose another `--run`, or remove those results with `--overwrite`."
                    )
                self.remove(["verify.parquet", *(file for step in now.steps.values() for file in step.files)])
                now = RunRecord()
        if now.model != record:
            self._write(replace(now, model=record))

    def set_data(self, options: Mapping[str, Any]) -> None:
        """Note the options that name the images, for later steps that leave them out; none changes nothing."""
        now = self.record
        if options and now.data != _plain(options):
            self._write(replace(now, data=_plain(options)))

    def is_done(self, name: str, inputs: Mapping[str, Any]) -> bool:
        """Whether the step was finished with these inputs and what it wrote is still there."""
        step = self.record.steps.get(name)
        if step is None or step.status != "done" or _changes(step.inputs, inputs):
            return False
        return all((self.path / file).exists() for file in step.files)

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
        instead: str = "--run",
        overwrite: bool = False,
        renew: bool = False,
    ) -> AbstractContextManager[None]:
        """Note that a step runs; the context returned notes how it ended: done, interrupted or failed.

        `inputs` is all that fixes the result. Where the folder holds the step with other inputs, finished or not,
        raises InputError that lists them. `overwrite` removes what the step left; `renew` keeps it until it writes
        anew. `files` are all that it may write, relative to the run folder; `temporary` are there for resuming alone,
        and removed when the step is done; `instead` is the option that keeps both results. While the context runs no
        other process can start the same step.
        """
        return self._locked(
            name,
            lambda: self._note_start(
                name, command=command, options=options, inputs=inputs, seed=seed, device=device,
                files=[*files, *temporary], instead=instead, overwrite=overwrite, renew=renew,
            ),
            temporary,
        )  # fmt: skip

    @contextmanager
    def _locked(self, name: str, note: Callable[[], StepRecord], temporary: Sequence[str]) -> Iterator[None]:
        """Hold the step's lock from before `note` looks at the record until the step has ended."""
        with exclusive(self.path / f".{name}.lock", f"{name} in {self.path}"), self._watched(name, note(), temporary):
            yield

    def _note_start(
        self,
        name: str,
        *,
        command: str,
        options: Mapping[str, Any],
        inputs: Mapping[str, Any],
        seed: int,
        device: str,
        files: Sequence[str],
        instead: str,
        overwrite: bool,
        renew: bool,
    ) -> StepRecord:
        old = self.record.steps.get(name)
        changes = _changes(old.inputs, inputs) if old is not None else ""
        if changes and not (overwrite or renew):
            raise InputError(
                f"{self.path} holds {name} with other inputs ({changes}). "
                f"Choose another `{instead}`, or start the step anew with `--overwrite`, which removes its results."
            )
        if overwrite:
            self.remove([*files, *(old.files if old is not None else [])])
        now = self.record
        step = StepRecord(
            command=command,
            options=_plain(options),
            inputs=_plain(inputs),
            files=list(files),
            seed=seed,
            versions=_versions(),
            device=device,
            git_commit=_git_commit(),
            status="running",
            started=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self._write(replace(now, steps={**now.steps, name: step}))
        return step

    def write_table(self, name: str, frame: pd.DataFrame) -> None:
        """Write NAME.parquet."""
        write_atomic(
            self.path / f"{name}.parquet", lambda path: frame.to_parquet(path, index=False, write_page_checksum=True)
        )

    def read_table(self, name: str, columns: Sequence[str] = ()) -> pd.DataFrame:
        """The table of NAME.parquet; raises InputError where it is missing, unreadable, or lacks one of `columns`."""
        path = self._existing(f"{name}.parquet")
        try:
            table = pd.read_parquet(path, page_checksum_verification=True)
        except (OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:  # pyarrow's, of damaged files
            raise InputError(f"{path} cannot be read: {first_line(error)}. {_remedy(name)}") from error
        missing = [column for column in columns if column not in table]
        if missing:
            raise InputError(
                f"{path} lacks the column {missing[0]!r}: it is of another version or program. {_remedy(name)}"
            )
        return table

    def write_json(self, name: str, value: Any) -> None:
        """Write NAME.json, indented, keys in the order given."""
        text = json.dumps(value, indent=1, default=json_scalar) + "\n"
        write_atomic(self.path / f"{name}.json", lambda path: path.write_text(text, encoding="utf-8"))

    def read_json(self, name: str) -> Any:
        """The content of NAME.json; raises InputError where it is missing or unreadable, with the line."""
        path = self._existing(f"{name}.json")
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is not JSON: line {error.lineno}: {error.msg}. {_remedy(name)}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} cannot be read: {first_line(error)}. {_remedy(name)}") from error

    def _existing(self, file: str) -> Path:
        path = self.path / file
        if not path.is_file():
            raise InputError(f"{self.path} has no {file}. Make it first: {_maker(path.stem)}.")
        return path

    def _write(self, record: RunRecord) -> None:
        self.write_json("run", asdict(record))

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
            now = self.record
            self._write(replace(now, steps={**now.steps, name: ended}))

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
            path = self.path / file
            if self.path.resolve() not in path.resolve().parents:  # run.json may have been edited
                raise InputError(
                    f"{self.path / 'run.json'} names {file!r}, which lies outside the run folder. Mend it."
                )
            with writing(path):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The keys whose values differ, as `key: old -> new`; JSON's eyes see a tuple as a list and NaN as itself."""
    before, after = ({k: json.dumps(v) for k, v in _plain(x).items()} for x in (old, new))
    keys = [k for k in {**before, **after} if before.get(k) != after.get(k)]
    shorten = {k: 20 for k in keys if k.endswith("sha256")}  # enough of a hash to tell two apart
    return ", ".join(
        f"{k}: {before.get(k, 'absent')[: shorten.get(k)]} -> {after.get(k, 'absent')[: shorten.get(k)]}" for k in keys
    )


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """The value as JSON reads it back."""
    return json.loads(json.dumps(dict(value), default=json_scalar))


def _remedy(name: str) -> str:
    """What to do about a damaged file of the run folder."""
    if name == "run":
        return "Mend it, or choose another `--run`."
    return f"Make it anew: {_maker(name)} with --overwrite."


def _maker(name: str) -> str:
    """The command that makes a file of the run folder."""
    return f"`{_MADE_BY.get(name, 'the step that writes it')}`"


def _versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result may depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):  # a checkout that was not installed
            found[package] = version(package)
    return found


def _git_commit() -> str | None:
    """The commit of the project's checkout; None where its files are not in git, as in site-packages."""
    here = Path(__file__)
    try:
        _git(here.parent, "ls-files", "--error-unmatch", here.name)
        return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


def run_names(folders: Sequence[Path], *, reserved: Collection[str] = ()) -> list[str]:
    """By what several run folders are told apart: their own names, which the user chose, no two alike.

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
