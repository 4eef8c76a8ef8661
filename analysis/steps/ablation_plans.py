"""What the arms of an ablation train: the shared options of a network, and the plan files of its arms."""

from dataclasses import replace
from pathlib import Path

from analysis.planning.plan_request import PlanRequest
from analysis.sensitivity import SweepConfig
from analysis.session.open_run import open_run
from analysis.session.processes import Processes
from analysis.session.setup import Setup
from analysis.steps.plan_step import run_plan
from analysis.steps.sensitivity_step import run_sensitivity
from analysis.storage.files import write_bytes
from analysis.storage.keyed_log import json_sha256
from analysis.training.ablation_config import Arm, Job, Subject
from analysis.training.calibration import calibrated, calibration_batches
from analysis.training.training_request import TrainRequest
from quant.bit_plan import BitPlan

CALIBRATION_IMAGES = 256
TENSORS = ("weight", "input", "attention")


def request_of(setup: Setup, subject: Subject, arm: Arm, job: Job, processes: Processes) -> TrainRequest:
    """What a job trains; plan files that it needs are made in the run folder, by the process of rank 0."""
    request = TrainRequest(name=job.name, config=job.config, val_images=subject.val_images)
    if arm.like is not None:
        return replace(request, plan_file=_planned(setup, subject, arm, arm.like, _key(job), processes))
    if arm.uniform is not None and arm.per_head:
        return replace(request, uniform=arm.uniform, layout=arm.layout)
    if arm.uniform is not None:
        return replace(request, plan_file=_one_scale_a_tensor(setup, arm, arm.uniform, _key(job), processes))
    return replace(request, floating=True)


def _planned(setup: Setup, subject: Subject, arm: Arm, like: str, key: str, processes: Processes) -> Path:
    """The planner's bits at the budget of `like`; the sweep behind them, shared, is made where it is not there."""
    file = setup.run / f"plan-{like}-{arm.layout}-{key}.json"

    def images() -> int:
        return open_run(setup, needs_data=True).images("train", None, at_most=subject.sweep_images).images

    if not processes.by_first(file.exists):
        sweep = SweepConfig(bit_widths=subject.sweep_bits, batchnorm="re-estimate")
        run_sensitivity(replace(setup, images=processes.by_first(images)), sweep, tensors=TENSORS)
        request = PlanRequest(like=like, layout=arm.layout, out=file, quiet=True)
        processes.by_first(lambda: run_plan(setup.run, request))
    if arm.per_head:
        return file
    without = setup.run / f"{file.stem}-per-tensor.json"

    def write() -> None:
        plan = BitPlan.from_json(file.read_text(encoding="utf-8"), source=str(file))
        write_bytes(without, _without_heads(plan).to_json().encode())

    processes.by_first(write)
    return without


def _one_scale_a_tensor(setup: Setup, arm: Arm, uniform: str, key: str, processes: Processes) -> Path:
    """Uniform bits as a plan file, with one scale a tensor where the default scheme has one a head."""
    file = setup.run / f"plan-{uniform}-{arm.layout}-{key}-per-tensor.json"

    def make() -> None:
        if file.exists():
            return
        opened = open_run(setup, needs_data=True)
        made = calibrated(
            opened.network, uniform, calibration_batches(opened, CALIBRATION_IMAGES), layout=arm.layout,
            estimator="mse", model=opened.plan_model, stored=opened.stored,
        )  # fmt: skip
        write_bytes(file, _without_heads(made.plan).to_json().encode())

    processes.by_first(make)
    return file


def _without_heads(plan: BitPlan) -> BitPlan:
    sites = (replace(s, granularity="per_tensor") if s.granularity == "per_head" else s for s in plan.sites)
    return replace(plan, sites=tuple(sites))


def _key(job: Job) -> str:
    """What distinguishes plans of different sweeps, layouts and images; the same for all seeds and settings."""
    fixed = {key: value for key, value in job.fixed.items() if not key.startswith("config.")}
    return json_sha256(fixed)[:8]
