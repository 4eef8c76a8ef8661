"""A lock between processes, so that two do not write the same results at once."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from analysis.storage.files import writing
from quant.errors import InputError


@contextmanager
def exclusive(path: Path, what: str, *, instead: str = "run") -> Iterator[None]:
    """Hold the lock `path`, a file that is there meanwhile; InputError where another process holds it.

    The system gives the lock of a killed process free, at once: a forked child, such as a worker that reads images, has
    no part in it. `instead` is the option that names another place.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    os.register_at_fork(after_in_child=file.close)  # a lock is held until all copies of its descriptor are closed
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(file, path):  # the holder removed it between our opening and locking: two would hold a lock
                raise BlockingIOError
        except BlockingIOError as error:
            raise InputError(
                f"Another process runs {what} at this moment. Wait for it, or choose another `{instead}`."
            ) from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def taking_turns(path: Path) -> Iterator[None]:
    """Hold the lock `path`, a file that is there meanwhile, after those who hold it now; for moments only."""
    while True:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, path):  # the one before removed it: the next have made another
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
