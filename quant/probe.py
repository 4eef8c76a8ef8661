"""Watches one forward pass: which functions of torch make sites, attention, and products that belong to none."""

from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from quant.attention import FUSED, MATMULS, SOFTMAXES, is_product_of_activations
from quant.attention_follower import AttentionFollower
from quant.products import LAYER_FUNCTIONS, TRANSPOSED, MacCounter, Product, first_tensor, kernel_macs, layer_macs
from quant.rewrites import rewritten
from quant.site import Site

if TYPE_CHECKING:
    from quant.trace import Trace


class Probe(AttentionFollower, TorchFunctionMode):
    """Sees every function of torch while `model` runs, and writes into `trace` what it shows.

    `made_of` says of which parameters alone a tensor is made; `counter` counts what every function multiplies.
    """

    def __init__(self, trace: "Trace", model: nn.Module, counter: MacCounter) -> None:
        layers = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))}
        super().__init__(trace, layers)
        self.counter = counter
        self.made_of: Any = WeakTensorKeyDictionary()
        self.weights: dict[int, list[str]] = {}
        self.holders: dict[int, tuple[str, str]] = {}  # of a parameter: the first module that has it, and its name
        self.parameters = {name: p.numel() for name, p in model.named_parameters()}
        self.buffers = {id(buffer) for buffer in model.buffers()}
        for name, module in model.named_modules():
            for own, parameter in module._parameters.items():
                if parameter is not None:
                    self.holders.setdefault(id(parameter), (name, own))
            if name in layers and module._parameters.get("weight") is not None:
                self.weights.setdefault(id(module._parameters["weight"]), []).append(name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = rewritten(func, args, kwargs)
        if formula is not None:
            if func is F.multi_head_attention_forward:
                self._note_in_proj(args, kwargs)
            with self:
                return formula()
        before = self.counter.macs
        result = func(*args, **kwargs)
        macs = self.counter.macs - before
        operands = (*args, *kwargs.values())
        owner, product = self.owner(), None
        if func in FUSED and owner is not None:
            self._fused(owner, *(_argument(args, kwargs, i, name) for i, name in enumerate(("query", "key", "value"))))
            return result
        if func in LAYER_FUNCTIONS:
            x, weight = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
            if not self._layer(func, x, weight, result):
                self._note_product(func, args, (x, weight), result, macs)
        else:
            if isinstance(result, (Tensor, tuple)):
                self._note_weights(func, operands)
            product = self._note_product(func, args, operands, result, macs)
        if owner is None:
            return result
        if func in SOFTMAXES:
            x, axis = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "dim")
            self._softmax(owner, x, result, over_last_axis=axis in (-1, x.ndim - 1))
        elif func in MATMULS and is_product_of_activations(args) and product is not None:
            self._product(owner, args[0], args[1], result, product)
        elif func in MATMULS:
            self._refuse(args, "its matrix products are over the whole batch")
        elif func is torch.einsum:
            self._refuse(args, "its products are written by einsum as no batched matrix product")
        elif isinstance(result, Tensor) and len(self.origins):
            self._pass_on(operands, result)
        return result

    def _note_product(
        self, func: Any, args: tuple[Any, ...], operands: tuple[Any, ...], result: Any, macs: int
    ) -> Product | None:
        """Note what a function multiplies, until a site claims it; and what a tensor made of parameters is made of."""
        found = first_tensor(result)
        if found is None:
            return None
        parts = [x for a in operands for x in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(x, Tensor)]
        if any(self._made_of(x) for x in parts) and all(id(x) in self.buffers or self._made_of(x) for x in parts):
            self.made_of[found[1]] = tuple({name: None for x in parts for name in self._made_of(x)})
        count = macs or kernel_macs(func, args, found[1])
        if not count and func is not F.embedding_bag:
            return None
        names = tuple({name: None for x in parts if x.ndim > 1 for name in self._made_of(x)})
        owner = self.owner()
        per_sample = (count or 0) // self.trace.samples_in(tuple(found[1].shape))
        product = Product("" if owner is None else owner.name, func, per_sample, names)
        self.products.append(product)
        if names and func is not F.embedding_bag:
            self.trace.layers.append(None)
        return product

    def _made_of(self, x: Tensor) -> tuple[str, ...]:
        """The names of the parameters that a tensor is made of; empty where anything else is in it."""
        for tensor in (x, x._base):
            if tensor is not None and id(tensor) in self.holders:
                return (".".join(filter(None, self.holders[id(tensor)])),)
        return self.made_of.get(x, ()) if len(self.made_of) else ()

    def _note_in_proj(self, args: tuple[Any, ...], kwargs: Any) -> None:
        """Know the parameters of torch's own attention by the module that has them, unless that is a linear."""
        names = ("query", "key", "value")
        separate = _argument(args, kwargs, 17, "use_separate_proj_weight")
        given = [_argument(args, kwargs, 18 + i, f"{name[0]}_proj_weight") for i, name in enumerate(names)]
        weights = given if separate else [_argument(args, kwargs, 5, "in_proj_weight")] * 3
        held = [self.holders.get(id(weight), ("", "")) for weight in weights]
        name = held[0][0]
        if not all(own for _, own in held) or len({module for module, _ in held}) > 1 or name in self.layers:
            return
        if name in self.trace.in_proj:
            return
        size = len(weights[0]) // 3
        rows = [None if separate else (i * size, (i + 1) * size) for i in range(3)]
        self.trace.in_proj[name] = {t: (own, r) for t, (_, own), r in zip(names, held, rows, strict=True)}
        for weight in weights:
            self.weights[id(weight)] = [name]
        site = Site(name, "input")  # as the module itself was given it: its linears show it as they get it
        for table in (self.trace.shapes, self.trace.other_shapes, self.trace.elements, self.trace.notes):
            table.pop(site, None)

    def _layer(self, func: Any, x: Tensor, weight: Tensor, result: Tensor) -> bool:
        """A linear or convolution: called, unless its own module is not running; whether it is one of the model's."""
        names = self.weights.get(id(weight), [])
        if not names and weight._base is not None:  # rows of the projection in torch's own attention
            names = [name for name in self.weights.get(id(weight._base), []) if name in self.trace.in_proj]
        if not names and id(weight) not in self.holders and self.frames and self.frames[-1].name in self.layers:
            names = [self.frames[-1].name]  # it makes the weight itself
        if not names:
            return False
        running = [frame.name for frame in self.frames if frame.name in names]
        name = running[-1] if running else names[0]
        in_proj = name in self.trace.in_proj
        if not running:
            user = self.frames[-1].name if self.frames else ""
            self.trace.functional.add(name)
            self.trace.users[name] = _around(self.trace.users.get(name, user), user)
            self.trace.calls[name] = self.trace.calls.get(name, 0) + 1
        if in_proj or not running:
            self.record(name, "input", x)
        if not running:
            self.record(name, "output", result)
        for frame in self.frames:
            if frame.name != name:
                frame.linears[name] = result if weight.ndim == 2 else result.movedim(1, -1)  # channels last
        self.trace.layers.append(name)
        carrier = x if func in TRANSPOSED else result
        macs = layer_macs(func, x, weight, result) // self.trace.samples_in(tuple(carrier.shape))
        if in_proj:
            self._count_parts(name, weight, macs)
        else:
            self.count(name, "weight", macs)
        return True

    def _count_parts(self, name: str, weight: Tensor, macs: int) -> None:
        """Give the parts of a projection's weight, of which `weight` may be some rows, their share of the product."""
        whole = weight if weight._base is None else weight._base
        own = self.holders[id(whole)][1]
        first = int(weight.storage_offset() - whole.storage_offset()) // weight[0].numel()
        if len(weight) < len(whole) or len({parameter for parameter, _ in self.trace.in_proj[name].values()}) > 1:
            self.trace.notes[Site(name, "input")] = (
                "query, key and value are made of several tensors: one scale for all"
            )
        for part, (parameter, rows) in self.trace.in_proj[name].items():
            start, stop = rows or (0, len(whole))
            here = min(stop, first + len(weight)) - max(start, first)
            if parameter == own and here > 0:
                self.count(name, f"weight.{part}", macs * here // len(weight))

    def _note_weights(self, func: Any, args: tuple[Any, ...]) -> None:
        """Say which layers give their weight to another function than a layer's own, without running."""
        for names in (self.weights[id(x)] for x in args if id(x) in self.weights):
            if not any(frame.name in names for frame in self.frames):
                note = f"used by {getattr(func, '__name__', func)} without being called: its weight only"
                self.trace.notes.setdefault(Site(names[0], "weight"), note)

    def finish(self) -> None:
        """Keep the attention that can be observed, and say what belongs to no site."""
        self._finish_attention()
        by_module: dict[str, list[Product]] = {}
        for product in self.products:
            by_module.setdefault(product.module, []).append(product)
        trace = self.trace
        for name, products in by_module.items():
            more = f" ({len(products) - 1} more in this module)" if len(products) > 1 else ""
            trace.unobserved.setdefault(name, products[0].reason + more)
            trace.unplanned[name] = trace.unplanned.get(name, 0) + sum(product.macs for product in products)
            taking_part = [parameter for product in products for parameter in product.parameters]
            trace.unplanned_parameters |= {parameter: self.parameters[parameter] for parameter in taking_part}
        trace.unplanned = {name: macs for name, macs in trace.unplanned.items() if macs}


def _argument(args: Any, kwargs: Any, place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def _around(first: str, second: str) -> str:
    """The innermost module that both are, or are in."""
    parts = zip(first.split("."), second.split("."), strict=False)
    return ".".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], parts))
