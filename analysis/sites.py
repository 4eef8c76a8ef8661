"""Which sites a network has, in network order, with their kind, size and cost."""

import re
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from quant.errors import InputError
from quant.site import ATTENTION_TENSORS, WEIGHT_TENSORS, Site, SiteInfo
from quant.trace import Trace, trace_forward

KINDS = (
    "conv", "conv.depthwise", "conv.pointwise", "patch_embed", "downsample", "attn.qkv", "attn.query", "attn.key",
    "attn.value", "attn.softmax", "attn.proj", "mlp.fc1", "mlp.fc2", "norm", "block", "head", "other",
)  # fmt: skip
_ATTENTION_KINDS = dict(zip(ATTENTION_TENSORS, ("attn.query", "attn.key", "attn.value", "attn.softmax"), strict=True))
_TRANSFORMS_ITS_WEIGHT = re.compile(r"StdConv|CondConv|WSConv|DynamicConv")
_NORM = re.compile(r"Norm|FrozenBatchNorm|BatchNorm|Affine$")
_BLOCK = re.compile(r"(Block|Bottleneck|Residual)\w*$|^(InvertedResidual|DepthwiseSeparableConv|EdgeResidual)$")
_QUERY_KEY_VALUE = {"q": "attn.query", "k": "attn.key", "v": "attn.value", "kv": "attn.key"}


def is_layer(module: nn.Module) -> bool:
    """Whether a module has a weight that multiplies its input: a convolution or a linear."""
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))


def find_sites(
    model: nn.Module,
    images: Tensor,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    classifier: Collection[str] = (),
) -> tuple[Trace, list[SiteInfo]]:
    """What one forward pass of `images` executes, and every site that it met, in order of execution.

    `include` and `exclude` are shell patterns over module names, what they leave out is marked `excluded`; a pattern
    that meets no module is an error.
    `classifier` names the head's layers; without it the last layer executed is the head. Layers that never ran come
    last, their weights only, with a note.
    """
    trace = trace_forward(model, images)
    modules = dict(model.named_modules())
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise InputError(f"no module matches {pattern!r}; the layers are named such as {_examples(modules)}.")
    executed = [m for (m, tensor) in trace.shapes if tensor == "input" and is_layer(modules[m])]
    if not executed:
        raise InputError("the model runs no convolution and no linear: there is nothing to quantize.")
    heads = set(classifier) or set(executed[-1:])
    kinds = {name: module_kind(name, module, trace, heads, modules) for name, module in modules.items()}
    first = executed[0] if executed else None
    found = _weights_and_activations(trace, modules, kinds, pinned={first, *heads})
    for fields in found:
        name = fields["site"].module
        included = not include or any(fnmatchcase(name, pattern) for pattern in include)
        if not included or any(fnmatchcase(name, pattern) for pattern in exclude):
            fields.update(excluded=True, quantizable=False, pinned=False)
    return trace, [SiteInfo(order=order, **fields) for order, fields in enumerate(found)]


def _examples(modules: dict[str, nn.Module]) -> str:
    names = [name for name, module in modules.items() if is_layer(module)]
    return ", ".join(names[:2] + names[-1:])


def module_kind(
    name: str, module: nn.Module, trace: Trace, heads: Collection[str], modules: dict[str, nn.Module]
) -> str:
    """One of `KINDS`, from the module's class, its place, and what one forward pass showed."""
    parts = name.split(".")
    if name in heads:
        return "head"
    if not is_layer(module):
        class_name = type(module).__name__
        if _NORM.search(class_name) and next(module.children(), None) is None:
            return "norm"
        return "block" if _BLOCK.search(class_name) else "other"
    if any(part.startswith("patch_embed") for part in parts):
        return "patch_embed"
    if any(part.startswith("downsample") for part in parts):
        return "downsample"
    inside_attention = any(".".join(parts[:i]) in trace.attention for i in range(len(parts)))
    if name in trace.qkv_parts or (inside_attention and parts[-1] == "qkv"):
        return "attn.qkv"
    if inside_attention and parts[-1] in _QUERY_KEY_VALUE:
        return _QUERY_KEY_VALUE[parts[-1]]
    if inside_attention and parts[-1].startswith(("proj", "out_proj", "to_out")):
        return "attn.proj"
    if isinstance(module, nn.Linear) or _is_pointwise(module):
        siblings = name.rpartition(".")[0]
        if parts[-1] in ("fc1", "fc2") and f"{siblings}.fc1" in modules and f"{siblings}.fc2" in modules:
            return f"mlp.{parts[-1]}"
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.groups == module.in_channels and module.groups > 1:
            return "conv.depthwise"
        return "conv.pointwise" if _is_pointwise(module) else "conv"
    return "other"


def _is_pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd) and set(module.kernel_size) == {1} and module.groups == 1


def _weights_and_activations(
    trace: Trace, modules: dict[str, nn.Module], kinds: dict[str, str], pinned: set[str | None]
) -> list[dict]:
    """Fields of each SiteInfo: the executed ones in their order, a weight just before its input, then the rest."""
    rows: list[dict] = []
    owners: dict[int, str] = {}
    for site, shape in trace.shapes.items():
        module = modules[site.module]
        kind = kinds[site.module]
        if site.tensor == "input":
            if not is_layer(module):
                continue
            weights = _weight_sites(site.module, module, trace, kind)
            owner = owners.setdefault(id(module._parameters.get("weight")), site.module)
            if owner != site.module and weights[0]["numel"]:
                shared = {"quantizable": False, "numel": 0, "note": f"shares its weight with {owner}"}
                weights = [{**row, **shared} for row in weights]
            rows.extend({**row, "pinned": site.module in pinned} for row in weights)
            rows.append(
                {**_activation(site, shape, trace, module, kind), "edges": tuple(row["site"] for row in weights),
                 "pinned": site.module in pinned, "quantizable": weights[0]["quantizable"],
                 "note": weights[0]["note"]}
            )  # fmt: skip
        elif site.is_attention:
            rows.append(_activation(site, shape, trace, module, _ATTENTION_KINDS[site.tensor]))
        elif is_layer(module) or kind in ("norm", "block"):
            rows.append({**_activation(site, shape, trace, module, kind), "quantizable": False})
    seen = {row["site"].module for row in rows}
    for name, module in modules.items():
        if is_layer(module) and name not in seen:
            never = {"quantizable": False, "note": "never executed: its weight only"}
            rows.extend({**row, **never} for row in _weight_sites(name, module, trace, kinds[name]))
    return rows


def _weight_sites(name: str, module: nn.Module, trace: Trace, kind: str) -> list[dict]:
    weight = module.get_parameter("weight") if "weight" in module._parameters else None
    note, quantizable = "", True
    if weight is None or _TRANSFORMS_ITS_WEIGHT.search(type(module).__name__):
        note, quantizable = f"{type(module).__name__} transforms its weight itself: observed, not quantized", False
    elif trace.calls.get(name, 0) > 1:
        note = f"called {trace.calls[name]} times in one forward pass"
    output = trace.shapes.get(Site(name, "output"), ())
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    carrier = Site(name, "input" if transposed else "output")  # each element of it meets one row of the weight
    made = getattr(module, "weight", None) if weight is None else weight  # weight_norm makes its weight anew each time
    macs = _per_image(trace, carrier) * (made.numel() // made.shape[0]) if output and isinstance(made, Tensor) else 0
    common = {"kind": kind, "quantizable": quantizable, "note": note, "edges": (Site(name, "input"),) if output else ()}
    if weight is None:
        return [{**common, "site": Site(name, "weight"), "shape": (), "numel": 0, "macs": macs}]
    attention = next((m for m in trace.attention if name.startswith(f"{m}.")), None)
    heads = trace.shapes[Site(attention, "value")][1] if attention and _has_heads(trace, attention) else 0
    parts = trace.qkv_parts.get(name)
    if parts:
        return [
            {**common, "site": Site(name, f"weight.{part}"), "shape": (stop - start, weight.shape[1]),
             "numel": (stop - start) * weight.shape[1], "channel_axis": 0, "channels": stop - start, "head_axis": 0,
             "heads": heads, "rows": (start, stop), "macs": macs // 3}
            for part, (start, stop) in parts.items()
        ]  # fmt: skip
    by_columns = kind == "attn.proj" and heads > 0 and weight.shape[1] % heads == 0
    channel_axis = 1 if transposed else 0
    return [
        {**common, "site": Site(name, "weight"), "shape": tuple(weight.shape), "numel": weight.numel(),
         "channel_axis": channel_axis, "channels": weight.shape[channel_axis], "head_axis": 1 if by_columns else -1,
         "heads": heads if by_columns else 0, "macs": macs}
    ]  # fmt: skip


def _per_image(trace: Trace, site: Site) -> int:
    """Elements of a site in the forward pass of one image, over all its calls.

    A tensor whose first axis holds no images (a table of relative positions) is computed once, whatever their number.
    """
    shape = trace.shapes[site]
    batched = bool(shape) and shape[0] % trace.images == 0
    return trace.elements[site] // (trace.images if batched else 1)


def _has_heads(trace: Trace, module: str) -> bool:
    return len(trace.shapes[Site(module, "value")]) == 4


def _activation(site: Site, shape: tuple[int, ...], trace: Trace, module: nn.Module, kind: str) -> dict:
    """Fields of an activation: elements of one image, and which axis holds channels or heads."""
    per_image = _per_image(trace, site)
    windows, rest = divmod(shape[0], trace.images) if shape else (0, 0)
    own_shape = tuple(shape[1:]) if windows == 1 and not rest else (windows, *shape[1:])
    row: dict = {"site": site, "kind": kind, "shape": own_shape, "numel": per_image}
    if site.is_attention:
        if len(shape) == 4:
            row.update(head_axis=1, heads=shape[1])
        product = {"query": ("key", -2), "attention": ("value", -1)}.get(site.tensor)
        other = {"query": "key", "key": "query", "attention": "value", "value": "attention"}[site.tensor]
        row["edges"] = (Site(site.module, other),)
        if product:
            row["macs"] = per_image * trace.shapes[Site(site.module, product[0])][product[1]]
        return row
    if len(shape) > 1:
        axis = _channel_axis(shape, module)
        row.update(channel_axis=axis, channels=shape[axis])
    return row


def _channel_axis(shape: tuple[int, ...], module: nn.Module) -> int:
    """Axis 1 for convolutions and norms over planes, the last for linears and LayerNorm; blocks as their last layer.

    A block whose last layer is a linear may still hand on planes (ConvNeXt): the axis of that layer's width decides.
    """
    if len(shape) < 4 or isinstance(module, nn.Linear):
        return len(shape) - 1 if not isinstance(module, nn.modules.conv._ConvNd) else 1
    layers = [m for m in module.modules() if is_layer(m)]
    if not layers:
        return 1 if re.search(r"2d|BatchNorm|GroupNorm", type(module).__name__) else len(shape) - 1
    if isinstance(layers[-1], nn.Linear) and shape[-1] == layers[-1].out_features:
        return len(shape) - 1
    return 1


def select_sites(sites: Sequence[SiteInfo], tensors: Sequence[str]) -> list[SiteInfo]:
    """The sites that can be quantized whose tensor is asked for, in network order.

    `tensors` holds weight, input, query, key, value, softmax (the site `attention` alone), or attention for all four
    inside attention.
    """
    groups = {
        "weight": WEIGHT_TENSORS, "input": ("input",), "attention": ATTENTION_TENSORS, "query": ("query",),
        "key": ("key",), "value": ("value",), "softmax": ("attention",),
    }  # fmt: skip
    unknown = [name for name in tensors if name not in groups]
    if unknown:
        raise InputError(f"--tensors {unknown[0]!r} is unknown; choose from {', '.join(groups)}.")
    wanted = {tensor for name in tensors for tensor in groups[name]}
    return [info for info in sites if info.quantizable and info.site.tensor in wanted]
