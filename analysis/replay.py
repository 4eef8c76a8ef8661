"""Prefix reuse: a network that was changed at one module runs from there on; what comes before is not computed again.

The clean run's tensors are held at the last cut (`analysis.sweeps.entry_points`) before the change, and the network is
entered there. That entering it gives the same bits is found out by running the clean network from each cut to the
next: where it arrives with the bits of the clean run, and the next cut holds all that the rest depends on, the end is
the same too.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from analysis.sweeps.entry_points import (
    AtEntry,
    EntryPoint,
    Execution,
    Forward,
    entered,
    execution,
    held_at,
    input_of,
    mapped,
    watched,
)
from quant import batches


class Replay:
    """Runs a network on fixed batches, from the last cut before a changed module where its state is known.

    `data` are batches; `cuts` those of `find_cuts`; `cache_bytes` limits what is kept. Batches beyond it run in full.
    Every result has the same bits as that of the whole network on the same batch. Before the first use each cut is
    tried with the clean network, on the first batch of each shape and on the first two images of every other one, and
    those that fail (`refused` names them) are not used. `move_to` may not run under `inference_mode`, whose tensors do
    not tell when they are changed in place; a call may. Beside what is kept, one batch's state at two cuts is held
    while the cuts are checked, and the next cut's while the last one's is still there.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Sequence[Any],
        cuts: Sequence[EntryPoint],
        *,
        cache_bytes: int,
        forward: Forward = batches.forward,
    ) -> None:
        self.model, self.batches, self.cache_bytes, self.forward = model, list(data), cache_bytes, forward
        self.cuts = list(cuts)
        self.refused: list[str] = []
        self.cut: EntryPoint | None = None
        self._kept: dict[int, tuple[AtEntry, list[int]]] = {}  # id of a batch -> what the cut needs, and its versions
        self._executions: dict[Any, Execution] = {}  # by the shape of a batch
        self._checked = False
        self._written: set[str] = set()  # cuts where the network writes into what it is given
        self._image_bytes: dict[str, float] = {}  # of what a cut needs

    def move_to(self, *modules: str) -> None:
        """Go to the last cut that is after none of `modules`. The network must be clean, in its present form.

        An inner cut is passed over where what it needs of all batches is more than `cache_bytes`.
        """
        with torch.no_grad():
            if not self._checked:
                self._check()
                self._checked = True
            entry = min(self._execution(self.batches[0]).entry.get(module, 0) for module in modules)
            wanted = next(
                (c for c in reversed(self.cuts) if c.entry <= entry and (c.base is None or self._fits(c))), None
            )
            if wanted is None:
                self.cut, self._kept = None, {}
            elif wanted != self.cut:
                self._keep(wanted)

    def __call__(self, images: Any) -> Any:
        """What the network returns for one of the batches."""
        kept = self._kept.get(id(images))
        if self.cut is None or kept is None:
            return self.forward(self.model, images)
        held, versions = kept
        copies = self.cut.module in self._written
        with entered(self.model, self.cut, self._execution(images), held.clone() if copies else held):
            output = self.forward(self.model, images)
        if not copies and _versions(held) != versions:  # the network took another branch: what was held is lost
            self._written.add(self.cut.module)
            del self._kept[id(images)]
            return self.forward(self.model, images)
        return output

    def _keep(self, cut: EntryPoint) -> None:
        """Hold what `cut` needs, computed from what is held at the present one."""
        kept, room = {}, self.cache_bytes
        for images in self.batches:
            held = self._next(cut, images, self.cut, self._kept.get(id(images), (None,))[0])
            room -= _bytes(held)
            if room < 0:
                break
            kept[id(images)] = (held, _versions(held))
        self.cut, self._kept = cut, kept

    def _next(self, cut: EntryPoint, images: Any, present: EntryPoint | None, held: AtEntry | None) -> AtEntry:
        """What `cut` needs of `images`, from what is held at the cut `present` if that comes before it."""
        if present is None or held is None or cut.entry <= present.entry:
            return held_at(self.model, cut, images, forward=self.forward)
        base = {present.module: held.x, present.base: held.base}.get(cut.base) if cut.base is not None else None
        return self._run_from(
            present, images, held, lambda: held_at(self.model, cut, images, base=base, forward=self.forward)
        )

    def _run_from(self, cut: EntryPoint, images: Any, held: AtEntry, forward: Callable[[], Any]) -> Any:
        """What `forward` returns, entered at `cut` with a copy of `held`; notes whether the network writes into it."""
        copy = held.clone()
        with entered(self.model, cut, self._execution(images), copy):
            result = forward()
        if any(_versions(copy)):
            self._written.add(cut.module)
        return result

    def _fits(self, cut: EntryPoint) -> bool:
        return self._image_bytes[cut.module] * sum(map(batches.samples, self.batches)) <= self.cache_bytes

    def _execution(self, images: Any) -> Execution:
        shapes = batches.signature(images)
        if shapes not in self._executions:
            self._executions[shapes] = execution(self.model, images, self.forward)
        return self._executions[shapes]

    def _check(self) -> None:
        """Refuse the cuts that do not give the bits of the whole network."""
        if not self.cuts:
            return
        seen: set[Any] = set()
        trials: list[Any] = []
        for images in self.batches:
            shapes = batches.signature(images)
            trials.append(batches.take(images, 0, 2) if shapes in seen else images)
            seen.add(shapes)
        if len(trials) == 1:
            trials.append(batches.mapped(batches.take(trials[0], 0, 2), _halved))
        clean = [self._clean(images) for images in trials]
        if not self._chain_holds(trials, clean):
            good = [cut for cut in self.cuts if self._ends_well(cut, trials, clean)]
            self.refused += [cut.module for cut in self.cuts if cut not in good]
            self.cuts = good

    def _clean(self, images: Any) -> dict[str, str]:
        """Digests of what the clean network gives to each cut and keeps for it; that of its answer under ""."""
        digests: dict[str, str] = {}

        def note(name: str) -> Callable[[Any], None]:
            return lambda value: digests.update({name: _digest(value)})

        inputs = {cut.module: note(cut.module) for cut in self.cuts}
        outputs = {name: note(f"{name}()") for cut in self.cuts for name in cut.kept}
        shapes = batches.signature(images)
        with watched(self.model, inputs, outputs):
            if shapes in self._executions:
                note("")(self.forward(self.model, images))
            else:
                self._executions[shapes] = execution(self.model, images, self.forward, note(""))
        return digests

    def _chain_holds(self, trials: Sequence[Any], clean: Sequence[Mapping[str, str]]) -> bool:
        """Whether entering at each cut leads to the next one, and from the last to the end, with the same bits.

        One trial follows the other at each cut, so that what a module remembers is always of another trial.
        """
        present: EntryPoint | None = None
        held: list[AtEntry | None] = [None] * len(trials)
        for cut in self.cuts:
            held = [self._next(cut, images, present, h) for images, h in zip(trials, held, strict=True)]
            present = cut
            for images, h, digests in zip(trials, held, clean, strict=True):
                assert h is not None
                self._image_bytes.setdefault(cut.module, _bytes(h) / batches.samples(images))
                given = {cut.module: h.x} | {f"{name}()": value for name, value in h.outputs.items()}
                if any(_digest(value) != digests[name] for name, value in given.items()):
                    return False
        return self._ends_well(self.cuts[-1], trials, clean, held)

    def _ends_well(
        self,
        cut: EntryPoint,
        trials: Sequence[Any],
        clean: Sequence[Mapping[str, str]],
        held: Sequence[AtEntry | None] | None = None,
    ) -> bool:
        """Whether the network entered at `cut` gives the clean answers; `held` is what the cut needs, where known."""
        known = [held_at(self.model, cut, images, forward=self.forward) for images in trials] if held is None else held
        for images, h, digests in zip(trials, known, clean, strict=True):
            assert h is not None
            self._image_bytes.setdefault(cut.module, _bytes(h) / batches.samples(images))
            if _digest(self._run_from(cut, images, h, partial(self.forward, self.model, images))) != digests[""]:
                return False
        return True


def find_cuts(model: nn.Module, images: Any, forward: Forward = batches.forward) -> list[EntryPoint]:
    """The cuts of a deterministic `model`, in order of execution, each tried on a batch: the same bits come out.

    Modules that hold parameters, are called once and get a tensor first come into question: as plain cuts, and those
    that are none as inner cuts where a layer's work is saved by it. They are tried from the last to the first, and a
    trial ends at the next plain cut, so that all of them cost a few forward passes.
    """
    run = execution(model, images, forward)
    names = [
        name for name in sorted(run.entry, key=run.entry.__getitem__) if run.calls[name] == 1 and run.skipped(name)
    ]
    names = [name for name in names if next(model.get_submodule(name).parameters(), None) is not None]
    inputs: dict[str, Any] = {}

    def note(name: str) -> Callable[[Any], None]:
        return lambda value: inputs.update({name: value.clone() if isinstance(value, Tensor) else None})

    with torch.no_grad():
        with watched(model, {name: note(name) for name in names}, {}):
            goal = _Goal(None, forward(model, images))
        cuts: list[EntryPoint] = []
        missed: list[str] = []  # in order of execution; since the last plain cut, which is their goal
        for name in [name for name in reversed(names) if inputs[name] is not None]:
            cut = EntryPoint(module=name, entry=run.entry[name], skipped=run.skipped(name), filled=False)
            plain = _tried(model, cut, run, AtEntry(x=inputs[name]), images, goal, forward)
            if plain is None:
                missed.insert(0, name)
                continue
            cuts = [plain, *_inner_cuts(model, plain, missed, inputs[name], run, images, goal, forward), *cuts]
            goal, missed = _Goal(name, inputs[name]), []
    return cuts


@dataclass(frozen=True)
class _Goal:
    """Where a trial ends, and the clean run's tensor there: a module's input, or for None what the network returns."""

    module: str | None
    x: Any


def _inner_cuts(
    model: nn.Module,
    base: EntryPoint,
    names: Sequence[str],
    x: Tensor,
    run: Execution,
    images: Any,
    goal: _Goal,
    forward: Forward,
) -> list[EntryPoint]:
    """The inner cuts among `names`, all between the plain cut `base`, whose input is `x`, and the next one."""
    cuts: list[EntryPoint] = []
    last = base
    for name in names:
        skipped = run.skipped(name)
        if not _layers(model, [name]) or not _layers(model, skipped) - _layers(model, last.skipped):
            continue
        # what was dead at the last cut is so here
        since = [n for n in skipped if n in last.kept or run.exit[n] > run.entry[last.module]]
        kept = sorted((n for n in since if run.calls[n] == 1), key=run.exit.__getitem__)
        cut = replace(base, module=name, entry=run.entry[name], skipped=skipped, base=base.module, kept=tuple(kept))
        try:
            with entered(model, base, run, x.clone()):
                held = held_at(model, cut, images, base=x, forward=forward)
        except TypeError:  # what one of them returns cannot be kept
            continue
        tried = _tried(model, cut, run, held, images, goal, forward)
        if tried is None:
            continue
        for other in kept:
            fewer = replace(tried, kept=tuple(n for n in tried.kept if n != other))
            tried = _tried(model, fewer, run, held, images, goal, forward) or tried
        cuts.append(tried)
        last = tried
    return cuts


def _tried(
    model: nn.Module, cut: EntryPoint, run: Execution, held: AtEntry, images: Any, goal: _Goal, forward: Forward
) -> EntryPoint | None:
    """`cut` if entering there leads to the goal with the same bits, with placeholders of the form that it needs."""
    held = replace(held, outputs={name: held.outputs[name] for name in cut.kept})
    for filled in (cut.filled, True):
        tried = replace(cut, filled=filled)
        try:
            with entered(model, tried, run, held.clone()):
                x = forward(model, images) if goal.module is None else input_of(model, goal.module, images, forward)
            return tried if _digest(x) == _digest(goal.x) else None
        except Exception:  # whatever code between the modules makes of a placeholder
            continue
    return None


def _layers(model: nn.Module, names: Iterable[str]) -> set[int]:
    """The weights of layers, that is, parameters of two and more dimensions, in these modules."""
    return {id(p) for name in names for p in model.get_submodule(name).parameters() if p.ndim > 1}


def _halved(x: Tensor) -> Tensor:
    return x / 2 if x.is_floating_point() else x


def _versions(held: AtEntry) -> list[int]:
    return [x._version for x in held.tensors()]


def _bytes(held: AtEntry) -> int:
    return sum(x.numel() * x.element_size() for x in held.tensors())


def _digest(value: Any) -> str:
    """A digest of the bits of all tensors in `value`."""
    digest = hashlib.sha256()

    def add(x: Tensor) -> None:
        digest.update(f"{x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    mapped(value, add)
    return digest.hexdigest()
