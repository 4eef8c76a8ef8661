"""Figures of a plan's verification: every plan at its accuracy, and at its predicted and measured KL."""

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.container import ErrorbarContainer

from analysis.figures.verification_plots import INTERVAL, plot_accuracy, plot_prediction, verification_figure
from analysis.planning.significance import plan_names


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture
def table():
    """A verification of six plans, the plan itself first and not the best."""
    return pd.DataFrame(
        {
            "plan": ["planned", "uniform", "greedy", "reverse", "random", "random"],
            "top1": [0.7, 0.68, 0.71, 0.3, 0.55, 0.6],
            "top1_se": 0.02,
            "planned_ahead": [0.0, 0.02, -0.01, 0.4, 0.15, 0.1],
            "planned_ahead_se": [0.0, 0.005, 0.01, 0.03, 0.02, 0.02],
            "predicted_kl": [0.05, 0.09, 0.051, 1.2, 0.4, 0.3],
            "measured_kl": [0.06, 0.1, 0.055, 1.5, 0.35, 0.31],
            "measured_kl_se": [0.002, 0.003, 0.002, 0.05, 0.02, 0.4],
        }
    )


def texts(labels):
    """Labels as text."""
    return [label.get_text() for label in labels]


def bars(ax):
    """The points with their intervals, in the order drawn."""
    return [container for container in ax.containers if isinstance(container, ErrorbarContainer)]


def test_plans_of_one_sort_are_numbered(table):
    """The sorts have their names; only where there are several is there a number; an unknown one keeps its own."""
    assert plan_names(table) == ["planned", "uniform", "greedy", "worst-first", "random 1", "random 2"]
    assert plan_names(pd.DataFrame({"plan": ["planned", "mine"]})) == ["planned", "mine"]


def test_accuracies_are_sorted_with_their_intervals(table):
    """The best above; bars of 1.96 standard errors in percent; beside each how far the plan is ahead; float a line."""
    ax = plot_accuracy(table, floating=0.72)
    names = ["greedy", "planned", "uniform", "random 2", "random 1", "worst-first"]
    assert texts(ax.get_yticklabels()) == names
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    for y, container in enumerate(bars(ax)):
        top1 = sorted(table["top1"], reverse=True)[y]
        assert container.lines[0].get_xydata().tolist() == [[100 * top1, y]]
        segment = container.lines[2][0].get_segments()[0]
        np.testing.assert_allclose(segment[:, 0], [100 * (top1 - INTERVAL * 0.02), 100 * (top1 + INTERVAL * 0.02)])
    beside = ax.figure.axes[1]
    assert texts(beside.get_yticklabels()) == [
        "\N{MINUS SIGN}1.0 ± 1.0", "", "+2.0 ± 0.5", "+10.0 ± 2.0", "+15.0 ± 2.0", "+40.0 ± 3.0"
    ]  # fmt: skip
    line = next(line for line in ax.lines if line.get_linestyle() == "--")
    assert line.get_xdata()[0] == 72
    assert not [line for line in plot_accuracy(table, ax=plt.figure().gca()).lines if line.get_linestyle() == "--"]


def test_predictions_stand_against_measurements(table):
    """Logarithmic axes of one range, the line of equality from corner to corner, a legend of the sorts, no bar to 0."""
    ax = plot_prediction(table)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert ax.get_xlim() == ax.get_ylim()
    at = np.concatenate([container.lines[0].get_xydata() for container in bars(ax)])
    np.testing.assert_allclose(at, table[["predicted_kl", "measured_kl"]])
    equality = next(line for line in ax.lines if line.get_linestyle() == "--")
    np.testing.assert_allclose(equality.get_xdata(), equality.get_ydata())
    np.testing.assert_allclose(equality.get_xdata(), ax.get_xlim())
    assert texts(ax.get_legend().get_texts()) == ["planned", "uniform", "greedy", "worst-first", "random"]
    ends = [container.lines[2][0].get_segments()[0][:, 1] for container in bars(ax)]
    assert min(end.min() for end in ends) > 0  # the last one's error is larger than its value
    np.testing.assert_allclose(ends[0], [0.06 - INTERVAL * 0.002, 0.06 + INTERVAL * 0.002])


def test_what_was_not_measured_is_left_out(table):
    """No labels: the panel of the KL alone. No prediction, or none above 0: the points that are left, or none."""
    assert len(verification_figure(table.assign(top1=np.nan), "net").axes) == 1
    some = table.assign(predicted_kl=[np.nan, 0.0, 0.051, 1.2, 0.4, 0.3])
    assert len(plot_prediction(some, ax=plt.figure().gca()).containers) == 4
    assert not plot_prediction(table.assign(predicted_kl=np.nan), ax=plt.figure().gca()).containers


@pytest.mark.parametrize("name", ["net", "a name of a run that is much longer than most names are " * 3])
@pytest.mark.parametrize("labels", [True, False])
def test_nothing_is_cut(table, name, labels):
    """All texts of the figure lie inside it, also with a float line at either end and a long name."""
    shown = table if labels else table.assign(top1=np.nan)
    for floating in (0.1, 0.99):
        figure = verification_figure(shown, name, floating=floating if labels else None)
        figure.canvas.draw()
        boxes = [*(text.get_window_extent() for text in figure.texts), *(ax.get_tightbbox() for ax in figure.axes)]
        assert len(boxes) == 1 + len(figure.axes)  # the title
        assert min(min(box.x0, box.y0) for box in boxes) >= -1
        assert max(box.x1 for box in boxes) <= figure.bbox.x1 + 1
        assert max(box.y1 for box in boxes) <= figure.bbox.y1 + 1
