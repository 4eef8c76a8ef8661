"""`qvw ablate`: the command line of ablations."""

from pathlib import Path

import click

from analysis.commands.first_word import first_word
from analysis.commands.shared_options import num_workers_option, quiet_option
from quant.errors import InputError


@click.command(short_help="Train and compare several variants over seeds.")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="CONFIG.yaml")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True,
              help="Folder for the tables, with a run folder for each network.")  # fmt: skip
@click.option("--only", multiple=True, metavar="NETWORK", show_default="all",
              help="Train only this network of the file; may be repeated.")  # fmt: skip
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, mps.")
@num_workers_option
@quiet_option
def ablate(config: Path, out: Path, only: tuple[str, ...], device: str, num_workers: int, quiet: bool) -> None:
    """Train every arm on every network with every seed, and estimate the effect of each arm.

    CONFIG.yaml names networks, arms and seeds; reports/ablation/cifar10.yaml is an example. Run the same command again
    to resume; finished trainings are kept, so seeds and arms can be added. Writes ablation.csv (one row per training),
    summary.csv (means with 95 % intervals over seeds, differences from the baseline paired by seed) and ablation.png.
    Several processes share each training: torchrun --nproc_per_node 4 -m -- analysis ablate ...
    """
    from analysis.steps.ablation_subjects import setup_of
    from analysis.training.ablation_config import read_ablation

    ablation = read_ablation(config)
    unknown = [name for name in only if name not in ablation.subjects]
    if unknown:
        raise InputError(f"{config} has no subject {unknown[0]!r}; it has {', '.join(ablation.subjects)}.")
    from analysis.session.requested import asked, check_device

    def check() -> None:
        check_device(device)
        for name, subject in ablation.subjects.items():
            if not only or name in only:
                try:
                    asked(setup_of(out / name, subject), needs_data=True)
                except InputError as error:
                    raise InputError(f"{config}, network {name}: {error}") from error

    first_word(check)
    from analysis.steps.ablation_step import run_ablation  # after the check: it imports torch

    run_ablation(ablation, out, only=only, device=device, num_workers=num_workers, quiet=quiet)
