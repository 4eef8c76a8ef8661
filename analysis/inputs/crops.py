"""Random crops of an image: drawn as a function of seeds, and cut out to the same bits by whoever asks."""

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from analysis.data import ChosenImages
from analysis.inputs.listing import InputConfig
from quant.errors import InputError
from quant.soft_label_format import LARGEST_SIDE, Crop


def read_for_crops(images: ChosenImages, i: int) -> Image.Image | Tensor:
    """The image that crops are cut from: a file as it is, a tensor (digits) after its preparation.

    Raises InputError where it cannot be read, or is too large for a stored box.
    """
    raw = images.raw(i)
    image = images.transform(raw).float() if isinstance(raw, Tensor) else raw
    if max(F.get_size(image)) > LARGEST_SIDE:
        raise InputError(f"The image {images.path(i)} has a side of more than {LARGEST_SIDE} pixels. Make it smaller.")
    return image


def draw_crop(
    image: Image.Image | Tensor, *seeds: int, scale: tuple[float, ...], ratio: tuple[float, ...], flip: float
) -> Crop:
    """A random crop, a function of the seeds and of the image's size.

    Its share of the area is uniform in `scale`, its width over height log-uniform in `ratio`, as torchvision's
    RandomResizedCrop (Szegedy et al., CVPR 2015, arXiv:1409.4842); `flip` is the probability of mirroring it.
    """
    with seeded(*seeds):
        box = RandomResizedCrop.get_params(image, list(scale), list(ratio))
        top, left, height, width = map(int, box)
        return Crop(top, left, height, width, bool(torch.rand(()) < flip))


def cut(image: Image.Image | Tensor, crop: Crop, config: InputConfig) -> Tensor:
    """The view of an image that the network gets: (channels, height, width) float32, normalised."""
    tensor = isinstance(image, Tensor)
    mode = InterpolationMode.BILINEAR if tensor else InterpolationMode(config.interpolation)
    box = (crop.top, crop.left, crop.height, crop.width)
    view = F.resized_crop(image, *box, size=list(config.input_size[1:]), interpolation=mode, antialias=True)
    if crop.flip:
        view = F.horizontal_flip(view)
    if tensor:  # normalised before
        return view
    return F.normalize(F.pil_to_tensor(view).float() / 255, mean=list(config.mean), std=list(config.std))


def fingerprint(image: Image.Image | Tensor) -> int:
    """A checksum of the image's size and pixels, 32 bits: with other pixels the same box is another view."""
    if isinstance(image, Tensor):
        return zlib.crc32(image.contiguous().numpy().data, zlib.crc32(repr(tuple(image.shape)).encode()))
    return zlib.crc32(image.tobytes(), zlib.crc32(f"{image.mode} {image.size}".encode()))


@contextmanager
def seeded(*seeds: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's generators, which the transforms draw from, and give their states back."""
    before: tuple[Any, Any, Any] = (random.getstate(), np.random.get_state(), torch.get_rng_state())  # noqa: NPY002
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    try:
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  # the generator that timm's transforms draw from
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])
