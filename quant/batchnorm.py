"""BatchNorm statistics after quantizing: taken anew, for a while or for good."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quant.errors import InputError


def batchnorms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The BatchNorm layers that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]


def reestimate_batchnorm_(
    model: nn.Module, batches: Iterable[Tensor], forward: Callable[[Tensor], Any] | None = None
) -> None:
    """Let BatchNorm take its statistics from `batches` through the model as it now is, which stays in evaluation mode.

    Running mean and variance are averages over batches weighted by their images. Without it the sensitivity of a
    convolution is mostly that of stale statistics. `forward` runs the model in another way than by calling it; what it
    leaves out keeps mean 0 and variance 1. InputError for batches of a single image.
    """
    run = model if forward is None else forward
    layers = batchnorms(model)
    if not layers:
        return
    momenta = [module.momentum for module in layers]
    try:
        for module in layers:
            module.reset_running_stats()
            module.train()
        seen = 0
        with torch.no_grad():
            for images in batches:
                if len(images) < 2:  # one image alone has no variance at a 1 x 1 map
                    continue
                seen += len(images)
                for module in layers:
                    module.momentum = len(images) / seen
                run(images)
        if not seen:
            raise InputError(
                "BatchNorm cannot take its statistics from batches of one image. Give at least two images (--images, "
                "--calibration-images, or in `qvw train` --set calibration_images) and a --batch-size of at least 2."
            )
    finally:
        for module, momentum in zip(layers, momenta, strict=True):
            module.momentum = momentum
            module.eval()


@contextmanager
def batchnorm_kept(model: nn.Module) -> Iterator[None]:
    """Whatever the block does to the statistics of BatchNorm, the stored ones come back, also after an error."""
    layers = batchnorms(model)
    stored = [({k: v.clone() for k, v in m.named_buffers(recurse=False)}, m.training) for m in layers]
    try:
        yield
    finally:
        for module, (buffers, training) in zip(layers, stored, strict=True):
            for name, value in buffers.items():
                getattr(module, name).copy_(value)
            module.train(training)


@contextmanager
def batchnorm_reestimated(model: nn.Module, batches: Iterable[Tensor]) -> Iterator[None]:
    """`reestimate_batchnorm_` while the block runs; the stored statistics come back, also after an error."""
    with batchnorm_kept(model):
        reestimate_batchnorm_(model, batches)
        yield
