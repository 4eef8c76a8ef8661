"""The public interface: exactly the promised names, each documented with an example, whatever was imported before."""

import inspect
import pkgutil
import subprocess
import sys

import pytest

import analysis
import quant

QUANT = {
    "BitPlan", "InputError", "Network", "attach_", "distillation_loss", "load_packed", "oscillation_table",
    "parameter_groups", "prepare_qat_", "reestimate_batchnorm_", "regularization", "restore_float_", "save_packed",
    "train_qat",
}  # fmt: skip
ANALYSIS = {
    "Run", "Task", "compare", "estimate_sensitivity", "evaluate", "measure_sensitivity", "measure_stats",
    "pareto_front", "plan_bits", "tasks", "write_report",
}  # fmt: skip
PLOTS = {name for name in dir(analysis) if name.startswith("plot_")}


def test_dir_lists_exactly_the_public_names():
    """Nothing that an import leaves behind, and the names of quant in analysis too, the same objects."""
    assert set(dir(quant)) == QUANT
    assert set(dir(analysis)) == QUANT | ANALYSIS | PLOTS
    assert len(PLOTS) >= 5
    assert all(getattr(analysis, name) is getattr(quant, name) for name in QUANT)


def test_no_public_name_is_that_of_a_module():
    """An import of the module would put it in the place of the function."""
    modules = {module.name for package in (analysis, quant) for module in pkgutil.iter_modules(package.__path__)}
    assert (QUANT | ANALYSIS | PLOTS) & modules == {"tasks"}


@pytest.mark.parametrize("name", sorted(QUANT | ANALYSIS - {"tasks"} | PLOTS))
def test_a_public_name_has_a_docstring_with_an_example(name):
    """What help() shows; an exception needs no example."""
    documentation = inspect.getdoc(getattr(analysis, name))
    assert documentation
    assert ">>> " in documentation or name == "InputError"


def test_the_import_is_light():
    """Neither torch nor pandas comes with `import analysis`."""
    code = "import sys, analysis; print([n for n in ('torch', 'pandas', 'timm', 'matplotlib') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error():
    """Not an import of something else."""
    for package in (analysis, quant):
        with pytest.raises(AttributeError):
            package.nothing  # noqa: B018  # the access is the test
