"""Plans as files: read and checked by themselves, before a model is there."""

from pathlib import Path

from quant.bit_plan import BitPlan
from quant.errors import InputError, first_line

PLAN_FILE = "plan.json"
"""A run's own plan, and the plan of a trained model, in its folder."""


def read_plan_file(path: Path) -> BitPlan:
    """The plan in a file, or in plan.json of a run folder; InputError where it cannot be read or is no plan."""
    file = path / PLAN_FILE if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the plan {file} cannot be read: {first_line(error)}. Make one with `qvw plan`.") from error
    return BitPlan.from_json(text, source=str(file))


def read_used_plan(path: Path) -> BitPlan:
    """The plan in a file from which a network is to be quantized; InputError also where it plans no site."""
    plan = read_plan_file(path)
    if not plan.sites:
        raise InputError(f"{path} plans no site: nothing would be quantized. Use --float for the model as it is.")
    return plan


def own_plan(run: Path) -> Path:
    """The run's own plan file; InputError where it has not been made."""
    own = run / PLAN_FILE
    if not own.exists():
        raise InputError(f"{own} does not exist: make it with `qvw plan`, or give --plan, --uniform w4a4 or --float.")
    return own
