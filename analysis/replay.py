"""Prefix reuse: a network that was changed at one module runs from there on; what comes before is not computed again.

A *cut* is a module at whose entry the rest of the forward pass depends on one tensor alone, the module's input. The
clean run's inputs are kept, and a changed network is entered at the last cut before the change: modules that end
before it are not run, they return placeholders of NaN. Every cut is tried on every batch that it is used for: entered
there, the clean network must give the bits that it gives in full. Stages and blocks are cuts, one inside another too;
the inside of a residual block is not.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A module where the network can be entered, and the outermost modules that end before it, which need not run."""

    module: str
    entry: int  # in the order of execution
    skipped: tuple[str, ...]
    filled: bool  # whether code between the modules writes into placeholders, which then need memory of their own


@dataclass(frozen=True, kw_only=True)
class Execution:
    """One forward pass: when each module was first entered and last left, how often it ran, and what it returned."""

    entry: Mapping[str, int]
    exit: Mapping[str, int]
    calls: Mapping[str, int]
    outputs: Mapping[str, Any]  # tensors of the outputs' shapes on the device "meta"


class _Reached(BaseException):  # a model may catch every Exception
    """The forward pass has come to the module that was waited for."""

    def __init__(self, x: Any) -> None:
        super().__init__()
        self.x = x


class Replay:
    """Runs a network on fixed batches, from the last cut before a changed module where its input is known.

    `batches` are images; `cuts` those of `find_cuts`; `cache_bytes` limits what is kept. Batches beyond it run in full.
    Every result has the same bits as that of the whole network on the same batch: each cut is tried with the clean
    network on every batch that is kept, and where it is not so (`refused` names these cuts) an earlier one is taken.
    Under `torch.no_grad`, not `inference_mode`, whose tensors do not tell when they are changed in place.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Tensor], cuts: Sequence[Cut], *, cache_bytes: int) -> None:
        self.model, self.batches, self.cache_bytes = model, list(batches), cache_bytes
        self.cuts = list(cuts)
        self.refused: list[str] = []
        self.cut: Cut | None = None
        self._kept: dict[int, tuple[Tensor, int]] = {}  # id of a batch -> the cut's input, and its version
        self._copies = False  # whether the network writes into its input at the cut
        self._executions: dict[torch.Size, Execution] = {}  # by the shape of a batch
        self._clean: dict[int, Any] = {}  # id of a batch -> what the clean network returns for it

    def move_to(self, *modules: str) -> None:
        """Go to the last cut that is after none of `modules`. The network must be clean, in its present form."""
        entry = min(self._execution(self.batches[0]).entry.get(module, 0) for module in modules)
        while True:
            wanted = next((cut for cut in reversed(self.cuts) if cut.entry <= entry), None)
            if wanted == self.cut or wanted is None:
                if wanted is None:
                    self.cut, self._kept = None, {}
                return
            if self._keep(wanted):
                return
            self.cuts.remove(wanted)
            self.refused.append(wanted.module)

    def __call__(self, images: Tensor) -> Any:
        """What the network returns for one of the batches."""
        kept = self._kept.get(id(images))
        if self.cut is None or kept is None:
            return self.model(images)
        x, version = kept
        if self._copies:
            x = x.clone()
        with entered(self.model, self.cut, self._execution(images), x):
            output = self.model(images)
        if not self._copies and x._version != version:  # another branch than on the clean network: what is kept is lost
            self.cut, self._kept = None, {}
            return self.model(images)
        return output

    def _keep(self, cut: Cut) -> bool:
        """Keep the inputs of `cut`, computed from those of the present one; whether it gives the same bits."""
        kept, room, copies = {}, self.cache_bytes, False
        with torch.no_grad():
            if not self._clean:
                self._clean = {id(images): self.model(images) for images in self.batches}
            for images in self.batches:
                x = self._input_at(cut, images)
                room -= x.numel() * x.element_size()
                if room < 0:
                    break
                kept[id(images)] = (x, x._version)
            for images in self.batches:
                if id(images) in kept:
                    x = kept[id(images)][0].clone()
                    with entered(self.model, cut, self._execution(images), x):
                        if not _same(self.model(images), self._clean[id(images)]):
                            return False
                    copies |= x._version > 0
        self.cut, self._kept, self._copies = cut, kept, copies
        return True

    def _input_at(self, cut: Cut, images: Tensor) -> Tensor:
        kept = self._kept.get(id(images))
        if self.cut is None or kept is None or cut.entry < self.cut.entry:
            return input_of(self.model, cut.module, images)
        x = kept[0].clone() if self._copies else kept[0]
        with entered(self.model, self.cut, self._execution(images), x):
            return input_of(self.model, cut.module, images)

    def _execution(self, images: Tensor) -> Execution:
        if images.shape not in self._executions:
            self._executions[images.shape] = execution(self.model, images)
        return self._executions[images.shape]


def find_cuts(model: nn.Module, images: Tensor) -> list[Cut]:
    """The cuts of a deterministic `model`, in order of execution, each tried on `images`: the same bits come out.

    Modules that hold parameters, are called once and get a tensor first come into question. Where one is none, as
    after the first layer of a residual block, the others of the same parent and what lies in them are not tried.
    """
    run = execution(model, images)
    cuts: list[Cut] = []
    closed: set[str] = set()  # modules whose children are no cuts
    with torch.no_grad():
        expected = model(images)
        for name in sorted(run.entry, key=run.entry.__getitem__):
            parent = name.rpartition(".")[0]
            if parent in closed:
                closed.add(name)
                continue
            skipped = _skipped(run, name)
            if not skipped or next(model.get_submodule(name).parameters(), None) is None:
                continue
            tried = (Cut(module=name, entry=run.entry[name], skipped=skipped, filled=f) for f in (False, True))
            cut = next((cut for cut in tried if _works(model, cut, run, images, expected)), None)
            if cut is not None and run.calls[name] == 1:
                cuts.append(cut)
            else:
                closed |= {parent, name} if parent else {name}
    return cuts


def _works(model: nn.Module, cut: Cut, run: Execution, images: Tensor, expected: Any) -> bool:
    try:
        x = input_of(model, cut.module, images).clone()
        with entered(model, cut, run, x):
            return _same(model(images), expected)
    except Exception:  # whatever code between the modules makes of a placeholder
        return False


def execution(model: nn.Module, images: Tensor) -> Execution:
    """What one forward pass of `images` runs, in which order."""
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
                outputs[name] = _mapped(output, lambda x: x.to("meta"))
            except TypeError:  # `entered` will refuse it
                outputs[name] = NotImplemented

        return hook

    handles = []
    try:
        for name, module in model.named_modules():
            if name:
                handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave(name))]
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return Execution(entry=entry, exit=left, calls=calls, outputs=outputs)


def input_of(model: nn.Module, name: str, images: Tensor) -> Tensor:
    """The first tensor that module `name` gets; the forward pass ends there. TypeError where it is no tensor."""

    def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
        raise _Reached(args[0] if args else next(iter(kwargs.values()), None))

    handle = model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
    try:
        model(images)
    except _Reached as reached:
        if not isinstance(reached.x, Tensor):
            raise TypeError(f"{name} gets no tensor first.") from None
        return reached.x
    finally:
        handle.remove()
    raise ValueError(f"{name} is not executed.")


@contextmanager
def entered(model: nn.Module, cut: Cut, run: Execution, x: Tensor) -> Iterator[None]:
    """While the block runs, a forward pass begins at `cut` with `x`; what ends before it returns placeholders.

    Hooks of the modules that are left out still run, on placeholders.
    """
    module = model.get_submodule(cut.module)
    own = {name: vars(model.get_submodule(name)).get("forward") for name in cut.skipped}  # a forward put on the object
    skipped = [(model.get_submodule(name), run.outputs[name]) for name in cut.skipped]
    reached = False

    def enter(_module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        nonlocal reached
        reached = True
        if args:
            return (x, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): x}

    def in_place_of(before: nn.Module, output: Any) -> Callable[..., Any]:
        forward = before.forward

        def placeholder(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs) if reached else _mapped(output, lambda t: _unknown(t, x, cut.filled))

        return placeholder

    handle = module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
    try:
        for before, output in skipped:
            before.forward = in_place_of(before, output)
        yield
    finally:
        handle.remove()
        for name, forward in own.items():
            before = model.get_submodule(name)
            vars(before).pop("forward", None)
            if forward is not None:
                before.forward = forward


def _skipped(run: Execution, name: str) -> tuple[str, ...]:
    """The outermost modules whose last call ends before `name` is entered."""
    before = {other for other, end in run.exit.items() if end < run.entry[name]}
    return tuple(sorted(other for other in before if other.rpartition(".")[0] not in before))


def _unknown(like: Tensor, device_of: Tensor, filled: bool) -> Tensor:
    """NaN in the shape of `like`. TypeError for integers and booleans, which have none."""
    if not like.is_floating_point() and not like.is_complex():
        raise TypeError(f"No placeholder for {like.dtype}.")
    if filled:
        return torch.full(like.shape, float("nan"), dtype=like.dtype, device=device_of.device)
    return torch.full((), float("nan"), dtype=like.dtype, device=device_of.device).expand(like.shape)


def _mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """`value` with every tensor in it changed; TypeError where it holds what may depend on the images unseen."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(part, change) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(part, change) for part in value))
    if type(value) in (list, tuple):
        return type(value)(_mapped(part, change) for part in value)
    if value is None or isinstance(value, (str, torch.Size)):
        return value
    raise TypeError(f"No placeholder for {type(value).__name__}.")


def _same(output: Any, expected: Any) -> bool:
    return isinstance(output, Tensor) and isinstance(expected, Tensor) and torch.equal(output, expected)
