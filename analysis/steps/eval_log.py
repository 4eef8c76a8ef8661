"""The scores of an evaluation's images, batch by batch in a log on the disk, so that a stopped evaluation resumes."""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor

from analysis.data import ImageData, none_readable, shared_batches
from analysis.runs import Run
from analysis.scoring import Scores, checked_output, divergences, scores
from analysis.session.loaded_run import LoadedRun, warn_of_skipped
from analysis.storage.keyed_log import OwnRows, json_sha256
from analysis.terminal.console import progress, resumable, warn


def log_name(asked: Mapping[str, Any]) -> str:
    """The log's name in the run folder; another for each evaluation, so that none takes over or ends another's."""
    return f"eval-{json_sha256(asked)[:12]}.partial.jsonl"


def log_names(run: Run) -> list[str]:
    """The logs of all evaluations that were stopped in a run folder."""
    return sorted(path.name for path in run.path.glob("eval-*.partial.jsonl"))


def floating_outputs(opened: LoadedRun, data: ImageData) -> list[Any]:
    """The model's outputs for each batch of images, None for one of which no image can be read."""
    setup, outputs, seen = opened.setup, list[Any](), 0
    with (
        progress(data.images, "floating point", "image", quiet=setup.quiet) as bar,
        torch.inference_mode(),
    ):
        for batch in shared_batches(data, batch_size=setup.batch_size, num_workers=setup.num_workers):
            pair = (batch.images.to(setup.device), opened.targets(batch.labels))
            count = len(batch.labels)
            run = opened.task.forward
            outputs.append(checked_output(run(opened.model, pair), count, seen=seen) if count else None)
            seen += count
            bar.update(count)
    return outputs


def evaluated(
    opened: LoadedRun,
    data: ImageData,
    asked: Mapping[str, Any],
    calibration: Sequence[Tensor],
    references: Sequence[Any] | None = None,
) -> tuple[Scores, Tensor | None]:
    """The scores of all images that can be read, in order, by the opened model as it runs now.

    With the `floating_outputs` as `references` the divergences from them too, else None.

    Batches that the log of what was `asked` holds are neither read nor run again; those that follow are added to it. It
    is gone on with only where model, images, versions and the same `calibration`, batches of images that set the
    scales, are those with which it was begun.
    """
    setup, size = opened.setup, opened.setup.batch_size
    owner = opened.identity(data) | {"asked": asked, "calibration": [_content(images) for images in calibration]}
    task, names = opened.task, [*Scores._fields]
    if references is not None:
        task = task.prepared([output for output in references if output is not None])
        names.append("divergence")
        owner["figures"] = names
    log = OwnRows(opened.run.path / log_name(asked), owner)
    own, others = log.read()
    if others:
        warn(f"{log.log.path} is damaged, or was begun with other inputs: what it lacks is evaluated again.")
    rows = _from_the_first_on(own)
    done = min(len(rows) * size, data.images)
    data.skipped.extend(dict.fromkeys(name for row in rows for name in row["skipped"]))

    def told() -> str:
        kept = min(len(_from_the_first_on(log.read()[0])) * size, data.images)
        return f"{kept:,} of {data.images:,} images" if kept else ""

    with (
        resumable(told),
        progress(data.images, "evaluation", "image", quiet=setup.quiet, done=done) as bar,
        torch.inference_mode(),
    ):
        seen, skipped = sum(len(row["loss"]) for row in rows), len(data.skipped)
        for batch in shared_batches(data, batch_size=size, num_workers=setup.num_workers, first=len(rows)):
            row: dict[str, Any] = {
                "batch": len(rows),
                "skipped": data.skipped[skipped:],
                **{name: [] for name in names},
            }
            if len(batch.labels):
                pair = (batch.images.to(setup.device), opened.targets(batch.labels))
                output = checked_output(task.forward(opened.model, pair), len(batch.labels), seen=seen)
                figures = scores(task, [output], [pair])
                row |= {name: values.tolist() for name, values in figures._asdict().items()}
                if references is not None:
                    row["divergence"] = divergences(task, [output], [references[len(rows)]], [pair]).tolist()
            log.append(row)
            rows.append(row)
            seen, skipped = seen + len(batch.labels), len(data.skipped)
            bar.update(min(size, data.images - bar.n))
    warn_of_skipped(data)
    if not seen:
        raise none_readable(data)
    loss, score, *more = (torch.tensor([x for row in rows for x in row[name]], dtype=torch.float64) for name in names)
    return Scores(loss, score), more[0] if more else None


def _from_the_first_on(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the batches in their order, up to one that is missing."""
    by_number = {row["batch"]: row for row in rows}
    return [by_number[number] for number in takewhile(by_number.__contains__, count())]


def _content(images: Tensor) -> str:
    return hashlib.sha256(images.cpu().contiguous().numpy().data).hexdigest()
