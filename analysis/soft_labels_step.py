"""`qvw soft-labels`: a teacher is asked once about many random crops of each image, its answers kept in a file."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from analysis.console import progress, say
from analysis.crops import cut, draw_crop, fingerprint, read_for_crops
from analysis.data import Broken, ChosenImages, ImageData, none_readable
from analysis.files import writing
from analysis.listing import InputConfig
from analysis.locks import exclusive
from analysis.open_run import open_run
from analysis.opened import Opened, warn_of_skipped
from analysis.setup import Setup
from quant.choices import Compression
from quant.errors import InputError
from quant.label_compression import compress
from quant.soft_labels import (
    UNREADABLE,
    Crop,
    SoftLabelHeader,
    SoftLabels,
    SoftLabelWriter,
    header_changes,
    is_soft_labels,
    partial_of,
)

TOP_K = 5


@dataclass(frozen=True, kw_only=True)
class SoftLabelRequest:
    """Which crops, and what is kept of the answers to them."""

    out: Path
    crops: int  # of each image
    scale: tuple[float, float]  # share of the image's area
    ratio: tuple[float, float]  # width over height
    flip: float  # probability
    compression: Compression
    top_k: int | None  # `TOP_K`, or all of fewer classes
    temperature: float
    crop_seed: int

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "SoftLabelRequest":
        """The options of a command line, checked."""
        request = TypeAdapter(cls).validate_python(dict(options))
        for name, (low, high), most in (("scale", request.scale, 1.0), ("ratio", request.ratio, float("inf"))):
            if not 0 < low <= high <= most:
                limit = " at most 1" if most == 1 else ""
                raise InputError(f"--{name} {low:g},{high:g}: expected two numbers above 0{limit}, the smaller first.")
        if request.out.is_dir():
            raise InputError(f"--out {request.out} is a folder. Name a file, such as {request.out / 'labels.soft'}.")
        return request


def run_soft_labels(setup: Setup, request: SoftLabelRequest) -> None:
    """Write the file; what was interrupted goes on to the same bytes, what is there already is not made again."""
    opened, out = open_run(setup, needs_data=True), request.out
    data = opened.images(setup.split or "train", setup.images)
    header = _header(opened, data, request)
    if out.exists() and not is_soft_labels(out):
        raise InputError(f"{out} exists and is no file of soft labels. Choose another --out.")
    with exclusive(out.with_name(f".{out.name}.lock"), f"the making of {out}", instead="--out"):
        if setup.overwrite:
            with writing(out):
                out.unlink(missing_ok=True)
                partial_of(out).unlink(missing_ok=True)
        if out.exists():
            labels = SoftLabels(out)
            if labels.header != header:
                raise InputError(
                    f"{out} holds soft labels with other inputs ({header_changes(labels.header, header)}). "
                    "Choose another --out, or make it anew with --overwrite."
                )
            say(f"{out} holds these soft labels already; --overwrite makes them anew.", quiet=setup.quiet)
            return
        with writing(out):
            writer = SoftLabelWriter(out, header)
        with closing(writer):
            _ask(opened, data, writer)
            with writing(out):
                writer.finish()
        warn_of_skipped(data)
    each = out.stat().st_size / header.records
    say(f"{header.crops} crops of each of {header.images} images, {each:.1f} bytes a crop, are in {out}",
        quiet=setup.quiet)  # fmt: skip


def _header(opened: Opened, data: ImageData, request: SoftLabelRequest) -> SoftLabelHeader:
    config, setup = opened.input_config, opened.setup
    with torch.inference_mode():
        classes = opened.model(opened.probe_image()).shape[-1]
    marginal = request.compression in ("marginal_smoothing", "marginal_renorm")
    top_k = min(TOP_K, classes) if request.top_k is None else request.top_k
    if marginal and top_k > classes:
        raise InputError(f"--top-k {top_k}, but {opened.name} has {classes} classes. Lower it.")
    return SoftLabelHeader(
        images=data.images, crops=request.crops, classes=classes, compression=request.compression,
        top_k=top_k if marginal else 0, temperature=request.temperature, teacher=opened.name,
        teacher_sha256=opened.record.weights_sha256, split=data.split, data_sha256=data.sha256,
        skip_broken=data.skip_broken, input_size=config.input_size, mean=config.mean, std=config.std,
        interpolation=config.interpolation, scale=request.scale, ratio=request.ratio, flip=request.flip,
        seed=request.crop_seed, batch_size=setup.batch_size, device=torch.device(setup.device).type,
    )  # fmt: skip


def _ask(opened: Opened, data: ImageData, writer: SoftLabelWriter) -> None:
    """Add the crops that are still missing, a batch at a time."""
    header, model, device = writer.header, opened.model, opened.setup.device
    quiet, workers = opened.setup.quiet, opened.setup.num_workers
    with progress(header.records, "soft labels", "crop", quiet=quiet) as bar, torch.inference_mode():
        if writer.done:
            say(f"goes on after {writer.done} of {header.records} crops", quiet=quiet)
        bar.update(writer.done)
        for parts in _batches(data, header, opened.input_config, writer.done, workers):
            logits = model(torch.cat([part.views for part in parts]).to(device)).float()
            if not torch.isfinite(logits).all():
                raise InputError(f"the teacher {opened.name} answers with NaN or Inf. Look for other weights of it.")
            kept, classes = compress(
                logits, compression=header.compression, top_k=header.top_k, temperature=header.temperature
            )
            crops = [crop for part in parts for crop in part.crops]
            with writing(writer.path):
                writer.append([part.fingerprint for part in parts for _ in part.crops], crops, kept, classes)
            bar.update(len(crops))
    if len(data.skipped) == data.images:
        raise none_readable(data)


def _batches(
    data: ImageData, header: SoftLabelHeader, config: InputConfig, first: int, num_workers: int
) -> Iterator[Sequence["_Part"]]:
    """The crops from number `first` of all on, in batches of `header.batch_size`, those of one image together."""
    starts = range(first, header.records, header.batch_size)
    keys: Any = _Keys(starts, header)  # lists of all would take more room than the crops
    loader = DataLoader(
        _CroppedImages(data.dataset, header, config), batch_sampler=keys, num_workers=num_workers,
        collate_fn=_listed, generator=torch.Generator(),
    )  # fmt: skip
    for parts in loader:
        for broken in (part.broken for part in parts if part.broken is not None):
            if not data.skip_broken:
                raise InputError(broken.message)
            if broken.name not in data.skipped:
                data.skipped.append(broken.name)
        yield parts


class _Part(NamedTuple):
    """Neighbouring crops of one image: (crops, channels, height, width), zeros where it cannot be read."""

    views: Tensor
    crops: list[Crop]
    fingerprint: int
    broken: Broken | None = None


class _Keys(Sequence[list[tuple[int, int, int]]]):
    """Of each batch the parts (image, its first crop, the one after its last)."""

    def __init__(self, starts: range, header: SoftLabelHeader) -> None:
        self.starts, self.header = starts, header

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, batch: Any) -> Any:
        start, header = self.starts[batch], self.header
        end = min(start + header.batch_size, header.records)
        return [
            (image, max(start - image * header.crops, 0), min(end - image * header.crops, header.crops))
            for image in range(start // header.crops, -(-end // header.crops))
        ]


class _CroppedImages(Dataset[_Part]):
    """Crops of the images, keyed by (image, first crop, last crop + 1); each a function of seed, image and number."""

    def __init__(self, images: ChosenImages, header: SoftLabelHeader, config: InputConfig) -> None:
        self.images, self.header, self.config = images, header, config

    def __getitem__(self, key: tuple[int, int, int]) -> _Part:
        i, first, end = key
        header = self.header
        try:
            image = read_for_crops(self.images, i)
        except InputError as error:  # raised in a worker process it would reach the user as a traceback of torch's
            nothing = torch.zeros(end - first, *self.config.input_size)
            return _Part(nothing, [UNREADABLE] * len(nothing), 0, Broken(self.images.names[i], str(error)))
        crops = [
            draw_crop(image, header.seed, i, number, scale=header.scale, ratio=header.ratio, flip=header.flip)
            for number in range(first, end)
        ]
        return _Part(torch.stack([cut(image, crop, self.config) for crop in crops]), crops, fingerprint(image))


def _listed(parts: list[_Part]) -> list[_Part]:
    return parts
