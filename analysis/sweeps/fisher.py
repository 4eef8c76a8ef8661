"""Fisher's information at every site from one backward pass, and what it predicts of a quantization error."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from analysis.sweeps.layer_products import parameter_met, product, weight_gradients
from analysis.sweeps.noise import power
from analysis.task import Task
from quant.batches import mapped
from quant.errors import InputError
from quant.insertion import weight_of
from quant.intercept import intercept
from quant.network import Network
from quant.quantizer import Quantizer
from quant.site import Site, SiteInfo


class ErrorScores(NamedTuple):
    """What the quantization error delta of one site at one bit-width predicts; means over samples.

    With g the gradient of the task's probe, of each sample:

        fisher           1/2 (sum g delta)^2           the divergence to second order, where the mean is over probes too
        fit              1/2 tr(F) mean(delta^2)       FIT (Zandonati et al. 2022, arXiv:2210.08502), F = E[g g^T]
        output_gradient  sum g^2 delta^2 of the output  ModelOpt AutoQuantize (there with the loss's gradient)
        noise            sum delta^2 / sum x^2         of the tensor alone: the inverse of its SQNR
        squared_error    mean(delta^2)                 of an element

    `products` are sum g delta of each image (images,), float32: of several sites together, errors add before they are
    squared, 1/2 (sum over sites of products)^2, which tells how they act on each other too. That holds for weights; the
    rounding errors of an activation are others as soon as a site before it is quantized.
    """

    fisher: float
    fit: float
    output_gradient: float
    noise: float
    squared_error: float
    products: NDArray[np.float32]


class _Sums:
    """Sums over images of one site; by bit-width where the error takes part."""

    def __init__(self, bit_widths: Iterable[int]) -> None:
        self.gradient = self.signal = 0.0
        self.images = self.elements = 0
        # Numbers, not tensors: small ones that live on between large ones keep the heap from shrinking (12 GB seen).
        self.products: dict[int, list[float]] = {bits: [] for bits in bit_widths}
        self.error = dict.fromkeys(self.products, 0.0)
        self.output = dict.fromkeys(self.products, 0.0)


def fisher_scores(
    net: Network,
    quantizers: Mapping[Site, Mapping[int, Quantizer]],
    data: Iterable[Any],
    task: Task,
) -> dict[tuple[Site, int], ErrorScores]:
    """The scores of each site and bit-width of `quantizers`, over the batches `data`.

    One forward and one backward pass, and of each layer one pass for each of its sites and bit-widths, and one forward
    and backward for the gradient of its weight image by image: the square of a batch's gradient is not the sum of the
    squares. Sites without such a gradient
    (modules called more than once in a pass, tables that do not depend on the image, tensors whose leading axis is not
    that of the images) are left out.
    """
    if task.probe is None:
        raise InputError(
            f"task {task.name!r} has no `probe`, from which sensitivities are estimated. Give one, as those of "
            "analysis.tasks have, or measure them: measure_sensitivity."
        )
    once = {site: by_bits for site, by_bits in quantizers.items() if _can_be_seen(site, net)}
    pass_ = _GradientPass(net, once)
    generator = torch.Generator().manual_seed(0)
    count = 0
    handlers = pass_.handlers()
    with frozen(net.model), _differentiable_embeddings(net.model):  # which spares half of the backward pass
        for batch in data:
            pass_.images = task.samples(batch)
            count += pass_.images
            with torch.enable_grad(), intercept(net, handlers):
                probed = task.probe(task.forward(net.model, mapped(batch, _leaf)), generator)
            if not probed.requires_grad:
                raise InputError(
                    "the output does not depend on the inputs in a way that can be differentiated (a `no_grad`, "
                    "`detach` or whole numbers on the way?): no sensitivity can be estimated. Measure it instead: "
                    "measure_sensitivity."
                )
            probed.backward()
            pass_.forget()
    return {
        (site, bits): _scores(sums, bits)
        for site, sums in pass_.sums.items()
        if sums.images == count
        for bits in sums.products
    }


def _scores(sums: _Sums, bits: int) -> ErrorScores:
    products = torch.tensor(sums.products[bits], dtype=torch.float64)
    return ErrorScores(
        fisher=power(products) / (2 * sums.images),
        fit=sums.gradient / (2 * sums.images) * sums.error[bits] / sums.elements,
        output_gradient=sums.output[bits] / sums.images,
        noise=sums.error[bits] / sums.signal if sums.signal else float("nan"),
        squared_error=sums.error[bits] / sums.elements,
        products=products.float().numpy(),
    )


def _leaf(x: Tensor) -> Tensor:
    """A copy that gradients are taken by, so that every activation that depends on it has one."""
    return x.detach().clone().requires_grad_() if x.is_floating_point() else x


@contextmanager
def _differentiable_embeddings(model: nn.Module) -> Iterator[None]:
    """While the block runs, what embeddings look up can be differentiated: tokens themselves cannot."""
    handles = [
        module.register_forward_hook(lambda _module, _args, output: output.requires_grad_())
        for module in model.modules()
        if isinstance(module, nn.Embedding)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _GradientPass:
    """Sees every tensor on its way forward, and its gradient on the way back."""

    def __init__(
        self,
        net: Network,
        quantizers: Mapping[Site, Mapping[int, Quantizer]],
    ) -> None:
        self.model, self.trace, self.quantizers = net.model, net.trace, quantizers
        self.sums = {site: _Sums(by_bits) for site, by_bits in quantizers.items()}
        self.images = 0
        self._inputs: dict[str, tuple[Tensor, int]] = {}  # by module: its input on this batch, and that one's version
        self._weights: dict[str, list[SiteInfo]] = {}
        self._errors: dict[tuple[Site, int], Tensor] = {}  # of weights: the same on every batch
        for site, by_bits in quantizers.items():
            if not site.is_weight:
                continue
            self._weights.setdefault(site.module, []).append(net.by_site[site])
            weight, sums = weight_of(net.model, net.by_site[site]), self.sums[site]
            sums.elements, sums.signal = weight.numel(), power(weight)
            for bits, quantizer in by_bits.items():
                self._errors[site, bits] = quantizer(weight) - weight
                sums.error[bits] = power(self._errors[site, bits])

    def handlers(self) -> dict[Site, Any]:
        """A handler of every tensor that is needed."""
        handlers: dict[Site, Any] = {}
        layers = dict.fromkeys(site.module for site in self.quantizers if not site.is_attention)
        for module in layers:
            handlers[Site(module, "input")] = lambda x, module=module: self._input(module, x)
            output = "projection" if module in self.trace.in_proj else "output"
            handlers[Site(module, output)] = lambda y, module=module: self._output(module, y)
        for site in self.quantizers:
            if site.is_attention:
                handlers[site] = lambda x, site=site: self._watched(site, x)
        return handlers

    def forget(self) -> None:
        """Let go of the tensors of a batch."""
        self._inputs.clear()

    def _input(self, module: str, x: Tensor) -> Tensor:
        self._inputs[module] = x.detach(), x._version
        site = Site(module, "input")
        return self._watched(site, x) if site in self.quantizers else x

    def _watched(self, site: Site, x: Tensor) -> Tensor:
        """The same tensor for this use alone, so that its gradient is not that of other uses."""
        if x.requires_grad and self._by_image(site, x):
            x = x.view_as(x)
            kept = x.detach(), x._version
            x.register_hook(lambda gradient: self._activation(site, kept, gradient))
        return x

    def _by_image(self, site: Site, x: Tensor) -> bool:
        """Whether the leading axis is images, or images x windows: as many times longer as there are more images."""
        traced = self.trace.shapes[site]
        return len(x) % self.images == 0 and len(x) * self.trace.images == traced[0] * self.images

    def _activation(self, site: Site, kept: tuple[Tensor, int], gradient: Tensor) -> None:
        x, sums = _unchanged(kept, site.module), self.sums[site]
        rows = gradient.reshape(self.images, -1)
        sums.images += self.images
        sums.elements += x.numel()
        sums.gradient += power(rows)
        sums.signal += power(x)
        for bits, quantizer in self.quantizers[site].items():
            error = quantizer(x) - x
            sums.error[bits] += power(error)
            weighed = rows * error.reshape(self.images, -1)
            sums.products[bits] += weighed.sum(dim=1, dtype=torch.float64).tolist()
            if site.is_attention:  # no layer follows of which this is the input: the tensor is its own output
                sums.output[bits] += power(weighed)

    def _output(self, module: str, y: Tensor) -> None:
        x, _ = self._inputs[module]
        shown = Site(module, "input" if module in self.trace.in_proj else "output")
        if y.requires_grad and self._by_image(shown, y) and self._by_image(Site(module, "input"), x):
            y.register_hook(lambda gradient: self._layer(module, gradient))

    def _layer(self, module: str, gradient: Tensor) -> None:
        """Scores of the layer's weight, and the output gradient's of its input; layers are linear in both."""
        layer, x = self.model.get_submodule(module), _unchanged(self._inputs[module], module)
        parameter = parameter_met(module, self.trace)
        weight = layer.get_parameter(parameter).detach()
        with torch.no_grad():
            for bits, quantizer in self.quantizers.get(Site(module, "input"), {}).items():
                change = product(layer, parameter, weight, quantizer(x) - x)
                self.sums[Site(module, "input")].output[bits] += power(gradient * change)
            for info in self._weights.get(module, ()):
                sums, rows = self.sums[info.site], _rows(info)
                sums.images += self.images
                for bits in self.quantizers[info.site]:
                    error = torch.zeros_like(weight)
                    error[rows] = self._errors[info.site, bits]
                    weighed = gradient * product(layer, parameter, error, x)
                    sums.output[bits] += power(weighed)
                    sums.products[bits] += weighed.reshape(self.images, -1).sum(dim=1, dtype=torch.float64).tolist()
        if module in self._weights:
            for image_gradient in weight_gradients(layer, parameter, x.chunk(self.images), gradient.chunk(self.images)):
                for info in self._weights[module]:
                    self.sums[info.site].gradient += power(image_gradient[_rows(info)])


def _rows(info: SiteInfo) -> slice:
    return slice(*(info.rows or (None,)))


def _can_be_seen(site: Site, net: Network) -> bool:
    """Whether a site is met once in a pass: not where a module runs again, shares its weight, or has several inputs."""
    parts = net.trace.in_proj.get(site.module, {})
    several = len({parameter for parameter, _ in parts.values()}) > 1 or Site(site.module, "input") in net.trace.notes
    if net.by_site[site].shared_with or (parts and several and not site.is_attention):
        return False
    return net.trace.calls.get(site.module, 0) == 1


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """While the block runs no parameter asks for a gradient, unless the block says so; afterwards all as before."""
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in asked:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, asks in asked.items():
            parameter.requires_grad_(asks)


def _unchanged(kept: tuple[Tensor, int], module: str) -> Tensor:
    x, version = kept
    if x._version != version:
        raise InputError(
            f"the network writes into the input of {module} after that has used it, so that gradients at it are lost. "
            "Leave the module out with `exclude`."
        )
    return x
