"""Figures of a whole model follow their formulas, and the comparison says what the numbers say."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats as scipy_stats

from analysis.running_stats import stats_of
from analysis.statistics.comparison import MEASURES, Compared, compare
from analysis.statistics.variation_frames import Measured, depth_frame
from analysis.steps.plan_step import bits_frame
from analysis.variation import layer_sites, usable, variation
from quant.errors import InputError


def stats_frame(model: str, tensors: list[tuple[str, str, str, torch.Tensor]]) -> pd.DataFrame:
    """Rows of stats.parquet of (module, kind, tensor, values), channels along axis 0."""
    rows = []
    for order, (module, kind, tensor, values) in enumerate(tensors):
        stats = stats_of(values, 0, len(values))
        rows.append(
            {"model": model, "module": module, "kind": kind, "order": order, "tensor": tensor, "numel": values.numel(),
             **stats.row(), "channel_range_ratio": stats.range_ratio(), "channel_std_cv": stats.std_cv(),
             "head_std_cv": float("nan")}
        )  # fmt: skip
    return pd.DataFrame(rows)


def compared(stats: pd.DataFrame) -> Compared:
    """What `compare` takes of the run that these statistics are of."""
    return Compared(Measured(name=stats["model"].iloc[0], stats=stats), variation(stats))


@pytest.fixture
def tensors():
    """A convolution, a fused qkv in three parts of unequal size, a linear, a constant one, a norm and two inputs."""
    torch.manual_seed(0)
    return [
        ("conv", "conv", "weight", torch.randn(8, 30)),
        ("conv", "conv", "input", torch.rand(8, 30)),
        ("attn.qkv", "attn.qkv", "weight.query", torch.randn(4, 10) * 0.1),
        ("attn.qkv", "attn.qkv", "weight.key", torch.randn(4, 20) * 0.2),
        ("attn.qkv", "attn.qkv", "weight.value", torch.randn(4, 40) * 0.3),
        ("attn.qkv", "attn.qkv", "input", torch.randn(8, 30)),
        ("fixed", "downsample", "weight", torch.ones(4, 4)),
        ("fc", "head", "weight", torch.distributions.StudentT(2.0).sample((20, 500))),
        ("norm", "norm", "output", torch.randn(8, 30)),
        ("block", "block", "output", torch.randn(8, 30)),
    ]


def test_sdam_is_the_population_deviation_of_module_abs_means(tensors):
    """Against the definition on the raw tensors: qkv is one module, the constant one, norms and blocks are left out."""
    result = variation(stats_frame("net", tensors))
    qkv = torch.cat([values.flatten() for module, _, _, values in tensors[2:5]])
    raw = [tensors[0][3], qkv, tensors[7][3]]
    abs_means = np.array([values.double().abs().mean().item() for values in raw])
    figures = result["weight"]
    assert figures["modules"] == 3
    assert figures["sdam"] == pytest.approx(abs_means.std(), rel=1e-9)
    assert figures["abs_mean"] == pytest.approx(abs_means.mean(), rel=1e-9)
    assert figures["cv"] == pytest.approx(abs_means.std() / abs_means.mean(), rel=1e-9)
    assert figures["log_abs_mean_mean"] == pytest.approx(np.log(abs_means).mean(), rel=1e-9)
    assert figures["log_abs_mean_std"] == pytest.approx(np.log(abs_means).std(), rel=1e-9)
    assert (result["over"], result["population"], result["model"]) == ("modules", True, "net")
    assert result["input"]["modules"] == 2


def test_spreads_and_the_worst_site(tensors):
    """Median and quartile distance over the sites, and the site with the largest outlier fraction."""
    figures = variation(stats_frame("net", tensors))["weight"]
    weights = [t[3] for t in tensors if t[2].startswith("weight") and t[0] != "fixed"]
    kurtosis = [scipy_stats.kurtosis(w.double().numpy(), axis=None) for w in weights]
    assert figures["excess_kurtosis_median"] == pytest.approx(np.median(kurtosis))
    assert figures["excess_kurtosis_iqr"] == pytest.approx(scipy_stats.iqr(kurtosis))
    assert figures["outlier_fraction_max_site"] == "fc:weight"
    values = weights[-1].double()
    beyond = ((values - values.mean()).abs() > 6 * values.std(correction=0)).double().mean().item()
    assert figures["outlier_fraction_max"] == pytest.approx(beyond)
    assert beyond > 0


def test_scaling_a_network_changes_sdam_and_not_the_coefficient(tensors):
    """All tensors times 3: SDAM times 3; the coefficient of variation and the deviation of the logarithm stay."""
    one = variation(stats_frame("net", tensors))["weight"]
    three = variation(stats_frame("net", [(*t[:3], t[3] * 3) for t in tensors]))["weight"]
    assert three["sdam"] == pytest.approx(3 * one["sdam"])
    for name in ("cv", "log_abs_mean_std", "excess_kurtosis_median", "channel_range_ratio_iqr"):
        assert three[name] == pytest.approx(one[name]), name


def test_variation_is_json_also_without_activations(tensors):
    """A run over weights alone has None, not NaN, for activations: the file stays valid JSON."""
    weights = stats_frame("net", [t for t in tensors if t[2].startswith("weight")])
    result = variation(weights)
    assert result["input"]["modules"] == 0
    assert {v for k, v in result["input"].items() if k != "modules"} == {None}
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_two_models_in_one_frame_are_refused(tensors):
    """The figures are those of one network."""
    frame = pd.concat([stats_frame("a", tensors), stats_frame("b", tensors)])
    with pytest.raises(ValueError, match="one model, got those of a, b"):
        variation(frame)


@pytest.mark.parametrize(
    "note",
    [
        "",
        float("nan"),
        "shares its weight with constant_proj",
        "shares its weight with not observed.proj",
        "used by constant_linear without being called: its weight only",
        "ParametrizedConstantLinear transforms its weight itself: observed, not quantized",
        "median channel is zero; called 2 times in one forward pass: over all calls",
    ],
)
def test_a_note_may_name_what_it_likes(note, tensors):
    """Names of modules, functions and classes leave no site out, whatever words they hold."""
    frame = stats_frame("net", tensors)
    frame["note"] = frame["note"].astype(object).where(frame["module"] != "conv", note)
    assert usable(frame).sum() == len(frame) - 1  # but for the constant one
    assert "conv" in set(layer_sites(frame, "weight")["module"])


@pytest.mark.parametrize(
    "note",
    [
        "constant",
        "not observed",
        "not executed on these images",
        "never executed: its weight only",
        "shares its weight with fc; constant",
        "called 2 times in one forward pass; not executed on these images",
        "its calls have different shapes: (1, 2), (3, 2); not observed; called 2 times in one forward pass",
    ],
)
def test_a_note_leaves_out_by_the_start_of_any_of_its_parts(note, tensors):
    """Each note that `qvw stats` writes where figures mean nothing, alone and beside another."""
    frame = stats_frame("net", tensors)
    frame["note"] = frame["note"].where(frame["module"] != "conv", note)
    assert usable(frame).tolist() == [module not in ("conv", "fixed") for module in frame["module"]]
    assert "conv" not in {*layer_sites(frame, "weight")["module"], *layer_sites(frame, "input")["module"]}


def test_comparison_has_a_row_per_measure_and_a_true_sentence(tensors):
    """Numbers are those of variation; the sentence names the larger one and the ratio."""
    small, large = stats_frame("small", tensors), stats_frame("large", [(*t[:3], t[3] * 3) for t in tensors])
    table = compare([compared(small), compared(large)])
    assert list(table.columns) == ["tensor", "measure", "small", "large", "reading"]
    assert len(table) == 2 * len(MEASURES)
    sdam = table[(table["tensor"] == "weight") & (table["measure"] == "sdam")].iloc[0]
    assert sdam["large"] == pytest.approx(3 * sdam["small"])
    assert sdam["reading"].endswith(": largest in large, 3 times small.")
    modules = table[(table["tensor"] == "weight") & (table["measure"] == "modules")].iloc[0]
    assert modules["reading"] == "Convolutions and linears whose weights were measured."
    assert table["reading"].str.endswith(".").all()
    with pytest.raises(InputError, match="two runs are named 'small'"):
        compare([compared(small)] * 2)


def test_comparison_with_a_run_without_activations(tensors):
    """What one run has not measured is NaN in its column, and the sentence says so."""
    full = stats_frame("full", tensors)
    weights = stats_frame("weights", [t for t in tensors if t[2].startswith("weight")])
    table = compare([compared(full), compared(weights)])
    row = table[(table["tensor"] == "input") & (table["measure"] == "sdam")].iloc[0]
    assert math.isnan(row["weights"])
    assert row["reading"] == "Measured in full alone."


def test_depth_runs_from_zero_to_one(tensors):
    """Each model's layers spread over 0 to 1 in network order; the parts of qkv follow each other."""
    depth = depth_frame([Measured(name="net", stats=stats_frame("net", tensors))])
    assert depth["relative_depth"].tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert depth["model"].unique().tolist() == ["net"]


def test_bits_follow_network_order(tensors):
    """Kind and order come from the statistics, whatever the order of the plan."""
    plan = pd.DataFrame({"module": ["fc", "conv"], "tensor": ["weight", "weight"], "bit_width": [8, 3]})
    frame = bits_frame(plan, stats_frame("net", tensors))
    assert frame["module"].tolist() == ["conv", "fc"]
    assert frame["kind"].tolist() == ["conv", "head"]
