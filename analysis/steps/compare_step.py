"""`qvw compare`: the statistics of several runs side by side, as tables and figures."""

import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pandas as pd

from analysis.figures.panels import figure_files, save_figure
from analysis.figures.variation_panels import STEMS, variation_figures
from analysis.page.figures import picture
from analysis.report import report_html
from analysis.runs import run_names, run_with_stats
from analysis.statistics.comparison import COLUMNS, Compared, compare
from analysis.statistics.variation_frames import Measured, channel_frame
from analysis.statistics.variation_tests import differences
from analysis.storage.files import write_bytes
from analysis.tensor_stats import STATS_COLUMNS
from analysis.terminal.console import as_text, say, warn
from analysis.variation import layer_sites, variation
from quant.errors import InputError


def run_compare(runs: Sequence[Path], out: Path, *, modules: Sequence[str] = (), quiet: bool = False) -> None:
    """Write comparison.csv, differences.csv, the figures of `variation_panels` with their data, and the report.

    `modules` are shell patterns of the layers whose channels are drawn; InputError for one that matches none.
    """
    if len(runs) < 2:
        raise InputError("one run was given. Name at least two run folders to compare.")
    measured: list[Measured] = []
    for path, name in zip(runs, run_names(runs, reserved=COLUMNS), strict=True):
        run = run_with_stats(path)
        measured.append(Measured.read(run, name, run.read_table("stats", STATS_COLUMNS)))
        for file in measured[-1].lacking():
            again = shlex.join(["qvw", "stats", "--run", str(path), "--overwrite"])
            warn(f"{path} has no {file}: the figures drawn from it leave this run out. `{again}` makes it.")
    table = compare([Compared(each, variation(each.stats)) for each in measured])
    channels = channel_frame(measured, modules)  # a wrong pattern is told before anything is written
    for line in _left_out(measured, channels, modules):
        say(line, quiet=quiet)
    write_bytes(out / "comparison.csv", table.to_csv(index=False).encode())
    pairs = differences([(each.name, each.stats) for each in measured])
    write_bytes(out / "differences.csv", pairs.to_csv(index=False).encode())
    stems, pictures = [], []
    for each in variation_figures(measured, modules):
        write_bytes(out / f"{each.stem}.csv", each.frame.to_csv(index=False).encode())
        save_figure(each.figure, out / each.stem)
        pictures.append(picture(each.figure, each.caption, each.words))
        stems.append(each.stem)
    for stem in set(STEMS) - set(stems):  # of other runs, compared into the same folder before
        for file in (*figure_files(stem), f"{stem}.csv"):
            with suppress(OSError):  # a folder of that name is the user's own
                (out / file).unlink()
    say(as_text(table[["tensor", "measure", *(each.name for each in measured)]]), quiet=quiet)
    say("\n".join(pairs["reading"]), quiet=quiet)
    say(f"in {out}: comparison.csv (each measure explained), differences.csv (intervals and tests)", quiet=quiet)
    say(f"figures, .png and .svg, with their data in .csv: {', '.join(stems)}", quiet=quiet)
    page = out / "index.html"
    write_bytes(page, report_html(runs, pictures).encode(errors="replace"))
    say(f"report in {page}", quiet=quiet)


def _left_out(measured: Sequence[Measured], channels: pd.DataFrame, modules: Sequence[str]) -> list[str]:
    """A sentence for each run that some figure does not show, though its tables are there."""
    lines = []
    for each in measured:
        if layer_sites(each.stats, "input").empty:
            lines.append(f"{each.name} was measured without images: the figures of activations leave it out.")
        if modules and each.channels is not None and each.name not in set(channels["model"]):
            lines.append(f"{each.name} has no layer that matches --module: the figure of channels leaves it out.")
    return lines
