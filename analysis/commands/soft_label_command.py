"""`qvw soft-labels`: the command line of a teacher's stored answers."""

from pathlib import Path
from typing import Any

import click

from analysis.commands.first_word import first_word
from analysis.commands.shared_options import (
    ListOf,
    common_options,
    data_options,
    model_options,
    pattern_options,
    seed_option,
)
from quant.choices import COMPRESSIONS
from quant.errors import InputError


@click.command(name="soft-labels", short_help="Store a teacher's outputs for training.")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FILE", help="The file to write.")
@click.option("--run", type=click.Path(file_okay=False, path_type=Path),
              help="A run folder that records the images and their preprocessing, and the teacher if MODEL is left "
                   "out; nothing is written there.")  # fmt: skip
@click.option("--crops", type=click.IntRange(1, 2**20), default=32, show_default=True, help="Crops per image.")
@click.option("--scale", type=ListOf(float, 2), default="0.08,0.936", show_default=True,
              help="Smallest and largest fraction of the image area in a crop.")  # fmt: skip
@click.option("--ratio", type=ListOf(float, 2), default="0.75,1.3333", show_default=True,
              help="Smallest and largest aspect ratio (width over height) of a crop.")  # fmt: skip
@click.option("--flip", type=click.FloatRange(0, 1), default=0.5, show_default=True,
              help="Probability of a horizontal flip; 0 for digits, text and signs.")  # fmt: skip
@click.option("--compression", type=click.Choice(COMPRESSIONS), default="marginal_smoothing", show_default=True,
              help="hard: the most likely class; smoothing: its probability, the rest spread evenly; "
                   "marginal_smoothing: so for the top K; marginal_renorm: only the top K; full: all.")  # fmt: skip
@click.option("--top-k", type=click.IntRange(min=1), show_default="5, or all of fewer classes",
              help="K of the marginal compressions.")  # fmt: skip
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True,
              help="Divides the teacher's logits; train with the same kd_temperature.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1, 2**16), default=64, show_default=True,
              help="Crops per forward pass.")  # fmt: skip
@click.option("--crop-seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True,
              help="Seed for the choice of crops.")  # fmt: skip
@model_options
@data_options(images="all")
@seed_option
@pattern_options
@common_options
def soft_labels(run: Path | None, **options: Any) -> None:
    """Run a teacher, MODEL, once on random crops of each training image, and store its outputs in a file.

    `qvw train --soft-labels FILE` then uses several of these crops of an image per step (--set crops_per_image=4), the
    same views, without running the teacher (Shen and Xing, ECCV 2022, arXiv:2112.01528). Training must use the same
    images: --run with the student's run folder ensures that. The teacher's images are prepared as its own timm
    configuration says, or --mean, --std and --input-size.

    Run the same command again to resume from FILE.partial.
    """
    from analysis.steps.soft_label_request import SoftLabelRequest, check_soft_label_target

    names = ("out", "crops", "scale", "ratio", "flip", "compression", "top_k", "temperature", "crop_seed")
    request = SoftLabelRequest.of({name: options.pop(name) for name in names})
    if run is None and (options["model"] is None or options["data"] is None):
        what = "a teacher: MODEL" if options["model"] is None else "images: --data D"
        raise InputError(f"soft labels need {what}, or --run with a run folder that records one.")
    from analysis.session.requested import asked
    from analysis.session.setup import Setup

    nowhere = request.out.with_name(f"{request.out.name}.run")  # a run folder that is not there knows nothing
    another = options["model"] is not None  # its images are prepared as it was trained, not as the run's network
    setup = Setup.of(options | {"run": run or nowhere, "own_preparation": another})

    def check() -> None:
        check_soft_label_target(request.out)
        asked(setup, needs_data=True, split="train")

    first_word(check)
    from analysis.steps.soft_label_step import run_soft_labels  # after the check: it imports torch

    run_soft_labels(setup, request)
