"""A trained, quantized network as one file of packed integer codes, and back into a fresh network."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quant.attention import AttentionForm, open_attention_
from quant.errors import InputError, first_line, system_error
from quant.insertion import detach_quantizers_, is_prepared
from quant.layers import is_quantized, quantize_layer_, share_quantizer_
from quant.multihead import leave_fast_path_
from quant.pack import load_packed_, pack
from quant.packed_layout import FORMAT, VERSION, PackedLayout, PackedSite
from quant.quantizer import LSQQuantizer, Quantizer, ScaleWatch
from quant.scheme import QuantScheme

_PLACES = ("scores", "softmaxes", "values", "values_first")


def save_packed(model: nn.Module, path: str | Path) -> None:
    """Write a model prepared by `prepare_qat_` as packed integer codes: one safetensors file, whole or not at all.

    It holds the codes of each quantized weight (1 to 8 or 16 bits each, bit-packed), scales and offsets (float32), all
    other parameters and buffers as they are, and how each site is quantized: nothing else is needed to load it into a
    fresh network, no plan and no example. Latent weights are not kept. Its size is what `plan.totals.size_bytes` says.

    Raises InputError for a model that is not prepared, and where the file cannot be written.

    >>> import tempfile
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> save_packed(model, "model.safetensors")
    Traceback (most recent call last):
    ...
    quant.errors.InputError: the model is in floating point: there is nothing to pack. Train it with a plan.
    """
    tensors, layout = pack(model), packed_layout(model)
    metadata = {FORMAT: layout.text(_digest(layout, tensors))}
    target = Path(path)
    handle, temporary = None, None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        os.close(handle)
        save_file(tensors, temporary, metadata=metadata)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except Exception as error:
        if system_error(error) is None:
            raise
        raise InputError(f"{target} cannot be written: {first_line(error)}.") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def load_packed(model: nn.Module, path: str | Path) -> nn.Module:
    """Fill a fresh floating-point model with a file of `save_packed`; returns it prepared, in evaluation mode.

    Its answers are those of the model that was saved. It can be trained on; its latent weights then start at the values
    that the codes stand for. `restore_float_` makes a floating-point model of it. No code from the file is run.

    Raises InputError where the file is not a packed model, damaged, or of another network, and for a model that is
    prepared already; the model is then as it was.

    >>> load_packed(nn.Linear(2, 2), "nothing.safetensors")
    Traceback (most recent call last):
    ...
    quant.errors.InputError: there is no file nothing.safetensors.
    """
    if is_prepared(model):
        raise InputError("the model is prepared already; load a packed file into a fresh one, or restore_float_ it.")
    layout, tensors = read_packed(Path(path))
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    try:
        _prepare_(model, layout, f"{path}")
        load_packed_(model, tensors, source=f"{path}")
    except BaseException:
        detach_quantizers_(model)
        model.load_state_dict(before)
        raise
    return model.eval()


def packed_layout(model: nn.Module) -> PackedLayout:
    """How the sites of a prepared model are quantized."""
    sites: list[PackedSite] = []
    owners: dict[int, int] = {}
    attention: dict[str, list[Any]] = {}
    for name, module in model.named_modules():
        if is_quantized(module):
            layer: Any = module
            for tensor, quantizer in (layer._modules.get("weight_quantizers") or {}).items():
                owners[id(quantizer)] = len(sites)
                part = tensor if tensor == "weight" else f"weight.{tensor}"
                site = _site(name, part, quantizer)
                parameter = layer.weight_parameters.get(tensor, "weight")
                sites.append(replace(site, rows=layer.weight_rows[tensor], parameter=parameter, called=layer.called))
            if isinstance(layer.input_quantizer, LSQQuantizer):
                sites.append(replace(_site(name, "input", layer.input_quantizer), called=layer.called))
        if hasattr(module, "attention_quantizers"):
            opened: Any = module
            form = opened.attention_form
            attention[name] = [int(form.fused), *(sorted(getattr(form, place)) for place in _PLACES)]
            sites += [_site(name, tensor, q) for tensor, q in opened.attention_quantizers.items()]
    shared = []
    for name, module in model.named_modules():
        if is_quantized(module) and "weight_quantizers" not in module._modules:
            layer = module
            for tensor, quantizer in layer.weight_quantizers.items():
                parameter = layer.weight_parameters.get(tensor, "weight")
                shared.append([owners[id(quantizer)], name, parameter, int(layer.called)])
    return PackedLayout(sites=tuple(sites), attention=attention, shared=shared)


def read_packed(path: Path) -> tuple[PackedLayout, dict[str, Tensor]]:
    """The layout and the tensors of a packed file, checked against its checksum."""
    if not path.is_file():
        raise InputError(f"there is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(FORMAT)
        tensors = load_file(path)
    except Exception as error:  # damaged files raise whatever their reader stumbles over
        raise InputError(
            f"{path} cannot be read ({first_line(error)}): it is not a packed model, or cut short."
        ) from error
    if text is None:
        raise InputError(f"{path} is not a packed model. Expected a file of save_packed.")
    try:
        content = json.loads(text)
        version = content.get("version")
        if version != VERSION:
            raise InputError(f"{path}: version is {version!r}, expected {VERSION}. Export the model again.")
        layout = PackedLayout(
            sites=tuple(map(PackedSite.of, content["sites"])), attention=content.get("attention", {}),
            shared=content.get("shared", ()),
        )  # fmt: skip
        intact = content["sha256"] == _digest(layout, tensors) and layout.text(content["sha256"]) == text
    except InputError:
        raise
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise InputError(f"{path} is damaged or was changed: its checksum is of another content. Export it again.")
    return layout, tensors


def packed_scheme(site: PackedSite) -> QuantScheme:
    """How a site of a packed file is quantized."""
    return QuantScheme(
        bit_width=site.bit_width, signed=site.signed, offset=site.offset,
        granularity=site.granularity,  # type: ignore[arg-type]  # QuantScheme refuses others
    )  # fmt: skip


def _site(module: str, tensor: str, quantizer: Any) -> PackedSite:
    scheme = quantizer.scheme
    return PackedSite(
        module=module, tensor=tensor, bit_width=scheme.bit_width, granularity=scheme.granularity, signed=scheme.signed,
        offset=scheme.offset, axis=quantizer.axis, groups=quantizer.groups, elements=quantizer.elements_per_scale,
    )  # fmt: skip


def _prepare_(model: nn.Module, layout: PackedLayout, source: str) -> None:
    """Quantize the sites of the layout; InputError where the model has not what it names."""
    watch, quantizers = ScaleWatch(), list[LSQQuantizer]()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modules = dict(model.named_modules())
    named = [site.module for site in layout.sites] + [*layout.attention] + [str(use[1]) for use in layout.shared]
    missing = next((name for name in named if name not in modules), None)
    if missing is not None:
        raise InputError(f"{source} is of another network: {type(model).__name__} has no module {missing!r}.")
    by_module: dict[str, list[tuple[PackedSite, LSQQuantizer]]] = {}
    for site in layout.sites:
        offset = torch.zeros(site.groups) if site.offset else None
        start = Quantizer(
            scheme=packed_scheme(site), scale=torch.ones(site.groups), offset=offset, axis=site.axis, groups=site.groups
        )
        quantizers.append(LSQQuantizer(start, elements_per_scale=site.elements, watch=watch).to(device).eval())
        by_module.setdefault(site.module, []).append((site, quantizers[-1]))
    for name, form in layout.attention.items():
        inside = {site.tensor: q for site, q in by_module.get(name, []) if _is_inside(site)}
        modules[name].attention_quantizers = nn.ModuleDict(inside)
        fused, *places = form
        found = AttentionForm(module=name, fused=bool(fused), **dict(zip(_PLACES, map(frozenset, places), strict=True)))
        open_attention_(modules[name], found, modules[name].attention_quantizers)
    for name, items in by_module.items():
        outside = [(site, q) for site, q in items if not _is_inside(site)]
        if outside:
            _quantize_layer_(modules, name, outside, source)
    for place, name, parameter, called in layout.shared:
        site = layout.sites[place]
        part = site.tensor.removeprefix("weight.")
        user = None if called else _user(modules, name)
        share_quantizer_(modules[name], part, (site.rows, quantizers[place]), parameter, user=user)
    leave_fast_path_(model)


def _quantize_layer_(
    modules: Mapping[str, nn.Module], name: str, items: list[tuple[PackedSite, LSQQuantizer]], source: str
) -> None:
    weights, parameters, of_input = {}, {}, None
    for site, quantizer in items:
        if site.tensor == "input":
            of_input = quantizer
            continue
        part = site.tensor.removeprefix("weight.")
        weights[part], parameters[part] = (site.rows, quantizer), site.parameter
        weight = modules[name]._parameters.get(site.parameter)
        if weight is None or (site.rows is not None and site.rows[1] > len(weight)):
            kind = type(modules[name]).__name__
            raise InputError(f"{source} is of another network: {name}, a {kind}, has no such {site.parameter}.")
    called = all(site.called for site, _ in items)
    quantize_layer_(
        modules[name], weights, of_input, user=None if called else _user(modules, name), parameters=parameters
    )


def _user(modules: Mapping[str, nn.Module], name: str) -> nn.Module:
    """The module whose forward multiplies by the weight of a layer that is never called."""
    return modules[name] if isinstance(modules[name], nn.MultiheadAttention) else modules[name.rpartition(".")[0]]


def _is_inside(site: PackedSite) -> bool:
    return site.tensor != "input" and not site.tensor.startswith("weight")


def _digest(layout: PackedLayout, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the layout and of names, dtypes, shapes and bytes of the tensors."""
    digest = hashlib.sha256(layout.text().encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        digest.update(x.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
