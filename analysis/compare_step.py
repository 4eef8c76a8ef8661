"""`qvw compare`: the statistics of several runs side by side, as tables and figures."""

from collections.abc import Sequence
from pathlib import Path

from analysis import comparison
from analysis.console import as_text, say
from analysis.files import write_bytes
from analysis.panels import depth_figure, save_figure
from analysis.report_step import run_report
from analysis.runs import Run
from analysis.tensor_stats import STATS_COLUMNS
from analysis.variation import variation
from analysis.variation_tests import differences
from quant.errors import InputError


def run_compare(runs: Sequence[Path], out: Path, *, quiet: bool = False) -> None:
    """Write comparison.csv, differences.csv, figures over depth with their data, and the report, into `out`."""
    if len(runs) < 2:
        raise InputError("one run was given; name at least two run folders to compare.")
    loaded: list[comparison.Run] = []
    for path in runs:
        run = Run(path)
        stats = run.read_table("stats", STATS_COLUMNS)
        loaded.append((_unique_name(path, [name for name, _, _ in loaded]), stats, variation(stats)))
    table = comparison.compare(loaded)
    write_bytes(out / "comparison.csv", table.to_csv(index=False).encode())
    pairs = differences([(name, stats) for name, stats, _ in loaded])
    write_bytes(out / "differences.csv", pairs.to_csv(index=False).encode())
    for tensor in ("weight", "input"):
        frame = comparison.depth_frame(loaded, tensor=tensor)
        if frame.empty:
            continue
        write_bytes(out / f"depth_{tensor}.csv", frame.to_csv(index=False).encode())
        save_figure(depth_figure(frame, tensor), out / f"variation_{tensor}")
    say(as_text(table[["tensor", "measure", *(name for name, _, _ in loaded)]]), quiet=quiet)
    say("\n".join(pairs["reading"]), quiet=quiet)
    say(
        f"comparison.csv (each measure explained), differences.csv (intervals and tests) and figures in {out}",
        quiet=quiet,
    )
    run_report(runs, out, quiet=quiet)


def _unique_name(path: Path, taken: Sequence[str]) -> str:
    """The run folder's name, which the user chose; with its parent's where two are named alike."""
    path = path.resolve()
    return path.name if path.name not in taken else f"{path.parent.name}/{path.name}"
