"""Networks of a trace that a test has made itself, for the functions that take a Network."""

from collections.abc import Iterable, Mapping

from torch import nn

from quant import batches
from quant.network import Network
from quant.site import Site, SiteInfo
from quant.trace import Trace


def net_of(
    model: nn.Module, trace: Trace, sites: Iterable[SiteInfo] | Mapping[Site, SiteInfo], name: str = "m"
) -> Network:
    """A network with this trace and these sites, not checked."""
    net = Network.__new__(Network)
    net.model, net.name, net.trace, net.infos = (
        model,
        name,
        trace,
        list(sites.values() if isinstance(sites, Mapping) else sites),
    )
    net.forward, net.samples = batches.forward, batches.samples
    return net
