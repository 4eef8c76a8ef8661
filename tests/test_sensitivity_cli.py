"""`qvw sensitivity` as a person uses it: proxies beside the sweep, few images, images without labels."""

import json

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from PIL import Image
from scipy.stats import spearmanr
from sklearn.datasets import load_digits

from analysis.figures.proxy_plots import plot_proxy, proxies_figure
from analysis.proxies import PROXIES, PROXY_COLUMNS, STATS_PROXIES
from analysis.sweeps.proxy_correlation import SITE_KEY
from tests.digits_vit import DATA, MODEL, qvw

pytestmark = pytest.mark.filterwarnings("ignore:the float network has")  # random weights have large logits


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder after stats and a sweep with proxies."""
    run = tmp_path_factory.mktemp("proxies") / "vit"
    assert qvw("stats", *MODEL, *DATA, "--images", 64, "--run", run) == 0
    assert qvw("sensitivity", *DATA[2:], "--images", 48, "--bits", "2,4", "--run", run, "--proxies") == 0
    return run


def test_every_proxy_scores_every_site(run):
    """A row for each single-site row of the sweep and each proxy, statistics among them."""
    table, swept = pd.read_parquet(run / "proxies.parquet"), pd.read_parquet(run / "sensitivity.parquet")
    assert list(table.columns) == list(PROXY_COLUMNS)
    sites = set(swept[["module", "tensor", "bit_width"]].itertuples(index=False, name=None))
    for proxy in PROXIES:
        rows = table[table["proxy"] == proxy]
        assert set(rows[["module", "tensor", "bit_width"]].itertuples(index=False, name=None)) == sites, proxy
        assert not rows.duplicated(["module", "tensor", "bit_width"]).any()
        assert np.isfinite(rows["score"]).all()


def test_correlations_are_those_of_the_two_tables(run):
    """Spearman's correlation by scipy of the written scores with the written KL; the ceiling is at most 1."""
    proxies, swept = pd.read_parquet(run / "proxies.parquet"), pd.read_parquet(run / "sensitivity.parquet")
    found = pd.read_parquet(run / "proxy_correlation.parquet")
    assert set(found["tensors"]) == {"all", "weight", "input", "attention"}
    both = proxies.merge(swept.drop(columns="score"), on=SITE_KEY)
    for row in found[found["tensors"] == "all"].itertuples():
        rows = both[(both["proxy"] == row.proxy) & (both["bit_width"] == row.bit_width)]
        if rows["score"].nunique() > 1:
            assert row.spearman == pytest.approx(spearmanr(rows["score"], rows["kl"]).statistic)
        assert row.sites == len(rows)
    assert (found["spearman_low"].dropna() <= found["spearman_high"].dropna()).all()
    assert found["ceiling"].between(0, 1).all()


def test_proxies_may_be_asked_for_later(run, capfd):
    """Nothing is measured again; the table of correlations is printed, with what each score is."""
    before = (run / "sensitivity.parquet").read_bytes()
    assert qvw("sensitivity", *DATA[2:], "--images", 48, "--bits", "4", "--run", run, "--proxies") == 0
    out = capfd.readouterr().out
    assert "Fisher predicts the KL itself" in out
    assert "at 4 bits" in out
    assert (run / "sensitivity.parquet").read_bytes() == before
    assert set(pd.read_parquet(run / "proxies.parquet")["bit_width"]) == {2, 4}


@pytest.mark.parametrize("images", [1, 5])
def test_fewer_images_than_a_batch(images, tmp_path):
    """They are one smaller batch; of a single image there is no standard error, no ceiling and no halving."""
    arguments = ["--images", images, "--batch-size", 64, "--bits", "2", "--tensors", "weight", "--proxies"]
    assert qvw("sensitivity", *MODEL, *DATA, *arguments, "--run", tmp_path / "few") == 0
    rows = pd.read_parquet(tmp_path / "few" / "sensitivity.parquet")
    assert (rows["images"] == images).all()
    assert np.isfinite(rows["kl"]).all()
    assert rows["kl_se"].isna().all() == (images == 1)
    assert pd.read_parquet(tmp_path / "few" / "proxy_correlation.parquet")["ceiling"].isna().all() == (images == 1)


def test_without_labels_there_is_no_trace_of_the_hessian(tmp_path):
    """The loss needs labels; the other proxies come from the network's own prediction."""
    pixels, _ = load_digits(return_X_y=True)
    for i in range(12):
        Image.fromarray((pixels[i] * 15.9).astype(np.uint8).reshape(8, 8)).save(tmp_path / f"{i}.png")
    (tmp_path / "list.csv").write_text("file\n" + "\n".join(f"{i}.png" for i in range(12)))
    data = ["--data", f"csv:{tmp_path / 'list.csv'}", "--num-workers", "0", "--holdout", "0"]
    assert qvw("sensitivity", *MODEL, *data, "--bits", "3", "--run", tmp_path / "run", "--proxies") == 0
    found = set(pd.read_parquet(tmp_path / "run" / "proxies.parquet")["proxy"])
    assert found == set(PROXIES) - set(STATS_PROXIES) - {"hessian_trace"}


def test_the_figure_draws_every_site(run):
    """As many points as sites in each panel; the line of equality in that of `fisher` alone."""
    proxies, swept = pd.read_parquet(run / "proxies.parquet"), pd.read_parquet(run / "sensitivity.parquet")
    frame = proxies.merge(swept.drop(columns="score"), on=SITE_KEY)
    frame = frame[frame["bit_width"] == 2]
    for proxy in PROXIES:
        rows = frame[frame["proxy"] == proxy]
        ax = plot_proxy(rows, proxy=proxy)
        drawn = np.concatenate([each.get_offsets() for each in ax.collections])
        assert sorted(drawn[:, 1]) == sorted(rows.loc[rows["kl"] > 0, "kl"])
        assert len(ax.lines) == (proxy == "fisher")
        plt.close(ax.figure)
    figure = proxies_figure(proxies, swept, pd.read_parquet(run / "proxy_correlation.parquet"), "m")
    assert sum(ax.has_data() for ax in figure.axes) == len(PROXIES)
    plt.close(figure)
    assert (run / "proxies.png").exists()


def test_groups_of_several_treatments_live_in_one_run(run):
    """Other tensors and another estimator are added, figures drawn, each ranked among its own."""
    for options in (["--groups", "kind"], ["--groups", "kind", "--tensors", "weight"],
                    ["--groups", "kind", "--estimator", "minmax"], ["--protocol", "leave_one_out", "--groups", "kind"],
                    ["--granularity", "per_tensor", "--tensors", "weight"]):  # fmt: skip
        assert qvw("sensitivity", *DATA[2:], "--images", 48, "--bits", "4", "--run", run, *options) == 0
    table = pd.read_parquet(run / "sensitivity.parquet")
    single = table[(table["group"] == "") & (table["bit_width"] == 4)]
    assert single.duplicated(["module", "tensor"]).any()
    ranked = single.dropna(subset="rank_low")
    assert not ranked.duplicated(["module", "tensor"]).any()
    assert ranked["rank_high"].max() == len(ranked)
    left_out = table[(table["protocol"] == "leave_one_out") & (table["group"] != "")]
    assert left_out.nsmallest(1, "kl")["rank_low"].item() == 1  # the group that helps most


def test_nothing_left_to_quantize_is_told(run, tmp_path, capfd):
    """Everything but all of attention, where attention alone is swept: that row is left out; a single site: refused."""
    arguments = ["--protocol", "leave_one_out", "--groups", "kind", "--tensors", "attention", "--bits", "4"]
    assert qvw("sensitivity", *DATA[2:], "--images", 48, "--run", run, *arguments) == 0
    groups = pd.read_parquet(run / "sensitivity.parquet")["group"]
    assert (groups == "kind:softmax").any()
    one = ["--include", "head", "--tensors", "weight", "--bits", "2", "--images", 8]
    assert qvw("sensitivity", *MODEL, *DATA, *one, "--run", tmp_path / "one", "--protocol", "leave_one_out") == 0
    assert len(pd.read_parquet(tmp_path / "one" / "sensitivity.parquet")) == 1  # everything, which is that one site
    capfd.readouterr()


def test_a_last_batch_of_one_image(tmp_path):
    """BatchNorm takes its statistics from the other batches; the row is measured on all images."""
    kwargs = {"layers": [1, 1, 1, 1], "num_classes": 10, "in_chans": 1, "stem_width": 8, "channels": [8, 8, 8, 8],
              "zero_init_last": False}  # fmt: skip
    model = ["resnet18", "--model-kwargs", json.dumps(kwargs), "--input-size", "1,32,32"]
    arguments = ["--images", 17, "--batch-size", 16, "--bits", "4", "--tensors", "weight", "--bn", "re-estimate"]
    assert qvw("sensitivity", *model, *DATA, *arguments, "--run", tmp_path / "run") == 0
    assert (pd.read_parquet(tmp_path / "run" / "sensitivity.parquet")["images"] == 17).all()


def test_damaged_rows_of_a_log_are_measured_again(run, tmp_path, capfd):
    """A line that is no JSON, values of too few images, a word for a number: a warning, and the same table."""
    fresh = tmp_path / "fresh"
    arguments = ["--images", 16, "--bits", "4", "--tensors", "weight"]
    assert qvw("sensitivity", *MODEL, *DATA, *arguments, "--run", fresh) == 0
    whole, images = (pd.read_parquet(fresh / f"{name}.parquet") for name in ("sensitivity", "sensitivity_images"))
    rows = whole.merge(images).to_dict("records")
    for row in rows:
        row["image_divergence"], row["image_delta_loss"] = list(row["image_divergence"]), list(row["image_delta_loss"])
    rows[1]["image_divergence"] = [1.0]
    rows[2]["kl"] = "abc"
    lines = [json.dumps(row) for row in rows]
    lines[3] = lines[3][:40]
    for name in ("sensitivity", "sensitivity_images"):
        (fresh / f"{name}.parquet").unlink()
    (fresh / "sensitivity.partial.1.jsonl").write_text("\n".join(lines) + "\n")
    capfd.readouterr()
    assert qvw("sensitivity", *arguments, "--run", fresh, *DATA[2:]) == 0
    assert "3 rows of" in capfd.readouterr().err
    pd.testing.assert_frame_equal(pd.read_parquet(fresh / "sensitivity.parquet"), whole)


ODD = """
import torch
from torch import nn

class Odd(nn.Module):
    def __init__(self, way="no_grad"):
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.first, self.head = nn.Linear(64, 16), nn.Linear(16, 10)
    def forward(self, x):
        x = x.flatten(1)
        if self.way == "no_grad":
            with torch.no_grad():
                return self.head(self.first(x).relu())
        if self.way == "overflow":
            return self.head(torch.sqrt(torch.relu(self.first(x)) * 0) + self.first(x).relu())
        return self.head(self.first(x).relu()) * 0 + 4 * x[:, :10] - 2

def no_grad(): return Odd()
def overflow(): return Odd("overflow")
def nothing(): return Odd("nothing")
"""


@pytest.mark.parametrize(("name", "code", "message"), [
    ("no_grad", 2, "can be differentiated"), ("overflow", 0, "Not scored"), ("nothing", 0, "Every change is 0"),
])  # fmt: skip
def test_models_that_proxies_cannot_serve(name, code, message, tmp_path, capfd):
    """No gradient: exit code 2 and the sweep kept; gradients that overflow: said; logits that never move: no figure."""
    (tmp_path / "odd.py").write_text(ODD)
    arguments = [f"{tmp_path / 'odd.py'}:{name}", *DATA, "--input-size", "1,8,8", "--mean", "0.5", "--std", "0.5",
                 "--images", "16", "--bits", "2", "--proxies", "--run", tmp_path / "run"]  # fmt: skip
    assert qvw("sensitivity", *arguments) == code
    printed = capfd.readouterr()
    assert message in printed.out + printed.err
    assert len(pd.read_parquet(tmp_path / "run" / "sensitivity.parquet")) == 4
