"""The images that a step runs on: bundled digits, image folders, CSV lists and timm data sets, chosen by a seed."""

import hashlib
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data.config import resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from analysis.inputs.data_string import class_names_from, per_channel
from analysis.inputs.listing import InputConfig, Listing, NotSkippedError, list_images
from quant.errors import InputError, first_line

_UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)  # what Pillow raises


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """The chosen images of one split, in the order in which every pass sees them."""

    dataset: "ChosenImages"
    spec: str
    split: str
    images: int  # how many were chosen, broken ones included
    class_names: Mapping[int, str]  # of the labels that there are, rising; empty where unlabelled
    sha256: str  # of the chosen names (relative to the data's root) and labels, in order
    note: str  # how a split came about that the data did not bring
    labelled: bool
    remarks: tuple[str, ...] = ()  # on files that are no images, and splits that are not used
    skip_broken: bool = False
    skipped: list[str] = field(default_factory=list)  # the broken images that passes over the data have met

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, by rising label."""
        return tuple(self.class_names.values())

    def first_classes(self, count: int) -> str:
        """The first classes with their labels, such as `0 cat, 1 dog, ...`."""
        named = [f"{label} {name}" if name != str(label) else name for label, name in self.class_names.items()]
        return ", ".join(named[:count]) + (", ..." if len(named) > count else "")


class ChosenImages(Dataset[tuple[Tensor, int]]):
    """The images at `indices` of a listing.

    An item is (image, label): float32 (channels, height, width) and an int, -1 where unlabelled. An image that cannot
    be read raises InputError with its name.
    """

    def __init__(self, listing: Listing, labels: np.ndarray, indices: np.ndarray) -> None:
        self.read, self.transform, self.indices, self.root = listing.read, listing.transform, indices, listing.root
        self.names = [listing.names[i] for i in indices]
        self.labels = labels[indices]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(self.raw(i)).float(), int(self.labels[i])

    def path(self, i: int) -> str:
        """Where the image lies: its file, or the data set and its index there."""
        return os.path.join(self.root, self.names[i])

    def raw(self, i: int) -> Any:
        """The image as it was read, before it is prepared."""
        try:
            return self.read(int(self.indices[i]))
        except NotSkippedError as error:
            raise NotSkippedError(f"The image {self.path(i)} cannot be read: {error}.") from error
        except _UNREADABLE as error:
            raise InputError(
                f"The image {self.path(i)} cannot be read: {first_line(error)}. "
                "Replace it, or leave such images out with `--skip-broken`."
            ) from error


class Broken(NamedTuple):
    """An image that could not be read, and the message of its InputError."""

    name: str
    message: str
    skipped: bool = True  # whether --skip-broken leaves it out


class Batch(NamedTuple):
    """Images (batch, channels, height, width) float32, labels (batch,) int64, -1 where unlabelled, and their paths."""

    images: Tensor
    labels: Tensor
    paths: list[str]


class _Item(NamedTuple):
    """One image that could be read."""

    image: Tensor
    label: int
    path: str


class _Guarded(Dataset[_Item | Broken]):
    """Hands errors over as values: raised in a worker process they would reach the user as a traceback of torch's."""

    def __init__(self, dataset: ChosenImages) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> _Item | Broken:
        try:
            return _Item(*self.dataset[i], self.dataset.path(i))
        except InputError as error:
            return Broken(self.dataset.names[i], str(error), not isinstance(error, NotSkippedError))


def _collate(items: Sequence[_Item | Broken]) -> tuple[Batch, list[Broken]]:
    """A batch of the images that could be read, and the others."""
    good = [item for item in items if isinstance(item, _Item)]
    images = torch.stack([item.image for item in good]) if good else torch.empty(0)
    batch = Batch(images, torch.tensor([item.label for item in good]), [item.path for item in good])
    return batch, [item for item in items if isinstance(item, Broken)]


def resolve_input(
    model: nn.Module,
    data: str,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: Sequence[int] | None = None,
    crop_pct: float | None = None,
    white_level: int | None = None,
) -> InputConfig:
    """How images of `data` become the model's input: as the user says, else as digits need, else as timm configures.

    Raises InputError where none of them says, and where the channels are not those of the model's first convolution.
    """
    told = getattr(model, "pretrained_cfg", None)
    told = told if isinstance(told, dict) and told.get("mean") and told.get("input_size") else None
    expected = input_channels(model)
    base: dict[str, Any]
    if data == "digits":
        base = {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,), "interpolation": "bilinear", "crop_pct": 1.0}
    elif told is None and (mean is None or std is None or input_size is None):
        raise InputError(
            f"{type(model).__name__} does not say how its images are prepared. Give `--mean`, `--std` and "
            "`--input-size`, such as --mean 0.49,0.48,0.45 --std 0.25,0.24,0.26 --input-size 3,32,32."
        )
    else:
        base = resolve_data_config(pretrained_cfg=told or {"input_size": tuple(input_size or ())})
        built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)  # set by the argument img_size
        base["input_size"] = (expected or base["input_size"][0], *(built_for or base["input_size"][1:]))
        if not (told and told.get("crop_pct")):
            base["crop_pct"] = None
    size = tuple(int(n) for n in (base["input_size"] if input_size is None else input_size))
    if len(size) != 3 or min(size) < 1:
        raise InputError(f"`--input-size` {size} is not channels, height, width; write such as 3,32,32.")
    if expected is not None and expected != size[0]:
        raise InputError(
            f"The model takes images of {expected} channels, {data} would give {size[0]}. Give `--input-size "
            f"{expected},{size[1]},{size[2]}`, or build the model with `--model-kwargs '{{\"in_chans\": {size[0]}}}'`."
        )
    crop = crop_pct or base["crop_pct"] or (1.0 if max(size[1:]) <= 64 else 0.875)
    if not 0 < crop <= 1:
        raise InputError(f"`--crop-pct` {crop:g} is not in (0, 1].")
    return InputConfig(
        input_size=(size[0], size[1], size[2]),
        mean=per_channel("mean", base["mean"] if mean is None else mean, size[0]),
        std=per_channel("std", base["std"] if std is None else std, size[0]),
        interpolation=base["interpolation"],
        crop_pct=crop,
        crop_mode=base.get("crop_mode", "center"),
        white_level=white_level,
    )


def load_data(
    spec: str,
    *,
    split: str,
    images: int | None,
    at_most: bool = False,
    seed: int,
    input_config: InputConfig,
    num_classes: int | None,
    holdout: float = 0.5,
    class_map: str | Path | None = None,
    class_order: str | Path | None = None,
    data_root: str | Path | None = None,
    skip_broken: bool = False,
) -> ImageData:
    """`images` images (None: all) of a split, `train` or `val`, every prefix of them balanced over the classes.

    Fewer than `images` are an error, unless `at_most` is set.

    `spec` is `digits`, `folder:PATH`, `csv:FILE` or the name of a timm data set. Data of one split is divided by
    `seed`: the share `holdout` of each class becomes `val`; with 0 all images serve both. `class_order` numbers class
    names: `plain` (torchvision's ImageFolder), `natural` (timm) or a file as `class_map`; it may be left out where the
    two are the same. Raises InputError for data that cannot be used, and where classes or labels do not fit a head of
    `num_classes`.
    """
    if not 0 <= holdout < 1:
        raise InputError(f"`--holdout` {holdout:g} is not in [0, 1).")
    if images is not None and images < 1:
        raise InputError(f"`--images` {images} is below 1.")
    indices_of, by = class_names_from(class_map, class_order)
    listing = list_images(spec, split, images, data_root, input_config, class_order=by, by_name=indices_of is not None)
    labels, classes = _head_labels(listing, spec, indices_of, num_classes)
    pool, note = np.arange(len(labels)), listing.note
    if listing.one_split:
        pool, note = _held_out(labels, split, holdout, seed)
    if not len(pool):
        raise InputError(f"{spec} has no image in its split {split!r}. Add some, or change `--split` or `--holdout`.")
    if images is not None and images > len(pool) and not at_most:
        raise InputError(f"`--images` {images}, but {spec} has {len(pool)} in its split {split!r}. Ask for fewer.")
    order = _balanced_order(labels[pool], np.random.default_rng([seed, 1]))[:images]
    chosen = ChosenImages(listing, labels, pool[order])
    lines = (f"{name}\t{label}\n" for name, label in zip(chosen.names, chosen.labels, strict=True))
    return ImageData(
        dataset=chosen,
        spec=spec,
        split=split,
        images=len(chosen),
        class_names=classes,
        sha256=hashlib.sha256("".join(lines).encode()).hexdigest(),
        note=note,
        labelled=bool((labels >= 0).all()),
        remarks=listing.remarks,
        skip_broken=skip_broken,
    )


def shared_batches(
    data: ImageData, *, batch_size: int, num_workers: int = 0, first: int = 0, every: int = 1
) -> Iterator[Batch]:
    """The batches number `first`, `first + every`, ... of the images, always in the same order.

    They hold the same images whatever `every` is. An image that cannot be read raises InputError, or with `skip_broken`
    is left out and named in `data.skipped`: a batch may be empty.
    """
    if batch_size < 1:
        raise InputError(f"`--batch-size` {batch_size} is below 1.")
    starts = range(first * batch_size, data.images, every * batch_size)
    chosen: Any = [range(start, min(start + batch_size, data.images)) for start in starts]  # lists would take more room
    loader: DataLoader[Any] = DataLoader(
        _Guarded(data.dataset),
        batch_sampler=chosen,
        num_workers=num_workers,
        collate_fn=_collate,
        generator=torch.Generator(),  # else the loader draws from the global one
    )
    for batch, broken in loader:
        for name, message, skipped in broken:
            if not (data.skip_broken and skipped):
                raise InputError(message)
            if name not in data.skipped:
                data.skipped.append(name)
        yield batch


def batches(data: ImageData, *, batch_size: int, num_workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (batch, channels, height, width) float32 and labels (batch,) int64, always in the same order.

    An image that cannot be read raises InputError, or with `skip_broken` is left out and named in `data.skipped`.
    """
    read = 0
    for images, labels, _ in shared_batches(data, batch_size=batch_size, num_workers=num_workers):
        read += len(labels)
        if len(labels):
            yield images, labels
    if not read:
        raise none_readable(data)


def none_readable(data: ImageData) -> InputError:
    """The error that says that not one image could be read."""
    return InputError(f"None of the {data.images} images of {data.spec} can be read. Check the data.")


def input_channels(model: nn.Module) -> int | None:
    """The channels of the model's first convolution; None where that does not tell those of an image."""
    told = getattr(model, "pretrained_cfg", None)
    name = told.get("first_conv") if isinstance(told, dict) else None
    if name:
        first = dict(model.named_modules()).get(name if isinstance(name, str) else name[0])
    else:
        first = next((m for m in model.modules() if next(m.parameters(recurse=False), None) is not None), None)
    # More than four: a stem that first turns neighbouring pixels into channels (TResNet).
    return first.in_channels if isinstance(first, nn.Conv2d) and first.in_channels <= 4 else None


def _balanced_order(labels: np.ndarray, rng: np.random.Generator, *, proportional: bool = False) -> np.ndarray:
    """A random order of the images in which the classes take turns.

    Every prefix has, as long as they last, equally many images of each class; where `proportional`, as large a share
    of each class.
    """
    shuffled = rng.permutation(len(labels))
    turn = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels[shuffled] == label)
        turn[members] = (np.arange(len(members)) + 0.5) / (len(members) if proportional else 1)
    return shuffled[np.argsort(turn, kind="stable")]


def _held_out(labels: np.ndarray, split: str, holdout: float, seed: int) -> tuple[np.ndarray, str]:
    """The images of undivided data that belong to `split`, and a note on how they came to."""
    if holdout == 0:
        return np.arange(len(labels)), "undivided data, holdout 0: the same images serve train and val"
    order = _balanced_order(labels, np.random.default_rng([seed, 0]), proportional=True)
    held = round(holdout * len(labels))
    chosen = np.sort(order[:held] if split == "val" else order[held:])
    return (
        chosen,
        f"undivided data: {split} is {len(chosen)} of {len(labels)} images (holdout {holdout:g}, seed {seed})",
    )


def _head_labels(
    listing: Listing, spec: str, indices_of: Mapping[str, int] | None, num_classes: int | None
) -> tuple[np.ndarray, dict[int, str]]:
    """Labels as indices into the model's head, and the names of the classes by rising label."""
    labels, names = listing.labels, listing.classes
    if indices_of is not None:
        if names is None:
            raise InputError(f"`--class-map` needs the names of classes, {spec} has none. Leave it out.")
        unknown = [name for name in names.values() if name not in indices_of]
        if unknown:
            raise InputError(f"The class map has no line for {unknown[0]!r} of {spec} ({len(unknown)} such). Add it.")
        labels = np.array([indices_of[names[label]] if label >= 0 else -1 for label in labels.tolist()])
        names = {indices_of[name]: name for name in names.values()}
    elif num_classes is not None and names is not None and listing.complete and len(names) != num_classes:
        raise InputError(
            f"{spec} has {len(names)} classes, the model's head has {num_classes}. Give `--class-map FILE` where the "
            f"""classes are some of the head's, or --model-kwargs '{{"num_classes": {len(names)}}}' for a new head, """
            "which is untrained."
        )
    if num_classes is not None and labels.max(initial=-1) >= num_classes:
        raise InputError(
            f"{spec} has the label {labels.max()}, the model's head has {num_classes} classes (0 to {num_classes - 1})."
        )
    present = np.unique(labels[labels >= 0]).tolist()
    return labels, {label: (names or {}).get(label, str(label)) for label in present}
