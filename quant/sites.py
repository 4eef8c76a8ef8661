"""Which sites a network has, in network order, with their kind, size and cost."""

import re
from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from quant import batches
from quant.errors import InputError
from quant.site import ATTENTION_TENSORS, WEIGHT_TENSORS, Site, SiteInfo
from quant.trace import Trace, trace_forward

KINDS = (
    "conv", "conv.depthwise", "conv.pointwise", "patch_embed", "downsample", "attn.qkv", "attn.query", "attn.key",
    "attn.value", "attn.softmax", "attn.proj", "mlp.fc1", "mlp.fc2", "norm", "block", "head", "other",
)  # fmt: skip
TENSOR_GROUPS = {
    "weight": WEIGHT_TENSORS, "input": ("input",), "attention": ATTENTION_TENSORS, "query": ("query",),
    "key": ("key",), "value": ("value",), "softmax": ("attention",),
}  # fmt: skip
"""What selects sites by their tensor."""
_ATTENTION_KINDS = dict(zip(ATTENTION_TENSORS, ("attn.query", "attn.key", "attn.value", "attn.softmax"), strict=True))
_TRANSFORMS_ITS_WEIGHT = re.compile(r"StdConv|CondConv|WSConv|DynamicConv")
_NORM = re.compile(r"Norm|Affine$")
_NORM_OF_PLANES = re.compile(r"2d|BatchNorm|GroupNorm")
_BLOCK = re.compile(
    r"Block|Bottle2?neck|Residual|DepthwiseSeparable|EncoderLayer|TransformerLayer|XceptionModule|SelectiveKernelBasic"
    r"|PreActBasic|DenseLayer|Cell(Stem)?\d?$|^(Inception[A-E]|Reduction[AB]|Mixed\da|Transformer|Outlooker|ConvEncoder)$"
)
_QUERY_KEY_VALUE = {"q": "attn.query", "k": "attn.key", "v": "attn.value", "kv": "attn.key"}


def is_layer(module: nn.Module) -> bool:
    """Whether a module has a weight that multiplies its input: a convolution or a linear."""
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))


def find_sites(
    model: nn.Module,
    batch: Any,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    classifier: Collection[str] = (),
    forward: Callable[[nn.Module, Any], Any] = batches.forward,
    samples: Callable[[Any], int] = batches.samples,
) -> tuple[Trace, list[SiteInfo]]:
    """What one forward pass of `batch` executes, and every site that it met, in order of execution.

    `include` and `exclude` are shell patterns over module names, what they leave out is marked `excluded`; a pattern
    that meets no module is an error.
    `classifier` names the head's layers; without it the last layer executed is the head. Layers that never ran come
    last, their weights only, with a note.
    """
    trace = trace_forward(model, batch, forward, samples)
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
        if _NORM.search(class_name) and not any(is_layer(inside) for inside in module.modules()):
            return "norm"  # also one that holds its activation function
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
            weights = _weight_sites(site.module, module, trace, kind, modules)
            owner = owners.setdefault(id(module._parameters.get("weight")), site.module)
            if owner != site.module and weights[0]["numel"]:
                shared = {"quantizable": False, "numel": 0, "note": f"shares its weight with {owner}"}
                weights = [{**row, **shared} for row in weights]
            rows.extend({**row, "pinned": site.module in pinned} for row in weights)
            rows.append(
                {**_activation(site, shape, trace, module, kind, weights[0]["note"]),
                 "edges": tuple(row["site"] for row in weights), "pinned": site.module in pinned,
                 "same": trace.same.get(site),
                 "quantizable": weights[0]["quantizable"]}
            )  # fmt: skip
        elif site.is_attention:
            rows.append(_activation(site, shape, trace, module, _ATTENTION_KINDS[site.tensor]))
        elif is_layer(module) or kind in ("norm", "block"):
            rows.append({**_activation(site, shape, trace, module, kind), "quantizable": False})
    seen = {row["site"].module for row in rows}
    for name, module in modules.items():
        if is_layer(module) and name not in seen:
            note = trace.notes.get(Site(name, "weight"), "never executed: its weight only")
            never = {"quantizable": False, "note": note}
            rows.extend({**row, **never} for row in _weight_sites(name, module, trace, kinds[name], modules))
    return rows


def _weight_sites(name: str, module: nn.Module, trace: Trace, kind: str, modules: dict[str, nn.Module]) -> list[dict]:
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
    parts, heads = trace.qkv_parts.get(name), 0
    attention = next((m for m in trace.attention if name.startswith(f"{m}.")), None)
    if attention is not None:
        heads = _heads(Site(attention, "value" if parts else "query"), modules[attention], trace)[1]
    if parts:
        return [
            {**common, "site": Site(name, f"weight.{part}"), "shape": (stop - start, weight.shape[1]),
             "numel": (stop - start) * weight.shape[1], "channel_axis": 0, "channels": stop - start, "head_axis": 0,
             "heads": heads, "rows": (start, stop), "macs": macs // 3}
            for part, (start, stop) in parts.items()
        ]  # fmt: skip
    by_columns = kind == "attn.proj" and heads > 0 and weight.shape[1] % heads == 0
    # Axis 1 of a grouped transposed convolution holds the output channels of one group, those of all groups mixed.
    mixed = isinstance(module, nn.modules.conv._ConvTransposeNd) and module.groups > 1
    channel_axis = -1 if mixed else int(transposed)
    return [
        {**common, "site": Site(name, "weight"), "shape": tuple(weight.shape), "numel": weight.numel(),
         "channel_axis": channel_axis, "channels": 0 if mixed else weight.shape[channel_axis],
         "head_axis": 1 if by_columns else -1, "heads": heads if by_columns else 0, "macs": macs}
    ]  # fmt: skip


def _per_image(trace: Trace, site: Site) -> int:
    """Elements of a site in the forward pass of one image, over all its calls.

    A tensor whose first axis holds no images (a table of relative positions) is computed once, whatever their number.
    """
    shape = trace.shapes[site]
    batched = bool(shape) and shape[0] % trace.images == 0
    return trace.elements[site] // (trace.images if batched else 1)


def _heads(site: Site, module: nn.Module, trace: Trace) -> tuple[int, int, str]:
    """The axis and number of the heads of query, key, value or attention, -1 and 0 where unknown; and a note on why.

    A batch axis as long as the module's own number of heads is theirs, the first of four axes where it states none.
    Windows may be as many as the heads, and heads may be folded into the batch: then none is taken for the heads,
    unless qkv's parts were found by their values as (batch, heads, tokens, d).
    """
    query, shape = trace.shapes[Site(site.module, "query")], trace.shapes[site]
    names = ("num_heads", "heads", "n_heads", "num_attention_heads")
    stated = next((n for n in (getattr(module, name, None) for name in names) if isinstance(n, int)), None)
    known = any(name.startswith(f"{site.module}.") for name in trace.qkv_parts)
    axes = [axis for axis in range(1, len(query) - 2) if stated is None or query[axis] == stated]
    if known and len(query) == 4:
        axes = [1]
    elif stated is not None and (len(axes) > 1 or (axes and stated > 1 and query[0] == stated * trace.images)):
        return -1, 0, "heads cannot be told from windows"
    if len(axes) != 1 or len(shape) != len(query):
        return -1, 0, ""
    return axes[0], shape[axes[0]], ""


def _activation(site: Site, shape: tuple[int, ...], trace: Trace, module: nn.Module, kind: str, note: str = "") -> dict:
    """Fields of an activation: elements of one image, and which axis holds channels or heads."""
    windows, rest = divmod(shape[0], trace.images) if shape else (0, 0)
    own_shape = tuple(shape[1:]) if windows == 1 and not rest else (windows, *shape[1:])
    row: dict = {"site": site, "kind": kind, "shape": own_shape, "numel": _per_image(trace, site)}
    notes = [note, trace.notes.get(site, "")]
    if site.is_attention:
        axis, groups, unknown = _heads(site, module, trace)
        notes.append(unknown)
        names = ("head_axis", "heads")
        other = {"query": "key", "key": "query", "attention": "value", "value": "attention"}[site.tensor]
        row["edges"] = (Site(site.module, other),)
        row["macs"] = trace.macs.get(site, 0) // (1 if rest else trace.images)
    else:
        axis = _channel_axis(shape, module) if len(shape) > 1 else -1
        groups = shape[axis] if len(shape) > 1 else 0
        names = ("channel_axis", "channels")
    others = trace.other_shapes.get(site, set())
    if any(len(other) != len(shape) or (groups and other[axis] != groups) for other in others):
        axis, groups = -1, 0
        notes.append(f"its calls have different shapes: {', '.join(map(str, sorted({shape, *others})[:3]))}")
    row.update(zip(names, (axis, groups), strict=True))
    if any(notes) and not note and trace.calls.get(site.module, 1) > 1:
        notes.append(f"called {trace.calls[site.module]} times in one forward pass: over all calls")
    row["note"] = "; ".join(filter(None, notes))
    return row


def _channel_axis(shape: tuple[int, ...], module: nn.Module) -> int:
    """The axis of a convolution's planes, the last of a linear; else the one, first or last, of the weights' width.

    Blocks hand on (batch, channels, height, width) or (batch, height, width, channels), whatever layers they hold.
    """
    last = len(shape) - 1
    if isinstance(module, nn.modules.conv._ConvNd):
        return max(0, last - len(module.kernel_size))
    if isinstance(module, nn.Linear) or last < 2:
        return last
    weights = [inside._parameters.get("weight") for inside in module.modules()]
    widths = [weight.numel() if weight.ndim < 2 else weight.shape[0] for weight in weights if weight is not None]
    first_votes, last_votes = widths.count(shape[1]), widths.count(shape[last])
    if first_votes != last_votes:
        return 1 if first_votes > last_votes else last
    layers = [inside for inside in module.modules() if is_layer(inside)]
    if layers:
        return last if last < 3 or isinstance(layers[-1], nn.Linear) else 1
    return 1 if _NORM_OF_PLANES.search(type(module).__name__) else last


def select_sites(sites: Sequence[SiteInfo], tensors: Sequence[str]) -> list[SiteInfo]:
    """The sites that can be quantized whose tensor is asked for, in network order.

    `tensors` holds weight, input, query, key, value, softmax (the site `attention` alone), or attention for all four
    inside attention.
    """
    unknown = [name for name in tensors if name not in TENSOR_GROUPS]
    if unknown:
        raise InputError(f"the tensor {unknown[0]!r} is unknown; choose from {', '.join(TENSOR_GROUPS)}.")
    wanted = {tensor for name in tensors for tensor in TENSOR_GROUPS[name]}
    return [info for info in sites if info.quantizable and info.site.tensor in wanted]


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """The dotted names of the classifier layers; empty where the model does not say."""
    modules = dict(model.named_modules())
    configuration = getattr(model, "pretrained_cfg", None)
    told = configuration.get("classifier") if isinstance(configuration, dict) else None
    told = (told,) if isinstance(told, str) else tuple(told or ())
    names = tuple(name for name in told if name in modules and not isinstance(modules[name], nn.Identity))
    if names or not callable(getattr(model, "get_classifier", None)):
        return names
    heads: Any = model.get_classifier()  # type: ignore[operator]  # nn.Module's attributes are Tensor | Module to mypy
    heads = heads if isinstance(heads, (tuple, list, nn.ModuleList)) else (heads,)
    layers = {id(head) for head in heads if not isinstance(head, nn.Identity)}
    return tuple(name for name, module in modules.items() if id(module) in layers)
