"""What one command works on: its options, the model with its sites, and the images."""

import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import click
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from tqdm import tqdm

from analysis.data import ImageData, batches, input_channels, load_data, resolve_input
from analysis.listing import InputConfig
from analysis.models import ModelSource, classifier_names, load_model, num_classes, weights_sha256
from analysis.runs import ModelRecord, Run
from analysis.sites import find_sites
from quant.errors import InputError
from quant.site import SiteInfo
from quant.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The options that `stats`, `sensitivity` and `eval` share, as typed; None where the run folder may know better."""

    run: Path
    model: str | None = None
    pretrained: bool = False
    weights: Path | None = None
    model_kwargs: dict[str, Any] | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    data: str | None = None
    split: str | None = None
    images: int | None = None
    batch_size: int = 64
    num_workers: int = 2
    holdout: float = 0.5
    class_map: Path | None = None
    data_root: Path | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    input_size: tuple[int, int, int] | None = None
    crop_pct: float | None = None
    skip_broken: bool = False
    device: str = "cpu"
    seed: int = 0
    overwrite: bool = False
    quiet: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Setup":
        """The options of a command line, checked."""
        return TypeAdapter(cls).validate_python(dict(options))


@dataclass(kw_only=True)
class Workbench:
    """An opened run folder: the model on its device, its trace and sites, and how its images are read."""

    setup: Setup
    run: Run
    source: ModelSource
    model: nn.Module
    weights_sha256: str
    input_config: InputConfig
    trace: Trace = field(init=False)
    sites: list[SiteInfo] = field(init=False)

    @property
    def name(self) -> str:
        """The model's short name: timm's, or the factory's function."""
        return self.source.model.rpartition(":")[2]

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model."""
        return sum(p.numel() for p in self.model.parameters())

    def images(self, split: str, count: int | None, at_most: int | None = None) -> ImageData:
        """Images of a split: exactly `count` where given (an error if there are fewer), else `at_most` or all."""
        setup = self.setup
        assert setup.data is not None
        if count is None and at_most is not None:
            count = min(at_most, self.images(split, None).images)
        return load_data(
            setup.data, split=split, images=count, seed=setup.seed, input_config=self.input_config,
            num_classes=num_classes(self.model), holdout=setup.holdout, class_map=setup.class_map,
            data_root=setup.data_root, skip_broken=setup.skip_broken,
        )  # fmt: skip

    def stream(self, data: ImageData, what: str) -> Iterable[tuple[Tensor, Tensor]]:
        """Batches of (images on the device, labels), with a progress bar that counts images."""
        with self.progress(data.images, what, "image") as bar:
            for images, labels in batches(data, batch_size=self.setup.batch_size, num_workers=self.setup.num_workers):
                yield images.to(self.setup.device), labels
                bar.update(len(images))

    def progress(self, total: int, what: str, unit: str) -> tqdm:
        """A bar on standard error; silent with --quiet and where standard error is no terminal."""
        return tqdm(total=total, desc=what, unit=f" {unit}", disable=True if self.setup.quiet else None, leave=False)

    @contextmanager
    def step(self, name: str, data: ImageData | None, files: Sequence[str]) -> Iterator[None]:
        """Note in run.json that a step runs, on which images, and how it ended; refuses to mix it with other inputs.

        `files` are what it writes; `--overwrite` removes them first.
        """
        setup = self.setup
        with self.run.start_step(
            name, command=shlex.join(["qvw", *sys.argv[1:]]), options=_jsonable(asdict(setup)),
            inputs=self.inputs(data), seed=setup.seed, device=setup.device, files=files, overwrite=setup.overwrite,
        ):  # fmt: skip
            yield

    def say(self, text: str) -> None:
        """One short table or path on standard output; nothing with --quiet."""
        if not self.setup.quiet:
            click.echo(text)

    def warn(self, text: str) -> None:
        """A line on standard error that does not stop the work."""
        click.echo(f"qvw: warning: {text}", err=True)

    def inputs(self, data: ImageData | None) -> dict[str, Any]:
        """What fixes the result of a step: a step of other inputs is another step."""
        setup = self.setup
        fixed: dict[str, Any] = {
            "weights_sha256": self.weights_sha256, "include": list(setup.include), "exclude": list(setup.exclude),
        }  # fmt: skip
        if data is not None:
            fixed |= {
                "split": data.split, "images": data.images, "images_sha256": data.sha256, "split_note": data.note,
                "batch_size": setup.batch_size, **_jsonable(asdict(self.input_config)),
            }  # fmt: skip
        return fixed


def open_workbench(setup: Setup, *, needs_data: bool) -> Workbench:
    """The model of `setup`, or of its run folder, loaded and traced on two images of the right size.

    Raises InputError where neither names a model (or, if `needs_data`, images), and where the folder holds another
    model's results.
    """
    run = Run(setup.run)
    known = run.record.model
    if setup.model is None:
        if known is None:
            raise InputError(f"{setup.run} knows no model yet. Name one: a timm name, or path/to/file.py:factory.")
        source = ModelSource(
            model=known.factory or known.typed,
            pretrained=known.pretrained,
            weights=known.weights,
            kwargs=known.kwargs,
            seed=known.seed,
        )
    else:
        source = ModelSource(
            model=setup.model, pretrained=setup.pretrained,
            weights=None if setup.weights is None else str(setup.weights.resolve()),
            kwargs=setup.model_kwargs or {}, seed=setup.seed,
        )  # fmt: skip
    setup = _recalled(setup, run)
    if needs_data and setup.data is None:
        raise InputError(f"{setup.run} knows no images yet. Name them: --data digits, folder:PATH or csv:FILE.")
    model = load_model(source)
    bench = Workbench(
        setup=setup, run=run, source=source, model=model, weights_sha256=weights_sha256(model),
        input_config=_input_config(model, setup),
    )  # fmt: skip
    typed = setup.model or (known.typed if known is not None else source.model)
    record = ModelRecord(
        typed=typed, pretrained=source.pretrained, weights=source.weights, kwargs=dict(source.kwargs),
        seed=source.seed, name=bench.name, factory=_factory(source), weights_sha256=bench.weights_sha256,
        parameters=bench.parameters,
    )  # fmt: skip
    run.set_model(record, overwrite=setup.overwrite)
    if setup.data is not None:
        remembered = {name: _jsonable(getattr(setup, name)) for name in REMEMBERED}
        run.set_data(remembered | {"data": _absolute(setup.data)})
    _place(model, setup.device)
    bench.trace, bench.sites = _traced(bench)
    return bench


REMEMBERED = ("data", "holdout", "seed", "class_map", "data_root", "mean", "std", "input_size", "crop_pct")


def _recalled(setup: Setup, run: Run) -> Setup:
    """The options with what the run folder knows of images and patterns, where this command does not say."""
    record = run.record
    if setup.data is None and record.data:
        given = {name: getattr(setup, name) for name in REMEMBERED if getattr(setup, name) != _default(name)}
        setup = Setup.of(asdict(setup) | record.data | given)
    if setup.model is None and record.steps and not (setup.include or setup.exclude):
        last = list(record.steps.values())[-1].inputs
        setup = replace(setup, include=tuple(last.get("include", ())), exclude=tuple(last.get("exclude", ())))
    return setup


def _absolute(data: str) -> str:
    """A data string that holds in every working directory."""
    kind, colon, path = data.partition(":")
    return f"{kind}:{Path(path).resolve()}" if colon and kind in ("folder", "csv") else data


def _default(name: str) -> Any:
    return next(f.default for f in fields(Setup) if f.name == name)


def _input_config(model: nn.Module, setup: Setup) -> InputConfig:
    if setup.data is None and setup.input_size is None and not getattr(model, "pretrained_cfg", None):
        raise InputError(
            "the model does not say which images it takes. Give --input-size 3,32,32, or --data, --mean and --std."
        )
    if setup.data is None:  # no image will be read: only the size matters
        channels = setup.input_size[0] if setup.input_size else input_channels(model) or 3
        plain = (0.5,) * channels
        return resolve_input(model, "noise", mean=plain, std=plain, input_size=setup.input_size)
    return resolve_input(
        model, setup.data, mean=setup.mean, std=setup.std, input_size=setup.input_size, crop_pct=setup.crop_pct
    )


def _factory(source: ModelSource) -> str | None:
    return None if source.factory is None else f"{source.factory[0].resolve()}:{source.factory[1]}"


def _place(model: nn.Module, device: str) -> None:
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {device!r} cannot be used: {str(error).splitlines()[0]}. Try --device cpu."
        ) from error


def _traced(bench: Workbench) -> tuple[Trace, list[SiteInfo]]:
    """One forward pass of two images of noise, which also shows whether the model takes images of this size."""
    size = bench.input_config.input_size
    images = torch.rand(2, *size, generator=torch.Generator().manual_seed(0)).to(bench.setup.device)
    try:
        return find_sites(
            bench.model, images, include=bench.setup.include, exclude=bench.setup.exclude,
            classifier=classifier_names(bench.model),
        )  # fmt: skip
    except (RuntimeError, AssertionError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{bench.name} does not take images of size {size}: {str(error).splitlines()[0]} "
            "Give --input-size, or the constructor's arguments by --model-kwargs."
        ) from error


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_jsonable(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def tensors_of(bench: Workbench, tensors: Sequence[str]) -> list[SiteInfo]:
    """The sites that can be quantized whose tensor is asked for, in network order.

    `tensors` holds weight, input, query, key, value, softmax (the site `attention` alone), or attention for all four
    inside attention.
    """
    groups = {"weight": ("weight", "weight.query", "weight.key", "weight.value"), "input": ("input",),
              "attention": ("query", "key", "value", "attention"), "query": ("query",), "key": ("key",),
              "value": ("value",), "softmax": ("attention",)}  # fmt: skip
    unknown = [name for name in tensors if name not in groups]
    if unknown:
        raise InputError(f"--tensors {unknown[0]!r} is unknown; choose from {', '.join(groups)}.")
    wanted = {tensor for name in tensors for tensor in groups[name]}
    return [info for info in bench.sites if info.quantizable and info.site.tensor in wanted]
