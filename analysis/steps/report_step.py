"""`qvw report`: run folders as one HTML page."""

from collections.abc import Sequence
from pathlib import Path

from analysis.report import report_html
from analysis.storage.files import write_bytes
from analysis.terminal.console import say


def run_report(runs: Sequence[Path], out: Path, *, quiet: bool = False) -> None:
    """Write `out`/index.html, a page of one or more run folders side by side, and say where it is."""
    page = out / "index.html"
    write_bytes(page, report_html(runs).encode(errors="replace"))
    say(f"report in {page}", quiet=quiet)
