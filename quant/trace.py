"""What runs in one forward pass: which sites, in which order, of what shape, and how attention is computed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quant import batches
from quant.attention import AttentionForm, fused_where_offered
from quant.attention_search import CallFrame
from quant.multihead import without_fast_path
from quant.probe import Probe
from quant.products import LAYER_FUNCTIONS as LAYER_FUNCTIONS
from quant.products import MacCounter
from quant.products import first_tensor as first_tensor
from quant.site import Site

Part = tuple[str, tuple[int, int] | None]
"""A parameter of a module, by its name there, and its rows; None for all of them."""


@dataclass(kw_only=True)
class Trace:
    """One forward pass of `images` images.

    `shapes` has every site that was executed (inputs, outputs, and on attention modules query, key, value,
    attention), in order of execution, with the shape of its first call; `other_shapes` those of later calls that
    differ; `elements` counts the elements of all calls; `notes` says what else is to be known of a site.
    `macs` are the multiply-accumulates of one sample: of weight x input at the weight, of query x key at `query`, of
    attention x value at `attention`. `unplanned` are those of products that are of no site, by the module that executes
    them, and `unplanned_parameters` the elements of the parameters that take part in these, by their name.
    `unobserved` are the modules with such products, or that multiply an activation by a softmax's result where no
    attention is handed over, each with the reason. `functional` are layers whose weight is used without calling them,
    `users` the modules whose forward does so, by the layer; `in_proj` has for modules with torch's own attention the
    parameter, and its rows, that makes query, key and value.
    `qkv_parts` maps a fused qkv linear to the rows of its query, key and value, found by comparing its output with the
    operands. `same` maps the input of a layer to the earlier one that is the very same tensor, as of the two branches
    of a residual block. `layers` are the modules whose weight multiplies, call after call; None stands for a parameter
    that is no layer's.
    """

    images: int
    shapes: dict[Site, tuple[int, ...]] = field(default_factory=dict)
    other_shapes: dict[Site, set[tuple[int, ...]]] = field(default_factory=dict)
    elements: dict[Site, int] = field(default_factory=dict)
    macs: dict[Site, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    attention: dict[str, AttentionForm] = field(default_factory=dict)
    unobserved: dict[str, str] = field(default_factory=dict)
    functional: set[str] = field(default_factory=set)
    users: dict[str, str] = field(default_factory=dict)
    in_proj: dict[str, dict[str, Part]] = field(default_factory=dict)
    qkv_parts: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    notes: dict[Site, str] = field(default_factory=dict)
    same: dict[Site, Site] = field(default_factory=dict)
    unplanned: dict[str, int] = field(default_factory=dict)
    unplanned_parameters: dict[str, int] = field(default_factory=dict)
    layers: list[str | None] = field(default_factory=list)

    def samples_in(self, shape: tuple[int, ...]) -> int:
        """How many samples a tensor of this shape holds, by its first axis, or the second (time before batch), else 1.

        A tensor whose axes hold no samples (a table of relative positions) is computed once, whatever their number.
        """
        first = bool(shape) and shape[0] % self.images == 0
        second = len(shape) > 2 and shape[0] > 1 and shape[1] == self.images
        return self.images if first or second else 1


def trace_forward(
    model: nn.Module,
    batch: Any,
    forward: Callable[[nn.Module, Any], Any] = batches.forward,
    samples: Callable[[Any], int] = batches.samples,
) -> Trace:
    """What one forward pass of `batch` executes; the model is left as it was."""
    trace = Trace(images=samples(batch))
    counter = MacCounter()
    probe = Probe(trace, model, counter)
    handles = []

    def enter(name: str, owns_parameters: bool) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            probe.enter(CallFrame(name, owns_parameters))
            if name not in trace.in_proj:  # its linears show theirs
                probe.record(name, "input", args[0] if args else next(iter(kwargs.values()), None))

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            probe.leave()
            probe.record(name, "output", output)

        return hook

    try:
        for name, module in model.named_modules():
            owns = next(module.parameters(), None) is not None
            handles.append(module.register_forward_pre_hook(enter(name, owns), with_kwargs=True))
            handles.append(module.register_forward_hook(leave(name)))
        with torch.no_grad(), without_fast_path(), fused_where_offered(list(model.modules())), counter, probe:
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    probe.finish()
    return trace
