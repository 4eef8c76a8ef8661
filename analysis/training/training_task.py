"""What a training is made of: plan, images, teacher and stored labels, opened and checked before it starts."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from analysis.data import ImageData
from analysis.session.loaded_run import LoadedRun
from analysis.storage.plan_file import own_plan
from analysis.training.calibration import read_plan
from analysis.training.stored_answers import open_soft_labels
from analysis.training.teacher import load_teacher
from analysis.training.training_request import TrainRequest
from quant.bit_plan import BitPlan
from quant.errors import InputError
from quant.soft_labels import SoftLabels
from quant.train import total_steps


@dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """One training, ready to be prepared; `inputs` are what fixes its result, besides the run's own."""

    plan: BitPlan | str | None  # uniform bits as `w3a4`; None for floating point
    train: ImageData
    val: ImageData
    teacher: nn.Module | None
    soft_labels: SoftLabels | None
    steps: int
    inputs: dict[str, Any]


def training_task(opened: LoadedRun, request: TrainRequest, processes: int) -> TrainingTask:
    """The task of a request; InputError where a part of it is missing or does not fit the others."""
    config, run = request.config, opened.run
    if opened.task.name != "classification":
        raise InputError(
            f"the included training learns class indices, not the task {opened.task.name!r}. Write a loop of your own: "
            "quant.prepare_qat_, parameter_groups and attach_."
        )
    plan = _plan(opened, request)
    before = run.record.steps.get(request.folder)
    known = before.inputs if before is not None and not opened.setup.overwrite else {}
    train = opened.step_images(request.folder, "train")
    val = _validation(opened, request, known.get("val_images"))
    if not (train.labelled and val.labelled):
        raise InputError("training needs labels, of the training and of the validation images.")
    steps = total_steps(config, train.images, processes)
    teacher, of_teacher = load_teacher(opened, request)
    soft_labels = None
    if request.soft_labels is not None:
        soft_labels = open_soft_labels(request.soft_labels, opened, train, config)
    elif config.crops_per_image > 1 and config.crop_area == 1 and not config.horizontal_flip:
        raise InputError(
            f"crops_per_image={config.crops_per_image}, but all would be the whole image. Give --soft-labels, or set "
            "crop_area below 1."
        )
    inputs = {
        "val_images": val.images, "val_sha256": val.sha256, **of_teacher, "layout": request.layout,
        "plan": plan.sha256 if isinstance(plan, BitPlan) else plan,
        **{f"config.{key}": value for key, value in asdict(config).items()},
        **({} if soft_labels is None else {"soft_labels_sha256": soft_labels.sha256}),
    }  # fmt: skip
    return TrainingTask(
        plan=plan, train=train, val=val, teacher=teacher, soft_labels=soft_labels, steps=steps, inputs=inputs
    )


def _validation(opened: LoadedRun, request: TrainRequest, known: int | None) -> ImageData:
    """The images to validate on: as many as the command says, else as when it was run before, else all."""
    asked = request.val_images or known
    val = opened.images("val", None, asked)
    if asked is None or val.images == asked:
        return val
    there = f"{val.spec} has {val.images} in its split 'val'"
    if request.val_images is not None:
        raise InputError(f"--val-images {asked}, but {there}. Ask for fewer.")
    raise InputError(
        f"{opened.run.path} holds {request.folder} validated on {asked} images, {there}. Put the images back, or start "
        "from scratch with --overwrite."
    )


def _plan(opened: LoadedRun, request: TrainRequest) -> BitPlan | str | None:
    """The plan, or uniform bits as `w3a4`, or None for floating point."""
    if request.floating:
        return None
    if request.uniform is not None:
        return request.uniform
    return read_plan(request.plan_file or own_plan(opened.run.path), opened)
