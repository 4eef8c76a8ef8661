"""Proxies and how they rank the sites: frames on real networks, correlations against scipy, ceilings by simulation."""

import itertools

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import timm
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from analysis.proxies import (
    IMAGES_AT_ONCE,
    PROXY_COLUMNS,
    PROXY_IMAGE_COLUMNS,
    STATS_PROXIES,
    proxy_table,
    stats_scores,
)
from analysis.sensitivity import SweepConfig, images_table, preferred_rows, sensitivity_table, sweep_keys
from analysis.sweeps.fisher import fisher_scores
from analysis.sweeps.hessian import hessian_traces
from analysis.sweeps.proxy_correlation import CORRELATION_COLUMNS, LEAST_SITES, noise_ceiling, proxy_correlations
from analysis.sweeps.sweep import sample_activations, sweep
from analysis.tasks import classification
from quant.batches import forward
from quant.calibrate import default_scheme, make_quantizer
from quant.choices import PROXIES
from quant.site import Site, SiteInfo
from quant.sites import find_sites
from tests.networks import net_of

IMAGES = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 10
BATCHES = list(zip(IMAGES.split(20), LABELS.split(20), strict=True))
BITS = (3, 6)

SCHEME = {"granularity": "per_tensor", "estimator": "mse"}


def opened(name):
    """A small network, its trace, and the sites that can be quantized."""
    torch.manual_seed(0)
    if name == "resnet":
        model = timm.create_model("resnet18", layers=(1, 1, 1, 1), channels=(8, 8, 8, 8), stem_width=8, num_classes=10,
                                  zero_init_last=False)  # fmt: skip
    else:
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=16, embed_dim=16, depth=2,
                                  num_heads=2, num_classes=10)  # fmt: skip
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    trace, sites = find_sites(model, IMAGES[:2])
    return model, trace, [info for info in sites if info.quantizable]


def table_of(model, trace, sites, batches=BATCHES, stats=None):
    """The two frames at `BITS`."""
    return proxy_table(
        net_of(model, trace, sites),
        sites,
        batches,
        BITS,
        task=classification(),
        estimator="minmax",
        granularity=None,
        stats=stats,
    )


def stats_of(sites):
    """A frame in the columns of stats.parquet that matter here, some values missing."""
    return pd.DataFrame(
        [
            {"module": info.site.module, "tensor": info.site.tensor, "abs_max_over_std": 2.0 + i,
             "excess_kurtosis": np.nan if i == 0 else i - 3.0, "outlier_fraction": i / 1000}
            for i, info in enumerate(sites)
        ]
    )  # fmt: skip


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_the_frames_hold_what_the_two_passes_give_with_the_quantizers_of_the_sweep(name):
    """Every site and bit-width has each gradient score and the noise; trace / 2 x mean squared error is HAWQ-V2's."""
    model, trace, sites = opened(name)
    table, images = table_of(model, trace, sites)
    assert list(table.columns) == list(PROXY_COLUMNS)
    assert list(images.columns) == list(PROXY_IMAGE_COLUMNS)
    expected = set(itertools.product([info.site for info in sites], BITS, set(PROXIES) - set(STATS_PROXIES)))
    rows = list(zip(table["module"], table["tensor"], table["bit_width"], table["proxy"], strict=True))
    assert len(rows) == len(set(rows))
    assert {(Site(m, t), bits, proxy) for m, t, bits, proxy in rows} == expected
    by_site = {info.site: info for info in sites}
    samples = sample_activations(net_of(model, trace, by_site), by_site, BATCHES, forward)
    quantizers = {}
    for site, info in by_site.items():
        schemes = {bits: default_scheme(model, info, bits, sample=samples.get(site)) for bits in BITS}
        quantizers[site] = {
            bits: make_quantizer(model, info, scheme, sample=samples.get(site), estimator="minmax")
            for bits, scheme in schemes.items()
        }
    sizes = [16, 4, 16, 4]
    assert max(sizes) == IMAGES_AT_ONCE
    small = list(zip(IMAGES.split(sizes), LABELS.split(sizes), strict=True))
    scores = fisher_scores(net_of(model, trace, by_site), quantizers, [x for x, _ in small], classification())
    traces = hessian_traces(net_of(model, trace, by_site), by_site, small, classification())
    for row in table.itertuples():
        site, bits = Site(row.module, row.tensor), row.bit_width
        if row.proxy == "hessian_trace":
            assert row.score == pytest.approx(0.5 * traces[site].trace * scores[site, bits].squared_error)
        else:
            assert row.score == pytest.approx(getattr(scores[site, bits], row.proxy))
    for row in images.itertuples():
        products = scores[Site(row.module, row.tensor), row.bit_width].products
        np.testing.assert_array_equal(row.products, products)
        assert products.shape == (40,)


def test_without_labels_there_is_no_hessian_and_all_else_is_the_same():
    """One unknown label is enough: a loss without it would be of other images."""
    model, trace, sites = opened("resnet")
    sites = sites[:4]
    table, _ = table_of(model, trace, sites)
    labels = LABELS.clone()
    labels[30] = -1
    without, _ = table_of(model, trace, sites, list(zip(IMAGES.split(20), labels.split(20), strict=True)))
    kept = table[table["proxy"] != "hessian_trace"].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, without.reset_index(drop=True), check_exact=True)
    assert len(kept) < len(table)


def test_the_statistics_join_the_table_for_its_own_sites_alone():
    """Rows of stats.parquet for other tensors (outputs, sites left out) give no score."""
    model, trace, sites = opened("resnet")
    stats = pd.concat([stats_of(sites), stats_of(sites[:1]).assign(tensor="output")])
    table, _ = table_of(model, trace, sites[:3], stats=stats)
    assert set(table["proxy"]) == set(PROXIES)
    scored = table[table["proxy"].isin(STATS_PROXIES)]
    assert {Site(m, t) for m, t in zip(scored["module"], scored["tensor"], strict=True)} == {s.site for s in sites[:3]}
    kurtosis = scored[scored["proxy"] == "stats_kurtosis"]["score"]
    assert kurtosis.isna().sum() == len(BITS)


@given(bits=st.integers(4, 8), m=st.floats(1, 4), seed=st.integers(0, 100))
@settings(max_examples=25)
def test_the_score_of_the_range_is_the_noise_of_rounding(bits, m, seed):
    """A Gaussian clipped at m, rounded to 2^b levels from -m to m: squared error over variance within 5 %."""
    x = np.clip(np.random.default_rng(seed).standard_normal(20000), -m, m)
    x[:2] = -m, m
    levels = np.linspace(-m, m, 2**bits)
    step = levels[1] - levels[0]
    error = np.round((x + m) / step) * step - m - x
    inside = np.abs(x) < m  # what was clipped lies on the grid's ends and has no error
    info = SiteInfo(site=Site("fc", "input"), kind="head", order=0, shape=(8,), numel=8)
    stats = stats_of([info]).assign(abs_max_over_std=m / x.std())
    scores = stats_scores(stats, {info.site: info}, (bits,)).set_index("proxy")["score"]
    assert scores["stats_range"] == pytest.approx((error[inside] ** 2).mean() / x.var(), rel=0.05)


def frames(kl, scores, *, tensors=None, bits=4, proxy="fisher"):
    """Measured rows, images and proxies of as many sites as `kl` (sites, images) has rows."""
    kl = np.asarray(kl, dtype=float)
    tensors = tensors or ["weight"] * len(kl)
    key = {"group": "", "protocol": "single", "granularity": "per_tensor", "estimator": "mse", "batchnorm": "none"}
    sites = [{"module": f"m{i}", "tensor": tensor, "bit_width": bits, **SCHEME} for i, tensor in enumerate(tensors)]
    measured = pd.DataFrame([{**s, **key, "divergence": x.mean()} for s, x in zip(sites, kl, strict=True)])
    images = pd.DataFrame([{**s, **key, "image_divergence": list(x), "image_delta_loss": list(x)}
                           for s, x in zip(sites, kl, strict=True)])  # fmt: skip
    proxies = pd.DataFrame([{**s, "proxy": proxy, "score": x} for s, x in zip(sites, scores, strict=True)])
    return proxies, measured, images


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=LEAST_SITES, max_size=12))
@settings(max_examples=20)
def test_both_correlations_are_those_of_scipy_ties_included(pairs):
    """Small integers have many ties; intervals are ordered and within -1 and 1."""
    scores, kl = np.array(pairs, dtype=float).T
    assume(len(set(scores)) > 1)
    assume(len(set(kl)) > 1)
    table = proxy_correlations(*frames(kl[:, None] * [1, 1], scores))
    assert list(table.columns) == list(CORRELATION_COLUMNS)
    assert list(table["tensors"]) == ["all", "weight"]
    row = table.iloc[0]
    assert row["sites"] == len(pairs)
    assert row["spearman"] == pytest.approx(scipy.stats.spearmanr(scores, kl).statistic, abs=1e-12)
    assert row["kendall"] == pytest.approx(scipy.stats.kendalltau(scores, kl).statistic, abs=1e-12)
    assert -1 - 1e-9 <= row["spearman_low"] <= row["spearman_high"] <= 1 + 1e-9


def test_a_monotone_change_of_the_score_changes_no_correlation():
    """Ranks alone count: a proxy need not be in nats."""
    generator = np.random.default_rng(0)
    kl, scores = generator.random((10, 4)), generator.random(10)
    first, second = (proxy_correlations(*frames(kl, s)) for s in (scores, np.exp(9 * scores)))
    pd.testing.assert_frame_equal(first, second)


def test_the_interval_is_the_bootstrap_over_sites():
    """Against scipy's own percentile bootstrap of pairs, 15 sites: within the noise of 1,000 resamples."""
    generator = np.random.default_rng(3)
    kl = generator.random(15)
    scores = kl + 0.3 * generator.random(15)
    row = proxy_correlations(*frames(kl[:, None] * [1, 1], scores)).iloc[0]
    other = scipy.stats.bootstrap(
        (scores, kl), lambda x, y: scipy.stats.spearmanr(x, y).statistic, paired=True, vectorized=False,
        method="percentile", n_resamples=1000, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert row["spearman_low"] == pytest.approx(other.low, abs=0.06)
    assert row["spearman_high"] == pytest.approx(other.high, abs=0.02)
    assert row["spearman_low"] < row["spearman"] < row["spearman_high"]


def test_classes_bit_widths_and_missing_scores_are_kept_apart():
    """Fused parts are weights, the four tensors of attention one class; NaN is no score; four sites give no row."""
    tensors = ["weight", "weight.query", "weight.key", "weight.value", "weight", "input", "input", "input", "input",
               "query", "key", "value", "attention", "query"]  # fmt: skip
    kl = np.random.default_rng(0).random((14, 6))
    parts = [frames(kl, kl.mean(axis=1), tensors=tensors, bits=3),
             frames(kl, np.where(np.arange(14) < 2, np.nan, -kl.mean(axis=1)), tensors=tensors, bits=2)]  # fmt: skip
    table = proxy_correlations(*(pd.concat(same, ignore_index=True) for same in zip(*parts, strict=True)))
    found = {(row.bit_width, row.tensors): (row.sites, row.spearman) for row in table.itertuples()}
    assert {key: sites for key, (sites, _) in found.items()} == {
        (2, "all"): 12, (2, "attention"): 5, (3, "all"): 14, (3, "weight"): 5, (3, "attention"): 5
    }  # fmt: skip
    assert all(spearman == pytest.approx(1 if bits == 3 else -1) for (bits, _), (_, spearman) in found.items())


def test_a_constant_score_has_no_correlation():
    """All sites without outliers: NaN rather than a number, and no warning."""
    table = proxy_correlations(*frames(np.random.default_rng(0).random((6, 4)), np.zeros(6), proxy="stats_outliers"))
    assert table[["spearman", "spearman_low", "spearman_high", "kendall"]].isna().all(axis=None)
    assert len(table) == 2


@pytest.mark.parametrize("noise", [0.3, 3.0, 12.0])
def test_the_ceiling_is_what_the_true_values_reach(noise):
    """Mean over 60 sweeps of 40 sites and 20 images: the estimate meets the correlation of truth and measurement.

    At noise 12 images the two agree within 0.1; Spearman-Brown is exact for Pearson's correlation, not for ranks.
    """
    generator = np.random.default_rng(0)
    ceilings, reached = [], []
    for _ in range(60):
        true = generator.standard_normal(40)
        values = true[:, None] + noise * generator.standard_normal((40, 20))
        ceilings.append(noise_ceiling(values))
        reached.append(scipy.stats.spearmanr(true, values.mean(axis=1)).statistic)
    assert np.mean(ceilings) == pytest.approx(np.mean(reached), abs=0.03 if noise < 5 else 0.1)


def test_what_all_images_have_in_common_lowers_no_ceiling():
    """A hard image is hard for every site: ranks of sites do not see it. Without noise the ceiling is 1."""
    generator = np.random.default_rng(0)
    common = 100 * generator.standard_normal(12)
    values = generator.random((8, 1)) + np.zeros((8, 12))
    assert noise_ceiling(values) == pytest.approx(1)
    assert noise_ceiling(values + common) == pytest.approx(1)


def test_the_ceiling_has_its_limits():
    """One image tells nothing of noise, sites that are all alike have no ranks, halves in opposite order give 0."""
    assert np.isnan(noise_ceiling(np.arange(6.0)[:, None]))
    assert np.isnan(noise_ceiling(np.ones((6, 4))))
    opposite = np.stack([np.arange(6.0), -np.arange(6.0)], axis=1)
    assert noise_ceiling(opposite) == 0


@pytest.mark.filterwarnings("ignore:the float network has")  # random weights have large logits
def test_on_a_real_network_fisher_predicts_the_measured_sweep():
    """At 6 bits, all sites of a small ResNet, from the frames of the sweep: Spearman above 0.8 of the ceiling."""
    model, trace, sites = opened("resnet")
    config = SweepConfig(bit_widths=(6,), batchnorm="stored", estimator="minmax")
    rows = list(
        sweep(net_of(model, trace, sites, "m"), sites, BATCHES, sweep_keys(model, sites, config), task=classification())
    )
    proxies, _ = table_of(model, trace, sites, stats=stats_of(sites))
    table = proxy_correlations(proxies, preferred_rows(sensitivity_table(rows)), images_table(rows))
    found = table[table["tensors"] == "all"].set_index("proxy")
    assert set(found.index) == set(PROXIES)
    assert (found.drop("stats_kurtosis")["sites"] == len(sites)).all()
    assert found.loc["stats_kurtosis", "sites"] == len(sites) - 1
    assert found.loc["fisher", "spearman"] > 0.8 * found.loc["fisher", "ceiling"] > 0.6
