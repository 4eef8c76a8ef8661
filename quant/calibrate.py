"""Ranges of activations, the quantizers made from them, and BatchNorm statistics after quantizing."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from quant.errors import InputError
from quant.functional import to_groups
from quant.intercept import intercept
from quant.prepare import weight_of
from quant.quantizer import Quantizer
from quant.range_estimators import Estimator, estimate_range
from quant.scheme import Granularity, QuantScheme, axis_and_groups, default_granularity, default_range
from quant.site import Site, SiteInfo
from quant.trace import Trace

SAMPLE = 2**16
"""Values kept of each activation for the search of its scale; its extremes are kept besides."""
_GOLDEN = 0.6180339887498949


class ActivationSample:
    """Values of one activation, an evenly spread sample of each batch together with the extremes of each group.

    `groups` values share a scale; `batches` is how many updates will come, so that the sample holds at most `SAMPLE`
    values. The places follow the golden ratio: the same for the same shape, and in step with no axis.
    """

    def __init__(self, axis: int, groups: int, batches: int) -> None:
        self.axis, self.groups = axis, groups
        self.per_group = max(256, SAMPLE // (groups * max(1, batches)))
        self.parts: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """Add one batch; returns nothing, so that it can stand as a handler that leaves the tensor as it is."""
        grouped = to_groups(x.detach(), self.axis, self.groups).float()
        outer, _, inner = grouped.shape
        total = outer * inner
        if total <= self.per_group:
            part = grouped.transpose(0, 1).reshape(self.groups, -1)
        else:
            places = ((torch.arange(1, self.per_group + 1, dtype=torch.float64) * _GOLDEN).frac() * total).long()
            places = places.to(grouped.device)
            part = grouped[places // inner, :, places % inner].T
        extremes = torch.stack((grouped.amin(dim=(0, 2)), grouped.amax(dim=(0, 2))), dim=1)
        self.parts.append(torch.cat((part, extremes), dim=1))

    @property
    def values(self) -> Tensor:
        """All that was kept: (groups, values)."""
        return torch.cat(self.parts, dim=1)


def observe_activations(
    model: nn.Module,
    trace: Trace,
    sites: Mapping[Site, SiteInfo],
    batches: Iterable[Tensor],
    *,
    count: int,
    granularity: Granularity | None = None,
) -> dict[Site, ActivationSample]:
    """A sample of every activation site among `sites`, of the floating-point model over `count` batches of images."""
    samples = {}
    for site, info in sites.items():
        if not site.is_weight:
            chosen = granularity_of(info, model, granularity)
            samples[site] = ActivationSample(*axis_and_groups(info, chosen), count)
    with torch.no_grad(), intercept(model, trace, {site: sample.update for site, sample in samples.items()}):
        for images in batches:
            model(images)
    for site, sample in samples.items():
        if not sample.parts:
            raise InputError(f"{site} was not executed on the calibration images; leave it out with --exclude.")
        if not torch.isfinite(sample.values).all():
            raise InputError(
                f"{site} holds NaN or Inf on the calibration images; look for the cause before quantizing."
            )
    return samples


def granularity_of(info: SiteInfo, model: nn.Module, granularity: Granularity | None) -> Granularity:
    """The granularity asked for, which concerns weights that have such an axis, else the site's default."""
    has_axis = {"per_tensor": True, "per_channel": info.channels > 0, "per_head": info.heads > 0}
    if granularity is not None and info.site.is_weight and has_axis[granularity]:
        return granularity
    return default_granularity(info, model.get_submodule(info.site.module))


def make_quantizer(
    model: nn.Module,
    info: SiteInfo,
    bit_width: int,
    *,
    sample: ActivationSample | None,
    estimator: Estimator,
    granularity: Granularity | None = None,
    scheme: QuantScheme | None = None,
) -> Quantizer:
    """The quantizer of one site at `bit_width`, its scale estimated from the weight or from the activation sample.

    `scheme` fixes sign, offset and granularity (a plan does); else the defaults hold.
    """
    if info.site.is_weight:
        values, signed, offset = weight_of(model, info), True, False
    else:
        assert sample is not None
        values = sample.values
        signed, offset = default_range(info, values.min().item(), values.max().item())
    if scheme is None:
        chosen = granularity_of(info, model, granularity)
        scheme = QuantScheme(bit_width=bit_width, signed=signed, offset=offset, granularity=chosen)
    axis, groups = axis_and_groups(info, scheme.granularity)
    if info.site.is_weight:
        values = to_groups(values, axis, groups).transpose(0, 1).reshape(groups, -1)
    scale, zero, degenerate = estimate_range(values, scheme, estimator)
    return Quantizer(scheme=scheme, scale=scale, offset=zero, axis=axis, groups=groups, degenerate=degenerate)


def batchnorms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The BatchNorm layers that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]


@contextmanager
def batchnorm_reestimated(model: nn.Module, batches: Iterable[Tensor]) -> Iterator[None]:
    """Let BatchNorm take its statistics from `batches` through the model as it now is; the stored ones come back.

    Running mean and variance are averages over batches weighted by their images; all else stays in evaluation mode.
    Without it the sensitivity of a convolution is mostly that of stale statistics. InputError for a single image.
    """
    layers = batchnorms(model)
    stored = [({k: v.clone() for k, v in m.named_buffers(recurse=False)}, m.momentum, m.training) for m in layers]
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
                model(images)
        if layers and not seen:
            raise InputError("BatchNorm cannot take its statistics from batches of one image; raise --batch-size.")
        for module in layers:
            module.eval()
        yield
    finally:
        for module, (buffers, momentum, training) in zip(layers, stored, strict=True):
            for name, value in buffers.items():
                getattr(module, name).copy_(value)
            module.momentum = momentum
            module.train(training)
