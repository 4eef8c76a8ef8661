"""Cuts: modules where a network can be entered midway, with what it has computed by then kept from a clean run.

At a *plain* cut the rest of the forward pass depends on one tensor alone, the module's input: stages and blocks are
such cuts, one inside another too. An *inner* cut lies between two plain ones, as the second layer of a residual block
does: entered there, the network also gets back the input of the last plain cut before it (`base`) and the outputs of
those modules in between that are used again later (`kept`). All other modules that end before a cut are not run; they
return placeholders of NaN, which show in the result where something was overlooked.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quant import batches

Forward = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True, kw_only=True)
class EntryPoint:
    """A module where the network can be entered, and the outermost modules that end before it, which need not run."""

    module: str
    entry: int  # in the order of execution
    skipped: tuple[str, ...]
    filled: bool  # whether code between the modules writes into placeholders, which then need memory of their own
    base: str | None = None  # of an inner cut: the plain cut whose input is given back too
    kept: tuple[str, ...] = ()  # of an inner cut: those of `skipped` whose outputs are given back


@dataclass(frozen=True, kw_only=True)
class AtEntry:
    """What the network gets back at a cut: the module's input, and for an inner cut what it needs besides."""

    x: Tensor
    base: Tensor | None = None
    outputs: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """All tensors in it."""
        found: list[Tensor] = [self.x] if self.base is None else [self.x, self.base]
        mapped(dict(self.outputs), found.append)
        return found

    def clone(self) -> "AtEntry":
        """The same values in memory of their own."""
        base = None if self.base is None else self.base.clone()
        return AtEntry(x=self.x.clone(), base=base, outputs=mapped(dict(self.outputs), torch.clone))


@dataclass(frozen=True, kw_only=True)
class Execution:
    """One forward pass: when each module was first entered and last left, how often it ran, and what it returned."""

    entry: Mapping[str, int]
    exit: Mapping[str, int]
    calls: Mapping[str, int]
    outputs: Mapping[str, Any]  # tensors of the outputs' shapes on the device "meta"

    def skipped(self, name: str) -> tuple[str, ...]:
        """The outermost modules whose last call ends before `name` is entered."""
        before = {other for other, end in self.exit.items() if end < self.entry[name]}
        return tuple(sorted(other for other in before if other.rpartition(".")[0] not in before))


class _Reached(BaseException):  # a model may catch every Exception
    """The forward pass has come to the module that was waited for."""

    def __init__(self, x: Any) -> None:
        super().__init__()
        self.x = x


def execution(
    model: nn.Module, batch: Any, forward: Forward = batches.forward, done: Callable[[Any], None] | None = None
) -> Execution:
    """What one forward pass of `batch` runs, in which order; `done` gets what the pass returns."""
    entry: dict[str, int] = {}
    left: dict[str, int] = {}
    calls: dict[str, int] = {}
    outputs: dict[str, Any] = {}
    clock = iter(range(1, 1 << 31))

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            entry.setdefault(name, next(clock))
            calls[name] = calls.get(name, 0) + 1

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            left[name] = next(clock)
            try:
                outputs[name] = mapped(output, lambda x: x.to("meta"))
            except TypeError:  # `entered` will refuse it
                outputs[name] = NotImplemented

        return hook

    handles = []
    try:
        for name, module in model.named_modules():
            if name:
                handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave(name))]
        with torch.no_grad():
            output = forward(model, batch)
        if done is not None:
            done(output)
    finally:
        for handle in handles:
            handle.remove()
    return Execution(entry=entry, exit=left, calls=calls, outputs=outputs)


@contextmanager
def watched(
    model: nn.Module,
    inputs: Mapping[str, Callable[[Any], None]],
    outputs: Mapping[str, Callable[[Any], None]],
) -> Iterator[None]:
    """While the block runs, show what modules get first, before hooks of their own, and what they return."""
    handles = []
    try:
        for name, show in inputs.items():

            def before(_module: nn.Module, args: Any, kwargs: Any, show: Callable[[Any], None] = show) -> None:
                show(args[0] if args else next(iter(kwargs.values()), None))

            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        for name, show in outputs.items():

            def after(_module: nn.Module, _args: Any, output: Any, show: Callable[[Any], None] = show) -> None:
                show(output)

            handles.append(model.get_submodule(name).register_forward_hook(after, prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_of(model: nn.Module, name: str, batch: Any, forward: Forward = batches.forward) -> Tensor:
    """The first tensor that module `name` gets; the forward pass ends there. TypeError where it is no tensor."""

    def stop(x: Any) -> None:
        raise _Reached(x)

    with watched(model, {name: stop}, {}):
        try:
            forward(model, batch)
        except _Reached as reached:
            if not isinstance(reached.x, Tensor):
                raise TypeError(f"{name} gets no tensor first.") from None
            return reached.x
    raise ValueError(f"{name} is not executed.")


def held_at(
    model: nn.Module, cut: EntryPoint, batch: Any, *, base: Tensor | None = None, forward: Forward = batches.forward
) -> AtEntry:
    """What `cut` needs of a forward pass of `batch`, which ends there; `base` where its base's input is known."""
    found: dict[str, Any] = {}

    def keep(name: str) -> Callable[[Any], None]:
        return lambda value: found.update({name: mapped(value, torch.clone)})  # later code may write into it

    inputs = {cut.base: keep("")} if cut.base is not None and base is None else {}
    with watched(model, inputs, {name: keep(name) for name in cut.kept}):
        x = input_of(model, cut.module, batch, forward)
    return AtEntry(x=x, base=found.pop("", base), outputs=found)


@contextmanager
def entered(model: nn.Module, cut: EntryPoint, run: Execution, held: AtEntry | Tensor) -> Iterator[None]:
    """While the block runs, a forward pass begins at `cut` with `held`; what ends before it returns placeholders.

    Hooks of the modules that are left out still run, on placeholders.
    """
    held = AtEntry(x=held) if isinstance(held, Tensor) else held
    own = {name: vars(model.get_submodule(name)).get("forward") for name in cut.skipped}  # a forward put on the object
    skipped = [(name, model.get_submodule(name)) for name in cut.skipped]
    reached = False

    def enter(x: Tensor, last: bool) -> Callable[..., tuple[Any, Any]]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            nonlocal reached
            reached |= last
            if args:
                return (x, *args[1:]), kwargs
            return args, {**kwargs, next(iter(kwargs)): x}

        return hook

    def in_place_of(name: str, before: nn.Module) -> Callable[..., Any]:
        forward = before.forward

        def placeholder(*args: Any, **kwargs: Any) -> Any:
            if reached:
                return forward(*args, **kwargs)
            if name in held.outputs:
                return held.outputs[name]
            return mapped(run.outputs[name], lambda t: _unknown(t, held.x, cut.filled))

        return placeholder

    handles = []
    try:
        given = {cut.module: held.x}
        if cut.base is not None and held.base is not None:
            given[cut.base] = held.base
        for name, x in given.items():
            hook = enter(x, name == cut.module)
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
        for name, before in skipped:
            before.forward = in_place_of(name, before)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, forward in own.items():
            before = model.get_submodule(name)
            vars(before).pop("forward", None)
            if forward is not None:
                before.forward = forward


def _unknown(like: Tensor, device_of: Tensor, filled: bool) -> Tensor:
    """NaN in the shape of `like`. TypeError for integers and booleans, which have none."""
    if not like.is_floating_point() and not like.is_complex():
        raise TypeError(f"No placeholder for {like.dtype}.")
    if filled:
        return torch.full(like.shape, float("nan"), dtype=like.dtype, device=device_of.device)
    return torch.full((), float("nan"), dtype=like.dtype, device=device_of.device).expand(like.shape)


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """`value` with every tensor in it changed; TypeError where it holds what may depend on the images unseen."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return batches.rebuilt(value, {key: mapped(part, change) for key, part in value.items()})
    if type(value) in (list, tuple) or (isinstance(value, tuple) and hasattr(value, "_fields")):
        return batches.rebuilt(value, [mapped(part, change) for part in value])
    if value is None or isinstance(value, (str, torch.Size)):
        return value
    raise TypeError(f"No placeholder for {type(value).__name__}.")
