"""A command shows the project's own warnings and no others."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from analysis.terminal.library_warnings import own_warnings_alone

ROOT = Path(__file__).parents[1]


def warned_by(name, text, stacklevel=1):
    """Raise a warning as a module of this name does."""
    code = f"import warnings\ndef f():\n    warnings.warn({text!r}, UserWarning, stacklevel={stacklevel})\n"
    module = {"__name__": name}
    exec(compile(code, f"{name}.py", "exec"), module)
    module["f"]()


def test_own_warnings_are_lines_of_the_command(capsys):
    """Of `quant` and `analysis` they are shown, wherever they point to; those of torch and of others are dropped."""
    with warnings.catch_warnings():
        warnings.resetwarnings()
        with own_warnings_alone():
            warned_by("torch.utils.data.dataloader", "This DataLoader will create 64 worker processes")
            warned_by("quantile.of.others", "not quant")
            warned_by("quant.network", "one layer is not observed", stacklevel=3)
            warned_by("analysis.evaluation", "from scratch")
    assert capsys.readouterr().err.splitlines() == [
        "qvw: warning: one layer is not observed", "qvw: warning: from scratch with --overwrite",
    ]  # fmt: skip


def test_warnings_that_are_errors_stay_so():
    """Who makes warnings into errors, as these tests do, meets them in a command too."""
    with own_warnings_alone(), pytest.raises(UserWarning, match="not quiet"):
        warned_by("torch.anything", "not quiet")


def test_more_workers_than_cores_are_not_a_matter_for_the_user(tmp_path):
    """Nothing of torch's loader is on the screen of a command with many worker processes."""
    arguments = [
        "stats", "resnet10t", "--model-kwargs", '{"in_chans": 1, "num_classes": 10}', "--data", "digits", "--images",
        "8", "--batch-size", "8", "--run", "r", "--num-workers", str((os.cpu_count() or 1) + 1),
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "analysis", *arguments], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if not line.startswith("qvw: warning: resnet10t has unt")] == []
