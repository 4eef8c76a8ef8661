"""The scores of an evaluation's images, batch by batch in a log on the disk, so that a stopped evaluation goes on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.data import ImageData, none_readable, shared_batches
from analysis.session.opened import Opened, warn_of_skipped
from analysis.storage.files import RowLog
from analysis.sweeps.evaluation import Scores, batch_logits, scores
from analysis.terminal.console import progress, resumable, say, warn


def log_name(fixed: Mapping[str, Any]) -> str:
    """The log's name in the run folder; another for each evaluation, so that none takes over or ends another's."""
    return f"eval-{_sha256(fixed)[:12]}.partial.jsonl"


def log_names(folder: Path) -> list[str]:
    """The logs of all evaluations that were stopped in a run folder."""
    return sorted(path.name for path in folder.glob("eval-*.partial.jsonl"))


def evaluated(
    opened: Opened, data: ImageData, log: RowLog, fixed: Mapping[str, Any], calibration: Sequence[Tensor]
) -> Scores:
    """The scores of all images that can be read, in order, by the opened model as it runs now.

    Batches that `log` holds are neither read nor run again; those that follow are added to it. It is taken for this
    evaluation's only where it was begun with the same `fixed` (what is evaluated, and how) and the same `calibration`,
    batches of images that set the scales.
    """
    setup, size = opened.setup, opened.setup.batch_size
    evaluation = _sha256([fixed, [_content(images) for images in calibration]])
    rows, damaged = _kept(log, evaluation)
    if damaged:
        warn(f"{log.path} is damaged, or of other calibration images: what it lacks is evaluated again.")
    done = min(len(rows) * size, data.images)
    if done:
        say(f"goes on after {done:,} of {data.images:,} images", quiet=setup.quiet)
        data.skipped.extend(dict.fromkeys(name for row in rows for name in row["skipped"]))

    def told() -> str:
        kept = len(_kept(log, evaluation)[0]) * size
        return f"{min(kept, data.images):,} of {data.images:,} images" if kept else ""

    with (
        resumable(told),
        progress(data.images, "evaluation", "image", quiet=setup.quiet) as bar,
        torch.inference_mode(),
    ):
        bar.initial = bar.n = bar.last_print_n = done  # so that the time to go is of the rest
        seen, skipped = sum(len(row["loss"]) for row in rows), len(data.skipped)
        # From batch number `rank` on, each in its turn.
        for batch in shared_batches(data, batch_size=size, num_workers=setup.num_workers, rank=len(rows)):
            row: dict[str, Any] = {"batch": len(rows), "loss": [], "hit": [], "skipped": data.skipped[skipped:]}
            if len(batch.labels):
                logits = batch_logits(opened.model, batch.images.to(setup.device), batch.labels, seen=seen)
                row |= {name: values.tolist() for name, values in scores(logits, batch.labels)._asdict().items()}
            log.append([row | {"sha256": _sha256([evaluation, row])}])
            rows.append(row)
            seen, skipped = seen + len(batch.labels), len(data.skipped)
            bar.update(min(size, data.images - bar.n))
    warn_of_skipped(data)
    if not seen:
        raise none_readable(data)
    loss, hit = ([x for row in rows for x in row[name]] for name in Scores._fields)
    return Scores(torch.tensor(loss, dtype=torch.float64), torch.tensor(hit, dtype=torch.float64))


def _kept(log: RowLog, evaluation: str) -> tuple[list[dict[str, Any]], bool]:
    """The logged batches of this evaluation from the first on, up to one that is missing; whether a line is not its."""
    lines = log.read(damaged=True)
    own = [row for row in lines if _is_own(row, evaluation)]
    by_number = {row["batch"]: row for row in own}
    return [by_number[n] for n in takewhile(by_number.__contains__, count())], len(own) < len(lines)


def _is_own(row: Any, evaluation: str) -> bool:
    """Whether a line is what this evaluation has written: its hash is of the evaluation and of the figures."""
    if not isinstance(row, dict):
        return False
    return row.get("sha256") == _sha256([evaluation, {name: row[name] for name in row if name != "sha256"}])


def _content(images: Tensor) -> str:
    return hashlib.sha256(images.cpu().contiguous().numpy().data).hexdigest()


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
