"""What a training is made of: plan, images, teacher and stored labels, opened and checked before it starts."""

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from analysis.data import ImageData
from analysis.inputs.weights import weights_sha256
from analysis.models import load_model
from analysis.session.opened import Opened
from analysis.storage.plan_file import own_plan
from analysis.terminal.console import warn
from analysis.training.calibration import read_plan
from analysis.training.request import TrainRequest
from analysis.training.soft_labels import open_soft_labels
from quant.bit_plan import BitPlan
from quant.errors import InputError, first_line
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


def training_task(opened: Opened, request: TrainRequest, processes: int) -> TrainingTask:
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
    teacher, teacher_sha256 = _teacher(opened, request)
    soft_labels = None
    if request.soft_labels is not None:
        soft_labels = open_soft_labels(request.soft_labels, opened, train, config)
    elif config.crops_per_image > 1 and config.crop_area == 1 and not config.horizontal_flip:
        raise InputError(
            f"crops_per_image={config.crops_per_image}, but all would be the whole image. Give --soft-labels, or set "
            "crop_area below 1."
        )
    inputs = {
        "val_images": val.images, "val_sha256": val.sha256, "teacher_sha256": teacher_sha256, "layout": request.layout,
        "plan": plan.sha256 if isinstance(plan, BitPlan) else plan,
        **{f"config.{key}": value for key, value in asdict(config).items()},
        **({} if soft_labels is None else {"soft_labels_sha256": soft_labels.sha256}),
    }  # fmt: skip
    return TrainingTask(
        plan=plan, train=train, val=val, teacher=teacher, soft_labels=soft_labels, steps=steps, inputs=inputs
    )


def _validation(opened: Opened, request: TrainRequest, known: int | None) -> ImageData:
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


def _plan(opened: Opened, request: TrainRequest) -> BitPlan | str | None:
    """The plan, or uniform bits as `w3a4`, or None for floating point."""
    if request.floating:
        return None
    if request.uniform is not None:
        return request.uniform
    return read_plan(request.plan_file or own_plan(opened.run.path), opened)


def _teacher(opened: Opened, request: TrainRequest) -> tuple[nn.Module | None, str | None]:
    """The network whose logits are distilled, and its hash; checked against the student on one image."""
    if not request.config.kd_weight or request.soft_labels is not None:
        return None, None
    source = request.teacher_source
    if source is None:
        teacher, name = copy.deepcopy(opened.model), opened.name
    else:
        teacher, name = load_model(source).to(opened.setup.device), source.model
        if source.untrained:
            warn(f"the teacher {name} has untrained weights: give --teacher-pretrained or --teacher-weights FILE.")
    image, size = opened.probe_image(), opened.input_config.input_size
    with torch.no_grad():
        expected = opened.model(image)
        try:
            answer = teacher(image)
        except Exception as error:  # whatever the forward of a network of other images raises
            raise InputError(
                f"the teacher {name} does not take the images of {opened.name}, {size}: {first_line(error)}. "
                "Choose another --teacher, or build it with --teacher-kwargs."
            ) from error
    if not isinstance(answer, Tensor) or answer.shape != expected.shape:
        came = f"{answer.shape[-1]} classes" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
        raise InputError(
            f"the teacher {name} answers with {came}, {opened.name} has {expected.shape[-1]} classes. "
            "Choose another --teacher, or train without one: --set kd_weight=0."
        )
    if not torch.isfinite(answer).all():
        raise InputError(f"the teacher {name} answers with NaN or Inf. Look for other weights of it.")
    return teacher.requires_grad_(False).eval(), weights_sha256(teacher)
