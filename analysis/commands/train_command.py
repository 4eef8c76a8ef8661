"""`qvw eval` and `qvw train`: the command line for accuracy without and with training."""

from pathlib import Path
from typing import Any

import click

from analysis.commands.first_word import first_word
from analysis.commands.shared_options import (
    CommandWithSettings,
    JsonObject,
    ListOf,
    batch_size_option,
    common_options,
    data_options,
    file_option,
    model_options,
    pattern_options,
    run_option,
    seed_option,
    task_option,
)
from quant.choices import ESTIMATORS

uniform_option = click.option("--uniform", metavar="wXaY", help="The same bits everywhere, such as w4a4.")
layout_option = click.option(
    "--layout", type=click.Choice(["paper", "strict"]), default="paper", show_default=True,
    help="For --uniform: paper keeps the first layer and the classifier at 8 bits.",
)  # fmt: skip


@click.command(name="eval", short_help="Evaluate the float, planned, uniform or trained model.")
@run_option
@file_option("--plan", "plan_file", help="Evaluate this plan, without training.")
@uniform_option
@click.option("--checkpoint", type=click.Path(exists=True, path_type=Path),
              help="A trained model, RUN/qat, or a file from `qvw export`.")  # fmt: skip
@click.option("--float", "floating", is_flag=True, help="Evaluate the model as it is, in floating point.")
@layout_option
@click.option("--calibration-images", type=click.IntRange(min=1), default=256, show_default=True,
              help="Training images to calibrate the scales of activations, or all if there are fewer.")  # fmt: skip
@click.option(
    "--estimator", type=click.Choice(ESTIMATORS), default="mse", show_default=True, help="Estimator of the scales."
)
@click.option("--bn", type=click.Choice(["stored", "re-estimate"]), default="re-estimate", show_default=True,
              help="BatchNorm statistics: the model's own, or re-estimated for the quantized network.")  # fmt: skip
@model_options
@task_option
@data_options(images="all, or as before", split="val")
@batch_size_option
@seed_option
@pattern_options
@common_options
def evaluate(**options: Any) -> None:
    """Measure loss and accuracy of ONE model: a plan or uniform bits without training, a trained model, or float.

    Choose it by --plan, --uniform, --checkpoint or --float. Uses all validation images by default; scales come from
    training images. Adds a row to verify.parquet, or replaces the row of the same kind and cost. Run the same command
    again to resume.
    """
    from analysis.steps.eval_request import EvalRequest

    names = ("plan_file", "uniform", "floating", "checkpoint", "layout", "calibration_images", "estimator")
    request = EvalRequest.of({name: options.pop(name) for name in names} | {"batchnorm": options.pop("bn")})
    from analysis.session.requested import asked
    from analysis.session.setup import Setup
    from analysis.storage.plan_file import read_used_plan
    from analysis.storage.trained_files import check_checkpoint

    setup = Setup.of(options)

    def check() -> None:
        if request.plan_file is not None:
            read_used_plan(request.plan_file)
        if request.checkpoint is not None:
            check_checkpoint(request.checkpoint)
        asked(setup, needs_data=True, split="val")

    first_word(check)
    from analysis.steps.eval_step import run_eval  # after the check: it imports torch

    run_eval(setup, request)


@click.command(cls=CommandWithSettings, short_help="Fine-tune with a plan or uniform bits.")
@run_option
@file_option("--plan", "plan_file", show_default="RUN/plan.json", help="The plan to train with.")
@uniform_option
@click.option(
    "--float", "floating", is_flag=True, help="Train without quantization, as the upper reference for a plan."
)
@layout_option
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE",
              help="One setting, such as learning_rate=0.001 or batch_size=128; may be repeated. All settings are "
                   "listed below.")  # fmt: skip
@file_option("--config", "config_file", help="A YAML file of settings, lines `key: value`; --set overrides it.")
@click.option("--name", help="Write to RUN/qat-NAME, for several trainings in one run.", show_default="RUN/qat")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), show_default="0", help="Seed for the order of images, "
              "augmentation and dropout: the setting `seed`.")  # fmt: skip
@click.option("--val-images", type=click.IntRange(min=1), help="Validation images.", show_default="all")
@click.option("--teacher", metavar="MODEL", show_default="the float model itself",
              help="A network to distill from.")  # fmt: skip
@file_option("--teacher-weights", help="Weights of the teacher.")
@click.option("--teacher-pretrained", is_flag=True, help="timm's published weights for the teacher.")
@click.option(
    "--teacher-kwargs", type=JsonObject(), help="Arguments of the teacher's constructor, as JSON.", show_default="none"
)
@click.option("--teacher-weights-entry", metavar="NAME", show_default="the one that fits",
              help="Which weights of the teacher's checkpoint.")  # fmt: skip
@click.option("--teacher-mean", type=ListOf(float), show_default="the teacher's own, or the student's",
              help="Mean of each channel of the teacher's images.")  # fmt: skip
@click.option("--teacher-std", type=ListOf(float, positive=True), show_default="the teacher's own, or the student's",
              help="Standard deviation of each channel of the teacher's images.")  # fmt: skip
@click.option("--teacher-input-size", type=ListOf(int, 3, positive=True), show_default="the teacher's own, or the "
              "student's", help="Channels, height, width of the teacher's images.")  # fmt: skip
@file_option("--soft-labels",
             help="Stored outputs of a teacher (`qvw soft-labels`), instead of running one.")  # fmt: skip
@model_options
@task_option
@data_options(images="all, or as before")
@click.option("--batch-size", type=click.IntRange(1, 2**16), default=64, show_default=True,
              help="Images per forward pass in validation and calibration; training: --set batch_size.")  # fmt: skip
@pattern_options
@common_options
def train(config_file: Path | None, settings: tuple[str, ...], seed: int | None, **options: Any) -> None:
    """Fine-tune the network with the bit-widths of a plan (LSQ), with distillation and oscillation regularization.

    Writes model.safetensors with plan.json, history.parquet, oscillation.parquet and config.json into RUN/qat, and a
    row of verify.parquet. Run the same command again to resume from the last checkpoint.
    """
    from analysis.training.training_options import read_config
    from analysis.training.training_request import TrainRequest

    names = ("plan_file", "uniform", "floating", "layout", "name", "teacher", "teacher_weights", "teacher_pretrained",
             "teacher_kwargs", "teacher_weights_entry", "teacher_mean", "teacher_std", "teacher_input_size",
             "soft_labels", "val_images")  # fmt: skip
    config = read_config(config_file, [*settings, *([] if seed is None else [f"seed={seed}"])])
    request = TrainRequest.of({name: options.pop(name) for name in names} | {"config": config})
    from analysis.inputs.model_source import check_source
    from analysis.session.requested import asked
    from analysis.session.setup import Setup
    from analysis.storage.plan_file import own_plan, read_used_plan

    setup = Setup.of(options)

    def check() -> None:
        asked(setup, needs_data=True)
        if not request.floating and request.uniform is None:
            read_used_plan(request.plan_file or own_plan(setup.run))
        if request.teacher_source is not None:
            check_source(request.teacher_source)

    first_word(check)
    from analysis.steps.train_step import run_train  # after the check: it imports torch

    run_train(setup, request)
