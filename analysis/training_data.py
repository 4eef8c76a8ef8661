"""Images to train on: augmented at random, but the same for the same seed, epoch and image."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from analysis.data import Broken, ImageData
from analysis.listing import InputConfig
from quant.config import QATConfig
from quant.errors import InputError
from quant.step_batches import StepBatches


class Item(NamedTuple):
    """One image to train on, and the broken images that it stands in for; `image` is None where it is broken itself."""

    image: Tensor | None
    label: int
    broken: list[Broken]


class TrainingImages(Dataset[Item]):
    """The images of `data`, keyed by (epoch, index), cropped and flipped as `config` says.

    Image files are augmented by timm's transforms, tensors (digits) after their preparation. Where broken images are to
    be skipped the next one that can be read takes the place of each, so that every batch has its size.
    """

    def __init__(self, data: ImageData, config: QATConfig, input_config: InputConfig) -> None:
        self.images, self.seed, self.skip_broken = data.dataset, config.seed, data.skip_broken
        area = (config.crop_area, 1.0)
        _, height, width = input_config.input_size
        self.from_file = create_transform(
            input_config.input_size, is_training=True, scale=area, hflip=config.horizontal_flip, color_jitter=0.0,
            interpolation=input_config.interpolation, mean=input_config.mean, std=input_config.std,
        )  # fmt: skip
        self.from_tensor = v2.Compose(
            [v2.RandomResizedCrop((height, width), scale=area, antialias=True),
             v2.RandomHorizontalFlip(config.horizontal_flip)]
        )  # fmt: skip
        self.unchanged = config.crop_area == 1 and config.horizontal_flip == 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, first = key
        broken: list[Broken] = []
        for i in (*range(first, len(self)), *range(first)):
            try:
                return Item(self._augmented(i, epoch), int(self.images.labels[i]), broken)
            except InputError as error:
                broken.append(Broken(self.images.names[i], str(error)))
                if not self.skip_broken:
                    break
        return Item(None, -1, broken)

    def _augmented(self, i: int, epoch: int) -> Tensor:
        if self.unchanged:
            return self.images[i][0]
        raw = self.images.raw(i)
        with _seeded(self.seed, epoch, i):
            x = self.from_tensor(self.images.transform(raw)) if isinstance(raw, Tensor) else self.from_file(raw)
        return x.float()


def training_batches(
    images: TrainingImages, sampler: StepBatches, data: ImageData, *, num_workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of the sampler: images (batch, channels, height, width) and labels (batch,).

    An image that cannot be read raises InputError, or with `skip_broken` is replaced, and named in `data.skipped`.
    """
    loader = DataLoader(
        images, batch_sampler=sampler, num_workers=num_workers, collate_fn=_listed, generator=torch.Generator()
    )
    for items in loader:
        for name, message in (one for item in items for one in item.broken):
            if not data.skip_broken:
                raise InputError(message)
            if name not in data.skipped:
                data.skipped.append(name)
        if any(item.image is None for item in items):
            raise InputError(f"None of the {data.images} images of {data.spec} can be read. Check the data.")
        yield torch.stack([item.image for item in items]), torch.tensor([item.label for item in items])


def _listed(items: list[Item]) -> list[Item]:
    return items


@contextmanager
def _seeded(*seeds: int) -> Iterator[None]:
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
