"""An open run folder: the model with its sites on a device, its images, and the record of the steps that use them."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from analysis.data import ImageData, batches, load_data, none_readable, shared_batches
from analysis.inputs.listing import InputConfig
from analysis.inputs.model_source import factory_of
from analysis.runs import Run
from analysis.session.session import Session, Source
from analysis.session.setup import REMEMBERED, Setup
from analysis.storage.run_record import ModelRecord, versions
from analysis.task import Task
from analysis.tasks import classes_of
from analysis.terminal.console import progress, say, warn
from quant.bit_plan import PlanModel
from quant.errors import InputError
from quant.network import Network
from quant.site import Site, SiteInfo
from quant.stored_model import StoredModel
from quant.trace import Trace


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """The model of a run folder on its device, with its trace and sites, and how its images are read.

    `setup` is complete: what the command did not say is what the run folder knew, or the default.
    """

    setup: Setup
    run: Run
    record: ModelRecord
    input_config: InputConfig
    network: Network
    task: Task

    @property
    def name(self) -> str:
        """The model's short name: timm's, or the factory's function."""
        return self.record.name

    @property
    def plan_model(self) -> PlanModel:
        """What a plan says of the model."""
        record = self.record
        return PlanModel(name=record.typed, kwargs=dict(record.kwargs), weights_sha256=record.weights_sha256)

    @property
    def stored(self) -> StoredModel:
        """The floating-point model as a file holds it, from which sizes follow."""
        return self.network.stored

    @property
    def model(self) -> nn.Module:
        """The model itself."""
        return self.network.model

    @property
    def trace(self) -> Trace:
        """What one forward pass of it runs."""
        return self.network.trace

    @property
    def sites(self) -> list[SiteInfo]:
        """What is known of each of its sites, in network order."""
        return self.network.infos

    @property
    def by_site(self) -> dict[Site, SiteInfo]:
        """The same, by name."""
        return self.network.by_site

    @cached_property
    def classes(self) -> int | None:
        """How many classes the output has: its columns, whatever the model says; None for other tasks."""
        if self.task.name != "classification":
            return None
        with torch.inference_mode():
            return classes_of(self.network(self.network.example))

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
                f"{data.split!r}. Put the images back, or start from scratch with --overwrite."
            )
        return data

    def images(self, split: str, count: int | None, at_most: int | None = None) -> ImageData:
        """Images of a split: exactly `count` where given (an error if there are fewer), else `at_most` or all."""
        setup = self.setup
        assert setup.data is not None
        assert setup.seed is not None
        assert setup.holdout is not None
        data = load_data(
            setup.data, split=split, images=at_most if count is None else count, at_most=count is None,
            seed=setup.seed, input_config=self.input_config,
            num_classes=self.classes,
            holdout=setup.holdout, class_map=setup.class_map, class_order=setup.class_order, data_root=setup.data_root,
            skip_broken=setup.skip_broken,
        )  # fmt: skip
        for remark in data.remarks:
            warn(remark)
        return data

    def probe_image(self) -> Tensor:
        """One image of noise (1, channels, height, width) on the device, always the same."""
        return image_of_noise(self.input_config, self.setup.device)

    def targets(self, labels: Tensor) -> Tensor | None:
        """The labels of images, class indices, where the task may make something of them; else None."""
        task = self.setup.task
        return labels if task in (None, "classification", "multilabel") or factory_of(task) is not None else None

    def stream(self, data: ImageData, what: str) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Batches of (images on the device, targets), with a progress bar that counts images."""
        setup = self.setup
        with progress(data.images, what, "image", quiet=setup.quiet) as bar:
            for images, labels in batches(data, batch_size=setup.batch_size, num_workers=setup.num_workers):
                yield images.to(setup.device), self.targets(labels)
                bar.update(len(images))
        warn_of_skipped(data)

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
                **{name: value for name, value in asdict(self.input_config).items() if value is not None},
            }  # fmt: skip
            if setup.task not in (None, "classification"):
                fixed["task"] = setup.task
        return fixed

    def identity(self, data: ImageData | None) -> dict[str, Any]:
        """All that fixes what a pass over images gives; by it unfinished work is known to be this one's.

        Beside `inputs` these are the network as it was built, the text of a user's factory (a forward that was fixed
        gives other values with equal weights), the sort of device, and versions.
        """
        record = self.record
        source = b"" if record.factory is None else Path(record.factory.rpartition(":")[0]).read_bytes()
        return self.inputs(data) | versions() | {
            "model": record.name, "kwargs": dict(record.kwargs), "device_type": torch.device(self.setup.device).type,
            "factory_sha256": hashlib.sha256(source).hexdigest(),
        }  # fmt: skip

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
        instead: str = "run",
        renew: bool = False,
    ) -> Iterator[None]:
        """Note in run.json the model, the images and that a step runs; the context notes how it ended.

        Refuses to mix it with another model or other inputs. `files` are what it writes, `--overwrite` removes them
        first, or with `renew` leaves them until they are written again; `options` are those of the step's own, `inputs`
        what else than model and images fixes its result, `seed` its own seed where that is not the one that chose the
        images, `temporary` files for resuming alone, `instead` the option that keeps both results. Images that were
        skipped are named in the step's options as `skipped_images`.
        """
        with self.session(data).step(
            name, files, options, inputs, seed=seed, temporary=temporary, instead=instead, renew=renew
        ):
            yield

    def session(self, data: ImageData | None) -> Session:
        """What a measurement needs to know, on images or on the weights alone."""
        setup = self.setup
        assert setup.seed is not None
        return Session(
            run=self.run, network=self.network, task=self.task, record=self.record,
            source=None if data is None else self._source(data), inputs=self.inputs(data),
            identity=self.identity(data), bar=partial(progress, quiet=setup.quiet), say=partial(say, quiet=setup.quiet),
            warn=warn, device=setup.device, options=asdict(setup), seed=setup.seed, overwrite=setup.overwrite,
            remembered={} if data is None else {name: getattr(setup, name) for name in REMEMBERED},
        )  # fmt: skip

    def _source(self, data: ImageData) -> Source:
        setup = self.setup

        def read(first: int, every: int) -> Iterator[tuple[tuple[Tensor, Tensor | None], Sequence[str]]]:
            for images, labels, paths in shared_batches(
                data, batch_size=setup.batch_size, num_workers=setup.num_workers, first=first, every=every
            ):
                yield (images.to(setup.device), self.targets(labels)), paths

        return Source(
            read=read, batches=-(-data.images // setup.batch_size), batch_size=setup.batch_size, samples=data.images,
            unit="image", names=data.dataset.names, skipped=data.skipped, nothing=str(none_readable(data)),
            at_end=lambda: warn_of_skipped(data),
        )  # fmt: skip


def warn_of_skipped(data: ImageData) -> None:
    """Say how many images were left out because they cannot be read, if any were."""
    if data.skipped:
        others = " and others" if len(data.skipped) > 1 else ""
        warn(
            f"{len(data.skipped)} of {data.images} images cannot be read and were left out: {data.skipped[0]}{others}."
        )


def image_of_noise(config: InputConfig, device: str) -> Tensor:
    """(1, channels, height, width) on `device`, uniform in [0, 1), always the same."""
    return torch.rand(1, *config.input_size, generator=torch.Generator().manual_seed(0)).to(device)
