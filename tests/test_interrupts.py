"""Signals end the work wherever they arrive."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WORK = """
import os, signal, sys, time
number = int(sys.argv[1])
def arrives():
    signal.raise_signal(number)
os.register_at_fork({when}=arrives)
from analysis.terminal.interrupts import catch_interrupts
catch_interrupts()
try:
    if os.fork() == 0:
        os._exit(0)
    os.wait()
    time.sleep(10)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.skipif(not hasattr(sys.modules["os"], "fork"), reason="the system cannot fork")
@pytest.mark.parametrize("number", [2, 15])
@pytest.mark.parametrize("when", ["before", "after_in_parent"])
def test_a_signal_during_a_fork_is_not_lost(number, when):
    """Python drops what is raised in the callbacks of a fork, as of a DataLoader's workers; here it comes later."""
    done = subprocess.run(
        [sys.executable, "-c", WORK.format(when=when), str(number)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("interrupted\n", "")


def test_a_signal_at_any_other_time_interrupts_at_once():
    """No fork, no delay."""
    script = "import signal; from analysis.terminal.interrupts import catch_interrupts; catch_interrupts()\n"
    script += (
        "try:\n    signal.raise_signal(15)\n    print('missed')\nexcept KeyboardInterrupt:\n    print('interrupted')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "interrupted\n"
