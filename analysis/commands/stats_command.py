"""`qvw stats`: the command line."""

from typing import Any

import click

from analysis.commands.first_word import first_word
from analysis.commands.shared_options import (
    batch_size_option,
    common_options,
    data_options,
    model_options,
    pattern_options,
    run_option,
    seed_option,
    task_option,
)


@click.command(short_help="Measure statistics of every tensor.")
@run_option
@model_options
@task_option
@data_options(images="2,000, or as before", split="train")
@batch_size_option
@seed_option
@pattern_options
@common_options
def stats(**options: Any) -> None:
    """Measure variance, kurtosis, outliers and quantiles of every weight, and with --data of every activation.

    Writes stats.parquet, channels.parquet, histograms.parquet and variation.json. Run the same command again to resume.
    Several processes share the images: torchrun --nproc_per_node 4 -m -- analysis stats ...
    """
    from analysis.session.requested import asked
    from analysis.session.setup import Setup

    setup = Setup.of(options)
    first_word(lambda: asked(setup, needs_data=False, split="train"))
    from analysis.steps.stats_step import run_stats  # after the check: it imports torch

    run_stats(setup)
