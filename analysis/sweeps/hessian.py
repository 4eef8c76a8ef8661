"""Traces of the loss's Hessian by random probes (Hutchinson, Communications in Statistics 1990)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from analysis.sweeps.fisher import frozen
from analysis.task import Task
from quant.intercept import intercept
from quant.network import Network
from quant.site import Site, SiteInfo


class HessianTrace(NamedTuple):
    """Trace of the Hessian of an image's loss, mean over images, and the standard error over the batches."""

    trace: float
    error: float


def hessian_traces(
    net: Network, sites: Mapping[Site, SiteInfo], data: Iterable[Any], task: Task
) -> dict[Site, HessianTrace]:
    """Trace of the Hessian of the task's loss by each site, over the batches `data`, whose labels are known.

    v^T H v with random signs v has the mean tr(H). One probe serves all weights of a batch and one all activations, for
    the parts of v^T H v that couple two sites have mean 0; a weight and its own input are coupled so much that one
    probe for both had five times the variance. Three backward passes and about three times the memory of training.
    Attention is computed by its formula: the fused kernels have no second derivative. The trace of an activation is
    that of ONE image. Sites that the loss does not depend on get 0.
    """
    assert task.loss is not None
    model = net.model
    activations = [site for site in sites if not site.is_weight]
    modules = list(dict.fromkeys(site.module for site in sites if site.is_weight))
    weights = {name: model.get_submodule(name).get_parameter("weight") for name in modules}
    generator = torch.Generator().manual_seed(0)
    found: dict[Site, list[tuple[float, int]]] = {site: [] for site in sites}
    shifts: dict[Site, Tensor] = {}  # zeros that are added to the activations, to differentiate by

    def shifted(site: Site) -> Any:
        def handler(x: Tensor) -> Tensor:
            shift = torch.zeros_like(x).requires_grad_()
            shifts[site] = shift  # of a module that is called twice the last call counts
            return x + shift

        return handler

    with frozen(model):
        for weight in weights.values():
            weight.requires_grad_(True)
        handlers = {site: shifted(site) for site in activations}
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), intercept(net, handlers):
            for batch in data:
                shifts.clear()
                loss = task.loss(task.forward(model, batch), batch).sum()
                leaves = [*weights.values(), *(shifts[site] for site in activations)]
                probes = [_signs(leaf, generator) for leaf in leaves]
                curvatures = _hessian_products(loss, leaves, probes, len(modules))
                products = [v * c for v, c in zip(probes, curvatures, strict=True)]
                by_module = dict(zip(modules, products, strict=False))
                by_activation = dict(zip(activations, products[len(modules) :], strict=True))
                for site, info in sites.items():
                    product = by_activation.get(site)
                    if product is None:
                        product = by_module[site.module][slice(*(info.rows or (None,)))]
                    found[site].append((product.sum(dtype=torch.float64).item(), task.samples(batch)))
    return {site: _mean(values) for site, values in found.items()}


def _hessian_products(loss: Tensor, leaves: Sequence[Tensor], probes: Sequence[Tensor], first: int) -> list[Tensor]:
    """H v of the `first` leaves among themselves, and of the others; zeros where the loss or its slope is constant."""
    if not loss.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    gradients = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
    found: list[Tensor] = []
    for group in (slice(first), slice(first, None)):
        dependent = [(g, v) for g, v in zip(gradients[group], probes[group], strict=True) if g.requires_grad]
        if not dependent:
            found += [torch.zeros_like(leaf) for leaf in leaves[group]]
            continue
        slopes, directions = zip(*dependent, strict=True)
        found += torch.autograd.grad(
            slopes, leaves[group], directions, materialize_grads=True, retain_graph=group.stop is not None
        )
    return found


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(2, like.shape, generator=generator).to(like) * 2 - 1


def _mean(values: list[tuple[float, int]]) -> HessianTrace:
    sums = torch.tensor([value for value, _ in values], dtype=torch.float64)
    images = torch.tensor([count for _, count in values], dtype=torch.float64)
    mean = sums.sum() / images.sum()
    spread = (sums - mean * images).std(correction=1).item() if len(values) > 1 else float("nan")
    return HessianTrace(trace=mean.item(), error=spread * len(values) ** 0.5 / images.sum().item())
