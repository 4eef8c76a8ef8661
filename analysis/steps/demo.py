"""`qvw demo`: a ResNet and a Swin on scikit-learn's digits: trained, measured, planned, trained again with few bits."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from analysis.data import ImageData, batches, load_data, resolve_input
from analysis.inputs import digits_models
from analysis.inputs.model_source import ModelSource
from analysis.models import load_model
from analysis.planning.plan_request import PlanRequest
from analysis.runs import Run
from analysis.scoring import outputs_of, scores
from analysis.sensitivity import SweepConfig
from analysis.session.open_run import open_run
from analysis.session.setup import Setup
from analysis.steps.compare_step import run_compare
from analysis.steps.eval_request import EvalRequest
from analysis.steps.eval_step import run_eval
from analysis.steps.plan_step import run_plan
from analysis.steps.sensitivity_step import run_sensitivity
from analysis.steps.stats_step import run_stats
from analysis.steps.train_step import run_train
from analysis.storage.files import write_atomic
from analysis.tasks import classification
from analysis.terminal.console import resumable
from analysis.training.training_request import TrainRequest
from quant.config import QATConfig
from quant.errors import InputError

WEIGHT_DECAY, WARM_UP = 0.05, 0.1
SWEEP, TENSORS = SweepConfig(), ("weight", "input", "attention")
TRAINING = QATConfig(
    steps=200, learning_rate=1e-3, batch_size=32, crop_area=0.8
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A small network and how it is trained on the digits; the batch is 32 images."""

    name: str  # of its run folder
    model: str  # file.py:function
    kwargs: dict[str, Any] = field(default_factory=dict)
    learning_rate: float
    epochs: int
    least_top1: float


RECIPES = (
    Recipe(
        name="resnet", model=f"{digits_models.__file__}:digits_resnet", learning_rate=2e-3, epochs=6, least_top1=0.97
    ),
    Recipe(name="swin", model=f"{digits_models.__file__}:digits_swin", learning_rate=1e-3, epochs=14, least_top1=0.96),
)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch on one thread: layers this small gain little by a second, and lose tenfold where another program runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def measure_demo(path: Path, *, quiet: bool = False) -> list[Path]:
    """The run folders of the demo's models, PATH/resnet and PATH/swin, with statistics and sensitivity in them.

    Models that are not there are trained first, on one or two cores in about a minute for both. What a folder holds of
    the same weights and images is kept as it is, so that a second call takes seconds and writes nothing.
    """
    for recipe in RECIPES:
        _check_earlier(Run(path / recipe.name), recipe)
    for recipe in RECIPES:
        _headline(f"{recipe.name}: train in floating point, measure", quiet)
        setup = _setup(path, recipe, quiet=quiet)
        assert setup.weights is not None
        if not setup.weights.exists():
            top1 = _train(recipe, setup.weights, quiet=quiet)
            _say(f"trained to {100 * top1:.1f} % of the validation digits", quiet)
        if _is_measured(setup):
            _say(f"{setup.run} holds statistics and sensitivity already", quiet)
            continue
        run_stats(setup)
        run_sensitivity(setup, SWEEP, tensors=TENSORS)
    return [path / recipe.name for recipe in RECIPES]


def _check_earlier(run: Run, recipe: Recipe) -> None:
    """Raise InputError for a damaged record, before any training, and for one of another network."""
    model = run.record.model
    if model is not None and model.name != recipe.model.rpartition(":")[2]:
        raise InputError(
            f"{run.path} holds results of {model.name}, perhaps of an earlier version of the demo. Delete the folder, "
            "or choose another --run."
        )


@_one_thread()
def run_demo(path: Path, *, quiet: bool = False) -> None:
    """Everything of the demo in `path`; what an earlier, interrupted call finished is kept."""
    started = time.monotonic()
    with resumable(lambda: _kept(path)):
        _run_demo(path, quiet=quiet)
    click.echo(f"Done in {time.monotonic() - started:.0f} s. Look first at the report of both networks:")
    click.echo(str(path / "report" / "index.html"))


def _kept(path: Path) -> str:
    """Which steps of an interrupted demo are finished, in words."""
    steps = [(r.name, name, s) for r in RECIPES for name, s in Run(path / r.name).record.steps.items()]
    done = [f"{name} of the {network}" for network, name, step in steps if step.status == "done"]
    return ", ".join(done)


def _run_demo(path: Path, *, quiet: bool) -> None:
    runs = measure_demo(path, quiet=quiet)
    for recipe in RECIPES:
        _headline(f"{recipe.name}: plan bits, evaluate without training", quiet)
        setup = _setup(path, recipe, quiet=quiet)
        plan_file = setup.run / "plan.json"
        run_eval(setup, EvalRequest(floating=True))
        run_plan(setup.run, PlanRequest(like="w3a4", verify=True, num_workers=0, quiet=quiet))
        run_eval(setup, EvalRequest(plan_file=plan_file))
        run_eval(setup, EvalRequest(uniform="w2a2"))
    for recipe in RECIPES:
        _headline(f"{recipe.name}: train with the plan, and with uniform bits", quiet)
        setup = _setup(path, recipe, quiet=quiet)
        run_train(setup, TrainRequest(plan_file=setup.run / "plan.json", config=TRAINING))
        for bits in ("w3a4", "w2a2"):  # the plan's budget; and bits at which nothing goes without training
            run_train(setup, TrainRequest(uniform=bits, name=bits, config=TRAINING))
    _headline("comparison and report", quiet)
    run_compare(runs, path / "report", quiet=quiet)


def _setup(path: Path, recipe: Recipe, *, quiet: bool) -> Setup:
    run = path / recipe.name
    return Setup(
        run=run, model=recipe.model, model_kwargs=recipe.kwargs, weights=run / "weights.safetensors", data="digits",
        quiet=quiet, num_workers=0,
    )  # fmt: skip


def _is_measured(setup: Setup) -> bool:
    """Whether the run folder holds the statistics and the whole sweep of these weights and images."""
    opened = open_run(setup, needs_data=True)
    steps = opened.run.record.steps
    if not {"stats", "sensitivity"} <= set(steps):
        return False
    sweep = asdict(SWEEP) | {"bit_widths": list(SWEEP.bit_widths), "tensors": list(TENSORS)}  # lists, as JSON has them
    if any(steps["sensitivity"].options.get(name) != value for name, value in sweep.items()):
        return False
    return all(
        opened.run.is_done(step, opened.inputs(opened.step_images(step, "train"))) for step in ("stats", "sensitivity")
    )


def _headline(text: str, quiet: bool) -> None:
    _say(f"\n== {text}", quiet)


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        click.echo(text)


def _train(recipe: Recipe, weights: Path, *, quiet: bool) -> float:
    """Train, save the weights, and return top-1 of the validation digits."""
    model = load_model(ModelSource(model=recipe.model, kwargs=recipe.kwargs))
    config = resolve_input(model, "digits")
    train, val = (
        load_data("digits", split=split, images=None, seed=0, input_config=config, num_classes=10)
        for split in ("train", "val")
    )
    images, labels = (torch.cat(parts) for parts in zip(*batches(train, batch_size=256), strict=True))
    fit_(model, images, labels, recipe, quiet=quiet)
    top1 = _top1(model, val)
    if top1 < recipe.least_top1:
        raise RuntimeError(f"{recipe.name} reached {top1:.3f} of the validation digits, expected {recipe.least_top1}.")
    metadata = {"recipe": recipe.model.rpartition(":")[2]}
    write_atomic(weights, lambda path: save_file(model.state_dict(), path, metadata=metadata))
    return top1


def fit_(model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe, *, quiet: bool) -> None:
    """Train in floating point: AdamW, warm-up then cosine to 0, no augmentation, shuffled by a fixed seed."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
    )
    per_epoch = math.ceil(len(images) / 32)
    total = per_epoch * recipe.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / total))
    generator = torch.Generator().manual_seed(0)
    model.train()
    silent = True if quiet else None
    with tqdm(total=total, desc=f"train {recipe.name}", unit=" step", disable=silent, leave=False) as bar:
        for _ in range(recipe.epochs):
            for chosen in torch.randperm(len(images), generator=generator).split(32):
                loss = F.cross_entropy(model(images[chosen]), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    model.eval()


def _rate(progress: float) -> float:
    """Share of the peak learning rate at `progress` (0 to 1) of the training."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


def _top1(model: nn.Module, data: ImageData) -> float:
    task, kept = classification(), list(batches(data, batch_size=256))
    outputs = outputs_of(partial(task.forward, model), kept, task)
    return scores(task, outputs, kept).score.mean().item()
