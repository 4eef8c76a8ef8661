"""A figure as files: PNG to look at, SVG to print."""

import io
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure, SubFigure

FORMATS: dict[str, dict] = {"png": {"dpi": 200}, "svg": {"metadata": {"Date": None}}}


def save_figure(figure: Figure | SubFigure, path: Path, write_bytes: Callable[[Path, bytes], object]) -> list[Path]:
    """The two files written, `path` with the suffixes .png (200 dots an inch) and .svg; the same bytes each time.

    `write_bytes(path, content)` writes one file, whole or not at all.
    """
    if isinstance(figure, SubFigure):
        raise TypeError("Only a whole figure can be saved, got a SubFigure.")
    written = []
    for suffix, options in FORMATS.items():
        buffer = io.BytesIO()
        with mpl.rc_context({"svg.hashsalt": path.name}):
            figure.savefig(buffer, format=suffix, **options)
        written.append(path.with_name(f"{path.name}.{suffix}"))
        write_bytes(written[-1], buffer.getvalue())
    return written
