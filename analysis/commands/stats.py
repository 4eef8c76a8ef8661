"""`qvw stats`: the command line."""

from typing import Any

import click

from analysis.commands.first_word import first_word
from analysis.commands.options import (
    batch_size_option,
    common_options,
    data_options,
    model_options,
    pattern_options,
    run_option,
    seed_option,
    task_option,
)


@click.command(short_help="Variance, kurtosis, outliers of every tensor.")
@run_option
@model_options
@task_option
@data_options(images="2,000, or as before", split="train")
@batch_size_option
@seed_option
@pattern_options
@common_options
def stats(**options: Any) -> None:
    """Variance, kurtosis, outliers, quantiles of every weight, and with --data of every activation.

    Writes stats.parquet, channels.parquet, histograms.parquet, variation.json. Several processes share the images:
    torchrun --nproc_per_node 4 -m -- analysis stats ... Interrupted and started again, it goes on with the next batch.
    """
    from analysis.session.asked import asked
    from analysis.session.setup import Setup

    setup = Setup.of(options)
    first_word(lambda: asked(setup, needs_data=False, split="train"))
    from analysis.steps.stats import run_stats  # after the check: it imports torch

    run_stats(setup)
