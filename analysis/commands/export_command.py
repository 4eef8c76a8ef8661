"""`qvw export`: the command line."""

from pathlib import Path
from typing import Any

import click

from analysis.commands.first_word import first_word
from analysis.commands.shared_options import model_options, pattern_options, quiet_option


@click.command(short_help="Pack a trained model as integer codes.")
@click.option("--run", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True,
              help="The run folder, after `qvw train` has finished.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, metavar="FILE.safetensors",
              help="The packed file; only an earlier packed file is replaced.")  # fmt: skip
@click.option("--name", help="Export the training RUN/qat-NAME.", show_default="RUN/qat")
@model_options
@pattern_options
@quiet_option
def export(name: str | None, out: Path, **options: Any) -> None:
    """Write a trained model as one file: bit-packed integer codes, scales, offsets, the plan, unquantized parameters.

    Needs a finished `qvw train` in the same run folder, with a plan or uniform bits. `qvw eval --run RUN --checkpoint
    FILE` evaluates the file; its outputs are those of the trained model. Use it to store or share the model, not to run
    it. Give MODEL and --weights only if they have moved.
    """
    from analysis.session.requested import asked
    from analysis.session.setup import Setup
    from analysis.storage.trained_files import check_export_target, packable_folder

    setup = Setup.of(options)

    def check() -> None:
        check_export_target(out)
        packable_folder(setup.run, name)
        asked(setup, needs_data=False)

    first_word(check)
    from analysis.steps.export_step import run_export  # after the check: it imports torch

    run_export(setup, out, name=name)
