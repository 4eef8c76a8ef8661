"""Running statistics as a file, so that a pass over images that was stopped resumes to the same bits.

The file is safetensors, from which no code is run. Its arrays hold all sites one after the other, in network order:

    groups     int64 (sites,)           channels or heads that are distinguished
    octaves    int64 (sites,)           octaves of the histogram, -1 where there is none yet
    centres    float64 (sites,)         of the histograms, 0 where there is none
    moments    float64 (8, groups)      fields of `Moments`, of the sites with values
    exponents  int64 (octaves,)         biased, rising within a site
    counts     int64 (octaves, 2, 128)  by sign and leading bits of the mantissa

The metadata hold, as JSON, what the pass is of, how far it has come, and why a site has no values or channels; and a
checksum of all this.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from analysis.running_stats import RunningStats
from analysis.statistics.float_histogram import BINS_PER_OCTAVE, FloatHistogram
from analysis.statistics.moments import Moments
from analysis.storage.files import write_bytes
from analysis.storage.step_inputs import input_changes
from quant.errors import first_line
from quant.site import Site

LAYOUT = 1  # to be raised with every change of what the file holds, or of how statistics are measured
_FIELDS = tuple(field.name for field in fields(Moments))
_ARRAYS = {"groups": (np.int64, 1), "octaves": (np.int64, 1), "centres": (np.float64, 1), "moments": (np.float64, 2),
           "exponents": (np.int64, 1), "counts": (np.int64, 3)}  # fmt: skip


class UnusableStatsError(ValueError):
    """The file cannot be gone on with; the text says why, its subject is the file."""


@dataclass(frozen=True, kw_only=True)
class Passed:
    """How far one process has come in its share of the batches."""

    batches: int = 0
    images: int = 0  # that could be read
    skipped: tuple[str, ...] = ()  # names of those that could not


@dataclass(frozen=True, kw_only=True)
class _Header:
    """What the metadata hold beside the checksum."""

    identity: dict[str, Any]
    passed: Passed
    reasons: list[str]  # of each site, as `RunningStats.reason`


def save_stats(path: Path, identity: Mapping[str, Any], passed: Passed, running: Mapping[Site, RunningStats]) -> None:
    """Write the file, whole or not at all; `identity` is all that fixes the pass. Raises InputError where it cannot."""
    arrays = _packed(running)
    reasons = [stats.reason for stats in running.values()]
    header = json.dumps(asdict(_Header(identity=_whole(identity), passed=passed, reasons=reasons)))
    metadata = {"header": header, "sha256": _digest(header, arrays)}
    write_bytes(path, save(arrays, metadata))  # its `save_file` has temporary files of its own, which a kill leaves


def load_stats(
    path: Path, identity: Mapping[str, Any], fresh: Mapping[Site, RunningStats]
) -> tuple[Passed, dict[Site, RunningStats]]:
    """How far the pass has come, and its statistics; `fresh` are those of the same sites that have seen nothing.

    Raises UnusableStatsError where the file is of another `identity`, which it tells, or damaged.
    """
    try:
        if not path.is_file():
            raise ValueError("no regular file")
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        header, digest = metadata["header"], metadata["sha256"]
        if digest != _digest(header, arrays):
            raise ValueError("its checksum is of another content")
        content = TypeAdapter(_Header).validate_json(header)
        changes = input_changes(content.identity, _whole(identity))
        if not changes:
            return content.passed, _unpacked(arrays, content.reasons, fresh)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RecursionError, MemoryError) as error:
        raise UnusableStatsError(f"is damaged ({first_line(error)})") from error
    raise UnusableStatsError(f"was begun with other inputs ({changes})")


def _whole(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {**identity, "layout": LAYOUT}


def _digest(header: str, arrays: Mapping[str, np.ndarray]) -> str:
    """The checksum of the content: header, and each array with its shape."""
    digest = hashlib.sha256(header.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _packed(running: Mapping[Site, RunningStats]) -> dict[str, np.ndarray]:
    """The arrays of the file."""
    histograms = [stats.histogram for stats in running.values()]
    moments = [stats.moments for stats in running.values() if stats.moments is not None]
    octaves = [sorted(histogram.octaves.items()) for histogram in histograms if histogram is not None]
    counts = [count for each in octaves for _, count in each]
    return {
        "groups": np.array([stats.groups for stats in running.values()], dtype=np.int64),
        "octaves": np.array([-1 if h is None else len(h.octaves) for h in histograms], dtype=np.int64),
        "centres": np.array([0.0 if h is None else h.centre for h in histograms], dtype=np.float64),
        "moments": np.stack([np.concatenate([np.empty(0), *(getattr(m, n) for m in moments)]) for n in _FIELDS]),
        "exponents": np.array([exponent for each in octaves for exponent, _ in each], dtype=np.int64),
        "counts": np.stack(counts) if counts else np.empty((0, 2, BINS_PER_OCTAVE), dtype=np.int64),
    }


def _unpacked(
    arrays: Mapping[str, np.ndarray], reasons: list[str], fresh: Mapping[Site, RunningStats]
) -> dict[Site, RunningStats]:
    """The statistics of each site. Raises ValueError where the arrays are not what `_packed` makes of such sites."""
    _check_shapes(arrays, len(fresh), len(reasons))
    running: dict[Site, RunningStats] = {}
    columns, rows = 0, 0  # of `moments` and of `counts` that belong to earlier sites
    for place, (site, begun) in enumerate(fresh.items()):
        groups, octaves = int(arrays["groups"][place]), int(arrays["octaves"][place])
        if groups not in (begun.groups, 1):
            raise ValueError(f"{groups} groups of {site}, expected {begun.groups}")
        running[site] = stats = RunningStats(groups)
        stats.reason = reasons[place]
        if octaves >= 0:
            stats.histogram = FloatHistogram(float(arrays["centres"][place]))
            own = slice(rows, rows + octaves)
            stats.histogram.octaves = dict(zip(arrays["exponents"][own].tolist(), arrays["counts"][own], strict=True))
            if len(stats.histogram.octaves) != octaves:
                raise ValueError(f"the histogram of {site} is cut short, or has an octave twice")
            rows += octaves
        if octaves > 0:
            part = arrays["moments"][:, columns : columns + groups]
            if part.shape[1] != groups:
                raise ValueError(f"the moments of {site} are cut short")
            stats.moments = Moments(*part)
            columns += groups
        _check(stats, site)
    if columns != arrays["moments"].shape[1] or rows != len(arrays["counts"]):
        raise ValueError("it holds more than its sites have")
    return running


def _check_shapes(arrays: Mapping[str, np.ndarray], sites: int, reasons: int) -> None:
    if arrays.keys() != _ARRAYS.keys():
        raise ValueError(f"it holds {', '.join(sorted(arrays))}")
    for name, (dtype, axes) in _ARRAYS.items():
        if arrays[name].dtype != dtype or arrays[name].ndim != axes:
            raise ValueError(f"{name} is {arrays[name].dtype} of shape {arrays[name].shape}")
    lengths = {len(arrays["groups"]), len(arrays["octaves"]), len(arrays["centres"]), reasons}
    if lengths != {sites} or len(arrays["moments"]) != len(_FIELDS):
        raise ValueError(f"it is not of {sites} sites")
    if arrays["counts"].shape != (len(arrays["exponents"]), 2, BINS_PER_OCTAVE):
        raise ValueError(f"counts have the shape {arrays['counts'].shape}")
    if not (np.abs(arrays["centres"]) <= np.finfo(np.float32).max).all():
        raise ValueError("a centre is no float32")


def _check(stats: RunningStats, site: Site) -> None:
    """Raises ValueError where histogram and moments cannot be of the same values."""
    histogram, moments = stats.histogram, stats.moments
    if histogram is None or moments is None:
        return
    known = np.isfinite([moments.count, moments.mean, moments.minimum, moments.maximum]).all()
    exponents = histogram.octaves.keys()
    if (
        not known
        or min(exponents) < 0
        or max(exponents) > 255
        or any((counts < 0).any() for counts in histogram.octaves.values())
        or (moments.minimum > moments.maximum).any()
        or (moments.count < 1).any()
        or histogram.count != stats.count
    ):
        raise ValueError(f"the figures of {site} contradict one another")
