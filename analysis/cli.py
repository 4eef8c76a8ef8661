"""`qvw`: from a model and images to statistics, sensitivity, a bit plan and its accuracy. One function a command."""

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from analysis.commands.ablation import ablate
from analysis.commands.export import export
from analysis.commands.first_word import first_word
from analysis.commands.options import quiet_option
from analysis.commands.plan import plan, plan_diff
from analysis.commands.sensitivity import sensitivity
from analysis.commands.soft_labels import soft_labels
from analysis.commands.stats import stats
from analysis.commands.train import evaluate, train
from analysis.memory import reuse_freed_memory
from analysis.terminal.interrupts import catch_interrupts
from analysis.terminal.library_warnings import own_warnings_alone
from analysis.terminal.option_words import as_options
from quant.errors import InputError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="quantization-variation-workbench")
def cli() -> None:
    """How weights and activations of vision models vary, which sites hurt at few bits, and how many bits each gets.

    \b
    The path, on a model of yours and your images:
      qvw stats MODEL --data folder:PATH --run runs/A  how every tensor varies
      qvw sensitivity --run runs/A --bits 2,3,4,8      what a quantized one costs
      qvw plan --run runs/A --weight-bits 3 --activation-bits 4
      qvw eval --run runs/A --plan runs/A/plan.json    accuracy without training
      qvw train --run runs/A                           train with the plan
      qvw export --run runs/A --out FILE.safetensors   the trained model, packed
      qvw report runs/A --out runs/A/report            all of it on one page
      qvw compare runs/A runs/B --out runs/A-vs-B      two models side by side

    MODEL is a timm name (`qvw models resnet`) or your own factory, path/to/file.py:function, with --weights FILE.
    MODEL and --data may be left out where the run folder knows them. `qvw demo` shows it all on bundled data.

    Exit codes: 0 done, 2 wrong input, 130 interrupted, 1 a defect of ours. What was interrupted keeps what it has done:
    the same command goes on.
    """


@cli.command(short_help="Names of timm models.")
@click.argument("pattern", required=False)
def models(pattern: str | None) -> None:
    """Names of timm models that can be used; PATTERN is a part of the name, or has * in it."""
    from analysis.inputs.timm_names import model_names, near_names

    names = model_names(pattern)
    if not names:
        near = near_names(pattern or "")
        hint = f"The nearest: {', '.join(near)}" if near else "Try a shorter part, such as `qvw models swin`"
        raise InputError(f"no timm model matches {pattern!r}. {hint}.")
    click.echo("\n".join(names))


for command in (stats, sensitivity, plan, plan_diff, evaluate, soft_labels, train, export, ablate):
    cli.add_command(command)


@cli.command(short_help="One HTML page of one or more runs.")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of index.html.")
@quiet_option
def report(runs: Sequence[Path], out: Path, quiet: bool) -> None:
    """The whole story of one or more runs on one page, from variation to accuracy; it needs no network."""
    from analysis.runs import reportable_run, run_names

    first_word(lambda: [run_names(runs), *map(reportable_run, runs)])
    from analysis.steps.report import run_report  # after the check: it imports torch

    run_report(runs, out, quiet=quiet)


@cli.command(short_help="Several runs side by side.")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the results.")
@click.option("--module", "modules", multiple=True, metavar="PATTERN", show_default="all",
              help="Layer whose channels are drawn, * and ? as in a shell; its full name (blocks.0.mlp.fc2) or the "
                   "short one of the figures (b0.mlp.fc2). Of several that match in a run, the one whose weight or "
                   "input has the widest channel, measured by the median one. May be repeated: runs differ in their "
                   "names.")  # fmt: skip
@quiet_option
def compare(runs: Sequence[Path], out: Path, modules: tuple[str, ...], quiet: bool) -> None:
    """Two or more runs side by side: how their weights and activations vary.

    \b
    Tables (CSV):
      comparison        a row a measure, a column a run, and what it means
      differences       whether modules of one run vary more than another's
    Figures (PNG, SVG, their data as CSV), *_weight and *_input:
      variation_*       measures of each layer over depth, such as kurtosis
      distributions_*   densities by kind of layer, beside a Gaussian's
      heads             standard deviation of each attention head
      channels          range of each channel of one layer a run (--module)

    index.html has them all on one page. Runs of weights alone are compared in their weights.
    """
    from analysis.runs import run_names, run_with_stats

    if len(runs) < 2:
        raise InputError("one run was given. Name at least two run folders to compare.")
    first_word(lambda: [run_names(runs), *map(run_with_stats, runs)])
    from analysis.steps.compare import run_compare  # after the check: it imports torch

    run_compare(runs, out, modules=modules, quiet=quiet)


@cli.command(short_help="The whole path on bundled digits.")
@click.option("--run", type=click.Path(file_okay=False, path_type=Path), default=Path("runs/demo"), show_default=True,
              help="Folder of the results.")  # fmt: skip
@quiet_option
def demo(run: Path, quiet: bool) -> None:
    """The whole path on scikit-learn's digits: a ResNet and a Swin, from training on the spot to a report of all."""
    from analysis.runs import Run

    first_word(lambda: [Run(path.parent).record for path in run.glob("*/run.json")])
    from analysis.steps.demo import run_demo  # after the check: it imports torch

    run_demo(run, quiet=quiet)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `qvw`; wrong input ends with exit code 2, an interrupt with 130, a defect with its traceback and 1."""
    catch_interrupts()
    reuse_freed_memory()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch is imported: its remarks, such as on sockets
    try:
        with own_warnings_alone():
            code = cli.main(list(arguments) if arguments is not None else None, prog_name="qvw", standalone_mode=False)
    except InputError as error:
        code = _complain(f"qvw: error: {as_options(str(error))}")
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        code = 2
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "qvw"
        code = _complain(f"qvw: error: {error.format_message()} See `{path} --help`.")
    except (KeyboardInterrupt, click.Abort) as error:
        if os.environ.get("RANK", "0") == "0":  # of several processes the first speaks
            click.echo(f"qvw: interrupted. {_kept(error, sys.argv[1:] if arguments is None else arguments)}", err=True)
        code = 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stdout = None  # or Python complains of the pipe once more at exit
        code = 0
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        code = _complain(
            f"qvw: error: {_who()} was killed, most often for want of memory. Give fewer --num-workers (0: none); what "
            "was kept of the work is used by the same command."
        )
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        code = _complain(f"qvw: error: no space left to write ({error.strerror}). Free some and run the command again.")
    sys.exit(code if isinstance(code, int) else 0)


def _kept(error: BaseException, arguments: Sequence[str]) -> str:
    """What a step has noted of what is kept (`resumable`); click raises its own exception from the interrupt."""
    notes = getattr(error.__cause__ or error, "__notes__", [])
    if not notes:
        return "Nothing new was kept: the same command starts where this one did."
    but = ", without --overwrite (which starts anew)" if "--overwrite" in arguments else ""
    return f"Kept: {'; '.join(notes)}. The same command goes on from there{but}."


def _who() -> str:
    """Whose end ends the readers of images: torchrun, too, stops all when one of its processes has ended."""
    together = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return "another process of this command, or one that reads images," if together else "a process that reads images"


def _complain(message: str) -> int:
    click.echo(message, err=True)
    return 2
