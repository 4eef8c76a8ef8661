"""Which images each optimizer step sees: a function of seed, epoch and step, so that a training can resume anywhere."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class StepBatches(Sampler[list[tuple[int, int]]]):
    """The (epoch, index) of the images of each step, from `first_step` on; one process's part of each batch.

    Every epoch is a new permutation of all images; the last ones that make no full batch are left out. `batch_size` are
    images: where each gives several crops, an epoch here is a pass over the images, of as many epochs counted in crops.
    """

    def __init__(
        self, images: int, *, batch_size: int, steps: int, seed: int, first_step: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        if batch_size > images:
            raise ValueError(f"`batch_size`={batch_size} is above the number of images, {images}.")
        self.images, self.batch_size, self.steps, self.seed = images, batch_size, steps, seed
        self.first_step, self.rank, self.world = first_step, rank, world
        self.per_epoch = images // batch_size

    def __len__(self) -> int:
        return max(0, self.steps - self.first_step)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, drawn = torch.empty(0), -1
        for step in range(self.first_step, self.steps):
            epoch, place = divmod(step, self.per_epoch)
            if epoch != drawn:
                # The two numbers make one seed; neighbouring seeds of torch's generator are independent.
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order, drawn = torch.randperm(self.images, generator=generator), epoch
            batch = order[place * self.batch_size : (place + 1) * self.batch_size]
            yield [(epoch, index) for index in batch[self.rank :: self.world].tolist()]
