"""README and docs/ say what is there: commands that parse, links that resolve, files that are named, code that runs."""

import importlib.util
import re
import shlex
from importlib import resources
from pathlib import Path

import click
import matplotlib.pyplot as plt
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from analysis.cli import cli
from quant.bit_plan import BitPlan

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CALL = re.compile(
    r"\b(?:qvw|analysis) (?=[a-z-]+ )"
)  # a line of the shell; `-m -- analysis` is torchrun's way to say it


def named(path: Path) -> str:
    """A page as the tests are called after it."""
    return str(path.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page without what is between fences."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def command_lines(page: Path) -> list[str]:
    """The indented lines of a page that call qvw, with their continuation lines, from the name of the command on."""
    lines = re.findall(r"^    \S.*$", re.sub(r"\\\n\s*", " ", prose(page)), re.MULTILINE)
    return [line[call.end():] for line in lines if (call := CALL.search(line))]  # fmt: skip


def parse(line: str) -> click.Context:
    """The parsed command line; click's own error where it is wrong. Nothing is run."""
    name, *arguments = shlex.split(line, comments=True)
    command = cli.get_command(click.Context(cli), name)
    if command is None:
        raise click.UsageError(f"No such command {name!r}.")
    return command.make_context(name, arguments)


@pytest.fixture
def no_files_needed(monkeypatch):
    """Command lines that name files to read parse although the files are not there."""
    for command in cli.commands.values():
        for parameter in command.params:
            if isinstance(parameter.type, click.Path):
                monkeypatch.setattr(parameter.type, "exists", False)


@pytest.mark.usefixtures("no_files_needed")
@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_command_line_parses(page):
    """Each `qvw` line of a page has a command, options and values that the real command line takes."""
    for line in command_lines(page):
        parse(line)


def test_the_pages_have_command_lines():
    """The reader of pages sees the lines it is for: every command is shown somewhere, torchrun's way too."""
    shown = {line.split()[0] for page in PAGES for line in command_lines(page)}
    assert set(cli.commands) - {"demo"} <= shown  # the demo is `make demo`
    assert any("torchrun" in line for line in prose(DOCS / "tutorial-many-gpus.md").splitlines())


@pytest.mark.parametrize("line", ["stat --run a", "plan --run a --weight-bit x", "plan --run a --nothing 3"])
def test_a_wrong_command_line_is_found(line):
    """An unknown command, option or value is not let through."""
    with pytest.raises(click.UsageError):
        parse(line)


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_leads_somewhere(page):
    """Each relative link of a page is to a file of the project, and to a heading of it where it names one."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{named(page)} links to {link}"
        assert not anchor or anchor in anchors(file), f"{named(page)} links to {link}"


def test_every_page_is_in_the_index():
    """docs/README.md links to each page of the guide."""
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert [
        page.name for page in DOCS.glob("*.md") if page.name != "README.md" and f"]({page.name})" not in index
    ] == []


def test_the_map_names_every_file():
    """docs/code.md names each file of quant and analysis, under its folder, and none that is gone."""
    text = (DOCS / "code.md").read_text(encoding="utf-8")
    written = {}
    for title, section in re.findall(
        r"^##+ ((?:quant|analysis)[\w/]*)/\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL
    ):
        written.setdefault(title, set()).update(re.findall(rf"`(?:{title}/)?(\w+\.py)`", section))
    there: dict[str, set[str]] = {}
    for package in ("quant", "analysis"):
        for path in ROOT.glob(f"{package}/**/*.py"):
            if path.name != "__init__.py":
                there.setdefault(path.parent.relative_to(ROOT).as_posix(), set()).add(path.name)
    assert written == there


def test_pictures_are_small():
    """The README can be read over a slow line: its pictures take at most 120 KB each."""
    pictures = list((DOCS / "images").glob("*.png"))
    assert pictures
    assert [picture.name for picture in pictures if picture.stat().st_size > 120 * 1024] == []


def test_the_tutorial_on_tables_runs(demonstrated, tmp_path, monkeypatch, capsys):
    """The Python blocks of the pandas tutorial run one after the other on the demo's folder, and print tables."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(demonstrated)
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "tutorial-pandas.md").read_text(encoding="utf-8")
    blocks = [code for language, code in FENCED.findall(page) if language == "python"]
    assert len(blocks) > 5
    names: dict = {}
    for code in blocks:
        exec(compile(code, "tutorial-pandas.md", "exec"), names)
    assert names["mean_bits"] > 0
    printed = capsys.readouterr().out
    assert "mean weight bits" in printed
    assert "excess_kurtosis" in printed


def python_blocks(page: Path) -> list[str]:
    """The code of a page that is marked as Python."""
    return [code for language, code in FENCED.findall(page.read_text(encoding="utf-8")) if language == "python"]


@pytest.mark.parametrize("page", ["own-task.md", "own-loop.md", "notebook.md"])
def test_the_pages_on_python_run(page, tmp_path, monkeypatch):
    """Their blocks run one after the other in an empty folder, as they stand."""
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(DOCS / page)
    assert blocks
    names: dict = {}
    for code in blocks:
        exec(compile(code, page, "exec"), names)
    plt.close("all")
    if page == "own-loop.md":
        assert names["accuracy"] > 0.85


def test_the_first_lines_of_the_readme_run(tmp_path, monkeypatch):
    """They take any model and batches, and leave a trained network as a file."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images[:256] / 8 - 1, dtype=torch.float32)[:, None]
    batches = list(zip(images.split(64), torch.tensor(digits.target[:256]).split(64), strict=True))
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)
    )
    names: dict = {"model": model.eval(), "val": batches[:2], "train": batches[2:]}
    [code] = python_blocks(ROOT / "README.md")
    exec(compile(code, "README.md", "exec"), names)
    plt.close("all")
    assert names["table"]["plan"].tolist() == ["float", "uniform", "planned"]
    assert names["history"][-1]["step"] > 0
    assert (tmp_path / "model.safetensors").stat().st_size > 0


def test_the_plan_file_shown_is_one():
    """The example of a plan file is read as one, and holds what it says."""
    [text] = [code for language, code in FENCED.findall((DOCS / "planning.md").read_text(encoding="utf-8"))
              if language == "json"]  # fmt: skip
    plan = BitPlan.from_json(text, source="planning.md")
    assert plan.solver.status == "optimal"
    assert len(plan.sites) == 1


def test_python_on_the_pages_is_python():
    """Every block that is marked as Python compiles."""
    for page in PAGES:
        for language, code in FENCED.findall(page.read_text(encoding="utf-8")):
            if language == "python":
                compile(code, named(page), "exec")


def test_the_gallery_has_the_style_of_the_report():
    """reports/build.py imports what there is, and its page includes the report's style sheet, wherever that lies."""
    spec = importlib.util.spec_from_file_location("build_of_reports", ROOT / "reports" / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    page = build.page_environment(build.HERE).get_template("gallery.html.jinja").render(sections=[])
    style = (resources.files("analysis.page") / "templates" / "report.css").read_text(encoding="utf-8")
    assert style.strip() in page


def test_reports_stay_small_and_tell_no_path_of_a_machine():
    """Results are kept in git: 3 MiB at most, each run.json with names of variables in place of folders."""
    files = [path for path in (ROOT / "reports").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 3 * 2**20
    records = [path for path in files if path.name.endswith("run.json")]
    assert len(records) >= 11
    for path in records:
        assert not re.search(r'[": ](/tmp|/home|/work|/Users|/mnt)/', path.read_text(encoding="utf-8")), path
