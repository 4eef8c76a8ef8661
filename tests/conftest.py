"""What every test shares: one thread, no window for figures, trained weights and real images, the demo's folder."""

import os
import shutil
from pathlib import Path

import hypothesis
import matplotlib
import pytest
import torch
from filelock import FileLock

from analysis.memory import reuse_freed_memory

SHARED = Path(__file__).parents[2] / "shared"

torch.set_num_threads(1)  # results to the bit, and no contention where tests run beside other work
matplotlib.use("Agg")  # draws without a display
reuse_freed_memory()  # tests on real networks take less processor time

# A busy machine makes an example slow without making it wrong; pytest-timeout stops what hangs. Examples are drawn
# afresh each time, but where changes are judged (CI): what is found there must come from the change.
hypothesis.settings.register_profile(
    "workbench",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize="CI" in os.environ,
)
hypothesis.settings.load_profile("workbench")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the repository: trained weights and real images that the project does not hold."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED}: the trained weights and real images are not part of the repository")
    return SHARED


@pytest.fixture(scope="session")
def demonstrated(tmp_path_factory, request) -> Path:
    """The demo's folder after an interruption before the second model's plan, and a second start; not to be changed.

    Test processes that run side by side share one: it takes minutes.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if hasattr(request.config, "workerinput") else base  # that of pytest-xdist's first process
    folder, done = shared / "demonstrated", shared / "demonstrated.done"
    with FileLock(shared / "demonstrated.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
            _demonstrate(folder)
            done.touch()
    return folder


def _demonstrate(folder: Path) -> None:
    from analysis.steps import demo  # late: the tests that need no demo then start sooner
    from analysis.steps.plan_step import run_plan

    calls = []

    def stopped(path, request):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        run_plan(path, request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "run_plan", stopped)
        with pytest.raises(KeyboardInterrupt):
            demo.run_demo(folder, quiet=True)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/weights.safetensors")}
    assert len(before) == 2
    demo.run_demo(folder, quiet=True)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # trained once
