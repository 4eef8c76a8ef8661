"""`make notebooks`: runs every notebook of this folder and writes each, with what it shows, as a page of HTML.

The pages need no network: figures are inlined, and the style is a few lines below.
"""

import base64
import io
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from PIL import Image
from pygments.formatters import HtmlFormatter

HERE = Path(__file__).parent
PAGES = HERE.parent / "reports" / "notebooks"
COLOURS = 48  # of a figure's palette: a third of the bytes, and no difference to the eye
STYLE = """
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; }
h1 { font-size: 1.7rem; line-height: 1.25; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
pre, code { font: 13px/1.45 ui-monospace, monospace; } code { background: #f3f3f3; }
pre { overflow-x: auto; } .anchor-link, .jp-InputPrompt, .jp-OutputPrompt, .prompt { display: none; }
.highlight { background: #f6f6f6; border-left: 3px solid #c9d4e5; padding: 0 0.8rem; margin: 1rem 0 0.4rem; }
.output_area, .jp-OutputArea-output { margin: 0.4rem 0; overflow-x: auto; } img { max-width: 100%; height: auto; }
.output_area pre { margin: 0; }
@media (max-width: 40rem) { img { max-width: none; } }
table { border-collapse: collapse; border: 0; font-size: 13px; }
th, td { padding: 0.15rem 0.6rem; text-align: right; border: 0; }
thead th { border-bottom: 1px solid #888; } tbody tr:nth-child(odd) { background: #f6f6f6; }
@media print { body { max-width: none; margin: 0; } pre { white-space: pre-wrap; } }
"""


def main() -> None:
    """Run and write the notebooks whose names begin as the arguments say, all without arguments."""
    chosen = [path for path in sorted(HERE.glob("*.ipynb")) if path.name.startswith(tuple(sys.argv[1:]) or "")]
    PAGES.mkdir(parents=True, exist_ok=True)
    for path in chosen:
        started = time.monotonic()
        notebook = nbformat.read(path, as_version=4)
        with TemporaryDirectory() as folder:  # files that a notebook writes stay there
            place = {"metadata": {"path": folder}}
            NotebookClient(notebook, timeout=3600, kernel_name="python3", resources=place).execute()
        page = PAGES / f"{path.stem}.html"
        page.write_text(page_of(notebook), encoding="utf-8")
        print(f"{path.name}: {time.monotonic() - started:.0f} s, {page.stat().st_size // 1024} KiB in {page}")


def page_of(notebook: NotebookNode) -> str:
    """The whole page; no state of widgets, no metadata of the kernel."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if "outputs" in cell:  # without progress bars and warnings of the kernel
            cell.outputs = [
                output for output in cell.outputs
                if output.get("name") != "stderr" and not any("widget" in kind for kind in output.get("data", {}))
            ]  # fmt: skip
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _small(output.data["image/png"])
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(notebook)
    title = notebook.cells[0].source.splitlines()[0].removeprefix("# ")
    style = STYLE + HtmlFormatter().get_style_defs(".highlight")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{style}</style>\n</head>\n'
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _small(png: str) -> str:
    """The same picture with a palette of `COLOURS`; both in base64."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    buffer = io.BytesIO()
    method = Image.Quantize.MAXCOVERAGE  # the default would give up the colour of a few small markers
    image.quantize(COLOURS, method=method, dither=Image.Dither.NONE).save(buffer, format="png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    main()
