"""`qvw`: from a model and images to statistics, sensitivity, a bit plan and its accuracy. One function a command."""

import errno
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from analysis.ablation_cli import ablate
from analysis.export_cli import export
from analysis.options import (
    ListOf,
    common_options,
    data_options,
    model_options,
    quiet_option,
    run_option,
    seed_option,
)
from analysis.plan_cli import plan, plan_diff
from analysis.soft_labels_cli import soft_labels
from analysis.train_cli import evaluate, train
from quant.choices import ESTIMATORS, GRANULARITIES, GROUPINGS, PROTOCOLS, Estimator, Granularity, Grouping, Protocol
from quant.errors import InputError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="quantization-variation-workbench")
def cli() -> None:
    """How weights and activations of vision models vary, which sites hurt at few bits, and how many bits each gets.

    \b
    The path, on a model of yours and your images:
      qvw stats        MODEL --data folder:PATH --run runs/NAME    variance, kurtosis, outliers of every tensor
      qvw sensitivity  --run runs/NAME --bits 2,3,4,8              what one quantized tensor costs
      qvw plan         --run runs/NAME --weight-bits 3 --activation-bits 4
      qvw eval         --run runs/NAME --plan runs/NAME/plan.json  accuracy of the plan, calibrated
      qvw train        --run runs/NAME                             train with the plan
      qvw export       --run runs/NAME --out FILE.safetensors      the trained model, packed
      qvw report       runs/NAME --out runs/NAME/report            one page: from variation to accuracy
      qvw compare      runs/A runs/B --out runs/A-vs-B             two models side by side

    MODEL is a timm name (`qvw models resnet`) or your own factory, path/to/file.py:function, with --weights FILE.
    MODEL and --data may be left out where the run folder knows them. `qvw demo` shows it all on bundled data.

    Exit codes: 0 done, 2 wrong input, 130 interrupted (start again to go on), 1 a defect of ours.
    """


@cli.command(short_help="Names of timm models.")
@click.argument("pattern", required=False)
def models(pattern: str | None) -> None:
    """Names of timm models that can be used; PATTERN is a part of the name, or has * in it."""
    from analysis.models import model_names

    names = model_names(pattern)
    if not names:
        raise InputError(
            f"no timm model matches {pattern!r}; try a shorter part of the name, such as `qvw models swin`."
        )
    click.echo("\n".join(names))


@cli.command(short_help="Variance, kurtosis, outliers of every tensor.")
@model_options
@data_options
@run_option
@seed_option
@common_options
def stats(**options: Any) -> None:
    """Variance, kurtosis, outliers, quantiles of every weight, and with --data of every activation.

    Writes stats.parquet, channels.parquet, histograms.parquet, variation.json. Training images by default.
    """
    from analysis.setup import Setup
    from analysis.stats_step import run_stats

    run_stats(Setup.of(options))


@cli.command(short_help="What one quantized tensor costs.")
@model_options
@data_options
@run_option
@seed_option
@common_options
@click.option("--bits", type=ListOf(int), default="2,3,4,8", show_default=True, help="Bit-widths: 1 to 8, and 16.")
@click.option("--tensors", type=ListOf(str), default="weight,input,attention", show_default=True,
              help="weight, input, attention (all four inside attention), or query, key, value, softmax.")  # fmt: skip
@click.option("--granularity", type=click.Choice(GRANULARITIES), help="Of weights; by default what suits each site.")
@click.option(
    "--estimator", type=click.Choice(ESTIMATORS), default="mse", show_default=True, help="Of the first scale."
)
@click.option("--bn", type=click.Choice(["stored", "re-estimate", "both"]), default="both", show_default=True,
              help="BatchNorm statistics: the model's own, or those of the quantized network.")  # fmt: skip
@click.option("--protocol", type=click.Choice(PROTOCOLS), default="single", show_default=True,
              help="single: nothing else is quantized; leave_one_out: everything else is.")  # fmt: skip
@click.option("--groups", type=click.Choice(GROUPINGS),
              help="Sites together: by kind (all attention, all MLPs, ...), block, stage or module.")  # fmt: skip
@click.option("--proxies", is_flag=True,
              help="Also scores that foretell the sweep from a few backward passes, and how well they do.")  # fmt: skip
@click.option("--cache-mib", type=click.IntRange(min=0), default=1024, show_default=True,
              help="About how much memory kept activations may take; 0: every row is a full pass.")  # fmt: skip
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
    """What the network loses when ONE site is quantized and all else stays in floating point.

    Or one group of sites (--groups: mhsa is all of attention, ffn both layers of the MLPs, query, key and value the
    rows of the weight and the tensor), or everything but one (--protocol leave_one_out; first layer and classifier
    then keep 8 bit). Writes sensitivity.parquet, cost.parquet and figures. Training images by default (256 of them),
    which stay on the device. Interrupted and started again, it goes on with the next row; other bit-widths, tensors
    or groups are added to the table. The network is entered at the layer that holds the site, with the activations
    that were kept.

    --proxies compares single sites with scores that need no pass for each; run `qvw stats` before, and statistics are
    among them. Several processes share the sites: torchrun --nproc_per_node 4 -m -- analysis sensitivity ...
    """
    from analysis.sensitivity import SweepConfig
    from analysis.sensitivity_step import run_sensitivity
    from analysis.setup import Setup

    config = SweepConfig(
        bit_widths=tuple(sorted(set(bits))), estimator=estimator, granularity=granularity, batchnorm=bn,
        protocol=protocol, groups=groups,
    )  # fmt: skip
    run_sensitivity(Setup.of(options), config, tensors=tensors, proxies=proxies, cache_mib=cache_mib)


for command in (plan, plan_diff, evaluate, soft_labels, train, export, ablate):
    cli.add_command(command)


@cli.command(short_help="One HTML page of one or more runs.")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of index.html.")
@quiet_option
def report(runs: Sequence[Path], out: Path, quiet: bool) -> None:
    """The whole story of one or more runs on one page, from variation to accuracy; it needs no network."""
    from analysis.report_step import run_report

    run_report(runs, out, quiet=quiet)


@cli.command(short_help="Several runs side by side.")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the results.")
@click.option("--module", "modules", multiple=True, metavar="PATTERN",
              help="Layer whose channels are drawn, * and ? as in a shell. Its full name (blocks.0.mlp.fc2) and the "
                   "short one of the figures (b0.mlp.fc2) both work. Of several that match in a run, or of all "
                   "without it, the one whose weight or input has the largest channel_range_ratio (widest over median "
                   "channel). May be repeated: runs differ in their names.")  # fmt: skip
@quiet_option
def compare(runs: Sequence[Path], out: Path, modules: tuple[str, ...], quiet: bool) -> None:
    """Two or more runs side by side: how their weights and activations vary.

    \b
    Tables (CSV):
      comparison            a row a measure, a column a run, and what it means
      differences           whether the modules of one run vary more than another's
    Figures (PNG, SVG, and their data as CSV), of weights and of activations:
      variation_weight, variation_input          six measures of each layer over depth, such as kurtosis
      heads                                      standard deviation of each attention head (runs with attention)
      distributions_weight, distributions_input  densities by kind of layer, beside a Gaussian's
      channels                                   range of each channel of one layer a run (--module)

    index.html has them all on one page. Runs of weights alone are compared in their weights.
    """
    from analysis.compare_step import run_compare

    run_compare(runs, out, modules=modules, quiet=quiet)


@cli.command(short_help="The whole path on bundled digits.")
@click.option("--run", type=click.Path(file_okay=False, path_type=Path), default=Path("runs/demo"), show_default=True,
              help="Folder of the results.")  # fmt: skip
@quiet_option
def demo(run: Path, quiet: bool) -> None:
    """The whole path on scikit-learn's digits: a ResNet and a Swin, from training on the spot to a report of all."""
    from analysis.demo import run_demo

    run_demo(run, quiet=quiet)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `qvw`; wrong input ends with exit code 2, an interrupt with 130, a defect with its traceback and 1."""
    with suppress(ValueError):  # only the main thread may set handlers
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = cli.main(list(arguments) if arguments is not None else None, prog_name="qvw", standalone_mode=False)
    except InputError as error:
        code = _complain(f"qvw: error: {error}")
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        code = 2
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "qvw"
        code = _complain(f"qvw: error: {error.format_message()} See `{path} --help`.")
    except (KeyboardInterrupt, click.Abort):
        click.echo("qvw: interrupted. What was computed is kept: the same command goes on from there.", err=True)
        code = 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stdout = None  # or Python complains of the pipe once more at exit
        code = 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        code = _complain(f"qvw: error: no space left to write ({error.strerror}). Free some and run the command again.")
    sys.exit(code if isinstance(code, int) else 0)


def _interrupt(_signal: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def _complain(message: str) -> int:
    click.echo(message, err=True)
    return 2
