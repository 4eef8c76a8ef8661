"""Each notebook runs from its first cell to its last, and is committed without what it printed."""

import base64
import re
import runpy
from pathlib import Path

import nbformat
import numpy as np
import pytest
from matplotlib import pyplot as plt
from nbclient import NotebookClient

import analysis

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def parameters_of(notebook):
    """The one cell that is tagged `parameters`."""
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    return cell


QUICK = {"01": "samples, epochs = 64, 1", "02": "samples, epochs, bits, time_limit = 32, 1, (2, 4, 8), 60",
         "03": "samples, epochs = 64, 1", "04": "epochs, steps = 1, 6", "05": "epochs, count = 1, 192"}  # fmt: skip


DRAWS = re.compile(r"\.plot\(|plot_\w+\(|\.subplots\(")


@pytest.mark.timeout(900)
@each_notebook
def test_a_notebook_runs(path, tmp_path):
    """Every cell runs in a fresh kernel, computations by hand agree with the library, and figures are shown."""
    notebook = nbformat.read(path, as_version=4)
    parameters_of(notebook).source += f"\n{QUICK[path.name[:2]]}"
    folder = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder).execute()
    drawing = [cell for cell in notebook.cells if cell.cell_type == "code" and DRAWS.search(cell.source)]
    assert drawing
    for cell in drawing:
        assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.source


@each_notebook
def test_a_notebook_uses_public_names_alone(path):
    """At most three lines import from the project, none of them what is inside its packages."""
    notebook = nbformat.read(path, as_version=4)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    imports = re.findall(r"^ *(?:from|import) (?:analysis|quant)\b.*$", code, re.MULTILINE)
    assert imports == ["import analysis as qv"]
    assert set(re.findall(r"\bqv\.(\w+)", code)) <= set(dir(analysis))


@each_notebook
def test_a_notebook_takes_other_networks(path):
    """Prose does not tell of fixed results: no figures stand in it."""
    notebook = nbformat.read(path, as_version=4)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert not re.search(r"\d+\.\d+", prose)


@each_notebook
def test_a_notebook_is_committed_as_it_was_written(path):
    """No outputs and no execution counts, so that a change shows in the diff; cells have ids, as nbformat 4.5 asks."""
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor >= 5) == (4, True)
    for cell in notebook.cells:
        assert cell.id
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


@each_notebook
def test_a_notebook_asks_one_question(path):
    """Its title is a question, its first code cell the parameters, and it has at most 15 cells, one checked."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert re.match(r"# .+\?$", notebook.cells[0].source.splitlines()[0])
    assert code[0] is parameters_of(notebook)
    assert len(notebook.cells) <= 15
    assert len(code) <= 15
    assert any(re.search(r"^\s*assert ", cell.source, re.MULTILINE) for cell in code)


@each_notebook
def test_a_notebook_foretells_and_doubts(path):
    """Its prose predicts before it shows, and says what a figure does not show."""
    notebook = nbformat.read(path, as_version=4)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert re.search(r"\*Prediction\b", prose)
    assert re.search(r"does not show", prose)


def test_a_page_needs_no_network_and_keeps_its_figures(tmp_path):
    """What `make notebooks` writes: the text, each figure inlined in its size, and nothing to be fetched."""
    rendering = runpy.run_path(str(NOTEBOOKS[0].parent / "render.py"))
    figure, ax = plt.subplots(figsize=(3, 2))
    ax.imshow(np.arange(12).reshape(3, 4))
    figure.savefig(tmp_path / "figure.png")
    plt.close(figure)
    shown = nbformat.v4.new_output(
        "display_data", {"image/png": base64.b64encode((tmp_path / "figure.png").read_bytes()).decode()}
    )
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("# Is it so?"), nbformat.v4.new_code_cell("draw()", outputs=[shown])],
        metadata={"widgets": {"state": "large"}},
    )
    page = rendering["page_of"](notebook)
    assert "<title>Is it so?</title>" in page
    assert page.count('src="data:image/png;base64,') == 1
    assert not re.search(r'(src|href)="https?:', page)
    assert "<script" not in page
    assert "large" not in page
