"""The page of live results, the results themselves, and the public figures."""

import pickle
import re

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

import analysis
from quant.errors import InputError

torch.manual_seed(0)
DATA = [(torch.randn(12, 3, 8, 8), torch.randint(3, (12,)))]


@pytest.fixture(scope="module")
def results():
    """Everything that a small network gives, by the argument of write_report."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3)).eval()
    net = analysis.Network(model, DATA[0], name="small")
    sens = analysis.measure_sensitivity(net, DATA, bits=(2, 4, 8))
    plan = analysis.plan_bits(net, sens, like="w4a4")
    return {
        "stats": analysis.measure_stats(net, DATA), "sensitivity": sens, "plan": plan,
        "evaluation": analysis.evaluate(net, DATA, {"float": None, "planned": plan}, calibration=DATA),
        "front": analysis.pareto_front(net, sens, points=4),
    }  # fmt: skip


def test_the_page_holds_what_was_given(results, tmp_path):
    """Each result has its section; nothing is fetched from elsewhere, and no command of a run folder is named."""
    page = analysis.write_report(tmp_path / "page.html", **results)
    text = page.read_text(encoding="utf-8")
    titles = re.findall(r"<h2 id=\"(\w+)\"", text)
    assert {"variation", "sensitivity", "plan", "front", "evaluation"} <= set(titles)
    assert not re.search(r'(src|href)="https?:', text)
    assert "qvw " not in re.sub(r"<footer>.*", "", text, flags=re.DOTALL)
    assert text.count("data:image/png;base64,") >= 4


@pytest.mark.parametrize("kind", ["stats", "sensitivity", "plan", "evaluation", "front"])
def test_each_result_alone_makes_a_page(kind, results, tmp_path):
    """A folder gets index.html."""
    assert analysis.write_report(tmp_path, **{kind: results[kind]}) == tmp_path / "index.html"


def test_several_networks_stand_side_by_side(results, tmp_path):
    """Results by name; a plan must then say whose it is."""
    both = {"a": results["stats"], "b": results["stats"]}
    text = analysis.write_report(tmp_path, stats=both).read_text(encoding="utf-8")
    assert "<h3>a</h3>" in text
    with pytest.raises(InputError, match="names"):
        analysis.write_report(tmp_path, stats=both, plan=results["plan"])


@pytest.mark.parametrize("arguments", [{}, {"stats": 3}, {"plan": {}}, {"evaluation": {"a": 1}}])
def test_what_is_no_result_is_refused(arguments, tmp_path):
    """One message that names the argument."""
    with pytest.raises(InputError):
        analysis.write_report(tmp_path, **arguments)


def test_results_show_themselves(results):
    """A figure, a table for a notebook, a short name; they survive pickling."""
    compared = analysis.compare({"a": results["stats"], "b": results["stats"]})
    for result in (results["stats"], results["sensitivity"], results["front"], compared):
        figure = result.plot()
        assert isinstance(figure, Figure)
        plt.close(figure)
        assert "<table" in result._repr_html_()
        assert type(result).__name__ in repr(result)
    again = pickle.loads(pickle.dumps(results["stats"]))
    assert again.table.equals(results["stats"].table)
    assert "<table" in results["plan"]._repr_html_()


def test_public_figures_draw_tables_on_given_axes(results):
    """Each takes a table as the library returns it, and returns the axes that it drew on."""
    tables = {
        "plot_distribution": results["stats"].table, "plot_sensitivity_heatmap": results["sensitivity"].table,
        "plot_bits": results["plan"].table,
        "plot_costs": results["sensitivity"].table.query("bit_width == 2"),
        "plot_rank_bands": results["sensitivity"].table.query("bit_width == 2"),
    }  # fmt: skip
    for name, table in tables.items():
        _, ax = plt.subplots()
        drawn = getattr(analysis, name)(table, ax=ax)
        assert isinstance(drawn, Axes)
        assert drawn is ax
        plt.close("all")
    assert isinstance(analysis.plot_pareto(results["front"].table, kind="weight_bits"), Axes)
    plt.close("all")


def test_the_public_names_are_those_of_the_contract():
    """`dir` lists them, each can be had and has a docstring."""
    for name in dir(analysis):
        assert getattr(analysis, name).__doc__, name
    with pytest.raises(AttributeError):
        analysis.nothing  # noqa: B018
