"""Run a network with some of its sites quantized, and give it back bit for bit."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from quant.intercept import intercept
from quant.site import Site, SiteInfo
from quant.trace import Trace


def weight_of(model: nn.Module, info: SiteInfo) -> Tensor:
    """The weight of a site, detached; only its own rows where it is a part of a fused weight."""
    weight = model.get_submodule(info.site.module).get_parameter("weight").detach()
    return weight if info.rows is None else weight[slice(*info.rows)]


@contextmanager
def quantized(
    model: nn.Module,
    trace: Trace,
    sites: Mapping[Site, SiteInfo],
    quantizers: Mapping[Site, Callable[[Tensor], Tensor]],
) -> Iterator[None]:
    """Fake-quantize the given sites of `model` while the block runs, without training.

    A quantized weight stands in a parameter of its own, and the model's own parameter object comes back on exit, so
    that it is the same bit for bit, also after an error; activations are replaced on their way (`intercept`).
    """
    originals: dict[str, nn.Parameter] = {}
    try:
        for site, quantizer in quantizers.items():
            if not site.is_weight:
                continue
            module = model.get_submodule(site.module)
            if site.module not in originals:
                original = module._parameters["weight"]
                assert original is not None
                originals[site.module] = original
                module._parameters["weight"] = nn.Parameter(original.detach().clone(), requires_grad=False)
            with torch.no_grad():
                rows = weight_of(model, sites[site])
                rows.copy_(quantizer(rows))
        with intercept(model, trace, {site: q for site, q in quantizers.items() if not site.is_weight}):
            yield
    finally:
        for name, original in originals.items():
            model.get_submodule(name)._parameters["weight"] = original
