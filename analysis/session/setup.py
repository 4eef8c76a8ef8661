"""The options that all steps on a model and images share, and what a run folder knows of them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from analysis.inputs.class_names import ORDERS
from analysis.inputs.model_source import factory_of
from analysis.runs import Run
from quant.errors import InputError

REMEMBERED = (
    "data", "holdout", "seed", "class_map", "class_order", "data_root", "mean", "std", "input_size", "crop_pct",
    "white_level", "task",
)  # fmt: skip
"""Options that a later command takes from the run folder where it does not give them."""
OF_NETWORK = ("mean", "std", "input_size", "crop_pct", "task")
"""Those of them that belong to the network, whatever the images."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The options that the commands share, as typed; None where the run folder may know better."""

    run: Path
    model: str | None = None
    pretrained: bool = False
    weights: Path | None = None
    weights_entry: str | None = None
    model_kwargs: dict[str, Any] | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    data: str | None = None
    task: str | None = None  # the name of a ready-made task, or path/to/file.py:function
    split: str | None = None
    images: int | None = None
    batch_size: int = 64
    num_workers: int = 2
    holdout: float | None = None
    class_map: Path | None = None
    class_order: str | None = None  # plain, natural or a file
    data_root: Path | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    input_size: tuple[int, int, int] | None = None
    crop_pct: float | None = None
    white_level: int | None = None
    skip_broken: bool = False
    device: str = "cpu"
    seed: int | None = None
    own_preparation: bool = False  # not that of the run folder: the network is another
    overwrite: bool = False
    quiet: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Setup":
        """The options of a command line, checked."""
        return TypeAdapter(cls).validate_python(dict(options))


def completed(setup: Setup, run: Run) -> Setup:
    """The options; what this command does not say of images and patterns is what the run folder knows, or default."""
    record = run.record
    if record.data:
        names: Sequence[str] = REMEMBERED if setup.data is None else OF_NETWORK  # other images, but of the same network
        if setup.own_preparation:
            names = tuple(name for name in names if name == "task" or name not in OF_NETWORK)
        given = {name: getattr(setup, name) for name in names if getattr(setup, name) is not None}
        try:
            setup = Setup.of(asdict(setup) | {name: record.data.get(name) for name in names} | given)
        except ValidationError as error:
            raise InputError(
                f"{run.path / 'run.json'} holds data options that cannot be used ({error.errors()[0]['loc'][0]}). "
                "Fix the file, or choose another --run."
            ) from error
    chosen = [step.inputs for step in record.steps.values() if {"include", "exclude"} <= set(step.inputs)]
    if setup.model is None and chosen and not (setup.include or setup.exclude):
        setup = replace(setup, include=tuple(chosen[-1]["include"]), exclude=tuple(chosen[-1]["exclude"]))
    return replace(
        setup, data=_absolute(setup.data), task=_absolute_task(setup.task),
        class_map=None if setup.class_map is None else setup.class_map.resolve(),
        class_order=_absolute_order(setup.class_order),
        data_root=None if setup.data_root is None else setup.data_root.resolve(),
        seed=0 if setup.seed is None else setup.seed,
        holdout=0.5 if setup.holdout is None else setup.holdout,
    )  # fmt: skip


def _absolute(data: str | None) -> str | None:
    """A data string that holds in every working directory."""
    kind, colon, path = (data or "").partition(":")
    return f"{kind}:{Path(path).resolve()}" if path and colon and kind in ("folder", "csv") else data


def _absolute_order(order: str | None) -> str | None:
    """An order of classes that holds in every working directory, where it is a file."""
    return order if order is None or order in ORDERS else str(Path(order).resolve())


def _absolute_task(task: str | None) -> str | None:
    """A task that holds in every working directory, where it is a function in a file."""
    factory = None if task is None else factory_of(task)
    return task if factory is None else f"{factory[0].resolve()}:{factory[1]}"
