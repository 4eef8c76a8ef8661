"""`qvw sensitivity`: the single-site sweep, into a run folder, resumable at every row."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.console import as_text, progress, say, warn
from analysis.cost import cost_table
from analysis.files import RowLog
from analysis.groups import EVERYTHING
from analysis.open_run import open_run
from analysis.opened import Opened
from analysis.panels import figure_files, save_figure
from analysis.rank_bands import images_to_separate
from analysis.sensitivity import (
    IMAGE_COLUMNS,
    ROW_KEY,
    SENSITIVITY_COLUMNS,
    SweepConfig,
    images_table,
    row_key,
    sensitivity_table,
    sweep_keys,
)
from analysis.sensitivity_panels import STEMS, sensitivity_figures
from analysis.setup import Setup
from analysis.sites import select_sites
from analysis.sweep import CACHE_MIB, sweep
from quant.choices import ALLOWED_BIT_WIDTHS
from quant.errors import InputError
from quant.site import SiteInfo

IMAGES = 256
LOG = "sensitivity.partial.jsonl"
FILES = (
    "sensitivity.parquet", "sensitivity_images.parquet", "cost.parquet", LOG,
    *(file for stem in STEMS for file in figure_files(stem)),
)  # fmt: skip


def run_sensitivity(setup: Setup, config: SweepConfig, *, tensors: Sequence[str], cache_mib: int = CACHE_MIB) -> None:
    """Sweep the sites that hold `tensors`; finished rows are kept one by one and never measured twice."""
    wrong = [bits for bits in config.bit_widths if bits not in ALLOWED_BIT_WIDTHS]
    if wrong:
        raise InputError(f"--bits {wrong[0]} is not offered; choose from {', '.join(map(str, ALLOWED_BIT_WIDTHS))}.")
    opened = open_run(setup, needs_data=True)
    run, quiet = opened.run, setup.quiet
    data = opened.step_images("sensitivity", "train", at_most=IMAGES)
    sites = select_sites(opened.sites, tensors)
    if not sites:
        raise InputError(f"no site of {opened.name} holds {', '.join(tensors)}; see --tensors, --include, --exclude.")
    blocks = {info.site.module for info in opened.sites if info.kind == "block"}
    keys = sweep_keys(opened.model, sites, config, blocks=blocks)
    log = RowLog(run.path / LOG)
    with opened.step("sensitivity", data, FILES, asdict(config) | {"tensors": list(tensors)}):
        rows = {row_key(row): row for row in _finished(opened, log)}
        todo = [key for key in keys if row_key(key) not in rows]
        if todo:
            batches = list(opened.stream(data, "images"))
            with progress(len(todo), "sensitivity", "row", quiet=quiet) as bar:
                for row in _rows(opened, sites, batches, todo, blocks, cache_mib):
                    log.append([row])
                    rows[row_key(row)] = row
                    bar.update()
        run.write_table("cost", cost_table(opened.sites))
        run.write_table("sensitivity_images", images_table(list(rows.values())))
        run.write_table("sensitivity", sensitivity_table(list(rows.values())))
        table = run.read_table("sensitivity")
        value = "delta_loss" if table["delta_loss"].notna().any() else "kl"
        for stem, figure in sensitivity_figures(table, opened.name):
            save_figure(figure, run.path / stem)
        log.remove()
    measured = {row_key(key) for key in keys}
    say(_summary([row for key, row in rows.items() if key in measured], value), quiet=quiet)
    figures = ", ".join(f"{stem}.png" for stem in STEMS if (run.path / f"{stem}.png").exists())
    say(f"{len(table)} rows in {run.path / 'sensitivity.parquet'}, figures {figures}", quiet=quiet)


def _rows(
    opened: Opened,
    sites: Sequence[SiteInfo],
    batches: Sequence[tuple[Tensor, Tensor]],
    todo: Sequence[dict],
    blocks: Collection[str],
    cache_mib: int,
) -> Iterator[dict]:
    """The rows of a sweep; where memory runs out it goes on with half as many images at a time, and notes it."""
    left, note = list(todo), ""
    while left:
        try:
            for row in sweep(
                opened.model, opened.trace, sites, batches, tuple(left), name=opened.name, blocks=blocks,
                cache_mib=cache_mib, tell=lambda text: say(text, quiet=opened.setup.quiet),
            ):  # fmt: skip
                yield row | {"note": "; ".join(filter(None, (row["note"], note)))}
                left.pop(0)
        except (MemoryError, RuntimeError) as error:
            size = max(len(images) for images, _ in batches) // 2
            if not _is_out_of_memory(error) or size < 1:
                raise
            batches = [part for x, y in batches for part in zip(x.split(size), y.split(size), strict=True)]
            cache_mib //= 2
            note = f"{size} images at a time: memory ran out with more"
            warn(f"memory ran out; going on with {size} images at a time.")


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or, where torch raises a plain RuntimeError, on the CPU."""
    plain = any(words in str(error) for words in ("not enough memory", "DefaultCPUAllocator"))
    return plain or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def _finished(opened: Opened, log: RowLog) -> list[dict]:
    """Rows of the table and of a sweep that was stopped; a row in both is the same measurement."""
    table = opened.run.path / "sensitivity.parquet"
    written = opened.run.read_table("sensitivity", SENSITIVITY_COLUMNS).to_dict("records") if table.exists() else []
    if (opened.run.path / "sensitivity_images.parquet").exists():
        images = opened.run.read_table("sensitivity_images", (*ROW_KEY, *IMAGE_COLUMNS)).to_dict("records")
        by_key = {row_key(row): {name: row[name] for name in IMAGE_COLUMNS} for row in images}
        written = [row | by_key.get(row_key(row), {}) for row in written]
    rows = [*written, *log.read()]
    if not all(isinstance(row, dict) and set(SENSITIVITY_COLUMNS) <= set(row) for row in rows):
        raise InputError(f"{log.path} is damaged. Start the step anew with --overwrite.")
    return rows


def _summary(rows: Sequence[dict], value: str) -> str:
    """The most sensitive sites, or groups, at the lowest bit-width, and how far that can be trusted."""
    table = sensitivity_table(rows)
    treatment = "re_estimated" if (table["batchnorm"] == "re_estimated").any() else table["batchnorm"].iloc[0]
    table = table[(table["batchnorm"] == treatment) & (table["bit_width"] == table["bit_width"].min())]
    out = table["protocol"] == "leave_one_out"
    everything = table[(table["group"] == EVERYTHING) & ~out]
    table = table[out] if out.any() else table
    worst = table.nsmallest(8, "kl") if out.any() else table.nlargest(8, "kl")
    names = ["group"] if (table["group"] != "").all() else ["module", "tensor"]
    columns = [*names, "delta_loss", "delta_loss_se", "delta_top1", "kl", "kl_se", "rank_low", "rank_high"]
    bits = int(table["bit_width"].iloc[0])
    text = f"Most sensitive at {bits} bit"
    if out.any():
        text = f"What helps most when it is left in floating point, all else at {bits} bit"
    text += f" (KL of the logits, ranks in 95 % of resampled images):\n{as_text(worst[columns])}"
    if len(everything):
        text += f"\nEverything at {bits} bit: KL {everything['kl'].iloc[0]:.3g}."
    return "\n".join([text, *_doubts(rows, table, value)])


def _doubts(rows: Sequence[dict], table: pd.DataFrame, value: str) -> list[str]:
    """What a reader must know before the ranks are used."""
    doubts = []
    if (table["kl"] == 0).all():
        doubts.append("Every change is 0: are residual branches zero-initialised (timm: zero_init_last)?")
    elif value == "delta_loss" and (table["delta_loss"].abs() < 2 * table["delta_loss_se"]).all():
        doubts.append("No change of the loss is larger than twice its standard error: use the KL, or more images.")
    shown = {tuple(key) for key in table[list(ROW_KEY)].itertuples(index=False)}
    values = [row["image_kl"] for row in rows if row_key(row) in shown and row.get("image_kl") is not None]
    if len(values) > 2 and (table["kl"] != 0).any():
        needed = images_to_separate(np.array(values, dtype=np.float64))
        have = len(values[0])
        if needed > have:
            amount = f"about {needed:,.0f} images" if needed < 1e6 else "more than a million images"
            doubts.append(f"The first ten cannot be told apart with {have} images; {amount} would.")
    return doubts
