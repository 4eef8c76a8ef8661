"""Standard output without what compiled libraries print to it."""

import io
import os
import subprocess
import sys

import pytest

from analysis.terminal.standard_output import c_output_discarded

SCRIPT = """
import ctypes, os
from analysis.terminal.standard_output import c_output_discarded
c_library = ctypes.CDLL(None)
print("python before")
c_library.puts(b"C before")
with c_output_discarded():
    os.write(1, b"descriptor inside")
    c_library.puts(b"C inside")
print("python after", flush=True)
c_library.puts(b"C after")
"""


def test_only_what_compiled_code_prints_inside_is_lost():
    """Into a pipe, where Python and C both hold text back, all but the text from inside comes out, in order."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=buffered)
    assert done.stdout.splitlines() == ["python before", "C before", "python after", "C after"]


def test_the_descriptor_is_restored_after_an_error(capfd):
    """An error inside passes through; the output is back afterwards and no descriptor stays open."""

    def interrupted() -> None:
        with c_output_discarded():
            os.write(1, b"inside")
            raise KeyboardInterrupt

    spare = os.dup(1)
    os.close(spare)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    os.write(1, b"after")
    assert capfd.readouterr().out == "after"
    again = os.dup(1)
    os.close(again)
    assert again == spare


@pytest.mark.parametrize("stdout", [None, io.StringIO()], ids=["none", "without a descriptor"])
def test_python_s_own_output_need_have_no_descriptor(stdout, capfd, monkeypatch):
    """With sys.stdout None, or a stream in memory, descriptor 1 is silenced and restored all the same."""
    with monkeypatch.context() as patch:  # undone before capfd closes the stream that it restores
        patch.setattr(sys, "stdout", stdout)
        with c_output_discarded():
            os.write(1, b"inside")
    os.write(1, b"after")
    assert capfd.readouterr().out == "after"


def test_a_process_without_descriptor_1_is_left_so(capfd):
    """Where descriptor 1 is closed the block runs, and it is closed afterwards."""
    kept = os.dup(1)
    os.close(1)
    try:
        with c_output_discarded():
            inside = True
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(1)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    assert inside
