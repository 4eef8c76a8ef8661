"""`qvw export`: a trained model as one safetensors file of packed integer codes; and back into a model."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from analysis.cost import cost_table
from analysis.planning import accounting
from analysis.session.open_run import open_run
from analysis.session.opened import Opened
from analysis.session.setup import Setup
from analysis.storage.files import write_atomic
from analysis.storage.run_record import typed_command
from analysis.storage.trained_files import (
    PACKED_FORMAT,
    TRAINED,
    check_export_target,
    check_packed,
    is_trained_folder,
    packable_folder,
)
from analysis.terminal.console import say, warn
from analysis.training.calibration import read_plan, uncalibrated
from analysis.training.trained_model import load_trained_
from quant.bit_plan import BitPlan, PlannedSite, check_known_sites
from quant.errors import InputError, first_line
from quant.insertion import attach_quantizers_
from quant.pack import PARTS, load_packed_, pack

VERSION = 1


def run_export(setup: Setup, out: Path, *, name: str | None = None) -> None:
    """Write the trained model of RUN/qat, or of RUN/qat-NAME, to `out`, and print what it takes."""
    check_export_target(out)
    trained = packable_folder(setup.run, name)
    opened = open_run(setup, needs_data=False)
    load_trained_(opened, trained)
    plan = read_plan(trained / "plan.json", opened, other_weights=True)
    tensors = pack(opened.model)
    content = {
        "format": PACKED_FORMAT, "version": VERSION,
        "model": {"name": opened.record.typed, "kwargs": dict(opened.record.kwargs), "seed": opened.record.seed},
        "input": asdict(opened.input_config), "plan": json.loads(plan.to_json()),
    }  # fmt: skip
    # One key with one text: safetensors writes several in an order that changes from run to run.
    metadata = {PACKED_FORMAT: _sealed(content, tensors)}
    inputs = opened.inputs(None) | {"model_sha256": hashlib.sha256((trained / TRAINED).read_bytes()).hexdigest()}
    inside = out.resolve().is_relative_to(opened.run.path.resolve())
    with opened.run.start_step(
        "export", command=typed_command(), options={"out": str(out), "name": name}, inputs=inputs,
        files=[str(out.resolve().relative_to(opened.run.path.resolve()))] if inside else [],
        seed=0, device=opened.setup.device, renew=True,
    ):  # fmt: skip
        write_atomic(out, lambda path: save_file(tensors, path, metadata=metadata))
    say(_account(opened, plan, tensors, out.stat().st_size), quiet=setup.quiet)
    say(f"the packed model is in {out}", quiet=setup.quiet)


def load_checkpoint_(opened: Opened, path: Path) -> Sequence[PlannedSite]:
    """Turn the opened model into a trained one; the sites that are quantized.

    `path` is a folder of `qvw train`, or a file of `qvw export`, from which no code is run. InputError where it is
    neither, damaged, or of another network; the weights that the opened model has do not matter.
    """
    if is_trained_folder(path):
        return load_trained_(opened, path)
    name, plan, tensors = _read(path)
    try:
        known = {info.site for info in opened.sites if info.quantizable}
        check_known_sites((planned.site for planned in plan.sites), known, what="--checkpoint")
        quantizers = uncalibrated(opened, plan)
    except InputError as error:
        raise InputError(f"{path} is of another network, {name}: {error}") from error
    attach_quantizers_(opened.model, quantizers, trace=opened.trace, sites=opened.by_site, image=opened.probe_image())
    load_packed_(opened.model, tensors, source=f"{path}, a packed {name},")
    opened.model.eval()
    return plan.sites


def _read(path: Path) -> tuple[str, BitPlan, dict[str, Tensor]]:
    """The model's name, the plan and the tensors of a packed file, checked against their checksum."""
    check_packed(path)
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {})[PACKED_FORMAT]
        tensors = load_file(path)
    except Exception as error:  # damaged files raise whatever their reader stumbles over
        raise InputError(
            f"--checkpoint {path} cannot be read ({first_line(error)}): not a packed model, or cut short. Name a file "
            "of `qvw export`, or a folder of `qvw train`."
        ) from error
    try:
        content = json.loads(text)
        version, name, plan = content["version"], content["model"]["name"], content["plan"]
        del content["sha256"]
        intact = text == _sealed(content, tensors)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        version, intact = VERSION, False
    if version != VERSION:
        raise InputError(f"{path}: version is {version!r}, expected {VERSION}. Export it again with this qvw.")
    if not intact:
        raise InputError(
            f"{path} is damaged or was changed: its plan and tensors do not have the checksum that it names. "
            "Export it again."
        )
    return name, BitPlan.from_json(json.dumps(plan), source=str(path)), tensors


def _sealed(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The header's text: its content with the SHA-256 of it and of names, dtypes, shapes and bytes of the tensors."""
    digest = hashlib.sha256(json.dumps(content).encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        digest.update(x.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return json.dumps({**content, "sha256": digest.hexdigest()})


def _account(opened: Opened, plan: BitPlan, tensors: Mapping[str, Tensor], size: int) -> str:
    """What each part of the file takes, beside the plan's bytes and the model in float32."""
    held = {part: [x for name, x in tensors.items() if name.partition("/")[0] == part] for part in PARTS}
    taken = {part: sum(x.nbytes for x in found) for part, found in held.items()}
    counted = taken["codes"] + taken["scale"] + taken["offset"] + taken["parameter"]
    planned = accounting.totals(
        plan.sites, cost_table(opened.sites, opened.trace.unplanned), opened.record.parameters
    ).size_bytes
    header = size - sum(taken.values())
    floating = accounting.FLOAT_BYTES * opened.record.parameters + taken["buffer"]
    lines = {
        f"codes of {len(held['codes'])} weights": taken["codes"],
        "scales and offsets": taken["scale"] + taken["offset"],
        "parameters outside the plan": taken["parameter"],
        "these three": counted, "size_bytes of the plan": planned,
        "buffers": taken["buffer"], "header: names and plan": header, "the file": size,
        "the model in float32": floating,
    }  # fmt: skip
    if counted != planned:
        warn(
            f"the file holds {abs(counted - planned)} bytes {'more' if counted > planned else 'less'} than the plan "
            "counts: it keeps each number in its own type, and a weight that an unplanned layer shares in full too."
        )
    table = "\n".join(f"  {name:28}{value:14,} bytes" for name, value in lines.items())
    without = floating / (size - header)
    return f"{table}\n{floating / size:.2f} times smaller than in float32 ({without:.2f} without the header)"
