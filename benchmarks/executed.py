"""What a forward pass executes, told by torch itself and by nothing of ours: for checks of `quant.trace`."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from quant.sites import is_layer


class WeightUses(TorchFunctionMode):
    """Names of the layers whose weight parameter reaches any torch function, whoever calls it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        layers = [(name, module) for name, module in model.named_modules() if is_layer(module)]
        self.names = {id(p): name for name, module in layers for p in module.parameters(recurse=False) if p.ndim > 1}
        self.used: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):  # attributes such as .shape and .ndim compute nothing
            self.used |= {self.names[id(a)] for a in (*args, *(kwargs or {}).values()) if id(a) in self.names}
        return result


class AttentionOperators(TorchDispatchMode):
    """Per module, in order, the operators of attention that torch dispatches: `fused`, `product`, `softmax`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.running: list[str] = []
        self.operators: dict[str, list[str]] = {}
        self.elements: dict[str, int] = {}  # of the attention that each module computes
        self.handles = []
        for name, module in model.named_modules():
            if next(module.parameters(), None) is not None:
                self.handles.append(module.register_forward_pre_hook(lambda *_, name=name: self.running.append(name)))
                self.handles.append(module.register_forward_hook(lambda *_: self.running.pop() and None))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0].strip("_")
        kind = {"bmm": "product", "baddbmm": "product", "softmax": "softmax", "safe_softmax": "softmax"}.get(name)
        if name.startswith("scaled_dot_product"):
            kind = "fused"
        elif kind == "softmax" and args[0].ndim < 3:
            kind = None
        if kind and self.running:
            name = self.running[-1]
            self.operators.setdefault(name, []).append(kind)
            elements = 0
            if kind == "fused":
                elements = args[0][..., 0].numel() * args[1].shape[-2]
            elif kind == "softmax":
                elements = args[0].numel()
            self.elements[name] = self.elements.get(name, 0) + elements
        return func(*args, **(kwargs or {}))

    def modules(self) -> list[str]:
        """Modules with fused attention, or with a product, then a softmax, then a product."""
        found = []
        for name, operators in self.operators.items():
            order = iter(operators)
            if "fused" in operators or all(kind in order for kind in ("product", "softmax", "product")):
                found.append(name)
        return found


def executed(model: nn.Module, image: Tensor) -> tuple[set[str], AttentionOperators]:
    """The layers that one forward pass calls, or whose weight it uses; and the operators of its attention."""
    uses, operators = WeightUses(model), AttentionOperators(model)
    called: set[str] = set()
    for name, module in model.named_modules():
        if is_layer(module):
            operators.handles.append(module.register_forward_hook(lambda *_, name=name: called.add(name)))
    try:
        with torch.no_grad(), operators, uses:
            model(image)
    finally:
        for handle in operators.handles:
            handle.remove()
    return uses.used | called, operators
