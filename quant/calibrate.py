"""Calibration: what activations look like, and the quantizers made from them and from the weights."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quant.bit_plan import PlannedSite, check_known_sites
from quant.choices import Estimator, Granularity
from quant.errors import InputError
from quant.functional import to_groups
from quant.insertion import weight_of
from quant.intercept import intercept
from quant.network import Forward, Network
from quant.quantizer import Quantizer
from quant.range_estimators import estimate_range
from quant.scheme import QuantScheme, axis_and_groups, default_granularity, default_range
from quant.site import Site, SiteInfo

SAMPLE = 2**16
"""About how many values are kept of each activation for the search of its scale; its extremes are kept besides."""
_LEAST = 256  # values of each group and batch


class ActivationSample:
    """Values of one activation, a random sample of each batch together with the extremes of each group.

    `groups` values share a scale; `batches` is how many updates will come, so that about `SAMPLE` values are kept in
    all. The places are drawn by a generator of its own: the same for the same shapes. `weights` says how many values of
    the activation each kept one stands for: an extreme for itself, so that the number of batches moves no scale.
    """

    def __init__(self, axis: int, groups: int, batches: int) -> None:
        self.axis, self.groups = axis, groups
        self.per_group = max(_LEAST, SAMPLE // (groups * max(1, batches)))
        self.parts: list[Tensor] = []
        self.part_weights: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(0)

    def update(self, x: Tensor) -> None:
        """Add one batch; returns nothing, so that it can stand as a handler that leaves the tensor as it is."""
        grouped = to_groups(x.detach(), self.axis, self.groups).float()
        outer, _, inner = grouped.shape
        total = outer * inner
        if total <= self.per_group:
            self.parts.append(grouped.transpose(0, 1).reshape(self.groups, -1))
            self.part_weights.append(torch.ones(total, device=x.device))
            return
        places = torch.randint(total, (self.per_group,), generator=self.generator).to(grouped.device)
        part = grouped[places // inner, :, places % inner].T
        extremes = torch.stack((grouped.amin(dim=(0, 2)), grouped.amax(dim=(0, 2))), dim=1)
        self.parts.append(torch.cat((part, extremes), dim=1))
        weights = torch.ones(self.per_group + 2, device=x.device)
        weights[:-2] = (total - 2) / self.per_group
        self.part_weights.append(weights)

    @property
    def values(self) -> Tensor:
        """All that was kept: (groups, values)."""
        return torch.cat(self.parts, dim=1)

    @property
    def weights(self) -> Tensor:
        """How many values of the activation each kept one stands for: (values,)."""
        return torch.cat(self.part_weights)


def observe_activations(
    net: Network,
    sites: Iterable[Site],
    data: Iterable[Any],
    *,
    count: int,
    granularities: Mapping[Site, Granularity] | None = None,
    forward: Forward | None = None,
) -> dict[Site, ActivationSample]:
    """A sample of every activation site among `sites`, of the floating-point model over `count` batches.

    `granularities` says which values share a scale where that is not the default.
    """
    samples = {}
    for site in sites:
        if not site.is_weight:
            info = net.by_site[site]
            chosen = (granularities or {}).get(site) or granularity_of(info, net.model, None)
            samples[site] = ActivationSample(*axis_and_groups(info, chosen), count)
    if not samples:
        return samples
    with torch.no_grad(), intercept(net, {site: sample.update for site, sample in samples.items()}):
        for batch in data:
            (forward or net.forward)(net.model, batch)
    for site, sample in samples.items():
        if not sample.parts:
            raise InputError(f"{site} was not executed on the calibration data; leave its module out with `exclude`.")
        if not torch.isfinite(sample.values).all():
            raise InputError(f"{site} holds NaN or Inf on the calibration data; look for the cause before quantizing.")
    return samples


def granularity_of(info: SiteInfo, model: nn.Module, granularity: Granularity | None) -> Granularity:
    """The granularity asked for, which concerns weights that have such an axis, else the site's default."""
    has_axis = {"per_tensor": True, "per_channel": info.channels > 0, "per_head": info.heads > 0}
    if granularity is not None and info.site.is_weight and has_axis[granularity]:
        return granularity
    return default_granularity(info, model.get_submodule(info.site.module))


def default_scheme(
    model: nn.Module,
    info: SiteInfo,
    bit_width: int,
    *,
    sample: ActivationSample | None,
    granularity: Granularity | None = None,
) -> QuantScheme:
    """The scheme of a site where no plan says otherwise; activations choose sign and offset by their sample."""
    signed, offset = True, False
    if not info.site.is_weight:
        assert sample is not None
        signed, offset = default_range(info, sample.values.min().item(), sample.values.max().item())
    chosen = granularity_of(info, model, granularity)
    return QuantScheme(bit_width=bit_width, signed=signed, offset=offset, granularity=chosen)


def make_quantizer(
    model: nn.Module, info: SiteInfo, scheme: QuantScheme, *, sample: ActivationSample | None, estimator: Estimator
) -> Quantizer:
    """The quantizer of one site, its scale estimated from the weight, or from the activation's sample.

    ValueError if the sample was not taken at the scheme's granularity, InputError for a weight with NaN or Inf.
    """
    axis, groups = axis_and_groups(info, scheme.granularity)
    weights = None
    if info.site.is_weight:
        weight = weight_of(model, info)
        if not torch.isfinite(weight).all():
            raise InputError(f"{info.site} holds NaN or Inf; it cannot be quantized. Look for other weights.")
        values = to_groups(weight, axis, groups).transpose(0, 1).reshape(groups, -1)
    else:
        assert sample is not None
        values, weights = sample.values, sample.weights
        if len(values) != groups:
            raise ValueError(f"{info.site} was sampled in {len(values)} groups; {scheme.granularity} has {groups}.")
    scale, zero, degenerate = estimate_range(values, scheme, estimator, weights)
    return Quantizer(scheme=scheme, scale=scale, offset=zero, axis=axis, groups=groups, degenerate=degenerate)


def calibrate(
    net: Network,
    sites: Sequence[PlannedSite],
    data: Iterable[Any],
    *,
    estimator: Estimator = "mse",
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> dict[Site, Quantizer]:
    """The quantizers of planned sites, scales of weights from the weights and of activations from batches of `data`.

    Raises InputError for a site that the network has not, or not with the planned axis.
    """
    check_planned(net, sites)
    batched = data if isinstance(data, Sequence) else list(data)
    activations = {planned.site: planned.granularity for planned in sites if not planned.site.is_weight}
    samples = observe_activations(
        net, activations, batched, count=len(batched), granularities=activations, forward=forward
    )
    return {
        planned.site: make_quantizer(
            net.model, net.by_site[planned.site], scheme_of(planned), sample=samples.get(planned.site),
            estimator=estimator,
        )
        for planned in sites
    }  # fmt: skip


def check_planned(net: Network, sites: Sequence[PlannedSite], what: str = "the plan") -> None:
    """Raise InputError for a plan without sites, a site that `net` cannot quantize, or one without the planned axis."""
    if not sites:
        raise InputError(f"{what} plans no site: nothing would be quantized.")
    known = {info.site: info for info in net.infos if info.quantizable}
    check_known_sites((planned.site for planned in sites), known, what=what)
    for planned in sites:
        info = known[planned.site]
        axes = {"per_tensor": 1, "per_channel": info.channels, "per_head": info.heads}
        if not axes[planned.granularity]:
            raise InputError(
                f"{what} has {planned.site} {planned.granularity}, but {net.name} has no such axis there. Plan it "
                "per_tensor, or plan again for this model."
            )


def planned_sites(
    net: Network,
    bits: Mapping[Site, int],
    data: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> list[PlannedSite]:
    """Sites at the given bit-widths, each at its default scheme: sign and offset of inputs by what `data` shows."""
    batched = data if isinstance(data, Sequence) else list(data)
    samples = observe_activations(net, bits, batched, count=len(batched), forward=forward)
    return [
        PlannedSite.of(info.site, default_scheme(net.model, info, bits[info.site], sample=samples.get(info.site)))
        for info in net.infos
        if info.site in bits
    ]


def scheme_of(planned: PlannedSite) -> QuantScheme:
    """How a planned site is quantized."""
    return QuantScheme(
        bit_width=planned.bit_width, signed=planned.signed, offset=planned.offset, granularity=planned.granularity
    )
