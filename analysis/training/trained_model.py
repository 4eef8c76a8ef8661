"""A trained, quantized network on the disk: model.safetensors and plan.json in one folder."""

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model

from analysis.session.loaded_run import LoadedRun
from analysis.storage.files import write_atomic, write_bytes
from analysis.storage.trained_files import trained_weights
from analysis.training.calibration import read_plan, uncalibrated
from quant.bit_plan import BitPlan, PlannedSite
from quant.errors import InputError, first_line
from quant.insertion import attach_quantizers_
from quant.quantizer import LSQQuantizer

_PLAN = "plan_sha256"  # key of the file's metadata


def save_trained(folder: Path, opened: LoadedRun, plan: BitPlan | None) -> None:
    """Write the model, prepared for `plan`, and the plan; a floating-point model (plan None) has no plan.json."""
    if plan is not None:
        write_bytes(folder / "plan.json", plan.to_json().encode())
    metadata = {_PLAN: _digest(plan)}
    write_atomic(folder / "model.safetensors", lambda path: save_model(opened.model, str(path), metadata=metadata))


def load_trained_(opened: LoadedRun, folder: Path) -> Sequence[PlannedSite]:
    """Turn the opened model into the trained one of `folder`; the sites that are quantized, none if it is float.

    Raises InputError where the folder is none of `qvw train`, damaged, or of another network.
    """
    weights = trained_weights(folder)
    folder = weights.parent
    sites: Sequence[PlannedSite] = ()
    plan = None
    if (folder / "plan.json").exists():
        plan = read_plan(folder / "plan.json", opened, other_weights=True)
        attach_quantizers_(opened.network, uncalibrated(opened, plan))
        sites = plan.sites
    try:
        with safe_open(weights, framework="pt") as file:
            digest = (file.metadata() or {}).get(_PLAN)
        if digest != _digest(plan):
            raise InputError(
                f"{weights} was trained with another plan than the one beside it. Put the plan back, or train again "
                "with --overwrite."
            )
        missing, unexpected = load_model(opened.model, weights, strict=False)
    except InputError:
        raise
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"{weights} cannot be loaded ({first_line(error)}): cut short, or of another network. "
            "Train again with --overwrite."
        ) from error
    if missing or unexpected:
        example = sorted([*missing, *unexpected])[0]
        raise InputError(
            f"{weights} is not of this network and plan: {len(missing)} tensors are missing and {len(unexpected)} "
            f"unexpected, such as {example!r}. Was plan.json changed? Train again with --overwrite."
        )
    wrong = [n for n, m in opened.model.named_modules() if isinstance(m, LSQQuantizer) and not (m.scale > 0).all()]
    if wrong:
        raise InputError(f"{weights}: the scale of {wrong[0]} is not above 0. The file cannot be used; train again.")
    corrupt = [n for n, x in opened.model.named_parameters() if not x.isfinite().all()]
    corrupt += [n for n, x in opened.model.named_buffers() if x.isnan().any()]  # a mask may have infinities
    if corrupt:
        raise InputError(f"{weights}: {corrupt[0]} holds NaN or Inf. The file cannot be used; train again.")
    opened.model.eval()
    return sites


def _digest(plan: BitPlan | None) -> str:
    return "none" if plan is None else plan.sha256
