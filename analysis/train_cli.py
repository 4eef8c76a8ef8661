"""`qvw eval` and `qvw train`: the command line of accuracies, without and with training."""

from pathlib import Path
from typing import Any

import click

from analysis.options import (
    CommandWithSettings,
    JsonObject,
    common_options,
    data_options,
    image_options,
    model_options,
    run_option,
    seed_option,
)
from quant.choices import ESTIMATORS

uniform_option = click.option("--uniform", metavar="wXaY", help="The same bits everywhere, such as w4a4.")
layout_option = click.option(
    "--layout", type=click.Choice(["paper", "strict"]), default="paper", show_default=True,
    help="Of --uniform: paper keeps first layer and classifier at 8 bit.",
)  # fmt: skip


@click.command(name="eval", short_help="Accuracy of float, plan, uniform bits, trained model.")
@model_options
@data_options
@run_option
@seed_option
@common_options
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="A plan file.")
@uniform_option
@click.option("--checkpoint", type=click.Path(path_type=Path),
              help="A model that `qvw train` has made, RUN/qat, or a file of `qvw export`.")  # fmt: skip
@click.option("--float", "floating", is_flag=True, help="The model as it is.")
@layout_option
@click.option("--calibration-images", type=click.IntRange(min=1), default=256, show_default=True,
              help="Training images that set the scales of activations.")  # fmt: skip
@click.option("--estimator", type=click.Choice(ESTIMATORS), default="mse", show_default=True, help="Of the scales.")
@click.option("--bn", type=click.Choice(["stored", "re-estimate"]), default="re-estimate", show_default=True,
              help="BatchNorm statistics: the model's own, or those of the quantized network.")  # fmt: skip
def evaluate(**options: Any) -> None:
    """Loss and top-1 of the float model, of a plan or uniform bits without training, or of a trained model.

    Validation images by default, all of them; scales come from training images. Adds a row to
    verify.parquet; one of the same kind and cost takes its place.
    """
    from analysis.eval_step import EvalRequest, run_eval
    from analysis.setup import Setup

    names = ("plan_file", "uniform", "floating", "checkpoint", "layout", "calibration_images", "estimator")
    request = EvalRequest.of({name: options.pop(name) for name in names} | {"batchnorm": options.pop("bn")})
    run_eval(Setup.of(options), request)


@click.command(cls=CommandWithSettings, short_help="Train with a plan or uniform bits.")
@model_options
@image_options
@run_option
@common_options
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="A plan file; by default RUN/plan.json.")
@uniform_option
@click.option("--float", "floating", is_flag=True, help="No quantization: the fair ceiling of a trained plan.")
@layout_option
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="A YAML file of settings, key: value.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE",
              help="One setting, such as learning_rate=0.001 or batch_size=128; may be repeated.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Order of images, augmentation, dropout (0).")
@click.option("--name", help="The results go to RUN/qat-NAME instead of RUN/qat: several trainings in one run.")
@click.option("--teacher", help="A network whose logits are distilled, as MODEL; by default the float model itself.")
@click.option("--teacher-weights", type=click.Path(path_type=Path), help="Its weights, .safetensors.")
@click.option("--teacher-pretrained", is_flag=True, help="timm's published weights for it.")
@click.option("--teacher-kwargs", type=JsonObject(), help="Arguments of its constructor, as JSON.")
@click.option("--soft-labels", type=click.Path(path_type=Path), metavar="FILE",
              help="Stored answers of a teacher (`qvw soft-labels`), in place of one that runs beside.")  # fmt: skip
@click.option("--val-images", type=click.IntRange(min=1), help="Images to validate on; by default all.")
def train(config_file: Path | None, settings: tuple[str, ...], seed: int | None, **options: Any) -> None:
    """Quantization-aware training (LSQ) of exactly the plan, with distillation and the oscillation term.

    Training images, all by default (--images N for fewer). Writes into RUN/qat: model.safetensors with plan.json,
    history.parquet, oscillation.parquet, config.json; and a row of verify.parquet. Interrupted and started again, it
    goes on from its last checkpoint.

    """
    from analysis.setup import Setup
    from analysis.train_options import read_config
    from analysis.train_step import TrainRequest, run_train

    names = ("plan_file", "uniform", "floating", "layout", "name", "teacher", "teacher_weights", "teacher_pretrained",
             "teacher_kwargs", "soft_labels", "val_images")  # fmt: skip
    config = read_config(config_file, [*settings, *([] if seed is None else [f"seed={seed}"])])
    request = TrainRequest.of({name: options.pop(name) for name in names} | {"config": config})
    run_train(Setup.of(options), request)
