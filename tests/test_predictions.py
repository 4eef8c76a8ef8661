"""How far predictions can be trusted: their bias on held-out images, noisy traces, interactions that must help."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from analysis.planning.interactions import FEW_IMAGES
from analysis.proxies import NOISY_TRACE, proxy_table
from analysis.storage.columns import VERIFICATION_COLUMNS
from analysis.tasks import classification
from quant.network import Network
from tests.digits_vit import qvw
from tests.test_edited_plan import DATA, MODEL


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A run folder with a sweep and its proxies on enough images for interactions."""
    run = tmp_path_factory.mktemp("predictions") / "run"
    assert qvw("sensitivity", *MODEL, *DATA, "--images", FEW_IMAGES, "--bits", "2,8", "--proxies", "--run", run,
               "--tensors", "weight", "--quiet") == 0  # fmt: skip
    return run


def test_the_prediction_is_set_beside_held_out_images(swept, capfd):
    """The ratio is the KL on validation images over the prediction, for every plan, with the error of the KL."""
    assert qvw("plan", "--run", swept, "--weight-bits", 4, "--verify", "--images", 60, "--num-workers", 0) == 0
    printed = capfd.readouterr().out
    table = pd.read_parquet(swept / "verification.parquet")
    assert list(table.columns) == list(VERIFICATION_COLUMNS)
    verify = pd.read_parquet(swept / "verify.parquet").drop_duplicates("plan").set_index("plan")
    first = table.iloc[0]
    assert first["heldout_kl"] == verify.loc["planned", "divergence"]
    believed = first["predicted_kl"] if np.isnan(first["predicted_kl_pairs"]) else first["predicted_kl_pairs"]
    assert first["prediction_ratio"] == pytest.approx(first["heldout_kl"] / believed)
    assert first["prediction_ratio_se"] == pytest.approx(first["heldout_kl_se"] / believed)
    assert "Prediction:" in printed
    assert f"{first['prediction_ratio']:.2f}" in printed


def test_images_of_the_sweep_are_not_held_out(tmp_path, swept):
    """Verified on the sweep's own images a prediction has no bias to show."""
    assert qvw("plan", "--run", swept, "--weight-bits", 5, "--verify", "--num-workers", 0, "--quiet", "--out",
               tmp_path / "other.json") == 0  # fmt: skip
    run = tmp_path / "undivided"
    data = [*DATA[2:], "--data", "digits"]
    assert qvw("sensitivity", *MODEL, *data, "--split", "val", "--images", 20, "--bits", "2,8", "--tensors", "weight",
               "--run", run, "--quiet") == 0  # fmt: skip
    assert qvw("plan", "--run", run, "--weight-bits", 4, "--verify", "--images", 20, "--num-workers", 0, "--quiet") == 0
    assert pd.read_parquet(run / "verification.parquet")["prediction_ratio"].isna().all()


def test_interactions_are_on_only_where_they_measurably_help(swept, tmp_path, capfd):
    """The plan of a verification is never the one that measured worse; the words say what was measured."""
    assert qvw("plan", "--run", swept, "--weight-bits", 4, "--verify", "--images", 40, "--num-workers", 0) == 0
    words = capfd.readouterr().out
    table = pd.read_parquet(swept / "verification.parquet").set_index("plan")
    if "interactions are counted" in words:
        assert table.loc["additive", "kl_excess"] > 0
    else:
        assert "additive" not in table.index
    assert qvw("plan", "--run", swept, "--weight-bits", 4, "--verify", "--images", 40, "--num-workers", 0, "--quiet",
               "--no-interactions") == 0  # fmt: skip
    assert "additive" not in set(pd.read_parquet(swept / "verification.parquet")["plan"])


@pytest.mark.parametrize(("batches", "noisy"), [(1, True), (64, False)])
def test_a_trace_whose_error_is_large_is_noted(batches, noisy):
    """One batch has no error, and so no certainty; many batches of a quadratic loss have little."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).eval()
    data = [(torch.randn(2 if noisy else 64, 6), torch.randint(3, (2 if noisy else 64,))) for _ in range(batches)]
    net = Network(model, data[0])
    sites = [info for info in net.infos if info.quantizable and info.site.is_weight]
    table, _ = proxy_table(
        net, sites, data, (4,), task=classification(), estimator="minmax", granularity=None, stats=None
    )
    notes = table.loc[table["proxy"] == "hessian_trace", "note"]
    assert (notes == NOISY_TRACE).all() == noisy
    assert (table.loc[table["proxy"] != "hessian_trace", "note"] == "").all()
