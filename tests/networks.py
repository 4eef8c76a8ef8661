"""Networks of a trace that a test has made itself, for the functions that take a Network, and their logits."""

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from quant import batches
from quant.network import Network
from quant.site import Site, SiteInfo
from quant.trace import Trace


def net_of(
    model: nn.Module,
    trace: Trace,
    sites: Iterable[SiteInfo] | Mapping[Site, SiteInfo] = (),
    name: str = "m",
    *,
    blocks: Collection[str] | None = None,
) -> Network:
    """A network with this trace and these sites, not checked; `blocks` where these are not among the sites."""
    net = Network.__new__(Network)
    net.model, net.name, net.trace = model, name, trace
    net.infos = list(sites.values() if isinstance(sites, Mapping) else sites)
    net.forward, net.samples = batches.forward, batches.samples
    if blocks is not None:
        net.blocks = set(blocks)
    return net


def logits_of(model: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The model's outputs for batches of images and labels, one row an image."""
    with torch.inference_mode():
        return torch.cat([model(images) for images, _ in pairs])
