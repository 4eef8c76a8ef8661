"""`qvw soft-labels`: a teacher is asked once about many random crops of each image, its answers kept in a file."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from analysis.data import Broken, ChosenImages, ImageData, none_readable
from analysis.inputs.crops import cut, draw_crop, fingerprint, read_for_crops
from analysis.inputs.listing import InputConfig
from analysis.session.loaded_run import LoadedRun, warn_of_skipped
from analysis.session.open_run import open_run
from analysis.session.processes import Processes, work_together
from analysis.session.setup import Setup
from analysis.steps.soft_label_request import TOP_K, SoftLabelRequest, check_soft_label_target
from analysis.storage.files import writing
from analysis.storage.locks import exclusive
from analysis.terminal.console import progress, resumable, say
from quant.errors import InputError
from quant.label_compression import compress
from quant.soft_label_format import UNREADABLE, Crop, SoftLabelHeader, header_changes
from quant.soft_label_writer import SoftLabelWriter, partial_of
from quant.soft_labels import SoftLabels


def run_soft_labels(setup: Setup, request: SoftLabelRequest) -> None:
    """Write the file; what was interrupted resumes to the same bytes, what is there already is not made again.

    Several processes take turns with the batches, to the same bytes; the one of rank 0 writes.
    """
    work_together(setup, lambda own, processes: _run_soft_labels(own, request, processes))


def _run_soft_labels(setup: Setup, request: SoftLabelRequest, processes: Processes) -> None:
    opened, data, header = processes.together(lambda: _opened(setup, request))
    out, main = request.out, processes.rank == 0
    with ExitStack() as held:
        writer = processes.together(lambda: _writer(header, out, held, overwrite=setup.overwrite) if main else None)
        first = processes.gather(None if writer is None else writer.done)[0]
        if first is None:
            say(f"{out} holds these soft labels already; --overwrite makes them again.", quiet=setup.quiet)
            return
        with resumable(lambda: _kept(writer)):
            _ask(opened, data, header, first, writer, processes)
            if writer is not None:
                with writing(out):
                    writer.finish()
    if main:
        warn_of_skipped(data)
        each = out.stat().st_size / header.records
        say(f"{header.crops} crops of each of {header.images} images, {each:.1f} bytes a crop, are in {out}",
            quiet=setup.quiet)  # fmt: skip


def _opened(setup: Setup, request: SoftLabelRequest) -> tuple[LoadedRun, ImageData, SoftLabelHeader]:
    opened = open_run(setup, needs_data=True)
    data = opened.images(setup.split or "train", setup.images)
    return opened, data, _header(opened, data, request)


def _writer(header: SoftLabelHeader, out: Path, held: ExitStack, *, overwrite: bool) -> SoftLabelWriter | None:
    """What continues the file, locked until `held` ends; None where the file is there already."""
    check_soft_label_target(out)
    held.enter_context(exclusive(out.with_name(f".{out.name}.lock"), f"the making of {out}", instead="--out"))
    if overwrite:
        with writing(out):
            out.unlink(missing_ok=True)
            partial_of(out).unlink(missing_ok=True)
    if out.exists():
        labels = SoftLabels(out)
        if labels.header != header:
            raise InputError(
                f"{out} holds soft labels with other inputs ({header_changes(labels.header, header)}). "
                "Choose another --out, or make it again with --overwrite."
            )
        return None
    with writing(out):
        return held.enter_context(closing(SoftLabelWriter(out, header)))


def _header(opened: LoadedRun, data: ImageData, request: SoftLabelRequest) -> SoftLabelHeader:
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


def _ask(
    opened: LoadedRun,
    data: ImageData,
    header: SoftLabelHeader,
    first: int,
    writer: SoftLabelWriter | None,
    processes: Processes,
) -> None:
    """Add the crops from number `first` of all on, in each round a batch of every process."""
    quiet, world = opened.setup.quiet, processes.world
    starts = range(first, header.records, header.batch_size)
    batches = _batches(data, header, opened.input_config, starts[processes.rank :: world], opened.setup.num_workers)
    with progress(header.records, "soft labels", "crop", quiet=quiet, done=first) as bar:
        for _ in range(0, len(starts), world):
            own = processes.together(lambda: [_answered(opened, header, parts) for parts in islice(batches, 1)])
            for answered in (one for each in processes.gather(own) for one in each):
                if writer is not None:
                    with writing(writer.path):
                        writer.append(*answered)
                bar.update(len(answered.crops))
    for skipped in processes.gather(data.skipped):
        data.skipped.extend(name for name in skipped if name not in data.skipped)
    if len(data.skipped) == data.images:
        processes.fail(none_readable(data))


def _answered(opened: LoadedRun, header: SoftLabelHeader, parts: Sequence["_Part"]) -> "_Answered":
    with torch.inference_mode():
        logits = opened.model(torch.cat([part.views for part in parts]).to(opened.setup.device)).float()
    if not torch.isfinite(logits).all():
        raise InputError(f"the teacher {opened.name} answers with NaN or Inf. Look for other weights of it.")
    kept, classes = compress(logits, compression=header.compression, top_k=header.top_k, temperature=header.temperature)
    fingerprints = [part.fingerprint for part in parts for _ in part.crops]
    return _Answered(fingerprints, [crop for part in parts for crop in part.crops], kept, classes)


def _kept(writer: SoftLabelWriter | None) -> str:
    """Where the next start resumes, in words: it asks for the last batch once more, which may be cut short."""
    kept = 0 if writer is None else writer.done - writer.header.batch_size
    return "" if writer is None or kept <= 0 else f"{kept:,} of {writer.header.records:,} crops"


def _batches(
    data: ImageData, header: SoftLabelHeader, config: InputConfig, starts: range, num_workers: int
) -> Iterator[Sequence["_Part"]]:
    """The crops in batches of `header.batch_size` that begin at numbers `starts`, those of one image together."""
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


class _Answered(NamedTuple):
    """A batch of crops with what is kept of the teacher's answers, as `SoftLabelWriter.append` takes them."""

    fingerprints: list[int]
    crops: list[Crop]
    kept: Tensor
    classes: Tensor


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
