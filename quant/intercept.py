"""The one hook context manager: see, and replace, activations while a forward pass runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from quant.attention import Handler, close_attention_, open_attention_
from quant.multihead import multi_head_attention, without_fast_path
from quant.network import Network
from quant.products import LAYER_FUNCTIONS, first_tensor
from quant.site import Site
from quant.trace import Trace


@contextmanager
def intercept(net: Network, handlers: Mapping[Site, Handler]) -> Iterator[None]:
    """Call each handler with its activation (detached from nothing, not copied) while the block runs.

    A handler returns the tensor that takes the activation's place, or None to leave it. Sites: `input` and `output` of
    any module (the first tensor of a tuple, list or dictionary), `query`, `key`, `value`, `attention` of attention
    modules, and `projection`, what the weights of torch's own attention give. Attention is computed by its formula only
    where one of its own sites has a handler; torch's fast path is off, whatever the handlers. Hooks and modes are
    removed on exit, also after an error.
    """
    model, trace = net.model, net.trace
    attention: dict[str, dict[str, Handler]] = {}
    functional: dict[str, dict[str, Handler]] = {}
    handles = []
    opened: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(without_fast_path())
        try:
            for site, handler in handlers.items():
                module = model.get_submodule(site.module)
                if site.is_attention:
                    attention.setdefault(site.module, {})[site.tensor] = handler
                elif site.module in trace.functional or (
                    site.tensor in ("input", "projection") and site.module in trace.in_proj
                ):
                    functional.setdefault(site.module, {})[site.tensor] = handler
                elif site.tensor == "input":
                    handles.append(module.register_forward_pre_hook(_before(handler), with_kwargs=True))
                else:
                    handles.append(module.register_forward_hook(_after(handler)))
            if functional:
                stack.enter_context(_FunctionalLayers(model, functional, trace))
            for name, by_tensor in attention.items():
                open_attention_(model.get_submodule(name), trace.attention[name], by_tensor)
                opened.append(name)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name in opened:
                close_attention_(model.get_submodule(name))


def _before(handler: Handler) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (_handled(handler, args[0]), *args[1:]), kwargs
        name = next(iter(kwargs), None)
        return None if name is None else (args, {**kwargs, name: _handled(handler, kwargs[name])})

    return hook


def _after(handler: Handler) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return _handled(handler, output)

    return hook


def _handled(handler: Handler, x: Any) -> Any:
    """`x` with its first tensor handled; `x` itself where the handler leaves it."""
    found = first_tensor(x)
    replaced = None if found is None else handler(found[1])
    if found is None or replaced is None:
        return x
    key, _ = found
    if key is None:
        return replaced
    if isinstance(x, Mapping):
        return type(x)({**x, key: replaced})  # type: ignore[call-arg]  # dictionaries are made of dictionaries
    items = [*x[:key], replaced, *x[key + 1 :]]
    return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)


class _FunctionalLayers(TorchFunctionMode):
    """Input and output of layers that are never called: BEiT, EVA and SwinV2 write F.linear(x, self.qkv.weight).

    So are the projections of torch's own attention, whose function is written as linears first.
    """

    def __init__(self, model: nn.Module, handlers: Mapping[str, Mapping[str, Handler]], trace: Trace) -> None:
        super().__init__()
        self.layers = []
        for name, by_tensor in handlers.items():
            held = trace.in_proj.get(name, {"weight": ("weight", None)})
            parameters = {parameter for parameter, _ in held.values()}
            self.layers.append((model.get_submodule(name), sorted(parameters), name in trace.in_proj, by_tensor))

    def _handlers(self, weight: Any) -> Mapping[str, Handler]:
        for module, parameters, in_parts, by_tensor in self.layers:
            for parameter in parameters:
                own = module._parameters.get(parameter)
                if own is weight or (in_parts and getattr(weight, "_base", None) is own):
                    return by_tensor
        return {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return multi_head_attention(*args, **kwargs)
        if func not in LAYER_FUNCTIONS:
            return func(*args, **kwargs)
        handlers = self._handlers(args[1] if len(args) > 1 else kwargs["weight"])
        if "input" in handlers:
            x = args[0] if args else kwargs["input"]
            replaced = handlers["input"](x)
            if replaced is not None:
                args, kwargs = ((replaced, *args[1:]), kwargs) if args else (args, {**kwargs, "input": replaced})
        result = func(*args, **kwargs)
        output = handlers.get("output") or handlers.get("projection")
        replaced = None if output is None else output(result)
        return result if replaced is None else replaced
