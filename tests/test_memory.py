"""Freed memory is reused where the C library can be told to, and nothing else changes."""

import json
import os
import subprocess
import sys

import pytest

from analysis.memory import VARIABLE, has_glibc

ALLOCATE = """
import json, resource, sys
import torch
from analysis import memory

torch.set_num_threads(1)
CALLS
x = torch.zeros(10_000_000)  # 40 MB: above 32 MiB glibc maps each tensor by itself, whatever was freed before
for i in range(30):
    if i == 10:  # by then the heap has room for all that lives at once
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x.relu().sum()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps({"state": memory.reuse_freed_memory(), "faults": faults}))
"""


def allocating(calls, **environment):
    """What a process of its own that makes and frees large tensors reports, after `calls`."""
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATE.replace("CALLS", calls)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.skipif(not has_glibc(), reason="only glibc's allocator can be told to keep freed memory")
def test_freed_memory_is_not_faulted_in_again():
    """Page faults of a repeated pattern of large tensors fall at least fivefold; False gives the memory back."""
    kept = allocating("memory.reuse_freed_memory()", **{VARIABLE: "1"})
    plain = allocating("memory.reuse_freed_memory(False)", **{VARIABLE: "1"})
    assert kept["state"] is True
    assert plain["state"] is False  # also for the call at the end, which leaves it open
    assert 5 * kept["faults"] < plain["faults"]


@pytest.mark.skipif(not has_glibc(), reason="only glibc's allocator can be told to keep freed memory")
def test_the_environment_switches_it_off_and_a_call_on_again():
    """QVW_REUSE_MEMORY=0 holds for calls that do not say; an explicit True holds whatever it says."""
    off = allocating("memory.reuse_freed_memory()", **{VARIABLE: "0"})
    on = allocating("memory.reuse_freed_memory(True)", **{VARIABLE: "0"})
    assert (off["state"], on["state"]) == (False, True)
    assert 5 * on["faults"] < off["faults"]


def test_without_glibc_nothing_happens(monkeypatch):
    """On macOS, Windows or musl both calls return False and raise nothing."""
    from analysis import memory

    monkeypatch.setattr(memory, "has_glibc", lambda: False)
    monkeypatch.setattr(memory, "_state", {"wanted": None, "set": False})
    assert memory.reuse_freed_memory() is False
    assert memory.reuse_freed_memory(True) is False
    assert memory.reuse_freed_memory(False) is False
