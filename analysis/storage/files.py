"""Files on the disk whole or not at all, and the append-only log of rows of a long step."""

import errno
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from quant.errors import InputError, system_error

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_ACCESS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENOENT,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}
YOUNG = 60.0
"""Seconds in which a file may be one that another machine is writing."""


def write_atomic(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in its place, on the disk before this returns.

    When it fails, the temporary file is removed and an earlier `path` stays as it was; a full disk or missing
    permission raises InputError. The temporary name has the suffix of `path`, by which some writers choose a format.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no regular file. Choose another name.")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            temporary.chmod(0o666 & ~_umask())  # safetensors keeps its files from other users
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _fsync_folder(path.parent)


def remove_unfinished(folder: Path) -> None:
    """Delete what killed processes of this machine have left in the folder of files that they were writing."""
    for path in folder.glob(".*.tmp*"):
        number = path.name.rpartition(".tmp")[0].rpartition(".")[2]
        with suppress(OSError):
            if number.isdecimal() and time.time() - path.stat().st_mtime > YOUNG and not _runs(int(number)):
                path.unlink()


def _runs(number: int) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    write_atomic(path, lambda temporary: temporary.write_bytes(content))


def _umask() -> int:
    """The permissions that new files of this process lack."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync_folder(folder: Path) -> None:
    """Make a rename in the folder outlast a power cut."""
    if os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk and missing permissions into InputError; safetensors and torch say them in words only."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        code = system_error(error)
        if code in _NO_SPACE:
            raise InputError(f"No space left to write {path}. Free some, then run the same command again.") from error
        if code in _NO_ACCESS:
            reason = os.strerror(code or 0)
            raise InputError(f"{path} cannot be written: {reason}. Check its permissions or choose another.") from error
        raise


class RowLog:
    """Rows in the order in which they were computed, one JSON object a line, so that a long step can be resumed."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows; when this returns they are on the disk. Where the disk is full the file is left as it was."""
        data = "".join(json.dumps(dict(row), default=json_scalar) + "\n" for row in rows).encode()
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b", buffering=0) as file:  # a buffer would try once more when the file is closed
                end = file.seek(0, os.SEEK_END)
                if end and (file.seek(end - 1), file.read(1))[1] != b"\n":
                    file.seek(0)
                    end = file.read().rfind(b"\n") + 1  # the last run was killed within a line
                    file.truncate(end)
                try:
                    while data:
                        data = data[file.write(data) :]
                    os.fsync(file.fileno())
                except OSError:
                    with suppress(OSError):
                        file.truncate(end)
                    raise

    def read(self, *, damaged: bool = False) -> list[Any]:
        """All whole rows, floats to the last bit; a last line that was cut short is removed from the file.

        Another line that is no JSON is an InputError, or with `damaged` the row None.
        """
        if not self.path.exists():
            return []
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror}. Fix it, or `overwrite=True`.") from error
        end = data.rfind(b"\n") + 1
        if end < len(data):
            os.truncate(self.path, end)
        rows = []
        for number, line in enumerate(data[:end].splitlines(), start=1):
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:  # ValueError: also of bytes that are no UTF-8
                if damaged:
                    rows.append(None)
                    continue
                raise InputError(
                    f"{self.path} is damaged at line {number}. Start the step from scratch with `overwrite=True`."
                ) from error
        return rows

    def keep(self, up_to_step: int) -> list[dict[str, Any]]:
        """Drop the rows whose `step` is later than `up_to_step`; the rows that stay."""
        rows = self.read()
        if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
            raise InputError(f"{self.path} is damaged: lines lack a step. Start from scratch: `overwrite=True`.")
        rows = [row for row in rows if row["step"] <= up_to_step]
        write_bytes(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        return rows

    def remove(self) -> None:
        """Delete the file, if there is one."""
        self.path.unlink(missing_ok=True)


def json_scalar(value: Any) -> Any:
    """A NumPy or torch scalar as Python's; a path as text."""
    return value.item() if hasattr(value, "item") else os.fspath(value)
