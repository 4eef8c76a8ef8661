"""`qvw export`: a trained model as one safetensors file of packed integer codes; and back into a model."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from analysis.session.loaded_run import LoadedRun
from analysis.session.open_run import open_run
from analysis.session.setup import Setup
from analysis.storage.run_record import typed_command
from analysis.storage.trained_files import (
    TRAINED,
    check_export_target,
    check_packed,
    is_trained_folder,
    packable_folder,
)
from analysis.terminal.console import say, warn
from analysis.training.calibration import read_plan
from analysis.training.trained_model import load_trained_
from quant.bit_plan import BitPlan, PlannedSite
from quant.pack import PARTS
from quant.packed_file import load_packed, packed_scheme, read_packed, save_packed
from quant.site import Site


def run_export(setup: Setup, out: Path, *, name: str | None = None) -> None:
    """Write the trained model of RUN/qat, or of RUN/qat-NAME, to `out`, and print what it takes."""
    check_export_target(out)
    trained = packable_folder(setup.run, name)
    opened = open_run(setup, needs_data=False)
    load_trained_(opened, trained)
    plan = read_plan(trained / "plan.json", opened, other_weights=True)
    inputs = opened.inputs(None) | {"model_sha256": hashlib.sha256((trained / TRAINED).read_bytes()).hexdigest()}
    inside = out.resolve().is_relative_to(opened.run.path.resolve())
    with opened.run.start_step(
        "export", command=typed_command(), options={"out": str(out), "name": name}, inputs=inputs,
        files=[str(out.resolve().relative_to(opened.run.path.resolve()))] if inside else [],
        seed=0, device=opened.setup.device, renew=True,
    ):  # fmt: skip
        save_packed(opened.model, out)
    say(_account(opened, plan, load_file(out), out.stat().st_size), quiet=setup.quiet)
    say(f"the packed model is in {out}", quiet=setup.quiet)


def load_checkpoint_(opened: LoadedRun, path: Path) -> Sequence[PlannedSite]:
    """Turn the opened model into a trained one; the sites that are quantized.

    `path` is a folder of `qvw train`, or a file of `qvw export`, from which no code is run. InputError where it is
    neither, damaged, or of another network; the weights that the opened model has do not matter.
    """
    if is_trained_folder(path):
        return load_trained_(opened, path)
    check_packed(path)
    load_packed(opened.model, path)
    layout, _ = read_packed(path)
    return [PlannedSite.of(Site(site.module, site.tensor), packed_scheme(site)) for site in layout.sites]


def _account(opened: LoadedRun, plan: BitPlan, tensors: Mapping[str, Tensor], size: int) -> str:
    """What each part of the file takes, beside the plan's bytes and the model in floating point."""
    held = {part: [x for name, x in tensors.items() if name.partition("/")[0] == part] for part in PARTS}
    taken = {part: sum(x.nbytes for x in found) for part, found in held.items()}
    planned, floating = opened.stored.size(plan.sites), opened.stored.size(())
    lines = {
        f"codes of {len(held['codes'])} weights": taken["codes"],
        "scales and offsets": taken["scale"] + taken["offset"],
        "parameters outside the plan": taken["parameter"], "buffers": taken["buffer"],
        "header: names and layout": size - sum(taken.values()), "the file": size, "size_bytes of the plan": planned,
        "the model in floating point": floating,
    }  # fmt: skip
    if size != planned:
        warn(f"the file has {abs(size - planned)} bytes {'more' if size > planned else 'less'} than the plan counts.")
    table = "\n".join(f"  {name:28}{value:14,} bytes" for name, value in lines.items())
    return f"{table}\n{floating / size:.2f} times smaller than in floating point"
