"""The images that a step runs on: bundled digits, image folders, CSV lists and timm data sets, chosen by a seed."""

import csv
import hashlib
import io
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.dataset_factory import create_dataset
from timm.data.transforms_factory import create_transform
from timm.utils.misc import natural_key
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from quant.errors import InputError

_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_TIMM_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")
_VALIDATION_NAMES = ["validation", "val", "test"]  # in timm's words, and in those of the hub's data sets
_UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)  # what Pillow raises


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """How an image becomes the model's input."""

    input_size: tuple[int, int, int]  # channels, height, width
    mean: tuple[float, ...]  # one value a channel, of pixels in [0, 1]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0  # the centre crop's side over the resized image's
    crop_mode: str = "center"  # timm's: center, squash or border


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """The chosen images of one split, in the order in which every pass sees them."""

    dataset: "ChosenImages"
    spec: str
    split: str
    images: int  # how many were chosen, broken ones included
    classes: tuple[str, ...]  # names of the classes, by rising label; empty where unlabelled
    sha256: str  # of the chosen names (relative to the data's root) and labels, in order
    note: str  # how a split came about that the data did not bring
    labelled: bool
    skip_broken: bool = False
    skipped: list[str] = field(default_factory=list)  # the broken images that passes over the data have met


@dataclass(frozen=True, kw_only=True)
class _Listing:
    """The images that one data string names, before any is chosen."""

    names: Sequence[str]
    labels: np.ndarray
    classes: Mapping[int, str] | None  # None where labels are indices without names
    read: Callable[[int], Any]  # index -> what `transform` takes; must pickle, for worker processes
    transform: Callable[[Any], Tensor]
    root: str = ""  # what the names are relative to
    one_split: bool = False
    complete: bool = True  # whether `classes` must be exactly those of the head
    note: str = ""


class ChosenImages(Dataset[tuple[Tensor, int]]):
    """The images at `indices` of a listing.

    An item is (image, label): float32 (channels, height, width) and an int, -1 where unlabelled. An image that cannot
    be read raises InputError with its name.
    """

    def __init__(self, listing: _Listing, labels: np.ndarray, indices: np.ndarray) -> None:
        self.read, self.transform, self.indices, self.root = listing.read, listing.transform, indices, listing.root
        self.names = [listing.names[i] for i in indices]
        self.labels = labels[indices]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        try:
            image = self.read(int(self.indices[i]))
        except _UNREADABLE as error:
            raise InputError(
                f"The image {os.path.join(self.root, self.names[i])} cannot be read: {error}. "
                "Replace it, or leave such images out with `--skip-broken`."
            ) from error
        return self.transform(image).float(), int(self.labels[i])


class _Broken(NamedTuple):
    """An image that could not be read, and the message of its InputError."""

    name: str
    message: str


class _Guarded(Dataset[tuple[Tensor, int] | _Broken]):
    """Hands errors over as values: raised in a worker process they would reach the user as a traceback of torch's."""

    def __init__(self, dataset: ChosenImages) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> tuple[Tensor, int] | _Broken:
        try:
            return self.dataset[i]
        except InputError as error:
            return _Broken(self.dataset.names[i], str(error))


def _collate(items: Sequence[tuple[Tensor, int] | _Broken]) -> tuple[Tensor, Tensor, list[_Broken]]:
    """A batch of the images that could be read, their labels, and the others."""
    good = [item for item in items if not isinstance(item, _Broken)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    return images, torch.tensor([label for _, label in good]), [item for item in items if isinstance(item, _Broken)]


def resolve_input(
    model: nn.Module,
    data: str,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: Sequence[int] | None = None,
    crop_pct: float | None = None,
) -> InputConfig:
    """How images of `data` become the model's input: as the user says, else as digits need, else as timm configures.

    Raises InputError where none of them says, and where the channels are not those of the model's first convolution.
    """
    told = getattr(model, "pretrained_cfg", None)
    told = told if isinstance(told, dict) and told.get("mean") and told.get("input_size") else None
    expected = _input_channels(model)
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
        mean=_per_channel("mean", base["mean"] if mean is None else mean, size[0]),
        std=_per_channel("std", base["std"] if std is None else std, size[0]),
        interpolation=base["interpolation"],
        crop_pct=crop,
        crop_mode=base.get("crop_mode", "center"),
    )


def load_data(
    spec: str,
    *,
    split: str,
    images: int | None,
    seed: int,
    input_config: InputConfig,
    num_classes: int | None,
    holdout: float = 0.5,
    class_map: str | Path | None = None,
    data_root: str | Path | None = None,
    skip_broken: bool = False,
) -> ImageData:
    """`images` images (None: all) of a split, `train` or `val`, every prefix of them balanced over the classes.

    `spec` is `digits`, `folder:PATH`, `csv:FILE` or the name of a timm data set. Data of one split is divided by
    `seed`: the share `holdout` of each class becomes `val`; with 0 all images serve both. Raises InputError for data
    that cannot be used, and where classes or labels do not fit a head of `num_classes`.
    """
    if not 0 <= holdout < 1:
        raise InputError(f"`--holdout` {holdout:g} is not in [0, 1).")
    if images is not None and images < 1:
        raise InputError(f"`--images` {images} is below 1.")
    indices_of = None if class_map is None else _read_class_map(Path(class_map))
    listing = _list_images(spec, split, images, data_root, input_config, named=indices_of is not None)
    labels, classes = _head_labels(listing, spec, indices_of, num_classes)
    pool, note = np.arange(len(labels)), listing.note
    if listing.one_split:
        pool, note = _held_out(labels, split, holdout, seed)
    if not len(pool):
        raise InputError(f"{spec} has no image in its split {split!r}. Add some, or change `--split` or `--holdout`.")
    if images is not None and images > len(pool):
        raise InputError(f"`--images` {images}, but {spec} has {len(pool)} in its split {split!r}. Ask for fewer.")
    order = _balanced_order(labels[pool], np.random.default_rng([seed, 1]))[:images]
    chosen = ChosenImages(listing, labels, pool[order])
    lines = (f"{name}\t{label}\n" for name, label in zip(chosen.names, chosen.labels, strict=True))
    return ImageData(
        dataset=chosen,
        spec=spec,
        split=split,
        images=len(chosen),
        classes=classes,
        sha256=hashlib.sha256("".join(lines).encode()).hexdigest(),
        note=note,
        labelled=bool((labels >= 0).all()),
        skip_broken=skip_broken,
    )


def batches(data: ImageData, *, batch_size: int, num_workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (batch, channels, height, width) float32 and labels (batch,) int64, always in the same order.

    An image that cannot be read raises InputError, or with `skip_broken` is left out and named in `data.skipped`.
    """
    if batch_size < 1:
        raise InputError(f"`--batch-size` {batch_size} is below 1.")
    loader = DataLoader(
        _Guarded(data.dataset),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
        generator=torch.Generator(),  # else the loader draws from the global one
    )
    read = 0
    for images, labels, broken in loader:
        for name, message in broken:
            if not data.skip_broken:
                raise InputError(message)
            if name not in data.skipped:
                data.skipped.append(name)
        read += len(labels)
        if len(labels):
            yield images, labels
    if not read:
        raise InputError(f"None of the {data.images} images of {data.spec} can be read. Check the data.")


def _input_channels(model: nn.Module) -> int | None:
    """The channels of the model's first convolution; None where that does not tell those of an image."""
    told = getattr(model, "pretrained_cfg", None)
    name = told.get("first_conv") if isinstance(told, dict) else None
    if name:
        first = dict(model.named_modules()).get(name if isinstance(name, str) else name[0])
    else:
        first = next((m for m in model.modules() if next(m.parameters(recurse=False), None) is not None), None)
    # More than four: a stem that first turns neighbouring pixels into channels (TResNet).
    return first.in_channels if isinstance(first, nn.Conv2d) and first.in_channels <= 4 else None


def _per_channel(option: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    """One value for each channel; a single one serves them all."""
    numbers = tuple(float(value) for value in values) * (channels if len(values) == 1 else 1)
    if len(numbers) != channels or not np.isfinite(numbers).all() or (option == "std" and min(numbers) <= 0):
        above = " above 0" if option == "std" else ""
        raise InputError(f"`--{option}` is {numbers}, expected one number{above} for each of {channels} channels.")
    return numbers


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
    listing: _Listing, spec: str, indices_of: Mapping[str, int] | None, num_classes: int | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as indices into the model's head, and the names of the classes by rising label."""
    labels, names = listing.labels, listing.classes
    if indices_of is not None:
        if names is None:
            raise InputError(f"`--class-map` needs the names of classes, {spec} has none. Leave it out.")
        unknown = [name for name in names.values() if name not in indices_of]
        if unknown:
            raise InputError(f"The class map has no line for {unknown[0]!r} of {spec} ({len(unknown)} such). Add it.")
        labels = np.array([indices_of[names[label]] for label in labels.tolist()])
        names = {indices_of[name]: name for name in names.values()}
    elif num_classes is not None and names is not None and listing.complete and len(names) != num_classes:
        raise InputError(
            f"{spec} has {len(names)} classes, the model's head has {num_classes}. Use another model, or "
            "`--class-map FILE` where the classes are some of the head's."
        )
    if num_classes is not None and labels.max(initial=-1) >= num_classes:
        raise InputError(
            f"{spec} has the label {labels.max()}, the model's head has {num_classes} classes (0 to {num_classes - 1})."
        )
    present = np.unique(labels[labels >= 0]).tolist()
    return labels, tuple((names or {}).get(label, str(label)) for label in present)


def _read_class_map(path: Path) -> dict[str, int]:
    """Class name -> index, from lines `class` (numbered from 0) or `class,index`."""
    if path.suffix not in (".txt", ".csv"):
        raise InputError(f"The class map {path} must be a .txt or .csv file of lines `class` or `class,index`.")
    rows = [row for row in _csv_rows(path) if row]
    try:
        pairs = [(row[0].strip(), int(row[1]) if len(rows[0]) == 2 else i) for i, row in enumerate(rows)]
    except (ValueError, IndexError) as error:
        raise InputError(
            f"The class map {path} must have lines `class` or `class,index` throughout: {error}."
        ) from error
    if not pairs or len(dict(pairs)) < len(pairs) or min(index for _, index in pairs) < 0:
        raise InputError(f"The class map {path} is empty, names a class twice or has an index below 0.")
    return dict(pairs)


def _csv_rows(path: Path) -> list[list[str]]:
    """The rows of a CSV file in UTF-8."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a CSV file: {error}. Check the path.") from error


def _list_images(
    spec: str, split: str, images: int | None, data_root: str | Path | None, config: InputConfig, *, named: bool
) -> _Listing:
    """All images of a split that the data string names; `named`: a class map will look the classes' names up."""
    kind, _, place = spec.partition(":")
    if spec == "digits":
        return _list_digits(split, config)
    if config.input_size[0] not in (1, 3):
        raise InputError(f"The model takes {config.input_size[0]} channels; image files give 3, or 1 as grey.")
    if kind == "folder":
        return _list_folder(Path(place), split, config)
    if kind == "csv":
        return _list_csv(Path(place), config, named=named)
    if spec.startswith(_TIMM_PREFIXES):
        return _list_timm(spec, split, images, data_root, config)
    raise InputError(
        f"`--data` {spec!r} is unknown. It is digits, folder:PATH, csv:FILE, or a timm data set, which starts with "
        f"{', '.join(_TIMM_PREFIXES)}."
    )


def _list_digits(split: str, config: InputConfig) -> _Listing:
    """scikit-learn's 1,797 digits (Alpaydin and Kaynak, UCI 1998), 1,347 to train on and 450 to validate."""
    from sklearn.datasets import load_digits  # here: it takes a second, which other data should not wait for
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(np.arange(len(labels)), test_size=450, stratify=labels, random_state=0)
    indices = np.sort(parts[split == "val"])
    grey = torch.from_numpy(pixels[indices]).float().reshape(-1, 1, 8, 8) / 16
    return _Listing(
        names=[f"digits/{i}" for i in indices],
        labels=labels[indices],
        classes={digit: str(digit) for digit in range(10)},
        read=partial(getitem, grey),
        transform=partial(_upsample, config=config),
    )


def _upsample(image: Tensor, config: InputConfig) -> Tensor:
    """A grey image (1, 8, 8) in [0, 1] at the model's size, normalised."""
    channels, height, width = config.input_size
    large = F.interpolate(image[None], size=(height, width), mode="bilinear", align_corners=False)[0]
    mean, std = torch.tensor(config.mean).view(-1, 1, 1), torch.tensor(config.std).view(-1, 1, 1)
    return (large.expand(channels, -1, -1) - mean) / std


def _list_folder(path: Path, split: str, config: InputConfig) -> _Listing:
    """PATH/SPLIT/CLASS/*, or PATH/CLASS/* where there is neither train/ nor val/."""
    if not path.is_dir():
        raise InputError(f"There is no folder {path}. Check `--data folder:PATH`.")
    splits = [name for name in ("train", "val") if (path / name).is_dir()]
    if splits and split not in splits:
        raise InputError(f"{path} has {splits[0]}/ but no {split}/. Add it, or use `--split {splits[0]}`.")
    folder = path / split if splits else path
    # Both splits together: a class without images in one of them must not shift the labels there.
    found = {f.name for part in splits or ["."] for f in (path / part).iterdir() if f.is_dir() and f.name[0] != "."}
    classes = dict(enumerate(sorted(found, key=natural_key)))
    names, labels = [], []
    for label, name in classes.items():
        files = sorted(_image_files(folder / name))
        if not files and (folder / name).is_dir():
            raise InputError(
                f"The class folder {folder / name} has no image ({' '.join(_SUFFIXES)}). Remove or fill it."
            )
        names += [file.relative_to(path).as_posix() for file in files]
        labels += [label] * len(files)
    if not names:
        raise InputError(f"{folder} has no class folders with images. Expected {folder}/CLASS/*.jpg, or use csv:FILE.")
    return _list_files(path, names, np.array(labels), classes, config, one_split=not splits)


def _image_files(folder: Path) -> Iterator[Path]:
    """The image files in a folder and below it, hidden ones left out."""
    return (f for f in folder.rglob("*") if f.suffix.lower() in _SUFFIXES and f.name[0] != "." and f.is_file())


def _list_csv(path: Path, config: InputConfig, *, named: bool) -> _Listing:
    """The files of a list, relative to its folder: columns `file` and `class_index` or `label`, or unlabelled.

    Labels that are all whole numbers are indices, unless a class map names them.
    """
    header, *rows = _csv_rows(path) or [[]]
    if "file" not in header:
        raise InputError(
            f"{path} has the columns {', '.join(header) or 'none'}; expected `file` and `class_index` or `label`."
        )
    table = [dict(zip(header, row, strict=False)) for row in rows if row]
    names = [row["file"] for row in table]
    column = next((c for c in (("label", "class_index") if named else ("class_index", "label")) if c in header), None)
    if column is None:
        return _list_files(path.parent, names, np.full(len(names), -1), None, config, one_split=True)
    values = [row.get(column, "").strip() for row in table]
    if column == "label" and (named or not all(value.isdecimal() for value in values)):
        classes = dict(enumerate(sorted(set(values), key=natural_key)))
        index = {name: label for label, name in classes.items()}
        labels = np.array([index[value] for value in values])
        return _list_files(path.parent, names, labels, classes, config, one_split=True)
    wrong = next((i for i, value in enumerate(values) if not value.isdecimal()), None)
    if wrong is not None:
        raise InputError(f"{path}: {column} of {names[wrong]!r} is {values[wrong]!r}, expected a whole number from 0.")
    labels = np.array([int(value) for value in values], dtype=np.int64)
    known = {int(value): row["label"] for value, row in zip(values, table, strict=True) if row.get("label")}
    return _list_files(path.parent, names, labels, known or None, config, one_split=True, complete=False)


def _list_files(
    root: Path,
    names: Sequence[str],
    labels: np.ndarray,
    classes: Mapping[int, str] | None,
    config: InputConfig,
    *,
    one_split: bool,
    complete: bool = True,
) -> _Listing:
    """Image files below `root`, prepared as timm does for evaluation."""
    return _Listing(
        names=names,
        labels=labels,
        classes=classes,
        read=partial(_read_file, [root / name for name in names], _mode(config)),
        transform=_eval_transform(config),
        root=str(root),
        one_split=one_split,
        complete=complete,
    )


def _read_file(paths: Sequence[Path], mode: str, i: int) -> Image.Image:
    """The decoded image."""
    with Image.open(paths[i]) as image:
        if image.mode.startswith(("I", "F")):  # Pillow would clip 16-bit pixels to white
            raise ValueError(f"its pixels are {image.mode}, not 8 bit")
        return image.convert(mode)


def _mode(config: InputConfig) -> str:
    """Pillow's name of the model's colours."""
    return "L" if config.input_size[0] == 1 else "RGB"


def _eval_transform(config: InputConfig) -> Callable[[Image.Image], Tensor]:
    """The resizing, centre crop and normalisation of timm's evaluation."""
    return create_transform(
        input_size=config.input_size,
        is_training=False,
        interpolation=config.interpolation,
        mean=config.mean,
        std=config.std,
        crop_pct=config.crop_pct,
        crop_mode=config.crop_mode,
    )


def _list_timm(
    spec: str, split: str, images: int | None, data_root: str | Path | None, config: InputConfig
) -> _Listing:
    """A data set of timm's; of a stream (webdataset and the like) the first `images` are read and kept in memory."""
    if data_root is None and spec.startswith(("torch/", "wds/")):
        raise InputError(f"{spec} needs `--data-root DIR`, the folder where the data set lies.")
    dataset = _create_timm(spec, split, data_root, config)
    if spec.startswith(("torch/folder", "torch/image_folder")) and Path(dataset.root) == Path(str(data_root)):
        raise InputError(f"{data_root} has no split folders; `--data folder:{data_root}` divides one split in two.")
    mode, note = _mode(config), ""
    labels: Sequence[int | None]
    read: Callable[[int], Any]
    if isinstance(dataset, IterableDataset):
        items = list(islice(dataset, images))
        labels, read = [label for _, label in items], partial(_converted, [image for image, _ in items], mode)
        note = f"the first {len(items)} images of a stream"
    else:
        labels = _stored_labels(dataset)
        read = partial(_read_timm, dataset, mode)
    samples = getattr(dataset, "samples", None)
    names = [str(i) for i in range(len(labels))]
    if samples is not None:
        names = [os.path.relpath(path, data_root or ".") for path, _ in samples]
    classes = getattr(dataset, "classes", None)
    return _Listing(
        names=names,
        labels=np.array([-1 if label is None else int(label) for label in labels], dtype=np.int64),
        classes=dict(enumerate(map(str, classes))) if classes else None,
        read=read,
        transform=_eval_transform(config),
        root=str(data_root) if samples is not None else spec,
        note=note,
    )


def _create_timm(spec: str, split: str, data_root: str | Path | None, config: InputConfig) -> Any:
    """A data set of timm's; where a hub's data set calls its validation images otherwise, `val` or `test`."""
    names = ["train"] if split == "train" else ["validation"] if spec.startswith("torch/") else _VALIDATION_NAMES
    failures = []
    for name in names:
        try:
            with redirect_stdout(io.StringIO()), warnings.catch_warnings():  # both are remarks of the libraries
                warnings.simplefilter("ignore")
                return create_dataset(
                    spec,
                    root=None if data_root is None else str(data_root),
                    split=name,
                    download=spec.startswith("torch/"),
                    input_img_mode=_mode(config),
                )
        except Exception as error:  # whatever a library of data sets raises
            failures.append(error)
    reason = str(failures[0]).strip().partition("\n")[0][:200] or type(failures[0]).__name__
    raise InputError(
        f"timm cannot open the data set {spec} ({split}): {reason}. Check its name, `--data-root` and the network."
    ) from failures[0]


def _stored_labels(dataset: Any) -> Sequence[int | None]:
    """The labels of a data set, where it has them without decoding the images."""
    if hasattr(dataset, "targets"):
        return dataset.targets
    reader = getattr(dataset, "reader", None)
    if reader is not None and hasattr(reader, "label_key"):
        return reader.dataset[reader.label_key]
    return [dataset[i][1] for i in range(len(dataset))]


def _read_timm(dataset: Any, mode: str, i: int) -> Image.Image:
    """The decoded image; timm's own ImageDataset would put another image in the place of a broken one."""
    reader = getattr(dataset, "reader", None)
    if reader is None:
        return dataset[i][0].convert(mode)
    with reader[i][0] as file, Image.open(file) as image:
        return image.convert(mode)


def _converted(images: Sequence[Image.Image], mode: str, i: int) -> Image.Image:
    """An image of a stream that was read before."""
    return images[i].convert(mode)
