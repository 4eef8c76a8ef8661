"""`qvw`: from a model and images to statistics, sensitivity, a bit plan and its accuracy; one function per command."""

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from analysis.commands.ablation_command import ablate
from analysis.commands.export_command import export
from analysis.commands.first_word import first_word
from analysis.commands.plan_command import plan, plan_diff
from analysis.commands.sensitivity_command import sensitivity
from analysis.commands.shared_options import quiet_option
from analysis.commands.soft_label_command import soft_labels
from analysis.commands.stats_command import stats
from analysis.commands.train_command import evaluate, train
from analysis.memory import reuse_freed_memory
from analysis.terminal.interrupts import catch_interrupts
from analysis.terminal.library_warnings import own_warnings_alone
from analysis.terminal.option_words import as_options
from quant.errors import InputError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="quantization-variation-workbench")
def cli() -> None:
    """Measure how weights and activations vary, find the sites that hurt at few bits, and plan bit-widths.

    \b
    The steps, on your model and your images:
      qvw stats MODEL --data folder:PATH --run runs/A  statistics of every tensor
      qvw sensitivity --run runs/A --bits 2-4,8        loss per quantized tensor
      qvw plan --run runs/A --weight-bits 3 --activation-bits 4
      qvw eval --run runs/A --plan runs/A/plan.json    accuracy without training
      qvw train --run runs/A                           fine-tune with the plan
      qvw export --run runs/A --out FILE.safetensors   the trained model, packed
      qvw report runs/A --out runs/A/report            all results on one page
      qvw compare runs/A runs/B --out runs/A-vs-B      two models side by side

    MODEL is a timm name (`qvw models resnet`) or your own factory, path/to/file.py:function, with --weights FILE.
    MODEL and --data are optional once a run folder has recorded them. `qvw demo` runs everything on bundled data. See
    `qvw COMMAND --help` for all options.

    Exit codes: 0 done, 2 wrong input, 130 interrupted, 1 internal error. To resume an interrupted command, run it
    again.
    """


@cli.command(short_help="List timm models.")
@click.argument("pattern", required=False)
def models(pattern: str | None) -> None:
    """List the timm models that can be used; PATTERN is a part of the name, or a shell pattern with *."""
    from analysis.inputs.timm_names import model_names, near_names

    names = model_names(pattern)
    if not names:
        near = near_names(pattern or "")
        hint = f"The nearest: {', '.join(near)}" if near else "Try a shorter part, such as `qvw models swin`"
        raise InputError(f"no timm model matches {pattern!r}. {hint}.")
    click.echo("\n".join(names))


for command in (stats, sensitivity, plan, plan_diff, evaluate, soft_labels, train, export, ablate):
    cli.add_command(command)


@cli.command(short_help="Write one HTML page of one or more runs.")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for index.html.")
@quiet_option
def report(runs: Sequence[Path], out: Path, quiet: bool) -> None:
    """Write all results of one or more runs on one page, from variation to accuracy; it works offline."""
    from analysis.runs import reportable_run, run_names

    first_word(lambda: [run_names(runs), *map(reportable_run, runs)])
    from analysis.steps.report_step import run_report  # after the check: it imports torch

    run_report(runs, out, quiet=quiet)


@cli.command(short_help="Compare runs side by side.")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the results.")
@click.option("--module", "modules", multiple=True, metavar="PATTERN", show_default="all",
              help="Layer whose channels are drawn: its full name (blocks.0.mlp.fc2), the short one of the figures "
                   "(b0.mlp.fc2), or a shell pattern. If several match in a run, the one with the largest ratio of "
                   "widest to median channel is drawn. May be repeated, as names differ between runs.")  # fmt: skip
@quiet_option
def compare(runs: Sequence[Path], out: Path, modules: tuple[str, ...], quiet: bool) -> None:
    """Compare how the weights and activations of two or more runs vary.

    \b
    Tables (CSV):
      comparison        one row per measure, one column per run, the meaning
      differences       tests of whether one run varies more than another
    Figures (PNG, SVG, their data as CSV), *_weight and *_input:
      variation_*       measures of each layer over depth, such as kurtosis
      distributions_*   densities by kind of layer, with a Gaussian
      heads             standard deviation of each attention head
      channels          range of each channel of one layer per run (--module)

    index.html shows all of them. Runs with statistics of weights only are compared by their weights.
    """
    from analysis.runs import run_names, run_with_stats

    if len(runs) < 2:
        raise InputError("one run was given. Name at least two run folders to compare.")
    first_word(lambda: [run_names(runs), *map(run_with_stats, runs)])
    from analysis.steps.compare_step import run_compare  # after the check: it imports torch

    run_compare(runs, out, modules=modules, quiet=quiet)


@cli.command(short_help="Run everything on bundled digits.")
@click.option("--run", type=click.Path(file_okay=False, path_type=Path), default=Path("runs/demo"), show_default=True,
              help="Folder for the results.")  # fmt: skip
@quiet_option
def demo(run: Path, quiet: bool) -> None:
    """Train a small ResNet and a small Swin on scikit-learn's digits, run every step on them, and write a report."""
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
            f"qvw: error: {_who()} was killed, usually because memory ran out. Reduce --num-workers (0: none), then "
            "run the same command again to resume."
        )
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        code = _complain(
            f"qvw: error: no space left to write ({error.strerror}). Free some space, then run the same command again "
            "to resume."
        )
    sys.exit(code if isinstance(code, int) else 0)


def _kept(error: BaseException, arguments: Sequence[str]) -> str:
    """What a step has noted of what is kept (`resumable`); click raises its own exception from the interrupt."""
    notes = getattr(error.__cause__ or error, "__notes__", [])
    if not notes:
        return "Nothing new was kept: the same command starts where this one did."
    but = " without --overwrite" if "--overwrite" in arguments else ""
    return f"Kept: {'; '.join(notes)}. Resume with the same command{but}."


def _who() -> str:
    """Whose end ends the readers of images: torchrun, too, stops all when one of its processes has ended."""
    together = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return "another process of this command, or one that reads images," if together else "a process that reads images"


def _complain(message: str) -> int:
    click.echo(message, err=True)
    return 2
