"""What every test shares: one thread, no window for figures, and the folder of trained weights and real images."""

from pathlib import Path

import hypothesis
import matplotlib
import pytest
import torch

SHARED = Path(__file__).parents[2] / "shared"

torch.set_num_threads(1)  # results to the bit, and no contention where tests run beside other work
matplotlib.use("Agg")  # draws without a display

# A busy machine makes an example slow without making it wrong; pytest-timeout stops what hangs.
hypothesis.settings.register_profile(
    "workbench", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("workbench")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the repository: trained weights and real images that the project does not hold."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED}: the trained weights and real images are not part of the repository")
    return SHARED
