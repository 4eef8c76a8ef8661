"""What a data string names: all images of a split, before any are chosen, and how each is read and prepared."""

import io
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
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
from PIL import Image, ImageOps
from timm.data.dataset_factory import create_dataset
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import IterableDataset

from analysis.inputs.data_string import check_data
from analysis.inputs.image_folder import ImageFolder, list_folder
from analysis.inputs.image_list import ImageList, list_csv
from quant.errors import InputError

_FULL_16_BITS = 2**16 - 1
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
    white_level: int | None = None  # what is white in images of more than 8 bits; None where there are none


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
    remarks: tuple[str, ...] = ()  # on what was left out


def list_images(
    spec: str,
    split: str,
    images: int | None,
    data_root: str | Path | None,
    config: InputConfig,
    *,
    class_order: str | None,
    by_name: bool,
) -> Listing:
    """All images of a split that the data string names.

    `class_order` is plain or natural, where it matters; `by_name`: a class map will look the classes' names up.
    """
    kind, _, place = spec.partition(":")
    order = "plain" if by_name and kind in ("folder", "csv") else class_order
    check_data(spec, split=split, data_root=data_root, class_order=order)
    if spec == "digits":
        return _list_digits(split, config)
    if config.input_size[0] not in (1, 3):
        raise InputError(f"The model takes {config.input_size[0]} channels; image files give 3, or 1 as grey.")
    if kind == "folder":
        path = Path(place)
        return _list_files(path, list_folder(path, split, order), config)
    if kind == "csv":
        found = list_csv(Path(place), split, class_order, by_name=by_name)
        return _list_files(Path(place).parent, found, config, complete=not found.numbered)
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


def _list_files(root: Path, found: ImageFolder | ImageList, config: InputConfig, *, complete: bool = True) -> Listing:
    """Image files below `root`, prepared as timm does for evaluation."""
    return Listing(
        names=found.names, labels=np.array(found.labels, dtype=np.int64), classes=found.classes,
        read=partial(_read_file, [root / name for name in found.names], _mode(config), config.white_level),
        transform=_eval_transform(config), root=str(root), one_split=found.one_split, complete=complete,
        remarks=found.remarks,
    )  # fmt: skip


def _read_file(paths: Sequence[Path], mode: str, white_level: int | None, i: int) -> Image.Image:
    """The decoded image."""
    with Image.open(paths[i]) as image:
        return in_mode(image, mode, white_level)


def in_mode(image: Image.Image, mode: str, white_level: int | None = None) -> Image.Image:
    """The image upright, with 8 bits per sample, in `mode`, L or RGB.

    An orientation noted by a camera (EXIF) is applied. Of transparent images the stored colours count, without their
    transparency, as in timm and torchvision; CMYK is converted without a colour profile. Samples of more than 8 bits
    are scaled so that `white_level` is white; Pillow's own conversion would make all grey above 255 white. Raises
    NotSkippedError where it is not given, and for 16-bit colour, of which Pillow reads the upper 8 bits, where it is
    not 65535.
    """
    colour = image.mode in ("RGB", "RGBA", "CMYK")
    deep_colour = colour and any("16" in str(tile[3]) for tile in getattr(image, "tile", []))
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        if white_level is None:
            raise _white_level_error(image.mode)
        grey = np.asarray(image, dtype=np.float64) * (255 / white_level)
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    elif deep_colour and white_level != _FULL_16_BITS:
        raise _white_level_error(f"16-bit {image.mode}")
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # to L or RGB at once, Pillow would warn of some transparent colours
    return image.convert(mode)


class NotSkippedError(InputError):
    """An image that cannot be used although it is not broken: `--skip-broken` does not leave it out."""


def _white_level_error(samples: str) -> NotSkippedError:
    return NotSkippedError(
        f"its samples are {samples}, which does not say what is white. Give `--white-level`: "
        f"{_FULL_16_BITS} where all 16 bits are used"
        + ("" if samples.startswith("16-bit") else ", 4095 for 12 bits, 1 for floats up to 1")
    )


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
        labels, read = (
            [label for _, label in items],
            partial(_converted, [image for image, _ in items], mode, config.white_level),
        )
        note = f"the first {len(items)} images of a stream"
    else:
        labels = _stored_labels(dataset)
        read = partial(_read_timm, dataset, mode, config.white_level)
    samples = getattr(dataset, "samples", None)
    names = [str(i) for i in range(len(labels))]
    if samples is not None:
        names = [os.path.relpath(path, data_root or ".") for path, _ in samples]
        read = partial(
            _read_file, [Path(path) for path, _ in samples], mode, config.white_level
        )  # torchvision's loader clips 16 bits
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


def _read_timm(dataset: Any, mode: str, white_level: int | None, i: int) -> Image.Image:
    """The decoded image; timm's own ImageDataset would put another image in the place of a broken one."""
    reader = getattr(dataset, "reader", None)
    if reader is None:
        return in_mode(dataset[i][0], mode, white_level)
    with reader[i][0] as file, Image.open(file) as image:
        return in_mode(image, mode, white_level)


def _converted(images: Sequence[Image.Image], mode: str, white_level: int | None, i: int) -> Image.Image:
    """An image of a stream that was read before."""
    return in_mode(images[i], mode, white_level)
