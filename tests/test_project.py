"""The project holds together: layers, sizes, docstrings, and the lists that must agree."""

import ast
import os
import re
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for package in ("quant", "analysis") for path in (ROOT / package).rglob("*.py"))

# What a file of quant may import besides torch, the standard library and quant itself.
QUANT_MAY_IMPORT = {
    "optimizer": {"timm"},  # optimizers and schedules
    "train": {"accelerate"},  # devices and processes
    "live_training": {"accelerate"},  # the same
    "checkpoints": {"accelerate", "safetensors"},  # processes; weights without running code
    "packed_file": {"safetensors"},  # the file itself
    "network": {"pandas"},  # the frame of sites
    "own_loop": {"pandas"},  # the frame of oscillations
    "bit_plan": {"pydantic", "pandas"},  # validation of a file that a person may have edited
    "config": {"pydantic"},  # the same
}
ANALYSIS_MAY_IMPORT_TIMM = {"models", "data", "listing", "training_data", "timm_names", "digits_models"}

# The folders of analysis, each of which may import those before it; and the files beside them: each belongs to one.
FOLDERS = (
    "terminal", "inputs", "storage", "statistics", "sweeps", "solver", "planning", "session", "training", "figures",
    "page", "steps", "commands",
)  # fmt: skip
FRONT = {
    "models": "inputs", "data": "inputs", "runs": "storage", "running_stats": "statistics",
    "scoring": "inputs", "task": "inputs", "tasks": "inputs", "memory": "terminal", "estimate": "sweeps",
    "results": "page", "measure": "steps", "evaluation": "steps", "network_comparison": "page", "live_report": "page",
    "allocation": "page",
    "tensor_stats": "statistics", "variation": "statistics", "replay": "sweeps",
    "sensitivity": "sweeps", "proxies": "sweeps", "cost": "planning", "planner": "planning", "plots": "figures",
    "report": "page", "cli": "commands", "__main__": "commands",
}  # fmt: skip

# Names to import, where they differ from the names that PyPI gives to the packages.
PYPI_NAMES = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml"}
# Names that conda-forge gives to a package, where they differ from those of PyPI.
CONDA_NAMES = {"torch": "pytorch"}


def read(name: str) -> str:
    """The text of a file of the project."""
    return (ROOT / name).read_text(encoding="utf-8")


def project_table() -> dict:
    """The table `project` of pyproject.toml."""
    return tomllib.loads(read("pyproject.toml"))["project"]


OPTIONAL = {"peers", "lightning", "onnx", "transformers"}
"""Extras that no set-up installs: what needs them is skipped without them."""


def requirements() -> list[str]:
    """Every requirement of pyproject.toml, such as "torch>=2.11", those of the extras that are set up too."""
    project = project_table()
    extras = [names for extra, names in project["optional-dependencies"].items() if extra not in OPTIONAL]
    return [*project["dependencies"], *chain.from_iterable(extras)]


def imported_modules(source: str) -> set[str]:
    """Dotted names of the modules that `source` imports, at its top or inside a function; "." marks a relative one."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else str(node.module))
            # `from analysis import cli` imports the module analysis.cli
            names.update(f"{node.module}.{alias.name}" for alias in node.names if not node.level)
    return names


def folder(module: str) -> str | None:
    """The folder that a dotted name of analysis belongs to; None for analysis itself and what it does not hold."""
    names = module.split(".")[1:]
    return (names[0] if names[0] in FOLDERS else FRONT.get(names[0])) if names else None


def runs_upwards(path: Path, name: str) -> bool:
    """Whether `path`, a file of analysis, may not import the module `name` of analysis: a folder that comes later."""
    own, other = folder(".".join(path.with_suffix("").parts)), folder(name)
    return own is not None and other is not None and FOLDERS.index(other) > FOLDERS.index(own)


def layer_breaks(path: Path, source: str) -> list[str]:
    """One line for each import in `source`, the text of `path` from the root on, that runs against the layers."""
    package, stem = path.parts[0], path.stem
    breaks = []
    for name in sorted(imported_modules(source)):
        top = name.partition(".")[0]
        if name == ".":
            breaks.append("a relative import: write it from the package on")
        elif package == "quant":
            allowed = {"torch", "quant", "__future__"} | QUANT_MAY_IMPORT.get(stem, set())
            if top not in allowed and top not in sys.stdlib_module_names:
                breaks.append(f"quant/{stem}.py imports {name}")
        elif (
            (top == "timm" and stem not in ANALYSIS_MAY_IMPORT_TIMM)
            or (name.startswith("analysis.cli") and stem != "__main__")
            or (top == "analysis" and runs_upwards(path, name))
        ):
            breaks.append(f"{path} imports {name}")
    return breaks


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_layers(path):
    """The arrow is torch <- quant <- analysis <- analysis.cli; timm enters where models, data or attention do."""
    assert layer_breaks(path.relative_to(ROOT), path.read_text(encoding="utf-8")) == []


def test_every_file_of_analysis_belongs_to_a_folder():
    """The folders and the files beside them are those that FOLDERS and FRONT list: a new one is given its place."""
    package = ROOT / "analysis"
    assert {path.parent.name for path in package.glob("*/__init__.py")} == set(FOLDERS)
    assert {path.stem for path in package.glob("*.py")} == {*FRONT, "__init__"}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("quant/functional.py", "def late():\n    import pandas as pd"),
        ("quant/functional.py", "import numpy"),
        ("quant/train.py", "from analysis.runs import write"),
        ("quant/train.py", "import seaborn"),
        ("quant/attention.py", "from matplotlib import pyplot"),
        ("quant/prepare.py", "from .scheme import QuantScheme"),
        ("quant/sites.py", "from timm.layers import Mlp"),
        ("analysis/runs.py", "from analysis import cli"),
        ("analysis/runs.py", "import analysis.cli"),
        ("analysis/page/content.py", "from analysis.steps.verify_step import VERIFICATION_COLUMNS"),
        ("analysis/page/content.py", "from analysis import measure"),
        ("analysis/solver/highs.py", "import analysis.planning.budgets"),
        ("analysis/cost.py", "from analysis.steps import plan_step"),
    ],
)
def test_an_import_against_the_layers_is_found(path, source):
    """The reader of imports sees each way of writing the arrow the wrong way round, inside functions too."""
    assert layer_breaks(Path(path), source)


def test_allowed_imports_pass():
    """What the layers allow is not reported."""
    assert layer_breaks(Path("quant/optimizer.py"), "import math\nimport torch.nn.functional as F\nimport timm") == []
    assert layer_breaks(Path("analysis/models.py"), "import timm\nfrom quant.site import Site") == []
    assert layer_breaks(Path("analysis/__main__.py"), "from analysis.cli import main") == []
    source = "from analysis.planning import frontier\nimport timm"
    assert layer_breaks(Path("analysis/steps/plan_step.py"), source) != []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_is(path):
    """Each module with code in it starts with a docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not tree.body or ast.get_docstring(tree)


def test_messages_of_quant_name_no_command_line():
    """Whoever calls a function reads of arguments and functions; the command line puts its options in their place."""
    for path in SOURCES:
        if path.parts[-2] == "quant":
            strings = [n.value for n in ast.walk(ast.parse(read(str(path)))) if isinstance(n, ast.Constant)]
            docstrings = {ast.get_docstring(n, clean=False) for n in ast.walk(ast.parse(read(str(path))))
                          if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))}  # fmt: skip
            told = [s for s in strings if isinstance(s, str) and s not in docstrings]
            assert not [s for s in told if re.search(r"--[a-z]|`qvw|qvw ", s)], path.name


def test_nine_files_in_ten_are_under_300_lines():
    """A file holds one idea: a long one is where a second moved in."""
    long = [path.name for path in SOURCES if len(path.read_text(encoding="utf-8").splitlines()) >= 300]
    assert len(long) <= len(SOURCES) / 10, long


def test_environment_yml_is_in_step_with_pyproject():
    """Users of conda get the packages, and the lower bounds, that pip users get with the extras dev and notebooks."""
    expected = {f"python{project_table()['requires-python']}", "pip"}
    for requirement in requirements():
        name, bound = re.fullmatch(r"([\w-]+)(.*)", requirement).groups()
        expected.add(CONDA_NAMES.get(name, name) + bound)

    environment = yaml.safe_load(read("environment.yml"))
    packages = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    assert {"pip": ["-e ."]} in environment["dependencies"]
    assert len(packages) == len(set(packages))
    assert set(packages) == expected


def test_every_dependency_has_its_reason():
    """Each requirement in pyproject.toml stands on its own line, followed by a comment."""
    text = read("pyproject.toml")
    for requirement in requirements():
        assert re.search(rf'^ +"{re.escape(requirement)}", +# \S', text, re.MULTILINE), requirement


def test_every_import_is_declared():
    """The packages import nothing that pyproject.toml does not ask for, the tests only that and the extras."""
    names = {False: project_table()["dependencies"], True: requirements()}
    declared = {extras: {re.match(r"[\w-]+", line).group() for line in lines} for extras, lines in names.items()}
    for path in [*SOURCES, *(ROOT / "tests").rglob("*.py")]:
        for name in imported_modules(path.read_text(encoding="utf-8")):
            top = name.partition(".")[0]
            if top and top not in sys.stdlib_module_names and top not in {"quant", "analysis", "benchmarks", "tests"}:
                assert PYPI_NAMES.get(top, top) in declared["tests" in path.parts], f"{path.name} imports {top}"


def test_constraints_fix_every_dependency():
    """constraints.txt names one exact version for each requirement, and none that differs by platform."""
    pins = {}
    for line in read("constraints.txt").splitlines():
        if line.startswith("#"):
            continue
        name, version = re.fullmatch(r"([\w.-]+)==(\S+)", line).groups()
        pins[re.sub(r"[-_.]+", "-", name).lower()] = version
    for requirement in requirements():
        assert re.match(r"[\w-]+", requirement).group().lower() in pins
    assert not [name for name in pins if name.startswith(("nvidia-", "cuda-", "triton"))]


def test_readme_names_the_two_commands():
    """README tells how to run the main job and the tests, and both are targets of the Makefile."""
    readme, makefile = read("README.md"), read("Makefile")
    for target in ("demo", "test"):
        assert re.search(rf"^ *make {target}\b", readme, re.MULTILINE)
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_ci_runs_the_test_command_of_the_readme():
    """.ci/run is executable and its last line is the test command of the README."""
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").splitlines()[-1] == "make test"


def test_changelog_has_what_is_to_come_first():
    """The first heading of CHANGELOG.md below its title is Unreleased, or the version of pyproject.toml."""
    headings = re.findall(r"^## (.+)$", read("CHANGELOG.md"), re.MULTILINE)
    assert headings[0] == "Unreleased" or headings[0].startswith(project_table()["version"])


def test_no_two_modules_share_a_name():
    """A name says where to look: it is given once."""
    names = [path.stem for path in SOURCES if path.stem not in ("__init__", "__main__")]
    assert len(names) == len(set(names)), sorted(name for name in set(names) if names.count(name) > 1)
