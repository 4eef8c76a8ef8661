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

from analysis.cli import main
from analysis.proxies import PROXIES, STATS_PROXIES
from analysis.proxy_plots import plot_proxy, proxies_figure

KWARGS = {"img_size": 16, "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 24, "depth": 2,
          "num_heads": 3}  # fmt: skip
MODEL = ["vit_tiny_patch16_224", "--model-kwargs", json.dumps(KWARGS), "--input-size", "1,16,16", "--mean", "0.5",
         "--std", "0.5"]  # fmt: skip
DATA = ["--data", "digits", "--num-workers", "0"]


def qvw(*arguments):
    """Exit code of a command, as the shell would see it."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


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
    assert list(table.columns) == ["module", "tensor", "bit_width", "proxy", "score"]
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
    both = proxies.merge(swept, on=["module", "tensor", "bit_width"])
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
    assert "Fisher foretells the KL itself" in out
    assert "at 2 bit" in out
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
    frame = proxies.merge(swept, on=["module", "tensor", "bit_width"])
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
