"""`qvw sensitivity`: the single-site sweep, into a run folder, resumable at every row."""

from collections.abc import Sequence
from dataclasses import asdict

import pandas as pd

from analysis.console import as_text, progress, say
from analysis.cost import cost_table
from analysis.files import RowLog
from analysis.panels import figure_files, save_figure, sensitivity_figure
from analysis.sensitivity import (
    SENSITIVITY_COLUMNS,
    SweepConfig,
    preferred_rows,
    row_key,
    sensitivity_table,
    sweep_keys,
)
from analysis.setup import Opened, Setup, open_run
from analysis.sites import select_sites
from analysis.sweep import sweep
from quant.choices import ALLOWED_BIT_WIDTHS
from quant.errors import InputError

IMAGES = 256
LOG = "sensitivity.partial.jsonl"
FILES = ("sensitivity.parquet", "cost.parquet", LOG, *figure_files("sensitivity"))


def run_sensitivity(setup: Setup, config: SweepConfig, *, tensors: Sequence[str]) -> None:
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
    keys = sweep_keys(opened.model, sites, config)
    log = RowLog(run.path / LOG)
    with opened.step("sensitivity", data, FILES, asdict(config) | {"tensors": list(tensors)}):
        rows = {row_key(row): row for row in _finished(opened, log)}
        todo = [key for key in keys if row_key(key) not in rows]
        if todo:
            batches = list(opened.stream(data, "images"))
            with progress(len(todo), "sensitivity", "row", quiet=quiet) as bar:
                for row in sweep(opened.model, opened.trace, sites, batches, todo, name=opened.name):
                    log.append([row])
                    rows[row_key(row)] = row
                    bar.update()
        run.write_table("cost", cost_table(opened.sites))
        run.write_table("sensitivity", sensitivity_table(list(rows.values())))
        table = run.read_table("sensitivity")
        value = "delta_loss" if table["delta_loss"].notna().any() else "kl"
        save_figure(sensitivity_figure(preferred_rows(table), opened.name, value=value), run.path / "sensitivity")
        log.remove()
    say(_summary(preferred_rows(table), value), quiet=quiet)
    say(f"{len(table)} rows in {run.path / 'sensitivity.parquet'}, figure sensitivity.png", quiet=quiet)


def _finished(opened: Opened, log: RowLog) -> list[dict]:
    """Rows of the table and of a sweep that was stopped; a row in both is the same measurement."""
    table = opened.run.path / "sensitivity.parquet"
    written = opened.run.read_table("sensitivity", SENSITIVITY_COLUMNS).to_dict("records") if table.exists() else []
    rows = [*written, *log.read()]
    if not all(isinstance(row, dict) and set(SENSITIVITY_COLUMNS) <= set(row) for row in rows):
        raise InputError(f"{log.path} is damaged. Start the step anew with --overwrite.")
    return rows


def _summary(rows: pd.DataFrame, value: str) -> str:
    lowest = rows[rows["bit_width"] == rows["bit_width"].min()].nlargest(8, value)
    columns = ["module", "tensor", "bit_width", "delta_loss", "delta_loss_se", "delta_top1", "kl", "sqnr_db"]
    text = f"Most sensitive at {lowest['bit_width'].iloc[0]} bit:\n{as_text(lowest[columns])}"
    if (rows["kl"] == 0).all():
        text += "\nEvery change is 0: are residual branches zero-initialised (timm: zero_init_last)?"
    return text
