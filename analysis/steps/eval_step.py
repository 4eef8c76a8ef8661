"""`qvw eval`: accuracy of the floating-point model, of a plan or uniform bits without training, of a trained model."""

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from analysis.data import ImageData
from analysis.inputs.weights import weights_sha256
from analysis.session.loaded_run import LoadedRun
from analysis.session.open_run import open_run
from analysis.session.setup import Setup
from analysis.steps.eval_log import evaluated, floating_outputs, log_name, log_names
from analysis.steps.eval_request import EvalRequest
from analysis.steps.export_step import load_checkpoint_
from analysis.steps.verify_rows import keep_row, show_rows, verify_row, verify_rows
from analysis.storage.plan_file import PLAN_FILE, read_plan_file
from analysis.storage.step_inputs import input_changes
from analysis.terminal.console import say, warn
from analysis.training.calibration import calibrated, calibration_batches, read_plan, running_quantized, warn_of_fewer
from quant.bit_plan import BitPlan, PlannedSite


def run_eval(setup: Setup, request: EvalRequest) -> None:
    """Evaluate what is asked for, and keep the result as a row of verify.parquet.

    What was interrupted resumes after the last batch that was evaluated, to the same row.
    """
    opened = open_run(setup, needs_data=True)
    plan = request.uniform if request.plan_file is None else read_plan(request.plan_file, opened)
    sites: Sequence[PlannedSite] = ()
    if request.checkpoint is not None:
        sites = load_checkpoint_(opened, request.checkpoint)
    data = opened.step_images("eval", "val")
    if request.floating and data.classes:
        say(f"classes in the order of the head: {data.first_classes(5)}", quiet=setup.quiet)
    options = {name: None if value is None else str(value) for name, value in asdict(request).items()}
    text = plan if plan is None or isinstance(plan, str) else plan.to_json()
    options["plan_sha256"] = None if text is None else hashlib.sha256(text.encode()).hexdigest()
    options["checkpoint_sha256"] = None if request.checkpoint is None else _trained_sha256(opened, sites)
    asked = {
        name: value for name, value in options.items() if name not in ("plan_file", "checkpoint")
    }  # wherever they lie
    of_other_images = _of_other_images(opened, data)
    with opened.step("eval", data, (), options, temporary=(log_name(asked),), renew=True):
        opened.run.remove([log_name(asked), *of_other_images] if setup.overwrite else ())
        running: Any = nullcontext()
        calibration: Sequence[Tensor] = ()
        if plan is not None:
            made = calibrated(
                opened.network, plan, calibration_batches(opened, request.calibration_images), layout=request.layout,
                estimator=request.estimator, model=opened.plan_model, stored=opened.stored,
            )  # fmt: skip
            warn_of_fewer(made, request.calibration_images, "--calibration-images")
            sites, calibration = made.plan.sites, [images for images, _ in made.data]
            running = running_quantized(opened.network, made, request.batchnorm)
        without_labels = plan is not None and opened.task.name != "classification"
        references = floating_outputs(opened, data) if without_labels else None
        with running:
            per_image, divergence = evaluated(opened, data, asked, calibration, references)
        kind = _kind(request, opened.run.path, plan)
        how = request.estimator if plan is not None else "learned" if sites else "none"
        batchnorm = "stored" if plan is None else request.batchnorm
        row = verify_row(
            kind, opened, sites, per_image, estimator=how, batchnorm=batchnorm, divergence=divergence
        )  # fmt: skip
        what = keep_row(opened, row, request.uniform or "")
    show_rows(opened, f"{kind} is {what}")


def _trained_sha256(opened: LoadedRun, sites: Sequence[PlannedSite]) -> str:
    """SHA-256 of a trained model that was loaded: its state, and how its sites are quantized."""
    return hashlib.sha256(f"{weights_sha256(opened.model)} {sites!r}".encode()).hexdigest()


def _of_other_images(opened: LoadedRun, data: ImageData) -> Sequence[str]:
    """The files that `--overwrite` has to remove: rows and unfinished evaluations, where they are of other images."""
    before = opened.run.record.steps.get("eval")
    if not opened.setup.overwrite or before is None or not input_changes(before.inputs, opened.inputs(data)):
        return ()
    rows = verify_rows(opened)
    if rows:
        warn(f"--overwrite removes {len(rows)} rows of verify.parquet, measured on other images.")
    return [*(["verify.parquet"] if rows else []), *log_names(opened.run)]


def _kind(request: EvalRequest, run: Path, plan: BitPlan | str | None) -> str:
    """What verify.parquet calls it; a trained model has the name of its folder, with its path if of another run.

    A plan that is not the run's own has the name of its file.
    """
    if request.checkpoint is not None:
        folder = request.checkpoint.resolve()
        folder = folder.parent if folder.name == "model.safetensors" else folder
        return folder.name if folder.parent == run.resolve() else str(folder)
    if isinstance(plan, BitPlan) and request.plan_file is not None:
        own = run / PLAN_FILE
        if not own.exists() or read_plan_file(own).sites == plan.sites:
            return "planned"
        return f"plan-{request.plan_file.stem}".removeprefix("plan-plan-")
    return "float" if request.floating else "uniform"
