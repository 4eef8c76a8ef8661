"""Each notebook runs from its first cell to its last, and is committed without what it printed."""

import base64
import re
import runpy
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from nbclient import NotebookClient

from analysis.notebook_runs import copy_of, network_runs, write_digits
from analysis.session.open_run import open_run
from analysis.session.setup import Setup
from analysis.steps.demo import RECIPES
from quant.errors import InputError

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def parameters_of(notebook):
    """The one cell that is tagged `parameters`."""
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    return cell


@pytest.mark.timeout(900)  # it may be the first test that asks for the demo
@each_notebook
def test_a_notebook_runs_on_the_demo(path, demonstrated, tmp_path):
    """Every cell runs in a fresh kernel, computations by hand agree with the library, and every figure is shown."""
    notebook = nbformat.read(path, as_version=4)
    before = {file: file.stat().st_mtime_ns for file in demonstrated.rglob("*")}
    parameters_of(notebook).source += f"\ndemo, runs = {str(demonstrated)!r}, {str(tmp_path)!r}"
    folder = {"metadata": {"path": str(path.parent)}}  # the kernel works where JupyterLab would start it
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=folder).execute()
    drawing = [
        cell for cell in notebook.cells if cell.cell_type == "code" and re.search(r"(_figure|subplots)\(", cell.source)
    ]
    assert drawing
    for cell in drawing:
        assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.id
    assert {file: file.stat().st_mtime_ns for file in demonstrated.rglob("*")} == before  # the demo is left as it was


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


@each_notebook
def test_a_notebook_foretells_and_doubts(path):
    """Its prose predicts before it shows, and says what a figure does not show."""
    notebook = nbformat.read(path, as_version=4)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert re.search(r"\*Prediction\b", prose)
    assert re.search(r"does not show", prose)


def test_networks_of_timm_need_images():
    """Names without images end in one message that says which line of the parameters cell is missing."""
    with pytest.raises(InputError, match=r'names resnet10t, and `data` is empty.*data = "folder:'):
        network_runs("no/demo", runs="no/runs", models=["resnet10t"])


def test_weights_that_cannot_be_had_are_told(monkeypatch, tmp_path):
    """Without a network the message says what was tried and what to set in the notebook, without timm's traceback."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        InputError, match=r"create_model\('resnet10t', pretrained=True\) failed.*weights = \{'resnet10t': \"FILE"
    ) as caught:
        network_runs("no/demo", runs=tmp_path, models=["resnet10t"], data="digits")
    assert caught.value.__suppress_context__


def test_a_network_of_timm_is_measured_once(tmp_path):
    """RUNS/NAME holds statistics and sensitivity of the network named; asked again it is read, not measured."""
    images = write_digits(tmp_path / "digits")
    files = sorted(images.glob("val/*/*.png"))[:16]
    listed = pd.DataFrame({"file": files, "class_index": [int(file.parent.name) for file in files]})
    listed.to_csv(tmp_path / "images.csv", index=False)
    wanted = {
        "runs": tmp_path,
        "models": ["test_resnet"],
        "data": f"csv:{tmp_path / 'images.csv'}",
        "pretrained": False,
        "images": 4,
    }
    (run,) = network_runs("no/demo", **wanted)
    assert run == tmp_path / "test_resnet"
    stats, sensitivity = (pd.read_parquet(run / f"{name}.parquet") for name in ("stats", "sensitivity"))
    assert sorted(sensitivity["bit_width"].unique()) == [2, 4, 8]
    assert set(sensitivity["module"]) <= set(stats["module"])
    written = (run / "stats.parquet").stat().st_mtime_ns
    assert network_runs("no/demo", **wanted) == [run]
    assert (run / "stats.parquet").stat().st_mtime_ns == written


def test_a_copy_takes_the_place_of_an_earlier_one_alone(tmp_path):
    """A copy of a run is made anew each time; a folder that is none is not removed."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    copy = copy_of(run, tmp_path / "copy")
    (copy / "plan.json").write_text("a plan")
    assert sorted(file.name for file in copy_of(run, copy).iterdir()) == ["run.json"]
    mine = tmp_path / "mine"
    mine.mkdir()
    with pytest.raises(InputError, match=r"mine is there already, and no run folder"):
        copy_of(run, mine)
    assert mine.is_dir()


def test_digits_as_files_are_the_bundled_ones(tmp_path):
    """The same images under the same labels, but for 8 bits a pixel."""
    recipe, folder = RECIPES[0], write_digits(tmp_path / "digits")
    setup = Setup(run=tmp_path / "run", model=recipe.model, model_kwargs=recipe.kwargs, data="digits")
    as_files = replace(setup, data=f"folder:{folder}", mean=(0.5,), std=(0.5,), input_size=(1, 32, 32), crop_pct=1.0)
    own, bundled = open_run(as_files, needs_data=True), open_run(setup, needs_data=True)
    for split, count in (("train", 1347), ("val", 450)):
        mine, expected = (opened.images(split, None).dataset for opened in (own, bundled))
        found = {Path(name).stem: mine[i] for i, name in enumerate(mine.names)}
        assert len(found) == len(expected) == count
        for i, name in enumerate(expected.names):
            image, label = expected[i]
            near, same = found[Path(name).stem]
            assert same == label
            assert (near - image).abs().max() <= 1 / 255 + 1e-6  # half a step of 8 bits, over a std of 0.5


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
