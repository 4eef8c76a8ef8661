"""`qvw ablate`: train every arm on every network with every seed, and say what each arm is worth."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.figures.ablation_plots import ablation_figure
from analysis.figures.panels import save_figure
from analysis.runs import Run
from analysis.session.processes import Processes, TogetherError, work_together
from analysis.session.setup import Setup
from analysis.steps.ablation_plans import request_of
from analysis.steps.ablation_subjects import setup_of
from analysis.steps.train_step import run_train
from analysis.storage.files import write_bytes
from analysis.terminal.console import as_text, resumable, say
from analysis.training.ablation_config import Ablation, Job
from analysis.training.ablation_results import result, results_frame, summarized, verdicts
from quant.checkpoints import last_step
from quant.errors import InputError

_NOTES = "ablation"  # .json in each run folder: what its trainings were made of


def run_ablation(
    ablation: Ablation, out: Path, *, only: Sequence[str], device: str, num_workers: int, quiet: bool
) -> None:
    """Make what is missing of the ablation; its trainings lie in run folders OUT/NETWORK.

    A training that is finished is kept, one that was interrupted resumes. After each, ablation.csv (a row a training),
    summary.csv and ablation.png are written again from all that are finished. `only` names the networks to train, so
    that several commands can share the work. Several processes share each sweep and each training, one after another,
    as in `run_sensitivity` and `run_train`; the one of rank 0 does the rest, and speaks.
    """
    setup = Setup(run=out, device=device, num_workers=num_workers, quiet=quiet)
    work_together(setup, lambda own, processes: _run_ablation(ablation, own, processes, only))


def _run_ablation(ablation: Ablation, setup: Setup, processes: Processes, only: Sequence[str]) -> None:
    out, quiet, main = setup.run, setup.quiet, processes.rank == 0
    jobs = list(ablation.jobs())
    wanted = [job for job in jobs if not only or job.subject in only]
    with resumable(lambda: _kept(out, wanted) if main else ""):
        for number, job in enumerate(wanted, start=1):
            place = f"{number} of {len(wanted)}"
            if not processes.by_first(partial(_is_told, ablation, job, setup, place)):
                _train(ablation, job, setup, processes)
                if main:
                    _note(Run(out / job.subject), job)
                    _write(out, ablation, jobs)
    if not main:
        return
    summary = _write(out, ablation, jobs)
    say(as_text(_in_percent(summary)), quiet=quiet)
    for line in verdicts(summary, ablation):
        say(line, quiet=quiet)
    say(f"the ablation is in {out}: ablation.csv, summary.csv, ablation.png", quiet=quiet)


def _is_told(ablation: Ablation, job: Job, setup: Setup, place: str) -> bool:
    """Say which training comes now; whether it is finished."""
    run = Run(setup.run / job.subject)
    _forget_deleted(run, job)
    finished = _is_done(run, job)
    step = 0 if finished else last_step(run.path / f"qat-{job.name}" / "checkpoints")
    state = ": finished already" if finished else f": resuming after step {step:,}" if step else ""
    say(f"== {place}: {job.subject}, {ablation.arms[job.arm].title}, seed {job.seed}{state}", quiet=setup.quiet)
    return finished


def _train(ablation: Ablation, job: Job, setup: Setup, processes: Processes) -> None:
    """Train one arm on one network with one seed."""
    subject, arm = ablation.subjects[job.subject], ablation.arms[job.arm]
    own = replace(
        setup_of(setup.run / job.subject, subject), device=setup.device, num_workers=setup.num_workers, quiet=True
    )
    with _of_job(job, own.run):
        run_train(own, request_of(own, subject, arm, job, processes))


def _forget_deleted(run: Run, job: Job) -> None:
    """Let run.json forget a training whose folder the user has deleted, so that it is made again."""
    name = f"qat-{job.name}"
    if name in run.record.steps and not (run.path / name).exists():
        run.write_json(_NOTES, {key: note for key, note in _noted(run).items() if key != job.name})
        run.edit(lambda now: replace(now, steps={key: step for key, step in now.steps.items() if key != name}))


@contextmanager
def _of_job(job: Job, run: Path) -> Iterator[None]:
    """Let an error say of which training it is, and what stands for the options that it names."""
    try:
        yield
    except InputError as error:
        kind = TogetherError if isinstance(error, TogetherError) else InputError
        raise kind(
            f"{job.subject}, arm {job.arm}, seed {job.seed}: {error} (Options are keys of the file. To train again "
            f"with other ones, delete {run / f'qat-{job.name}'}, or give the arm another name.)"
        ) from error


def _kept(out: Path, jobs: Sequence[Job]) -> str:
    """How many of the trainings are finished, in words."""
    done = sum(_is_done(Run(out / job.subject), job) for job in jobs)
    return f"{done} of {len(jobs)} trainings" if done else ""


def _write(out: Path, ablation: Ablation, jobs: Sequence[Job]) -> pd.DataFrame:
    """Write the tables and the figure of all trainings that are finished; returns the summary."""
    runs = {name: Run(out / name) for name in ablation.subjects}
    rows = [result(runs[job.subject], job) for job in jobs if _is_done(runs[job.subject], job)]
    results = results_frame(rows)
    summary = summarized(results, ablation)
    write_bytes(out / "ablation.csv", results.to_csv(index=False).encode())
    write_bytes(out / "summary.csv", summary.to_csv(index=False).encode())
    if len(results):
        save_figure(ablation_figure(results, summary), out / "ablation")
    return summary


def _is_done(run: Run, job: Job) -> bool:
    """Whether the run folder holds the training; InputError where it is of another arm or network of the same name."""
    step = run.record.steps.get(f"qat-{job.name}")
    known = _noted(run).get(job.name)
    if step is None or step.status != "done" or known is None:
        return False
    changed = [key for key in {**known, **job.fixed} if known.get(key) != job.fixed.get(key)]
    if changed:
        raise InputError(
            f"{run.path} holds {job.name} trained with {changed[0]}={str(known.get(changed[0]))[:60]}, now it is "
            f"{str(job.fixed.get(changed[0]))[:60]}. Give the arm another name, or choose another --out."
        )
    return True


def _note(run: Run, job: Job) -> None:
    """Keep what a finished training was made of beside it."""
    run.write_json(_NOTES, _noted(run) | {job.name: job.fixed})


def _noted(run: Run) -> dict[str, dict[str, Any]]:
    return run.read_json(_NOTES) if (run.path / f"{_NOTES}.json").exists() else {}


def _in_percent(summary: pd.DataFrame) -> pd.DataFrame:
    shown = summary.drop(columns=["arm", "against"])
    for name in shown.columns:
        if name.startswith(("top1", "ahead", "oscillating")):
            shown[name] = (100 * shown[name]).round(2)
    return shown.round({"weight_bits": 2, "activation_bits": 2, "images_per_second": 0})
