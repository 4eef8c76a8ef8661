"""The rows of a sweep, measured one by one: with less memory where it runs out, and for no longer than allowed."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from analysis.sensitivity import SENSITIVITY_COLUMNS, quantized_sites
from analysis.sweeps.sweep import CACHE_MIB, sweep
from analysis.task import Task
from quant.batches import take
from quant.network import Network
from quant.site import SiteInfo


def _silent(_text: str) -> None:
    return None


def measured_rows(
    net: Network,
    sites: Sequence[SiteInfo],
    data: Sequence[Any],
    keys: Sequence[Mapping[str, Any]],
    *,
    task: Task,
    cache_mib: int = CACHE_MIB,
    tell: Callable[[str], None] = _silent,
) -> Iterator[dict[str, Any]]:
    """The rows of `sweep`; where memory runs out, the rest with half as many samples at a time, and a note."""
    left, note = list(keys), ""
    while left:
        try:
            for row in sweep(net, sites, data, tuple(left), task=task, cache_mib=cache_mib, tell=tell):
                yield row | {"note": "; ".join(filter(None, (row["note"], note)))}
                left.pop(0)
        except (MemoryError, RuntimeError) as error:
            size = max(task.samples(batch) for batch in data) // 2
            if not is_out_of_memory(error) or size < 1:
                raise
            data = [take(batch, start, start + size) for batch in data for start in range(0, task.samples(batch), size)]
            cache_mib //= 2
            note = f"{size} samples at a time: memory ran out with more"
            tell(f"Memory ran out; continuing with {size} samples at a time.")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or, where torch raises a plain RuntimeError, on the CPU."""
    plain = any(words in str(error) for words in ("not enough memory", "DefaultCPUAllocator"))
    return plain or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def within(rows: Iterator[dict[str, Any]], seconds: float | None) -> Iterator[dict[str, Any]]:
    """`rows` until the time is over; the row that is being measured then is the last."""
    start = time.monotonic()
    for row in rows:
        yield row
        if seconds is not None and time.monotonic() - start > seconds:
            return


def unmeasured_row(
    net: Network, sites: Sequence[SiteInfo], key: Mapping[str, Any], task: Task, reason: str
) -> dict[str, Any]:
    """The row of `key` with NaN for every figure, and why."""
    named = quantized_sites(key, sites, blocks=net.blocks)
    info = named[0][0]
    return {
        **dict.fromkeys(SENSITIVITY_COLUMNS, math.nan), **key, "model": net.name, "source": "measured",
        "task": task.name, "kind": info.kind, "order": info.order, "signed": None, "offset": None, "images": 0,
        "note": reason,
    }  # fmt: skip


def informative_first(keys: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The keys with the fewest bits first, where sites differ most; in network order at each bit-width."""
    return sorted(keys, key=lambda key: key["bit_width"])
