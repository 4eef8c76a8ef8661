"""The session of a live network: its run folder, its batches, and what fixes a result that was measured on them."""

import hashlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from analysis.inputs.weights import tensor_bytes, weights_sha256
from analysis.runs import Run
from analysis.session.session import Session, Source
from analysis.storage.run_record import ModelRecord, versions
from analysis.task import Task
from quant.batches import checked_data, first_batch, tensors, to_device
from quant.errors import InputError
from quant.network import Network


def live_session(
    net: Network,
    task: Task,
    run: Run | str | Path,
    data: Iterable[Any] | None,
    *,
    overwrite: bool,
    progress: bool,
    whole: bool = False,
) -> Session:
    """What a measurement of `net` notes in the run folder.

    The data are known by their number of batches and the content of the first; with `whole`, where they are in memory
    anyway, by the content of all.
    """
    run = run if isinstance(run, Run) else Run(run)
    source = None if data is None else _source(net, task, data)
    record = _record(net, run)
    inputs: dict[str, Any] = {
        "weights_sha256": record.weights_sha256, "include": list(net.include), "exclude": list(net.exclude)
    }  # fmt: skip
    if source is not None:
        content = checked_data(data) if whole else [first_batch(data)]
        inputs |= {"batches": source.batches, "data_sha256": batches_sha256(content), **_task_inputs(task)}
        if source.samples is not None:
            inputs["images"] = source.samples
    code = {"model": record.name, "code_sha256": _code_sha256(type(net.model)), "device_type": net.device.type}
    return Session(
        run=run, network=net, task=task, record=record, source=source, inputs=inputs,
        identity={**inputs, **versions(), **code}, bar=partial(_bar, progress), say=lambda _text: None,
        warn=partial(warnings.warn, stacklevel=2), device=str(net.device), overwrite=overwrite,
    )  # fmt: skip


def _source(net: Network, task: Task, data: Iterable[Any]) -> Source:
    """The batches of `data`, counted; of a list the samples too."""
    known = isinstance(data, (list, tuple))
    batches = len(data) if isinstance(data, Sized) else sum(1 for _ in checked_data(data))
    if not batches:
        raise InputError("`data` holds no batch. Give at least one.")

    def read(first: int, every: int) -> Iterator[tuple[Any, Sequence[str]]]:
        seen = 0
        for place, batch in enumerate(checked_data(data)):
            count = task.samples(batch)
            if place >= first and (place - first) % every == 0:
                yield to_device(batch, net.device), [f"number {i}" for i in range(seen, seen + count)]
            seen += count

    return Source(
        read=read, batches=batches, unit="sample", samples=sum(map(task.samples, data)) if known else None
    )  # fmt: skip


def _record(net: Network, run: Run) -> ModelRecord:
    """What run.json says of the model; of the same weights under the same name, what it says already."""
    known, sha256 = run.record.model, weights_sha256(net.model)
    if known is not None and (known.name, known.weights_sha256) == (net.name, sha256):
        return known
    parameters = sum(p.numel() for p in net.model.parameters())
    return ModelRecord(typed=net.name, name=net.name, weights_sha256=sha256, parameters=parameters)


def batches_sha256(batches: Iterable[Any]) -> str:
    """Hexadecimal SHA-256 over the types, shapes and bytes of all tensors of the batches, in order."""
    digest = hashlib.sha256()
    for batch in batches:
        for x in tensors(batch):
            digest.update(f"{x.dtype} {tuple(x.shape)}\n".encode())
            digest.update(tensor_bytes(x))
        digest.update(b"batch\n")
    return digest.hexdigest()


def _task_inputs(task: Task) -> dict[str, str]:
    """The task's name; of one that is not ready-made, the text of its functions too."""
    parts = {field.name: getattr(task, field.name) for field in fields(task)}
    own = [part for part in parts.values() if callable(part) and not _is_ours(part)]
    named = {} if task.name == "classification" else {"task": task.name}
    return named | ({"task_sha256": _code_sha256(*own)} if own else {})


def _is_ours(part: Callable) -> bool:
    return str(getattr(part, "__module__", "")).partition(".")[0] in ("analysis", "quant")


def _code_sha256(*parts: Any) -> str:
    """A hash of the source text of functions or classes; of their names where there is no text."""
    digest = hashlib.sha256()
    for part in parts:
        try:
            text = inspect.getsource(part)
        except (OSError, TypeError):  # typed at a prompt, or a callable object
            text = str(getattr(part, "__qualname__", type(part).__qualname__))
        digest.update(text.encode())
    return digest.hexdigest()


def _bar(shown: bool, total: int | None, what: str, unit: str, done: int = 0) -> tqdm:
    return tqdm(total=total, initial=done, desc=what, unit=unit, disable=not shown)
