"""Quantizers go into a network and out of it: fixed ones for a while, or learned ones for training."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from quant.attention import close_attention_, open_attention_
from quant.attention_search import KNOWN_LAYOUTS
from quant.choices import GradientScale
from quant.errors import InputError
from quant.functional import check_compiler, dequantize
from quant.intercept import intercept
from quant.layers import is_quantized, quantize_layer_, restore_layer_, share_quantizer_, weight_parts
from quant.multihead import leave_fast_path_, return_to_fast_path_
from quant.network import Network, unchanged
from quant.quantizer import LSQQuantizer, Quantizer, ScaleWatch
from quant.site import Site, SiteInfo


def weight_of(model: nn.Module, info: SiteInfo) -> Tensor:
    """The weight of a site, detached; only its own rows where it is a part of a fused weight."""
    weight = model.get_submodule(info.site.module).get_parameter(info.parameter).detach()
    return weight if info.rows is None else weight[slice(*info.rows)]


@contextmanager
def quantized(net: Network, quantizers: Mapping[Site, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Fake-quantize the given sites of a network while the block runs, without training.

    A quantized weight stands in a parameter of its own, in every module that has it, and the model's own parameter
    object comes back on exit, so that it is the same bit for bit, also after an error; activations are replaced on
    their way (`intercept`).
    """
    model, sites = net.model, net.by_site
    originals: list[tuple[nn.Module, str, nn.Parameter]] = []
    replaced: set[int] = set()
    try:
        for site, quantizer in quantizers.items():
            if not site.is_weight:
                continue
            original = model.get_submodule(site.module)._parameters[sites[site].parameter]
            assert original is not None
            if id(original) not in replaced:
                own = nn.Parameter(original.detach().clone(), requires_grad=False)
                replaced.add(id(own))
                holders = [(m, name) for m in model.modules() for name, p in m._parameters.items() if p is original]
                for module, name in holders:
                    originals.append((module, name, original))
                    module._parameters[name] = own
            with torch.no_grad():
                rows = weight_of(model, sites[site])
                rows.copy_(quantizer(rows))
        with intercept(net, {site: q for site, q in quantizers.items() if not site.is_weight}):
            yield
    finally:
        for module, name, original in originals:
            module._parameters[name] = original


def attach_quantizers_(
    net: Network,
    quantizers: Mapping[Site, Quantizer],
    *,
    gradient_scale: GradientScale = "lsq",
    compiled: bool = False,
) -> None:
    """Quantize the sites of `quantizers` from now on, each with learned scales that start at the given ones.

    The network's example then runs through the model and proves that every site is executed as it was traced: as many
    elements, each on its grid. Raises InputError with all sites that were not, the model restored, and for a fused qkv
    weight whose layout is not known. `detach_quantizers_` undoes it. `gradient_scale` is that of weights; activations
    keep LSQ's. `compiled` fake-quantizes through torch.compile; InputError where that does not work.
    """
    model, sites = net.model, net.by_site
    _refuse_unknown_layouts(quantizers, sites)
    if compiled:
        check_compiler(net.device)
    watch = ScaleWatch()
    learned = {
        site: LSQQuantizer(
            start,
            elements_per_scale=max(1, sites[site].numel // start.groups),
            gradient_scale=gradient_scale if site.is_weight else "lsq",
            watch=watch,
        )
        .to(net.device)
        .train(model.training)
        for site, start in quantizers.items()
    }
    by_module: dict[str, dict[str, LSQQuantizer]] = {}
    for site, quantizer in learned.items():
        by_module.setdefault(site.module, {})[site.tensor] = quantizer
    try:
        for name, by_tensor in by_module.items():
            _attach_(net, name, by_tensor)
        _share_(net, learned)
        leave_fast_path_(model)
        # To the bit, which a GPU's compiler does not promise.
        _check_execution(net, learned)
        for quantizer in learned.values():
            quantizer.compiled = compiled
    except BaseException:
        detach_quantizers_(model)
        raise


def _refuse_unknown_layouts(quantizers: Mapping[Site, Quantizer], sites: Mapping[Site, SiteInfo]) -> None:
    """Raise InputError where rows of a fused qkv weight are to share a scale, and whose rows they are is not known."""
    unknown = [
        site.module
        for site, start in quantizers.items()
        if site.tensor == "weight" and sites[site].kind == "attn.qkv" and start.scheme.granularity != "per_channel"
    ]
    if unknown:
        raise InputError(
            f"{unknown[0]} makes query, key and value in a layout that is not known ({len(unknown)} such layers). "
            f"Known: {KNOWN_LAYOUTS}. Plan their weights per_channel, which needs no layout, or leave them out with "
            "`exclude`."
        )


def _attach_(net: Network, name: str, by_tensor: Mapping[str, LSQQuantizer]) -> None:
    model, trace = net.model, net.trace
    module = model.get_submodule(name)
    inside = {tensor: q for tensor, q in by_tensor.items() if Site(name, tensor).is_attention}
    outside = {tensor: q for tensor, q in by_tensor.items() if tensor not in inside}
    if inside:
        _open(net, name, inside)
    around = next((n for n in trace.in_proj if name in (n, f"{n}.out_proj")), None)
    if around in trace.attention and not hasattr(model.get_submodule(around), "attention_quantizers"):
        _open(net, around, {})  # by linears, whatever of it is quantized
    if outside:
        infos = [net.by_site[Site(name, tensor)] for tensor in outside]
        weights = {info.site.tensor.removeprefix("weight."): (info.rows, outside[info.site.tensor])
                   for info in infos if info.site.is_weight}  # fmt: skip
        parameters = {info.site.tensor.removeprefix("weight."): info.parameter for info in infos if info.site.is_weight}
        if not weights and name in trace.in_proj:  # its input meets them all the same
            parameters = {part: parameter for part, (parameter, _) in trace.in_proj[name].items()}
        quantize_layer_(module, weights, outside.get("input"), user=_user(net, name), parameters=parameters)


def _user(net: Network, name: str) -> nn.Module | None:
    """The module whose forward multiplies by the weight of a layer that is never called; None for one that is."""
    if name in net.trace.in_proj:
        return net.model.get_submodule(name)
    return net.model.get_submodule(net.trace.users[name]) if name in net.trace.functional else None


def _open(net: Network, name: str, inside: Mapping[str, LSQQuantizer]) -> None:
    module = net.model.get_submodule(name)
    module.attention_quantizers = nn.ModuleDict(dict(inside))
    open_attention_(module, net.trace.attention[name], module.attention_quantizers)


def _share_(net: Network, learned: Mapping[Site, LSQQuantizer]) -> None:
    """Let other modules that have a planned weight too use the quantizers of the one that owns it."""
    for site, quantizer in learned.items():
        info = net.by_site[site]
        original = net.model.get_submodule(site.module)._parameters.get(info.parameter) if site.is_weight else None
        for name in info.shared_with:
            module = net.model.get_submodule(name)
            own = next(key for key, p in module._parameters.items() if p is original)
            part = site.tensor.removeprefix("weight.")
            share_quantizer_(module, part, (info.rows, quantizer), own, user=_user(net, name))


def detach_quantizers_(model: nn.Module) -> None:
    """Undo `attach_quantizers_`: the layers are of their own classes again, with the latent weights, bit for bit."""
    for module in model.modules():
        restore_layer_(module)
        if hasattr(module, "attention_quantizers"):
            close_attention_(module)
            del module.attention_quantizers
    return_to_fast_path_(model)


def is_prepared(model: nn.Module) -> bool:
    """Whether any site of the model is quantized for training."""
    return any(is_quantized(module) or hasattr(module, "attention_quantizers") for module in model.modules())


def latent_weights(model: nn.Module) -> dict[Site, tuple[Tensor, LSQQuantizer]]:
    """The latent weight, with gradient, and the quantizer of every quantized weight site, in the model's order."""
    found = {}
    for name, module in model.named_modules():
        if is_quantized(module):
            for tensor, latent, quantizer in weight_parts(module):
                site = Site(name, tensor if tensor == "weight" else f"weight.{tensor}")
                found[site] = (latent, quantizer)
    return found


def _check_execution(net: Network, learned: Mapping[Site, LSQQuantizer]) -> None:
    """Raise InputError unless the example passes every quantizer exactly as it passed the floating-point model."""
    expected = {site: net.by_site[site].numel if site.is_weight else net.trace.elements[site] for site in learned}
    elements = dict.fromkeys(learned, 0)
    off_grid: set[Site] = set()

    def watch(site: Site) -> Callable[..., None]:
        def hook(quantizer: LSQQuantizer, args: tuple[Tensor], output: Tensor) -> None:
            elements[site] += output.numel()
            grid = dequantize(quantizer.codes(args[0]), quantizer.scale, quantizer.offset)
            if not torch.equal(output, grid.reshape(output.shape).to(output.dtype)):
                off_grid.add(site)

        return hook

    handles = [quantizer.register_forward_hook(watch(site)) for site, quantizer in learned.items()]
    try:
        with unchanged(net.model), torch.no_grad():
            net(net.example)
    finally:
        for handle in handles:
            handle.remove()
    wrong = [
        f"{site} ({elements[site]} of {expected[site]} elements)"
        for site in learned
        if site in off_grid or not _as_traced(site, elements[site], expected[site])
    ]
    if wrong:
        raise InputError(
            f"{len(wrong)} of {len(learned)} planned sites were not executed as planned: {', '.join(wrong)}. "
            "Leave these modules out with `exclude`, and plan again."
        )


def _as_traced(site: Site, elements: int, expected: int) -> bool:
    """Whether a site saw what it should: an activation every element once, a weight its own, once a use."""
    return elements > 0 and (elements % expected == 0 if site.is_weight else elements == expected)
