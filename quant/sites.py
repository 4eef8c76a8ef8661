"""Which sites a network has, in network order, with their kind, size and cost."""

import re
from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from quant import batches
from quant.errors import InputError
from quant.site import ATTENTION_TENSORS, WEIGHT_TENSORS, Site, SiteInfo
from quant.site_fields import ATTENTION_KINDS, activation_row, called, remade_by, weight_rows
from quant.site_fields import is_layer as is_layer
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
_NORM = re.compile(r"Norm|Affine$")
_BLOCK = re.compile(
    r"Block|Bottle2?neck|Residual|DepthwiseSeparable|EncoderLayer|TransformerLayer|XceptionModule|SelectiveKernelBasic"
    r"|PreActBasic|DenseLayer|Cell(Stem)?\d?$|^(Inception[A-E]|Reduction[AB]|Mixed\da|Transformer|Outlooker|ConvEncoder)$"
)
_QUERY_KEY_VALUE = {"q": "attn.query", "k": "attn.key", "v": "attn.value", "kv": "attn.key"}


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
    `classifier` names the head's layers; without it the last layer executed is the head, unless a
    weight that is no layer's comes after it. Layers that never ran come
    last, their weights only, with a note.
    """
    trace = trace_forward(model, batch, forward, samples)
    modules = dict(model.named_modules())
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise InputError(f"no module matches {pattern!r}; the layers are named such as {_examples(modules)}.")
    if not any(tensor == "input" and (is_layer(modules[m]) or m in trace.in_proj) for m, tensor in trace.shapes):
        raise InputError("the model runs no convolution and no linear: there is nothing to quantize.")
    ends = trace.layers[:1] + trace.layers[-1:]  # None where the first or last product is no layer's
    heads = set(classifier) or {name for name in ends[-1:] if name is not None}
    kinds = {name: module_kind(name, module, trace, heads, modules) for name, module in modules.items()}
    found = _weights_and_activations(trace, modules, kinds, pinned={*ends[:1], *heads})
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
    if name in trace.in_proj:
        return "attn.qkv"
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
    owners: dict[int, list[dict]] = {}  # by a weight's identity: the rows of the layer that uses it first
    for site, shape in trace.shapes.items():
        module = modules[site.module]
        kind = kinds[site.module]
        if site.tensor == "input" and (is_layer(module) or site.module in trace.in_proj):
            own = weight_rows(site.module, module, trace, kind, modules)
            note = called(site.module, trace) if own[0]["quantizable"] else own[0]["note"]
            weights = _shared(own, modules, owners)
            quantizable = all(row["quantizable"] or row.get("same") for row in weights)
            rows.extend({**row, "pinned": site.module in pinned} for row in weights)
            rows.append(
                {**activation_row(site, shape, trace, module, kind, note),
                 "edges": tuple(row["site"] for row in weights), "pinned": site.module in pinned,
                 "same": trace.same.get(site),
                 "quantizable": quantizable}
            )  # fmt: skip
        elif site.is_attention:
            rows.append(activation_row(site, shape, trace, module, ATTENTION_KINDS[site.tensor]))
        elif site.tensor == "output" and (is_layer(module) or kind in ("norm", "block")):
            rows.append({**activation_row(site, shape, trace, module, kind), "quantizable": False})
    seen = {row["site"].module for row in rows}
    for name, module in modules.items():
        if is_layer(module) and name not in seen:
            note = trace.notes.get(Site(name, "weight"), "never executed: its weight only")
            never = {"quantizable": False, "note": note}
            weights = [{**row, **never} for row in weight_rows(name, module, trace, kinds[name], modules)]
            rows.extend(_shared(weights, modules, owners))
    return rows


def _shared(weights: list[dict], modules: dict[str, nn.Module], owners: dict[int, list[dict]]) -> list[dict]:
    """The rows of a weight that other modules have too: of the first that uses it; later ones own nothing."""
    name, parameter = weights[0]["site"].module, weights[0].get("parameter", "weight")
    weight = modules[name]._parameters.get(parameter)
    if weight is None:
        return weights
    if id(weight) in owners:
        first = owners[id(weight)]
        same = {row["site"].tensor: row["site"] for row in first}
        note = f"shares its weight with {first[0]['site'].module}"
        usable = all(row["quantizable"] for row in first)
        return [
            {**row, "quantizable": False, "numel": 0, "note": note,
             "same": same.get(row["site"].tensor, first[0]["site"]) if usable else None}
            for row in weights
        ]  # fmt: skip
    others = tuple(n for n, m in modules.items() if n != name and any(p is weight for p in m._parameters.values()))
    if others:
        note = f"also used by {', '.join(others)}: one weight, quantized in all its uses"
        weights = [
            {**row, "shared_with": others, "note": "; ".join(filter(None, [row["note"], note]))} for row in weights
        ]
    owners[id(weight)] = weights
    return weights


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


def check_plain_weights(model: nn.Module, sites: Sequence[SiteInfo]) -> None:
    """Raise InputError where no site can be quantized because layers compute their weight of others at every pass."""
    if any(info.quantizable for info in sites):
        return
    names = list(dict.fromkeys(info.site.module for info in sites if info.site.is_weight and not info.excluded))
    remade = {name: remade_by(model.get_submodule(name)) for name in names}
    ways = list(dict.fromkeys(filter(None, remade.values())))
    if ways:
        named = [name for name in names if remade[name]]
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        raise InputError(
            f"no site can be quantized: {', '.join(named[:3])}{more} compute their weight at every forward pass. Leave "
            f"them a plain weight first: {' or '.join(ways)}."
        )


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
