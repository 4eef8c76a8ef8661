"""`qvw ablate`: train every arm on every network with every seed, and say what each arm is worth."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from analysis.ablation import result, results_frame, summarized, verdicts
from analysis.ablation_config import Ablation, Arm, Job, Subject, read_ablation
from analysis.ablation_plots import ablation_figure
from analysis.calibration import calibrated
from analysis.console import as_text, say
from analysis.files import write_bytes
from analysis.open_run import open_run
from analysis.panels import save_figure
from analysis.plan_request import PlanRequest
from analysis.plan_step import run_plan
from analysis.runs import Run
from analysis.sensitivity import SweepConfig
from analysis.sensitivity_step import run_sensitivity
from analysis.setup import Setup
from analysis.train_step import TrainRequest, run_train
from quant.bit_plan import BitPlan
from quant.errors import InputError

CALIBRATION_IMAGES = 256
TENSORS = ("weight", "input", "attention")


def run_ablation(path: Path, out: Path, *, only: Sequence[str], device: str, num_workers: int, quiet: bool) -> None:
    """Make what is missing of the ablation in the YAML file `path`; its trainings lie in run folders OUT/NETWORK.

    A training that is finished is kept, one that was interrupted goes on. After each, ablation.csv (a row a training),
    summary.csv and ablation.png are written anew from all that are finished. `only` names the networks to train, so
    that several processes can share the work.
    """
    ablation = read_ablation(path)
    unknown = [name for name in only if name not in ablation.subjects]
    if unknown:
        raise InputError(f"{path} has no subject {unknown[0]!r}; it has {', '.join(ablation.subjects)}.")
    jobs = list(ablation.jobs())
    wanted = [job for job in jobs if not only or job.subject in only]
    for number, job in enumerate(wanted, start=1):
        subject, arm = ablation.subjects[job.subject], ablation.arms[job.arm]
        say(f"== {number} of {len(wanted)}: {job.subject}, {arm.title}, seed {job.seed}", quiet=quiet)
        setup = replace(_setup(out / job.subject, subject), device=device, num_workers=num_workers, quiet=True)
        if not _is_done(Run(setup.run), job):
            run_train(setup, _request(setup, subject, arm, job))
            _write(out, ablation, jobs)
    summary = _write(out, ablation, jobs)
    say(as_text(_in_percent(summary)), quiet=quiet)
    for line in verdicts(summary, ablation):
        say(line, quiet=quiet)
    say(f"the ablation is in {out}: ablation.csv, summary.csv, ablation.png", quiet=quiet)


def _setup(run: Path, subject: Subject) -> Setup:
    return Setup(
        run=run, model=subject.model, pretrained=subject.pretrained,
        weights=None if subject.weights is None else Path(subject.weights), model_kwargs=subject.model_kwargs,
        include=subject.include, exclude=subject.exclude, data=subject.data, images=subject.images,
        holdout=subject.holdout, mean=subject.mean, std=subject.std, input_size=subject.input_size,
    )  # fmt: skip


def _request(setup: Setup, subject: Subject, arm: Arm, job: Job) -> TrainRequest:
    request = TrainRequest(name=job.name, config=job.config, val_images=subject.val_images)
    if arm.like is not None:
        return replace(request, plan_file=_planned(setup, subject, arm, arm.like))
    if arm.uniform is not None and arm.per_head:
        return replace(request, uniform=arm.uniform, layout=arm.layout)
    if arm.uniform is not None:
        return replace(request, plan_file=_one_scale_a_tensor(setup, arm, arm.uniform))
    return replace(request, floating=True)


def _planned(setup: Setup, subject: Subject, arm: Arm, like: str) -> Path:
    """The planner's bits at the budget of `like`; the sweep behind them is made where it is not there."""
    file = setup.run / f"plan-{like}-{arm.layout}.json"
    if not file.exists():
        sweep = SweepConfig(bit_widths=subject.sweep_bits, batchnorm="re-estimate")
        run_sensitivity(replace(setup, images=subject.sweep_images), sweep, tensors=TENSORS)
        run_plan(setup.run, PlanRequest(like=like, layout=arm.layout, out=file, quiet=True))
    if arm.per_head:
        return file
    plan = BitPlan.from_json(file.read_text(encoding="utf-8"), source=str(file))
    without = setup.run / f"{file.stem}-per-tensor.json"
    write_bytes(without, _without_heads(plan).to_json().encode())
    return without


def _one_scale_a_tensor(setup: Setup, arm: Arm, uniform: str) -> Path:
    """Uniform bits as a plan file, with one scale a tensor where the default scheme has one a head."""
    file = setup.run / f"plan-{uniform}-{arm.layout}-per-tensor.json"
    if not file.exists():
        made = calibrated(
            open_run(setup, needs_data=True), uniform, layout=arm.layout, calibration_images=CALIBRATION_IMAGES,
            estimator="mse",
        )  # fmt: skip
        write_bytes(file, _without_heads(made.plan).to_json().encode())
    return file


def _without_heads(plan: BitPlan) -> BitPlan:
    sites = (replace(s, granularity="per_tensor") if s.granularity == "per_head" else s for s in plan.sites)
    return replace(plan, sites=tuple(sites))


def _write(out: Path, ablation: Ablation, jobs: Sequence[Job]) -> pd.DataFrame:
    """Write the tables and the figure of all trainings that are finished; returns the summary."""
    runs = {name: Run(out / name) for name in ablation.subjects}
    rows = [result(runs[job.subject], job) for job in jobs if _is_done(runs[job.subject], job)]
    results = results_frame(rows)
    summary = summarized(results, ablation)
    write_bytes(out / "ablation.csv", results.to_csv(index=False).encode())
    write_bytes(out / "summary.csv", summary.to_csv(index=False).encode())
    if len(results):
        save_figure(ablation_figure(results, summary), out / "ablation")
    return summary


def _is_done(run: Run, job: Job) -> bool:
    """Whether the run folder holds the training with exactly these settings."""
    step = run.record.steps.get(f"qat-{job.name}")
    known = {} if step is None or step.status != "done" else step.inputs
    return all(known.get(f"config.{name}") == value for name, value in asdict(job.config).items())


def _in_percent(summary: pd.DataFrame) -> "pd.DataFrame":
    shown = summary.drop(columns=["arm", "against"])
    for name in shown.columns:
        if name.startswith(("top1", "ahead", "oscillating")):
            shown[name] = (100 * shown[name]).round(2)
    return shown.round({"weight_bits": 2, "activation_bits": 2, "images_per_second": 0})
