"""BatchNorm statistics after quantizing: re-estimated, for a while or for good."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from quant import batches
from quant.errors import InputError


def batchnorms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The BatchNorm layers that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]


def reestimate_batchnorm_(model: nn.Module, data: Iterable[Any], forward: Callable[[Any], Any] | None = None) -> None:
    """Let BatchNorm take its statistics from batches through the model as it now is; it stays in evaluation mode.

    Running mean and variance are averages over all calls of a layer in all batches, weighted by their samples: a layer
    that is called several times (a recurrent network, shared towers) sees the mean of its calls. Without it the
    sensitivity of a convolution is mostly that of stale statistics. `forward(batch)` runs the model in another way than
    by calling it with the batch's inputs; layers that it leaves out keep mean 0 and variance 1. Models without
    BatchNorm stay as they are. Raises InputError where every batch holds a single sample.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    >>> reestimate_batchnorm_(model, [torch.randn(8, 3, 5, 5), torch.randn(4, 3, 5, 5)])
    """
    run = partial(batches.forward, model) if forward is None else forward
    layers = batchnorms(model)
    if not layers:
        return
    momenta = [module.momentum for module in layers]
    seen = dict.fromkeys(layers, 0)  # samples, once for each call
    count = 0

    def weigh(module: Any, _args: Any) -> None:
        seen[module] += count
        module.momentum = count / seen[module]

    handles = []
    try:
        for module in layers:
            module.reset_running_stats()
            module.train()
            handles.append(module.register_forward_pre_hook(weigh))
        found = False
        with torch.no_grad():
            for batch in data:
                count = batches.samples(batch)
                if count < 2:  # one sample alone has no variance at a 1 x 1 map
                    continue
                found = True
                run(batch)
        if not found:
            raise InputError(
                "BatchNorm cannot take its statistics from batches of one sample. Give at least two samples in a batch."
            )
    finally:
        for handle in handles:
            handle.remove()
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
def batchnorm_reestimated(
    model: nn.Module, data: Iterable[Any], forward: Callable[[Any], Any] | None = None
) -> Iterator[None]:
    """`reestimate_batchnorm_` while the block runs; the stored statistics come back, also after an error."""
    with batchnorm_kept(model):
        reestimate_batchnorm_(model, data, forward)
        yield
