"""Keeping the process's standard output clean of what compiled libraries print to it."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_C_LIBRARY = ctypes.CDLL("ucrtbase" if sys.platform == "win32" else None)


@contextmanager
def c_output_discarded() -> Iterator[None]:
    """Discard what is written to file descriptor 1, as compiled code does, until the block ends, also by an error.

    What was printed before still comes out. The descriptor is the process's: other threads lose their output too.
    Nothing happens where the process has no descriptor 1; sys.stdout need have none, as in a notebook.
    """
    with suppress(AttributeError, ValueError):  # sys.stdout is None, or closed
        sys.stdout.flush()
    _C_LIBRARY.fflush(None)
    try:
        kept = os.dup(1)
    except OSError:
        kept = -1
    try:
        if kept >= 0:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        if kept >= 0:
            _C_LIBRARY.fflush(None)  # C holds back what it prints to a pipe or file, until after the block
            os.dup2(kept, 1)
            os.close(kept)
