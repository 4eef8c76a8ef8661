"""What one command works on: its options, the model with its sites, and the images."""

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from analysis.console import progress, warn
from analysis.data import Batch, ImageData, batches, input_channels, load_data, resolve_input, shared_batches
from analysis.listing import InputConfig
from analysis.models import (
    ModelSource,
    classifier_names,
    described,
    load_model,
    num_classes,
    tensors_in,
    weights_sha256,
)
from analysis.runs import ModelRecord, Run, RunRecord, StepRecord
from analysis.sites import find_sites
from quant.errors import InputError, first_line
from quant.site import Site, SiteInfo
from quant.trace import Trace

REMEMBERED = ("data", "holdout", "seed", "class_map", "data_root", "mean", "std", "input_size", "crop_pct")
"""Options that a later command takes from the run folder where it does not give them."""
PREPROCESSING = ("mean", "std", "input_size", "crop_pct")
"""Those of them that belong to the network, whatever the images."""


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
    holdout: float | None = None
    class_map: Path | None = None
    data_root: Path | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    input_size: tuple[int, int, int] | None = None
    crop_pct: float | None = None
    skip_broken: bool = False
    device: str = "cpu"
    seed: int | None = None
    overwrite: bool = False
    quiet: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Setup":
        """The options of a command line, checked."""
        return TypeAdapter(cls).validate_python(dict(options))


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The model of a run folder on its device, with its trace and sites, and how its images are read.

    `setup` is complete: what the command did not say is what the run folder knew, or the default.
    """

    setup: Setup
    run: Run
    record: ModelRecord
    model: nn.Module
    input_config: InputConfig
    trace: Trace
    sites: list[SiteInfo]

    @property
    def name(self) -> str:
        """The model's short name: timm's, or the factory's function."""
        return self.record.name

    @cached_property
    def by_site(self) -> dict[Site, SiteInfo]:
        """The sites by name."""
        return {info.site: info for info in self.sites}

    def step_images(self, step: str, split: str, at_most: int | None = None) -> ImageData:
        """Images of a step: as many as the command says, else as when it was run before, else `at_most` or all."""
        setup, before = self.setup, self.run.record.steps.get(step)
        known = None if before is None or setup.overwrite else before.inputs.get("images")
        if setup.images is not None or known is None:
            return self.images(setup.split or split, setup.images, at_most)
        data = self.images(setup.split or split, None, known)
        if data.images < known:
            raise InputError(
                f"{self.run.path} holds {step} of {known} images, {data.spec} has {data.images} in its split "
                f"{data.split!r}. Put the images back, or start anew with --overwrite."
            )
        return data

    def images(self, split: str, count: int | None, at_most: int | None = None) -> ImageData:
        """Images of a split: exactly `count` where given (an error if there are fewer), else `at_most` or all."""
        setup = self.setup
        assert setup.data is not None
        assert setup.seed is not None
        assert setup.holdout is not None
        return load_data(
            setup.data, split=split, images=at_most if count is None else count, at_most=count is None,
            seed=setup.seed, input_config=self.input_config, num_classes=num_classes(self.model),
            holdout=setup.holdout, class_map=setup.class_map, data_root=setup.data_root,
            skip_broken=setup.skip_broken,
        )  # fmt: skip

    def probe_image(self) -> Tensor:
        """One image of noise (1, channels, height, width) on the device, always the same."""
        return _probe_image(self.input_config, self.setup.device)

    def stream(self, data: ImageData, what: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of (images on the device, labels), with a progress bar that counts images."""
        setup = self.setup
        with progress(data.images, what, "image", quiet=setup.quiet) as bar:
            for images, labels in batches(data, batch_size=setup.batch_size, num_workers=setup.num_workers):
                yield images.to(setup.device), labels
                bar.update(len(images))
        warn_of_skipped(data)

    def share(self, data: ImageData, what: str, *, rank: int, world: int) -> Iterator[Batch]:
        """One process's share of the batches, every `world`-th from `rank` on, on the device; a batch may be empty."""
        setup, options = self.setup, {"rank": rank, "world": world}
        with progress(data.images, what, "image", quiet=setup.quiet or rank > 0) as bar:
            for batch in shared_batches(data, batch_size=setup.batch_size, num_workers=setup.num_workers, **options):
                yield batch._replace(images=batch.images.to(setup.device))
                bar.update(min(setup.batch_size * world, data.images - bar.n))  # the other processes do as much

    def inputs(self, data: ImageData | None) -> dict[str, Any]:
        """What fixes the result of a step: a step of other inputs is another step."""
        setup = self.setup
        fixed: dict[str, Any] = {
            "weights_sha256": self.record.weights_sha256, "include": list(setup.include),
            "exclude": list(setup.exclude),
        }  # fmt: skip
        if data is not None:
            fixed |= {
                "split": data.split, "images": data.images, "images_sha256": data.sha256,
                "split_note": data.note, "batch_size": setup.batch_size, "skip_broken": setup.skip_broken,
                **_jsonable(asdict(self.input_config)),
            }  # fmt: skip
        return fixed

    @contextmanager
    def step(
        self,
        name: str,
        data: ImageData | None,
        files: Sequence[str],
        options: Mapping[str, Any],
        inputs: Mapping[str, Any] | None = None,
        *,
        seed: int | None = None,
        temporary: Sequence[str] = (),
        instead: str = "--run",
        renew: bool = False,
    ) -> Iterator[None]:
        """Note in run.json the model, the images and that a step runs; the context notes how it ended.

        Refuses to mix it with another model or other inputs. `files` are what it writes, `--overwrite` removes them
        first, or with `renew` leaves them until they are written anew; `options` are those of the step's own, `inputs`
        what else than model and images fixes its result, `seed` its own seed where that is not the one that chose the
        images, `temporary` files for resuming alone, `instead` the option that keeps both results. Images that were
        skipped are named in the step's options as `skipped_images`.
        """
        setup, run = self.setup, self.run
        run.set_model(self.record, overwrite=setup.overwrite)
        assert setup.seed is not None
        fixed, before = self.inputs(data) | dict(inputs or {}), run.record.steps.get(name)
        with run.start_step(
            name, command=shlex.join(["qvw", *sys.argv[1:]]), options=_jsonable(asdict(setup) | dict(options)),
            inputs=fixed, seed=setup.seed if seed is None else seed, device=setup.device, files=files,
            temporary=temporary, instead=instead, overwrite=setup.overwrite and not renew,
            renew=setup.overwrite and renew,
        ):  # fmt: skip
            if data is not None:
                run.set_data({name: _jsonable(getattr(setup, name)) for name in REMEMBERED})
            yield
        # A step that goes on has rows of earlier passes, which skipped what they could not read.
        earlier = before is not None and not setup.overwrite and before.inputs == run.record.steps[name].inputs
        skipped = list(before.options.get("skipped_images", [])) if before is not None and earlier else []
        skipped += [path for path in ([] if data is None else data.skipped) if path not in skipped]
        if skipped:
            step = run.record.steps[name]
            self._note_step(name, replace(step, options=step.options | {"skipped_images": skipped}))

    def put_back(self, name: str, before: RunRecord) -> None:
        """Let run.json tell of a step, and of its images, what it told `before`, if that step's files are all there."""
        step = before.steps.get(name)
        if step is not None and all((self.run.path / file).exists() for file in step.files):
            self._note_step(name, step, data=before.data)

    def _note_step(self, name: str, step: StepRecord, **changes: Any) -> None:
        now = self.run.record
        self.run.write_json("run", asdict(replace(now, steps={**now.steps, name: step}, **changes)))


def warn_of_skipped(data: ImageData) -> None:
    """Say how many images were left out because they cannot be read, if any were."""
    if data.skipped:
        others = " and others" if len(data.skipped) > 1 else ""
        warn(
            f"{len(data.skipped)} of {data.images} images cannot be read and were left out: {data.skipped[0]}{others}."
        )


def open_run(setup: Setup, *, needs_data: bool) -> Opened:
    """The model of `setup`, or of its run folder, loaded and traced on an image of the right size; writes nothing.

    Raises InputError where neither names a model, and if `needs_data`, where neither names images or the model returns
    no logits.
    """
    run = Run(setup.run)
    known = run.record.model
    if setup.model is None and (setup.pretrained or setup.weights is not None or setup.model_kwargs is not None):
        raise InputError("--pretrained, --weights and --model-kwargs need MODEL before them: name the model too.")
    if setup.model is not None:
        weights = None if setup.weights is None else str(setup.weights.resolve())
        source = ModelSource(
            model=setup.model, pretrained=setup.pretrained, weights=weights, kwargs=setup.model_kwargs or {},
            seed=setup.seed or 0,
        )  # fmt: skip
    elif known is not None:
        source = ModelSource(
            model=known.factory or known.typed, pretrained=known.pretrained, weights=known.weights,
            kwargs=known.kwargs, seed=known.seed,
        )  # fmt: skip
    else:
        raise InputError(f"{setup.run} knows no model yet. Name one: a timm name, or path/to/file.py:factory.")
    setup = _completed(setup, run)
    if needs_data and setup.data is None:
        raise InputError(f"{setup.run} knows no images yet. Name them: --data digits, folder:PATH or csv:FILE.")
    try:
        model = load_model(source)
    except InputError as error:
        if setup.model is not None:
            raise
        raise InputError(f"{error} {setup.run} names it: where it has moved, give MODEL and --weights.") from error
    if setup.model is not None and source.factory is None and not source.pretrained and source.weights is None:
        warn(f"{setup.model} has untrained weights: give --pretrained or --weights FILE for trained ones.")
    record = ModelRecord(
        typed=setup.model or (known.typed if known is not None else source.model), pretrained=source.pretrained,
        weights=source.weights, kwargs=dict(source.kwargs), seed=source.seed, name=source.model.rpartition(":")[2],
        factory=None if source.factory is None else f"{source.factory[0].resolve()}:{source.factory[1]}",
        weights_sha256=weights_sha256(model), parameters=sum(p.numel() for p in model.parameters()),
    )  # fmt: skip
    if known is not None and setup.model is None and known.weights_sha256 != record.weights_sha256:
        raise InputError(
            f"{known.typed} is not the model that {setup.run} holds: its weights have changed since. "
            "Put the old file back, or name the model and another --run."
        )
    input_config = _input_config(model, setup)
    _place(model, setup.device)
    trace, sites = _traced(model, setup, record.name, input_config, needs_logits=needs_data)
    return Opened(setup=setup, run=run, record=record, model=model, input_config=input_config, trace=trace, sites=sites)


def _completed(setup: Setup, run: Run) -> Setup:
    """The options; what this command does not say of images and patterns is what the run folder knows, or default."""
    record = run.record
    if record.data:
        names = REMEMBERED if setup.data is None else PREPROCESSING  # other images, but of the same network
        given = {name: getattr(setup, name) for name in names if getattr(setup, name) is not None}
        try:
            setup = Setup.of(asdict(setup) | {name: record.data.get(name) for name in names} | given)
        except ValidationError as error:
            raise InputError(
                f"{run.path / 'run.json'} holds data options that cannot be used ({error.errors()[0]['loc'][0]}). "
                "Mend the file, or choose another --run."
            ) from error
    chosen = [step.inputs for step in record.steps.values() if {"include", "exclude"} <= set(step.inputs)]
    if setup.model is None and chosen and not (setup.include or setup.exclude):
        setup = replace(setup, include=tuple(chosen[-1]["include"]), exclude=tuple(chosen[-1]["exclude"]))
    return replace(
        setup, data=_absolute(setup.data),
        class_map=None if setup.class_map is None else setup.class_map.resolve(),
        data_root=None if setup.data_root is None else setup.data_root.resolve(),
        seed=0 if setup.seed is None else setup.seed,
        holdout=0.5 if setup.holdout is None else setup.holdout,
    )  # fmt: skip


def _absolute(data: str | None) -> str | None:
    """A data string that holds in every working directory."""
    kind, colon, path = (data or "").partition(":")
    return f"{kind}:{Path(path).resolve()}" if path and colon and kind in ("folder", "csv") else data


def _input_config(model: nn.Module, setup: Setup) -> InputConfig:
    if setup.data is not None:
        return resolve_input(
            model, setup.data, mean=setup.mean, std=setup.std, input_size=setup.input_size, crop_pct=setup.crop_pct
        )
    if setup.input_size is None and not getattr(model, "pretrained_cfg", None):
        raise InputError(
            "the model does not say which images it takes. Give --input-size 3,32,32, or --data, --mean and --std."
        )
    channels = setup.input_size[0] if setup.input_size else input_channels(model) or 3
    plain = (0.5,) * channels  # no image will be read: only the size matters
    return resolve_input(model, "noise", mean=plain, std=plain, input_size=setup.input_size)


def _place(model: nn.Module, device: str) -> None:
    try:
        model.to(device)
    except Exception as error:  # torch raises by device: RuntimeError, AssertionError, NotImplementedError
        reason = first_line(error)
        raise InputError(f"device {device!r} cannot be used: {reason}. Try --device cpu.") from error


def _traced(
    model: nn.Module, setup: Setup, name: str, config: InputConfig, *, needs_logits: bool
) -> tuple[Trace, list[SiteInfo]]:
    """One forward pass of one image of noise, which also shows whether the model takes images of this size.

    One image, so that tensors with no batch axis (tables of relative positions) are counted once.
    """
    try:
        image = _probe_image(config, setup.device)
        with torch.inference_mode():
            first, second = model(image), model(image)
        answers = [
            pair for pair in zip(tensors_in(first), tensors_in(second), strict=False) if pair[0].is_floating_point()
        ]
        if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True) for a, b in answers):
            raise InputError(
                f"{name} gives two answers to the same image: its forward pass is random, or changes the model. "
                "Switch dropout and noise off in evaluation mode."
            )
        if needs_logits and not (isinstance(first, Tensor) and first.ndim == 2 and len(first) == 1):
            raise InputError(
                f"{name} returned {described(first)} for one image; expected logits of shape (images, classes). "
                "Name a factory whose model returns them alone, path/to/file.py:factory; `qvw stats` needs none."
            )
        return find_sites(
            model, image, include=setup.include, exclude=setup.exclude, classifier=classifier_names(model)
        )
    except InputError:
        raise
    except Exception as error:  # the model is the user's: whatever its forward raises is told
        reason = first_line(error)
        raise InputError(
            f"{name} does not take images of size {config.input_size}: {reason}. "
            "Give --input-size, or the constructor's arguments by --model-kwargs."
        ) from error


def _probe_image(config: InputConfig, device: str) -> Tensor:
    return torch.rand(1, *config.input_size, generator=torch.Generator().manual_seed(0)).to(device)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_jsonable(item) for item in value]
    return str(value) if isinstance(value, Path) else value
