"""A tensor that passes several sites unchanged, as one module's output and the next one's input, is measured once."""

import weakref
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from analysis.running_stats import Batch, RunningStats
from quant.functional import to_groups

_SAMPLE = 256  # values of a tensor that are compared
_REMEMBERED = 8  # tensors, while they are alive; of each, counts of 512 KiB


State = tuple[int, int, Tensor]


class _Entry(NamedTuple):
    """A tensor that was measured, how it was then, axis and number of groups, and what it gave."""

    tensor: weakref.ref[Tensor]
    state: State
    grouping: tuple[int, int]
    batch: Batch


class SharedTensors:
    """Updates statistics of sites, and remembers what the last few tensors gave.

    A tensor counts as the same where it is the same object, of the same version, at the same place, and some of its
    values are the same: one that was changed in place since, as by `ReLU(inplace=True)`, is measured again. Tensors are
    not kept alive. Nothing is shared under `torch.inference_mode`, whose tensors have no version.
    """

    def __init__(self) -> None:
        self._recent: deque[_Entry] = deque(maxlen=_REMEMBERED)

    def update(self, stats: RunningStats, x: Tensor, axis: int, groups: int) -> None:
        """Add `x`, whose axis `axis` is split into `groups`, to `stats`. Raises NonFiniteError."""
        state = _state(x)
        for entry in self._recent:
            same = entry.tensor() is x and entry.grouping == (axis, groups) and _same(entry.state, state)
            if same and stats.takes(entry.batch):
                stats.add(entry.batch)
                return
        measured = stats.update(to_groups(x, axis, groups))
        if measured is not None and state is not None:
            alive = (entry for entry in self._recent if entry.tensor() is not None)
            self._recent = deque(alive, maxlen=_REMEMBERED)
            self._recent.append(_Entry(weakref.ref(x), state, (axis, groups), measured))

    def forget(self) -> None:
        """Start again, as for another batch: buffers that live on hold other values then."""
        self._recent.clear()


def _state(x: Tensor) -> State | None:
    """What tells that a tensor was changed: version, address, and some values; None where it cannot be told.

    Writes through `.data` and numpy raise no version.
    """
    if x.is_inference() or not x.is_contiguous():
        return None
    return x._version, x.data_ptr(), x.detach().view(-1)[:: max(1, x.numel() // _SAMPLE)].clone()


def _same(before: State, now: State | None) -> bool:
    return now is not None and before[:2] == now[:2] and torch.equal(before[2], now[2])
