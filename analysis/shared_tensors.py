"""A tensor that passes several sites unchanged, as one module's output and the next one's input, is measured once."""

import weakref
from collections import deque

from torch import Tensor

from analysis.running_stats import Batch, RunningStats
from quant.functional import to_groups

_REMEMBERED = 8  # tensors, while they are alive; of each, counts of 512 KiB


class SharedTensors:
    """Updates statistics of sites, and remembers what the last few tensors gave.

    A tensor counts as the same where it is the same object, of the same version: one that was changed in place since,
    as by `ReLU(inplace=True)`, is measured anew. Tensors are not kept alive. Not for `torch.inference_mode`, whose
    tensors have no version.
    """

    def __init__(self) -> None:
        self._recent: deque[tuple[weakref.ref[Tensor], int, tuple[int, int], Batch]] = deque(maxlen=_REMEMBERED)

    def update(self, stats: RunningStats, x: Tensor, axis: int, groups: int) -> None:
        """Add `x`, whose axis `axis` is split into `groups`, to `stats`. Raises NonFiniteError."""
        for tensor, version, grouping, batch in self._recent:
            if tensor() is x and version == x._version and grouping == (axis, groups) and stats.takes(batch):
                stats.add(batch)
                return
        measured = stats.update(to_groups(x, axis, groups))
        if measured is not None:
            alive = (entry for entry in self._recent if entry[0]() is not None)
            self._recent = deque(alive, maxlen=_REMEMBERED)
            self._recent.append((weakref.ref(x), x._version, (axis, groups), measured))
