"""Images to train on: augmented at random, but the same for the same seed, epoch and image."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from analysis.data import Broken, ImageData, collate
from analysis.listing import InputConfig
from quant.config import QATConfig
from quant.errors import InputError
from quant.step_batches import StepBatches


class TrainingImages(Dataset[tuple[Tensor, int] | Broken]):
    """The images of `data`, keyed by (epoch, index), cropped and flipped as `config` says.

    Image files are augmented by timm's transforms, tensors (digits) after their preparation.
    """

    def __init__(self, data: ImageData, config: QATConfig, input_config: InputConfig) -> None:
        self.images, self.seed = data.dataset, config.seed
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

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | Broken:
        epoch, i = key
        try:
            if self.unchanged:
                return self.images[i]
            raw = self.images.raw(i)
        except InputError as error:
            return Broken(self.images.names[i], str(error))
        with _seeded(self.seed, epoch, i):
            x = self.from_tensor(self.images.transform(raw)) if isinstance(raw, Tensor) else self.from_file(raw)
        return x.float(), int(self.images.labels[i])


def training_batches(
    images: TrainingImages, sampler: StepBatches, data: ImageData, *, num_workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of the sampler: images (batch, channels, height, width) and labels (batch,).

    An image that cannot be read raises InputError, or with `skip_broken` is left out and named in `data.skipped`.
    """
    loader = DataLoader(
        images, batch_sampler=sampler, num_workers=num_workers, collate_fn=collate, generator=torch.Generator()
    )
    for x, labels, broken in loader:
        for name, message in broken:
            if not data.skip_broken:
                raise InputError(message)
            if name not in data.skipped:
                data.skipped.append(name)
        if len(labels):
            yield x, labels


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
