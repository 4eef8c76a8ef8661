"""What is known of each weight and activation after one forward pass: the fields of its `SiteInfo`."""

import re

from torch import Tensor, nn
from torch.nn.utils import parametrize

from quant.site import ATTENTION_TENSORS, Site
from quant.trace import Trace

ATTENTION_KINDS = dict(zip(ATTENTION_TENSORS, ("attn.query", "attn.key", "attn.value", "attn.softmax"), strict=True))
_TRANSFORMS_ITS_WEIGHT = re.compile(r"StdConv|CondConv|WSConv|DynamicConv")
_NORM_OF_PLANES = re.compile(r"2d|BatchNorm|GroupNorm")


def is_layer(module: nn.Module) -> bool:
    """Whether a module has a weight that multiplies its input: a convolution or a linear."""
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))


def remade_by(module: nn.Module) -> str:
    """The call that leaves a layer a plain weight, where it is computed of others at every forward pass; else empty.

    >>> remade_by(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    'torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")'
    """
    if parametrize.is_parametrized(module, "weight"):
        return 'torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")'
    held = {*module._parameters, *module._buffers}
    for names, call in (
        ({"weight_orig", "weight_mask"}, 'torch.nn.utils.prune.remove(layer, "weight")'),
        ({"weight_g", "weight_v"}, "torch.nn.utils.remove_weight_norm(layer)"),
        ({"weight_orig", "weight_u"}, "torch.nn.utils.remove_spectral_norm(layer)"),
    ):
        if names <= held:
            return call
    return ""


def weight_rows(name: str, module: nn.Module, trace: Trace, kind: str, modules: dict[str, nn.Module]) -> list[dict]:
    """Fields of the weight of a layer, of its parts where it is a fused one."""
    if name in trace.in_proj:
        return _in_proj_rows(name, module, trace, kind)
    weight = module.get_parameter("weight") if "weight" in module._parameters else None
    note, quantizable = "", True
    if weight is None or _TRANSFORMS_ITS_WEIGHT.search(type(module).__name__):
        remade = remade_by(module)
        way_out = f"; a plain weight by {remade} can be" if remade else ""
        note = f"{type(module).__name__} transforms its weight itself: observed, not quantized{way_out}"
        quantizable = False
    elif trace.calls.get(name, 0) > 1:
        note = called(name, trace)
    ran = Site(name, "input") in trace.shapes
    macs = trace.macs.get(Site(name, "weight"), 0)
    common = {"kind": kind, "quantizable": quantizable, "note": note, "edges": (Site(name, "input"),) if ran else ()}
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
    axis, channels = weight_channels(module, weight)
    if not channels:
        common["note"] = "; ".join(filter(None, [note, "its groups mix output channels: one scale for the weight"]))
    return [
        {**common, "site": Site(name, "weight"), "shape": tuple(weight.shape), "numel": weight.numel(),
         "channel_axis": axis, "channels": channels,
         "head_axis": 1 if by_columns else -1, "heads": heads if by_columns else 0, "macs": macs}
    ]  # fmt: skip


def weight_channels(module: nn.Module, weight: Tensor) -> tuple[int, int]:
    """The axis of a weight that equal parts share an output channel along, and how many; -1 and 0 where none does.

    A transposed convolution's weight is (inputs, outputs of one group, ...). Where each group has one output, all that
    belongs to it is a part of the first axis.
    """
    if not isinstance(module, nn.modules.conv._ConvTransposeNd):
        return 0, weight.shape[0]
    if module.groups == 1:
        return 1, weight.shape[1]
    return (0, module.groups) if weight.shape[1] == 1 else (-1, 0)


def _in_proj_rows(name: str, module: nn.Module, trace: Trace, kind: str) -> list[dict]:
    """Fields of what makes query, key and value in torch's own attention."""
    heads = _heads(Site(name, "value"), module, trace)[1] if name in trace.attention else 0
    found = []
    for part, (parameter, rows) in trace.in_proj[name].items():
        weight = module.get_parameter(parameter)
        count = len(weight) if rows is None else rows[1] - rows[0]
        site = Site(name, f"weight.{part}")
        found.append(
            {"site": site, "kind": kind, "shape": (count, *weight.shape[1:]), "numel": count * weight[0].numel(),
             "channel_axis": 0, "channels": count, "quantizable": True,
             "head_axis": 0 if heads else -1, "heads": heads, "rows": rows,
             "parameter": parameter, "macs": trace.macs.get(site, 0), "edges": (Site(name, "input"),),
             "note": called(name, trace)}
        )  # fmt: skip
    return found


def called(name: str, trace: Trace) -> str:
    """A note on a module that runs more than once; else empty."""
    return f"called {trace.calls[name]} times in one forward pass" if trace.calls.get(name, 0) > 1 else ""


def _per_image(trace: Trace, site: Site) -> int:
    """Elements of a site in the forward pass of one image, over all its calls."""
    return trace.elements[site] // trace.samples_in(trace.shapes[site])


def _heads(site: Site, module: nn.Module, trace: Trace) -> tuple[int, int, str]:
    """The axis and number of the heads of query, key, value or attention, -1 and 0 where unknown; and a note on why.

    A batch axis as long as the module's own number of heads is theirs, the first of four axes where it states none.
    Windows may be as many as the heads, and heads may be folded into the batch: then none is taken for the heads,
    unless qkv's parts were found by their values as (batch, heads, tokens, d).
    """
    query, shape = trace.shapes[Site(site.module, "query")], trace.shapes[site]
    names = ("num_heads", "heads", "n_heads", "num_attention_heads")
    stated = next((n for n in (getattr(module, name, None) for name in names) if isinstance(n, int)), None)
    known = any(name.startswith(f"{site.module}.") for name in trace.qkv_parts) or site.module in trace.in_proj
    axes = [axis for axis in range(1, len(query) - 2) if stated is None or query[axis] == stated]
    if known and len(query) == 4:
        axes = [1]
    elif stated is not None and (len(axes) > 1 or (axes and stated > 1 and query[0] == stated * trace.images)):
        return -1, 0, "heads cannot be told from windows"
    if len(axes) != 1 or len(shape) != len(query):
        return -1, 0, ""
    return axes[0], shape[axes[0]], ""


def activation_row(
    site: Site, shape: tuple[int, ...], trace: Trace, module: nn.Module, kind: str, note: str = ""
) -> dict:
    """Fields of an activation: elements of one image, and which axis holds channels or heads."""
    windows, rest = divmod(shape[0], trace.images) if shape else (0, 0)
    if not rest:
        own_shape = tuple(shape[1:]) if windows == 1 else (windows, *shape[1:])
    else:  # time before batch, or a table
        own_shape = (shape[0], 1, *shape[2:]) if trace.samples_in(shape) > 1 else tuple(shape)
    row: dict = {"site": site, "kind": kind, "shape": own_shape, "numel": _per_image(trace, site)}
    notes = [note, trace.notes.get(site, "")]
    if site.is_attention:
        axis, groups, unknown = _heads(site, module, trace)
        notes.append(unknown)
        names = ("head_axis", "heads")
        other = {"query": "key", "key": "query", "attention": "value", "value": "attention"}[site.tensor]
        row["edges"] = (Site(site.module, other),)
        row["macs"] = trace.macs.get(site, 0)
    else:
        axis = -1
        if len(shape) > 1:
            in_proj = site.tensor == "input" and site.module in trace.in_proj
            axis = len(shape) - 1 if in_proj else _channel_axis(shape, module)
        groups = shape[axis] if len(shape) > 1 else 0
        names = ("channel_axis", "channels")
    others = trace.other_shapes.get(site, set())
    if any(len(other) != len(shape) or (groups and other[axis] != groups) for other in others):
        axis, groups = -1, 0
        notes.append(f"its calls have different shapes: {', '.join(map(str, sorted({shape, *others})[:3]))}")
    row.update(zip(names, (axis, groups), strict=True))
    if not note and trace.calls.get(site.module, 1) > 1:
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
