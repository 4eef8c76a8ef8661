"""Images to train on: augmented at random, but the same for the same seed, epoch and image."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from analysis.data import Broken, ImageData
from analysis.inputs.crops import cut, fingerprint, read_for_crops, seeded
from analysis.inputs.listing import InputConfig, NotSkippedError
from quant.config import QATConfig
from quant.errors import InputError
from quant.soft_label_format import UNREADABLE, StoredCrop
from quant.soft_labels import SoftLabels
from quant.step_batches import StepBatches


class Item(NamedTuple):
    """The views of one image to train on, and the broken images that it stands in for.

    `views` is (views, channels, height, width), or None where the image is broken itself; `stored` has the teacher's
    answers to them, where it was asked before; `refused` is the message of a NotSkippedError.
    """

    views: Tensor | None
    label: int
    broken: list[Broken]
    stored: Sequence[StoredCrop] = ()
    refused: str = ""


class TrainingImages(Dataset[Item]):
    """The images of `data`, keyed by (epoch, index), each with `config.crops_per_image` views.

    Image files are augmented by timm's transforms as `config` says, tensors (digits) after their preparation; with
    `soft_labels` the views are stored ones, which the file alone describes. Where broken images are to be skipped the
    next one that can be read takes the place of each, so that every batch has its size.
    """

    def __init__(
        self, data: ImageData, config: QATConfig, input_config: InputConfig, soft_labels: SoftLabels | None = None
    ) -> None:
        self.images, self.seed, self.skip_broken = data.dataset, config.seed, data.skip_broken
        self.crops, self.input_config, self.soft_labels = config.crops_per_image, input_config, soft_labels
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
                views, stored = self._augmented(i, epoch) if self.soft_labels is None else self._stored(i, epoch)
                return Item(views, int(self.images.labels[i]), broken, stored)
            except NotSkippedError as error:
                return Item(None, -1, broken, refused=str(error))
            except InputError as error:
                broken.append(Broken(self.images.names[i], str(error)))
                if not self.skip_broken:
                    break
        return Item(None, -1, broken)

    def _augmented(self, i: int, epoch: int) -> tuple[Tensor, Sequence[StoredCrop]]:
        if self.unchanged:
            return self.images[i][0].expand(self.crops, -1, -1, -1), ()
        raw = self.images.raw(i)
        tensor = self.images.transform(raw) if isinstance(raw, Tensor) else None
        with seeded(self.seed, epoch, i):
            views = [self.from_file(raw) if tensor is None else self.from_tensor(tensor) for _ in range(self.crops)]
        return torch.stack(views).float(), ()

    def _stored(self, i: int, epoch: int) -> tuple[Tensor, Sequence[StoredCrop]]:
        labels = self.soft_labels
        assert labels is not None
        image = read_for_crops(self.images, i)
        drawn = stored_crops_of(self.seed, epoch, i, crops=self.crops, stored=labels.header.crops)
        stored = [labels.crop(i, crop) for crop in drawn]
        if stored[0].crop == UNREADABLE:
            raise InputError(
                f"The image {self.images.path(i)} could not be read when {labels.path} was made. Make the labels again "
                "or leave such images out with `--skip-broken`."
            )
        if fingerprint(image) != labels.fingerprint(i):
            raise NotSkippedError(
                f"{self.images.path(i)} is not the image that {labels.path} was made of: it has other pixels, or is "
                "decoded otherwise. Put the old file back, or make the labels again with `qvw soft-labels`."
            )
        return torch.stack([cut(image, each.crop, self.input_config) for each in stored]), stored


def stored_crops_of(seed: int, epoch: int, image: int, *, crops: int, stored: int) -> list[int]:
    """Which `crops` of an image's `stored` ones an epoch sees, a pass over the images: never one of them twice.

    A function of seed, epoch and image. Epochs take turns through a random order of the stored crops, as far as whole
    turns go, and then through another: a crop is seen again only when that order is used up.
    """
    cycle, turn = divmod(epoch, stored // crops)
    order = np.random.default_rng([seed, cycle, image]).permutation(stored)
    return order[turn * crops : (turn + 1) * crops].tolist()


def training_batches(
    images: TrainingImages, sampler: StepBatches, data: ImageData, *, num_workers: int
) -> Iterator[tuple[Tensor, ...]]:
    """The batches of the sampler: images (batch, channels, height, width) and labels (batch,).

    The views of an image are neighbours. With soft labels the teacher's probabilities (batch, classes) follow. An image
    that cannot be read raises InputError, or with `skip_broken` is replaced, and named in `data.skipped`.
    """
    loader = DataLoader(
        images, batch_sampler=sampler, num_workers=num_workers, collate_fn=_listed, generator=torch.Generator()
    )
    for items in loader:
        for name, message, _ in (one for item in items for one in item.broken):
            if not data.skip_broken:
                raise InputError(message)
            if name not in data.skipped:
                data.skipped.append(name)
        for item in items:
            if item.refused:
                raise NotSkippedError(item.refused)
            if item.views is None:
                raise InputError(f"None of the {data.images} images of {data.spec} can be read. Check the data.")
        views = torch.cat([item.views for item in items])
        labels = torch.tensor([item.label for item in items for _ in item.views])
        if images.soft_labels is None:
            yield views, labels
        else:
            yield views, labels, images.soft_labels.distributions([crop for item in items for crop in item.stored])


def _listed(items: list[Item]) -> list[Item]:
    return items
