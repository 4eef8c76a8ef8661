"""`qvw`: from a model and images to statistics, sensitivity, a bit plan and its accuracy. One function a command."""

import errno
import json
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import click

from quant.choices import ESTIMATORS, GRANULARITIES, Estimator, Granularity
from quant.errors import InputError

F = TypeVar("F", bound=Callable[..., Any])


class _List(click.ParamType):
    """A comma-separated list of one type, such as `2,3,4,8`."""

    def __init__(self, kind: type, length: int | None = None) -> None:
        self.kind, self.length = kind, length
        self.name = "LIST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        try:
            items = tuple(self.kind(part.strip()) for part in str(value).split(","))
        except ValueError:
            self.fail(
                f"{value!r} is no comma-separated list of {self.kind.__name__} values, such as 2,3,4.", param, ctx
            )
        if self.length is not None and len(items) != self.length:
            self.fail(f"{value!r} has {len(items)} values, expected {self.length}.", param, ctx)
        return items


class _Json(click.ParamType):
    """A JSON object."""

    name = "JSON"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, dict):
            return value
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError) as error:
            self.fail(f"{str(value)[:80]!r} is no JSON: {error}. Write such as '{{\"num_classes\": 10}}'.", param, ctx)
        if not isinstance(parsed, dict):
            self.fail(f"{value!r} is no JSON object; write such as '{{\"num_classes\": 10}}'.", param, ctx)
        return parsed


def _stacked(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


_run = click.option(
    "--run", type=click.Path(file_okay=False, path_type=Path), required=True, help="The run folder; made if missing."
)
_model_options = _stacked(
    click.argument("model", required=False),
    click.option("--pretrained", is_flag=True, help="timm's published weights (needs a network or a cache)."),
    click.option("--weights", type=click.Path(path_type=Path), help="Weights: .safetensors, or .pt without code."),
    click.option("--model-kwargs", type=_Json(), help="Arguments of the model's constructor, as JSON."),
    click.option("--include", multiple=True, metavar="PATTERN", help="Only modules that match; may be repeated."),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave out modules that match; may be repeated."),
)
_data_options = _stacked(
    click.option("--data", help="digits, folder:PATH, csv:FILE, or a timm data set (torch/cifar10, hfds/..., wds/...)"),
    click.option("--split", type=click.Choice(["train", "val"]), help="Which images; each command says its default."),
    click.option("--images", type=click.IntRange(min=1), help="How many images, balanced over the classes."),
    click.option("--batch-size", type=click.IntRange(1, 2**16), default=64, show_default=True),
    click.option("--num-workers", type=click.IntRange(min=0), default=2, show_default=True, help="Decoding processes."),
    click.option("--holdout", type=click.FloatRange(0, 1, max_open=True),
                 help="Share of one-split data that becomes the validation split (0.5); 0: every image serves both."),
    click.option("--class-map", type=click.Path(path_type=Path), help="Lines `class` or `class,index`, where the "
                 "folders are a subset of the head's classes."),
    click.option("--data-root", type=click.Path(path_type=Path), help="Where a timm data set lies."),
    click.option("--mean", type=_List(float), help="Normalisation, where the model does not say: 0.49,0.48,0.45."),
    click.option("--std", type=_List(float), help="Normalisation, where the model does not say."),
    click.option("--input-size", type=_List(int, 3), help="Channels, height, width: 3,32,32."),
    click.option("--crop-pct", type=click.FloatRange(0, 1, min_open=True), help="Centre crop share after resizing."),
    click.option("--skip-broken", is_flag=True, help="Leave out images that cannot be read, and count them."),
)  # fmt: skip
_common_options = _stacked(
    click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, mps."),
    click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Choice of images, splits, untrained weights (0)."),
    click.option("--overwrite", is_flag=True, help="Start this step anew where the run folder holds other results."),
    click.option("--quiet", is_flag=True, help="No progress bar, no table."),
)


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
      qvw compare      runs/A runs/B --out runs/A-vs-B             two models side by side

    MODEL is a timm name (`qvw models resnet`) or your own factory, path/to/file.py:function, with --weights FILE.
    MODEL and --data may be left out where the run folder knows them. `qvw demo` shows it all on bundled data.

    Exit codes: 0 done, 2 wrong input, 130 interrupted (start again to go on), 1 a defect of ours.
    """


@cli.command()
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


@cli.command()
@_model_options
@_data_options
@_run
@_common_options
def stats(**options: Any) -> None:
    """Variance, kurtosis, outliers, quantiles of every weight, and with --data of every activation.

    Writes stats.parquet, channels.parquet, histograms.parquet, variation.json. Training images by default.
    """
    from analysis.setup import Setup
    from analysis.stats_step import run_stats

    run_stats(Setup.of(options))


@cli.command()
@_model_options
@_data_options
@_run
@_common_options
@click.option("--bits", type=_List(int), default="2,3,4,8", show_default=True, help="Bit-widths: 1 to 8, and 16.")
@click.option("--tensors", type=_List(str), default="weight,input,attention", show_default=True,
              help="weight, input, attention (all four inside attention), or query, key, value, softmax.")  # fmt: skip
@click.option("--granularity", type=click.Choice(GRANULARITIES), help="Of weights; by default what suits each site.")
@click.option(
    "--estimator", type=click.Choice(ESTIMATORS), default="mse", show_default=True, help="Of the first scale."
)
@click.option("--bn", type=click.Choice(["stored", "re-estimate", "both"]), default="both", show_default=True,
              help="BatchNorm statistics: the model's own, or those of the quantized network.")  # fmt: skip
def sensitivity(
    bits: tuple[int, ...],
    tensors: tuple[str, ...],
    granularity: Granularity | None,
    estimator: Estimator,
    bn: str,
    **options: Any,
) -> None:
    """What the network loses when ONE site is quantized and all else stays in floating point.

    Writes sensitivity.parquet, cost.parquet and sensitivity.png. Training images by default (256 of them). Interrupted
    and started again, it goes on with the next site; other bit-widths or tensors are added to the table.
    """
    from analysis.sensitivity import SweepConfig
    from analysis.sensitivity_step import run_sensitivity
    from analysis.setup import Setup

    config = SweepConfig(
        bit_widths=tuple(sorted(set(bits))), estimator=estimator, granularity=granularity, batchnorm=bn
    )
    run_sensitivity(Setup.of(options), config, tensors=tensors)


@cli.command()
@_run
@click.option("--weight-bits", type=click.FloatRange(min=0, min_open=True), help="Mean bits of all weights.")
@click.option("--activation-bits", type=click.FloatRange(min=0, min_open=True), help="Mean bits of all activations.")
@click.option("--size-mib", type=click.FloatRange(min=0, min_open=True), help="Size of the quantized model.")
@click.option("--gbitops", type=click.FloatRange(min=0, min_open=True), help="10^9 bit operations of one image.")
@click.option("--candidates", type=_List(int), help="Bit-widths to choose from; by default all that were measured.")
@click.option("--objective", default="kl", show_default=True,
              help="What is to grow least: kl (least noisy), loss, logit_nmse, top1.")  # fmt: skip
@click.option("--pin", multiple=True, metavar="PATTERN=BITS", help="Fix the bits of modules that match; repeatable.")
@click.option("--tie", multiple=True, metavar="PATTERN", help="Sites that match share their bits; repeatable.")
@click.option("--layout", type=click.Choice(["paper", "strict"]), default="paper", show_default=True,
              help="paper: first layer and classifier at 8 bit; strict: no exception.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="The plan file; by default RUN/plan.json.")
@click.option("--quiet", is_flag=True)
def plan(run: Path, **options: Any) -> None:
    """The bit plan that hurts least within the budgets, by an exact integer program, with its certificate.

    Needs `qvw sensitivity` in the same run folder. Writes plan.json and plan.png.
    """
    from analysis.plan_step import PlanRequest, run_plan

    run_plan(run, PlanRequest.of(options))


@cli.command(name="eval")
@_model_options
@_data_options
@_run
@_common_options
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="A plan file.")
@click.option("--uniform", metavar="wXaY", help="The same bits everywhere, such as w4a4.")
@click.option("--float", "floating", is_flag=True, help="The model as it is.")
@click.option("--layout", type=click.Choice(["paper", "strict"]), default="paper", show_default=True,
              help="Of --uniform: paper keeps first layer and classifier at 8 bit.")  # fmt: skip
@click.option("--calibration-images", type=click.IntRange(min=1), default=256, show_default=True,
              help="Training images that set the scales of activations.")  # fmt: skip
@click.option("--estimator", type=click.Choice(ESTIMATORS), default="mse", show_default=True)
@click.option("--bn", type=click.Choice(["stored", "re-estimate"]), default="re-estimate", show_default=True)
def evaluate(**options: Any) -> None:
    """Loss and top-1 of the floating-point model, of a plan, or of uniform bits: calibrated, without training.

    Validation images by default, all of them; scales come from training images. Adds a row to verify.parquet.
    """
    from analysis.eval_step import EvalRequest, run_eval
    from analysis.setup import Setup

    names = ("plan_file", "uniform", "floating", "layout", "calibration_images", "estimator")
    request = EvalRequest.of({name: options.pop(name) for name in names} | {"batchnorm": options.pop("bn")})
    run_eval(Setup.of(options), request)


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the results.")
@click.option("--quiet", is_flag=True)
def compare(runs: Sequence[Path], out: Path, quiet: bool) -> None:
    """Two or more runs side by side: how their weights and activations vary. Tables (CSV) and figures (PNG, SVG)."""
    from analysis.compare_step import run_compare

    run_compare(runs, out, quiet=quiet)


@cli.command()
@click.option("--run", type=click.Path(file_okay=False, path_type=Path), default=Path("runs/demo"), show_default=True)
@click.option("--quiet", is_flag=True)
def demo(run: Path, quiet: bool) -> None:
    """The whole path on scikit-learn's digits: a ResNet and a Swin, trained on the spot, to bit plans and figures."""
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
