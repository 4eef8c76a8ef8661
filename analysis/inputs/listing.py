"""What a data string names: all images of a split, before any are chosen, and how each is read and prepared."""

import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import islice
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.dataset_factory import create_dataset
from timm.data.transforms_factory import create_transform
from timm.utils.misc import natural_key
from torch import Tensor
from torch.utils.data import IterableDataset

from analysis.inputs.data_string import check_data, csv_table, folder_splits
from quant.errors import InputError

_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_VALIDATION_NAMES = ["validation", "val", "test"]  # in timm's words, and in those of the hub's data sets


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
class Listing:
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


def list_images(
    spec: str, split: str, images: int | None, data_root: str | Path | None, config: InputConfig, *, named: bool
) -> Listing:
    """All images of a split that the data string names; `named`: a class map will look the classes' names up."""
    check_data(spec, split=split, data_root=data_root)
    kind, _, place = spec.partition(":")
    if spec == "digits":
        return _list_digits(split, config)
    if config.input_size[0] not in (1, 3):
        raise InputError(f"The model takes {config.input_size[0]} channels; image files give 3, or 1 as grey.")
    if kind == "folder":
        return _list_folder(Path(place), split, config)
    if kind == "csv":
        return _list_csv(Path(place), config, named=named)
    return _list_timm(spec, split, images, data_root, config)


def _list_digits(split: str, config: InputConfig) -> Listing:
    """scikit-learn's 1,797 digits (Alpaydin and Kaynak, UCI 1998), 1,347 to train on and 450 to validate."""
    from sklearn.datasets import load_digits  # here: it takes a second, which other data should not wait for
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(np.arange(len(labels)), test_size=450, stratify=labels, random_state=0)
    indices = np.sort(parts[split == "val"])
    grey = torch.from_numpy(pixels[indices]).float().reshape(-1, 1, 8, 8) / 16
    return Listing(
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


def _list_folder(path: Path, split: str, config: InputConfig) -> Listing:
    """PATH/SPLIT/CLASS/*, or PATH/CLASS/* where there is neither train/ nor val/."""
    splits = folder_splits(path, split)
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


def _list_csv(path: Path, config: InputConfig, *, named: bool) -> Listing:
    """The files of a list, relative to its folder: columns `file` and `class_index` or `label`, or unlabelled.

    Labels that are all whole numbers are indices, unless a class map names them.
    """
    header, table = csv_table(path)
    names = [row["file"] for row in table]
    column = next((c for c in (("label", "class_index") if named else ("class_index", "label")) if c in header), None)
    if column is None:
        return _list_files(path.parent, names, np.full(len(names), -1), None, config, one_split=True)
    values = [row.get(column, "").strip() for row in table]
    if column == "label" and (named or not all(value.isdecimal() and len(value) < 10 for value in values)):
        classes = dict(enumerate(sorted(set(values), key=natural_key)))
        index = {name: label for label, name in classes.items()}
        labels = np.array([index[value] for value in values])
        return _list_files(path.parent, names, labels, classes, config, one_split=True)
    wrong = next((i for i, value in enumerate(values) if not (value.isdecimal() and len(value) < 10)), None)
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
) -> Listing:
    """Image files below `root`, prepared as timm does for evaluation."""
    return Listing(
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
        return in_mode(image, mode)


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image with 8 bits a sample in `mode`, L or RGB.

    Of transparent images the stored colours count, without their transparency, as in timm and torchvision; CMYK is
    converted without a colour profile. Of 16-bit grey the upper 8 bits count, as Pillow takes them of 16-bit colour;
    its own conversion would make all above 255 white. Raises ValueError for 32-bit samples, whose white is not known.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # both hold 16 bits
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its samples are {image.mode}: 32 bits, of which none says what is white")
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # to L or RGB at once, Pillow would warn of some transparent colours
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


def _list_timm(spec: str, split: str, images: int | None, data_root: str | Path | None, config: InputConfig) -> Listing:
    """A data set of timm's; of a stream (webdataset and the like) the first `images` are read and kept in memory."""
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
        read = partial(_read_file, [Path(path) for path, _ in samples], mode)  # torchvision's loader clips 16 bits
    classes = getattr(dataset, "classes", None)
    return Listing(
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
        return in_mode(dataset[i][0], mode)
    with reader[i][0] as file, Image.open(file) as image:
        return in_mode(image, mode)


def _converted(images: Sequence[Image.Image], mode: str, i: int) -> Image.Image:
    """An image of a stream that was read before."""
    return in_mode(images[i], mode)
