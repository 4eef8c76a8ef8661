"""How weights and activations of vision networks vary, which sites suffer at few bits, and how many bits each gets.

Measure a live model (a plain `nn.Module` and an iterable of batches are enough):

    Network                what a model holds: its tensors that can be quantized, with shape, kind and cost
    measure_stats          variance, kurtosis, outliers, channel ranges of every tensor
    measure_sensitivity    what the output loses when one tensor is quantized
    estimate_sensitivity   the same, predicted from one backward pass
    compare                several networks side by side

Decide and verify:

    plan_bits              how many bits each tensor gets under a budget (exact integer program)
    pareto_front           the best plan for every budget
    evaluate               plans, uniform bits and the float network on the same data
    BitPlan                a plan: table, totals, save, load, diff

Say what an output is worth:

    Task, tasks            classification, segmentation, regression, embedding, detection, ... or your own

Train with the plan (also in `quant`): prepare_qat_, parameter_groups, attach_, distillation_loss, regularization,
oscillation_table, reestimate_batchnorm_, restore_float_, train_qat, save_packed, load_packed.

Show and keep: the plot_* functions draw any of the tables on matplotlib axes, write_report makes a page, Run is a
folder that keeps results and resumes work. Wrong input raises InputError.
"""

import importlib
from typing import TYPE_CHECKING, Any

import quant

_HOME = {
    "Network": "quant.network",
    "Task": "analysis.task",
    "measure_stats": "analysis.measure",
    "measure_sensitivity": "analysis.measure",
    "estimate_sensitivity": "analysis.measure",
    "compare": "analysis.network_comparison",
    "plan_bits": "analysis.allocation",
    "pareto_front": "analysis.allocation",
    "evaluate": "analysis.evaluation",
    "write_report": "analysis.live_report",
    "Run": "analysis.runs",
    "plot_distribution": "analysis.plots",
    "plot_sensitivity_heatmap": "analysis.plots",
    "plot_bits": "analysis.plots",
    "plot_costs": "analysis.figures.sensitivity_plots",
    "plot_rank_bands": "analysis.figures.sensitivity_plots",
    "plot_groups": "analysis.figures.sensitivity_plots",
    "plot_pareto": "analysis.figures.pareto_plots",
    "plot_history": "analysis.figures.training_plots",
    "plot_oscillation": "analysis.figures.training_plots",
}
"""Where each public name is defined; it is imported when it is first used."""

__all__ = sorted({*_HOME, *quant.__all__, "tasks"})


def __getattr__(name: str) -> Any:
    """A public name, imported at its first use."""
    if name == "tasks":
        return importlib.import_module("analysis.tasks")
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in quant.__all__:
        value = getattr(quant, name)
    else:
        raise AttributeError(f"module 'analysis' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)


if TYPE_CHECKING:
    from analysis import tasks as tasks
    from analysis.allocation import pareto_front as pareto_front
    from analysis.allocation import plan_bits as plan_bits
    from analysis.evaluation import evaluate as evaluate
    from analysis.live_report import write_report as write_report
    from analysis.measure import estimate_sensitivity as estimate_sensitivity
    from analysis.measure import measure_sensitivity as measure_sensitivity
    from analysis.measure import measure_stats as measure_stats
    from analysis.network_comparison import compare as compare
    from analysis.runs import Run as Run
    from analysis.task import Task as Task
    from quant import *  # noqa: F403  # the public names of quant
