"""`qvw sensitivity`: the command line."""

from typing import Any

import click

from analysis.commands.first_word import first_word
from analysis.commands.shared_options import (
    BitWidths,
    ListOf,
    batch_size_option,
    common_options,
    data_options,
    model_options,
    pattern_options,
    run_option,
    seed_option,
    task_option,
)
from quant.choices import (
    ESTIMATORS,
    GRANULARITIES,
    GROUPINGS,
    PROTOCOLS,
    TENSORS,
    Estimator,
    Granularity,
    Grouping,
    Protocol,
)


@click.command(short_help="Measure the loss per quantized tensor.")
@run_option
@click.option("--bits", type=BitWidths(), default="2,3,4,8", show_default=True,
              help="Bit-widths to measure, of 1 to 8 and 16, as a list or range: 2,4,8 or 2-8 or 2-4,8. A plan chooses "
                   "among them. Keep 8: the first layer and the classifier need it in layout paper, the default of "
                   "`qvw plan`.")  # fmt: skip
@click.option("--tensors", type=ListOf(str, choices=TENSORS), default="weight,input,attention", show_default=True,
              help="weight, input, attention (all four inside attention), or query, key, value, softmax.")  # fmt: skip
@click.option("--groups", type=click.Choice(GROUPINGS), show_default="each site alone",
              help="Quantize sites together: by kind (attention, MLPs, ...), block, stage or module.")  # fmt: skip
@click.option("--protocol", type=click.Choice(PROTOCOLS), default="single", show_default=True,
              help="single: quantize only the site; leave_one_out: quantize everything but the site.")  # fmt: skip
@click.option("--proxies", is_flag=True,
              help="Also scores that predict the sweep from a few backward passes, and how well.")  # fmt: skip
@click.option("--bn", type=click.Choice(["stored", "re-estimate", "both"]), default="both", show_default=True,
              help="BatchNorm statistics: the model's own, or re-estimated for the quantized network.")  # fmt: skip
@click.option("--granularity", type=click.Choice(GRANULARITIES), show_default="what suits each site",
              help="Granularity of the scales of weights.")  # fmt: skip
@click.option(
    "--estimator", type=click.Choice(ESTIMATORS), default="mse", show_default=True, help="Estimator of the scales."
)
@click.option("--cache-mib", type=click.IntRange(min=0), default=1024, show_default=True,
              help="Memory for cached activations, approximately; 0: a full forward pass for every row.")  # fmt: skip
@model_options
@task_option
@data_options(images="256, or as before", split="train")
@batch_size_option
@seed_option
@pattern_options
@common_options
def sensitivity(
    bits: tuple[int, ...],
    tensors: tuple[str, ...],
    granularity: Granularity | None,
    estimator: Estimator,
    bn: str,
    protocol: Protocol,
    groups: Grouping | None,
    proxies: bool,
    cache_mib: int,
    **options: Any,
) -> None:
    """Measure what the network loses when one site is quantized and all else stays in floating point.

    --groups quantizes a group of sites instead (mhsa: all of attention; ffn: both layers of the MLPs; query, key and
    value: the rows of the weight and the tensor); --protocol leave_one_out quantizes everything but one, with the first
    layer and the classifier at 8 bits. Writes sensitivity.parquet, cost.parquet and figures.

    Run the same command again to resume; other bit-widths, tensors or groups are added to the table. All images stay on
    the device, and each row starts at the quantized layer, from cached activations.

    --proxies compares single sites with cheaper scores, including statistics if `qvw stats` was run before. Several
    processes share the sites: torchrun --nproc_per_node 4 -m -- analysis sensitivity ...
    """
    from analysis.session.requested import asked
    from analysis.session.setup import Setup

    setup = Setup.of(options)
    first_word(lambda: asked(setup, needs_data=True, split="train"))
    from analysis.sensitivity import SweepConfig  # after the check: both import torch
    from analysis.steps.sensitivity_step import run_sensitivity

    config = SweepConfig(
        bit_widths=bits, estimator=estimator, granularity=granularity, batchnorm=bn,
        protocol=protocol, groups=groups,
    )  # fmt: skip
    run_sensitivity(setup, config, tensors=tensors, proxies=proxies, cache_mib=cache_mib)
