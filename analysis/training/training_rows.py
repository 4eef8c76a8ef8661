"""The rows of a training: logs on the disk while it runs, tables of the run folder when it has ended."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from analysis.runs import Run
from analysis.storage.columns import BINS_COLUMNS, HISTORY_COLUMNS, OSCILLATION_COLUMNS
from analysis.storage.files import RowLog
from quant.config import QATConfig
from quant.errors import InputError
from quant.site import Site, SiteInfo
from quant.train import StepReport, binned_steps, logged_steps

_COLUMNS = {"history": HISTORY_COLUMNS, "oscillation": OSCILLATION_COLUMNS, "bins": BINS_COLUMNS}
TABLES, LOGS = (tuple(name + suffix for name in _COLUMNS) for suffix in (".parquet", ".partial.jsonl"))
"""The names of the files, in the folder of the training."""


class TrainingRows:
    """The logs of a training in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logs = {name: RowLog(folder / log) for name, log in zip(_COLUMNS, LOGS, strict=True)}

    def keep(self, first: int, config: QATConfig, total: int) -> None:
        """Drop the rows after step `first`, from where the training resumes; all of them at 0.

        InputError where rows up to there are missing.
        """
        lost = [log.path for log in self.logs.values() if first and not log.path.exists()]  # all are made at the start
        rows = {name: log.keep(first if first else -1) for name, log in self.logs.items()}
        trained = {row["step"] for row in rows["history"] if row.get("split") == "train"}
        observed, binned = ({row["step"] for row in rows[name]} for name in ("oscillation", "bins"))
        expected = set(logged_steps(config, total, first))
        bins = {step for step in binned_steps(total) if step <= first}
        if lost or trained != expected or ((observed or binned) and (observed, binned) != (expected | {0}, bins)):
            raise InputError(
                f"{self.folder} lacks rows of its history up to the checkpoint of step {first}. Put its files "
                "*.partial.jsonl back, or start from scratch with --overwrite."
            )

    def append(self, report: StepReport) -> None:
        """Add what one step leaves."""
        for name, rows in (("history", report.history), ("oscillation", report.oscillation), ("bins", report.bins)):
            if rows:
                self.logs[name].append(rows)

    def write(self, run: Run, sites: Mapping[Site, SiteInfo]) -> None:
        """Write the tables of the training's folder in `run`; the bins with the kind of each module."""
        for name, columns in _COLUMNS.items():
            table = pd.DataFrame(self.logs[name].read(), columns=list(columns))
            if name == "bins":
                names = zip(table["module"], table["tensor"], strict=True)
                table["kind"] = [sites[Site(*site)].kind for site in names]
            run.write_table(f"{self.folder.name}/{name}", table)
