"""`qvw train`: quantization-aware training from a plan or uniform bits, and the float model trained the same way."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from analysis.data import ImageData
from analysis.inputs.training_data import TrainingImages, training_batches
from analysis.scoring import Scores, label_doubts, outputs_of, scores
from analysis.session.loaded_run import LoadedRun
from analysis.session.open_run import open_run
from analysis.session.processes import work_together
from analysis.session.setup import Setup
from analysis.steps.verify_rows import drop_rows, keep_row, show_rows, verify_row
from analysis.task import mean_and_error
from analysis.terminal.console import progress, resumable, say, warn
from analysis.training.calibration import calibrated, calibration_batches, warn_of_fewer
from analysis.training.trained_model import save_trained
from analysis.training.training_messages import extent, low_rate, outcome, strengths
from analysis.training.training_request import TrainRequest
from analysis.training.training_rows import LOGS, TABLES, TrainingRows
from analysis.training.training_task import TrainingTask, training_task
from quant.batchnorm import batchnorms, reestimate_batchnorm_
from quant.bit_plan import BitPlan
from quant.checkpoints import last_step
from quant.insertion import attach_quantizers_
from quant.train import train_images
from quant.trainability import check_trainable


def run_train(setup: Setup, request: TrainRequest) -> None:
    """Train, and leave history, oscillation, the final model with its plan, and its accuracy in the run folder.

    What was interrupted resumes from its last checkpoint; what is done with the same inputs is not done again. Several
    processes share each batch; the one of rank 0 writes and speaks.
    """
    work_together(setup, lambda own, _processes: _run_train(own, request))


def _run_train(setup: Setup, request: TrainRequest) -> None:
    config, accelerator = request.config, _accelerator(setup.device)
    opened = open_run(setup, needs_data=True)
    folder, main = opened.run.path / request.folder, accelerator.is_main_process
    task = training_task(opened, request, accelerator.num_processes)
    if opened.run.is_done(request.folder, opened.inputs(task.train) | task.inputs) and not setup.overwrite:
        say(f"{folder} holds this training already; --overwrite trains again.", quiet=setup.quiet)
        return
    image = opened.probe_image()
    check_trainable(opened.model, config, torch.cat((image, image.flip(-1))))
    with _step(opened, request, task, accelerator.num_processes) if main else nullcontext():
        if main:
            if setup.overwrite:
                drop_rows(opened, request.folder)
            opened.run.write_json(f"{request.folder}/config", asdict(config))
            if task.teacher is not None and not last_step(folder / "checkpoints"):
                _tell_accuracies(opened, task)
        accelerator.wait_for_everyone()  # what --overwrite removes is gone before anyone looks for a checkpoint
        plan, calibration = _prepare_(opened, task.plan, request)
        if main:
            say(extent(config, task.steps, task.train.images, task.val.images), quiet=setup.quiet)
            if hint := low_rate(plan, config):
                say(hint, quiet=setup.quiet)
        with resumable(lambda: _kept(folder, task.steps)):
            per_image = _train(opened, request, task, accelerator, calibration)
        if main:
            _finish(opened, plan, request, per_image)
    if main:
        show_rows(opened, f"{request.folder} is new")
        say(f"the model and its history are in {folder}", quiet=setup.quiet)


def _tell_accuracies(opened: LoadedRun, task: TrainingTask) -> None:
    """Print how the teacher and the float student do on the validation images, and what is doubtful about it."""
    assert task.teacher is not None
    assert opened.classes is not None
    networks = {"float student": opened.model}
    if not _same_weights(opened.model, task.teacher):
        networks = {"teacher": task.teacher, **networks}
    found = {name: _validated(opened, model, task.val) for name, model in networks.items()}
    top1 = {name: mean_and_error(each.score) for name, each in found.items()}
    said = ", ".join(f"{name} {100 * mean:.2f} % (± {100 * error:.2f})" for name, (mean, error) in top1.items())
    say(f"top-1 on {task.val.images:,} validation images before training: {said}", quiet=opened.setup.quiet)
    for name, each in found.items():
        doubts = label_doubts(each.loss.mean().item(), each.score.mean().item(), len(each.loss), opened.classes)
        if doubts:
            warn(f"{name}: {doubts}")


def _same_weights(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def _step(opened: LoadedRun, request: TrainRequest, task: TrainingTask, processes: int) -> AbstractContextManager[None]:
    """The step of run.json that the training is."""
    files, temporary = ([f"{request.folder}/{name}" for name in names] for names in (_FILES, _TEMPORARY))
    options = {name: value for name, value in asdict(request).items() if name != "config"}
    options["processes"] = processes
    if task.soft_labels is not None:
        options["soft_labels_header"] = asdict(task.soft_labels.header)
    return opened.step(
        request.folder, task.train, files, options, task.inputs, seed=request.config.seed, temporary=temporary,
        instead="--name",
    )  # fmt: skip


def _kept(folder: Path, total: int) -> str:
    """What the checkpoints of an interrupted training hold, in words."""
    step = last_step(folder / "checkpoints")
    return f"the training up to step {step:,} of {total:,}" if step else ""


_FILES = ("config.json", *TABLES, "model.safetensors", "plan.json")
_TEMPORARY = ("checkpoints", *LOGS)


def _accelerator(device: str) -> Accelerator:
    """The processes and the device of a training; gradients are averaged where `torchrun` has started several."""
    if AcceleratorState._shared_state and AcceleratorState().num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier training may have used another device
    return Accelerator(cpu=device == "cpu", device_placement=False)  # the model is where the run put it


def _prepare_(
    opened: LoadedRun, plan: BitPlan | str | None, request: TrainRequest
) -> tuple[BitPlan | None, Sequence[Tensor]]:
    """Quantize the opened model with calibrated scales, BatchNorm re-estimated; a float model stays as it is.

    Returns the plan, uniform bits written out, and the calibration images.
    """
    config = request.config
    if plan is None:
        data = opened.images("train", None, at_most=config.calibration_images)
        return None, [x for x, _ in opened.stream(data, "calibration")] if batchnorms(opened.model) else []
    made = calibrated(
        opened.network, plan, calibration_batches(opened, config.calibration_images), layout=request.layout,
        estimator=config.estimator, model=opened.plan_model, stored=opened.stored,
    )  # fmt: skip
    warn_of_fewer(made, config.calibration_images, "--set calibration_images")
    attach_quantizers_(opened.network, made.quantizers, gradient_scale=config.gradient_scale, compiled=config.compile)
    images = [x for x, _ in made.data]
    reestimate_batchnorm_(opened.model, images)
    return made.plan, images


def _train(
    opened: LoadedRun,
    request: TrainRequest,
    task: TrainingTask,
    accelerator: Accelerator,
    calibration: Sequence[Tensor],
) -> Scores:
    """Run the loop, its rows on the disk as they come; the scores of the trained model's validation."""
    folder, config, setup = opened.run.path / request.folder, request.config, opened.setup
    images = TrainingImages(task.train, config, opened.input_config, task.soft_labels)
    first = last_step(folder / "checkpoints")
    rows = TrainingRows(folder)
    if accelerator.is_main_process:
        rows.keep(first, config, task.steps)

    latest: list[Scores] = []

    def validate(model: nn.Module) -> dict[str, float]:
        figures = _validated(opened, model.eval(), task.val)
        latest[:] = [figures]
        return {"loss": figures.loss.mean().item(), "top1": figures.score.mean().item()}

    reports = train_images(
        opened.model, task.teacher, config=config, images=task.train.images, validate=validate, accelerator=accelerator,
        load=lambda sampler: training_batches(images, sampler, task.train, num_workers=setup.num_workers),
        checkpoints=folder / "checkpoints", calibration=calibration,
    )  # fmt: skip
    quiet = setup.quiet or not accelerator.is_main_process
    with progress(task.steps, f"train {request.folder}", "step", quiet=quiet, done=first) as bar:
        for report in reports:
            if accelerator.is_main_process:
                rows.append(report)
            bar.update(report.step - bar.n)
    return latest[0]  # the loop ends with a validation


def _validated(opened: LoadedRun, model: nn.Module, data: ImageData) -> Scores:
    """Loss and score of every validation image, batch by batch."""
    task = opened.task
    parts = [
        scores(task, outputs_of(partial(task.forward, model), [batch], task), [batch])
        for batch in opened.stream(data, "validation")
    ]
    return Scores(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _finish(opened: LoadedRun, plan: BitPlan | None, request: TrainRequest, per_image: Scores) -> None:
    """Write the tables, the model and its row of verify.parquet."""
    run, name = opened.run, request.folder
    TrainingRows(run.path / name).write(run, opened.by_site)
    save_trained(run.path / name, opened, plan)
    sites, how = ((), "none") if plan is None else (plan.sites, "learned")
    row = verify_row(name, opened, sites, per_image, estimator=how)
    keep_row(opened, row)
    history = run.read_table(f"{name}/history")
    words, worse = outcome(history, loss_se=row["loss_se"], top1_se=row["top1_se"])
    for line in filter(None, (words, strengths(history))):
        say(line, quiet=opened.setup.quiet)
    if worse:
        warn(
            "the validation loss rose by more than two standard errors: the training did harm. Lower learning_rate, or "
            "change crop_area and horizontal_flip (--set)."
        )
