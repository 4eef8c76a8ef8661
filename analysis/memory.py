"""Freed memory stays with the process: on Linux, large freed tensors would go back to the kernel after every layer."""

import ctypes
import os

VARIABLE = "QVW_REUSE_MEMORY"
"""Environment variable; `QVW_REUSE_MEMORY=0` switches reuse off."""

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of mallopt, from glibc's malloc.h
_DEFAULTS = {_TRIM_THRESHOLD: 128 * 1024, _MMAP_MAX: 65536}
_REUSE = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_MAX: 0}

_state: dict[str, bool | None] = {"wanted": None, "set": False}


def reuse_freed_memory(enabled: bool | None = None) -> bool:
    """Let the C library keep freed memory and hand it out again; returns whether it does.

    Without it glibc maps each large tensor afresh and returns it when it is freed, and the kernel clears its pages
    again at the next allocation: a third to a half of the processor time of a forward pass on large images. Peak memory
    stays the same, but the process keeps its peak until it ends. Results do not change.

    With `enabled` None it is switched on unless an earlier call said False or the environment has
    `QVW_REUSE_MEMORY=0`; True and False decide for the whole process, also for later calls. Every `measure_*` function
    calls it. The first call takes microseconds, later ones nothing. Where the C library is not glibc (macOS, Windows,
    musl) nothing happens and False is returned.

    >>> reuse_freed_memory() in (True, False)
    True
    """
    if enabled is not None:
        _state["wanted"] = enabled
    wanted = _state["wanted"]
    if wanted is None:
        wanted = os.environ.get(VARIABLE, "1").strip().lower() not in ("0", "false", "no", "off")
    if wanted != _state["set"]:
        _state["set"] = _apply(_REUSE if wanted else _DEFAULTS) and wanted
    return bool(_state["set"])


def has_glibc() -> bool:
    """Whether this process runs on glibc, the C library whose allocator can be told to keep memory."""
    try:
        return hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
    except (OSError, TypeError):  # Windows cannot open the process itself
        return False


def _apply(settings: dict[int, int]) -> bool:
    """Set parameters of the allocator; False where this cannot be done."""
    if not has_glibc():
        return False
    library = ctypes.CDLL(None)
    return all(library.mallopt(parameter, value) == 1 for parameter, value in settings.items())
