"""Each notebook runs from its first cell to its last, and is committed without what it printed."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def parameters_of(notebook):
    """The one cell that is tagged `parameters`."""
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    return cell


@pytest.mark.timeout(900)  # it may be the first test that asks for the demo
@each_notebook
def test_a_notebook_runs_on_the_demo(path, demonstrated):
    """Every cell runs in a fresh kernel, computations by hand agree with the library, and every figure is shown."""
    notebook = nbformat.read(path, as_version=4)
    parameters_of(notebook).source += f"\ndemo = {str(demonstrated)!r}"
    folder = {"metadata": {"path": str(path.parent)}}  # the kernel works where JupyterLab would start it
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=folder).execute()
    drawing = [cell for cell in notebook.cells if cell.cell_type == "code" and re.search(r"_figure\(", cell.source)]
    assert drawing
    for cell in drawing:
        assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.id


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
    """Its title is a question, its first code cell the parameters, and it has at most 15 cells of code, one checked."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert re.match(r"# .+\?$", notebook.cells[0].source.splitlines()[0])
    assert code[0] is parameters_of(notebook)
    assert len(code) <= 15
    assert any(re.search(r"^\s*assert ", cell.source, re.MULTILINE) for cell in code)
