"""The accounting of plans, against figures worked out by hand."""

import math
from typing import Any

import pandas as pd
import pytest

from analysis.planning import accounting
from quant.bit_plan import PlannedSite
from quant.errors import InputError
from quant.site import Site


def row(
    name: str, count: int, macs: int, *edges: str, channels: int = 0, heads: int = 0, pinned: bool = False
) -> dict[str, Any]:
    """A row of cost.parquet for the site `name` (module:tensor) of `count` elements."""
    site = Site.parse(name)
    return {
        "module": site.module,
        "tensor": site.tensor,
        "numel": count,
        "elements_per_image": math.nan if site.is_weight else float(count),
        "macs": macs,
        "edges": list(edges),
        "channels": channels,
        "heads": heads,
        "kind": "other",
        "order": 0,
        "quantizable": True,
        "pinned": pinned,
    }


COST = pd.DataFrame(
    [
        row("conv:weight", 27, 900, "conv:input", channels=3, pinned=True),
        row("conv:input", 100, 900, "conv:weight", channels=1, pinned=True),
        row("qkv:weight.query", 10, 50, "qkv:input", heads=2),
        row("qkv:weight.key", 10, 50, "qkv:input", heads=2),
        row("qkv:weight.value", 10, 70, "qkv:input", heads=2),
        row("qkv:input", 40, 170, "qkv:weight.query", "qkv:weight.key", "qkv:weight.value"),
        row("attn:query", 20, 80, "attn:key", heads=2),
        row("attn:key", 20, 80, "attn:query", heads=2),
        row("attn:attention", 60, 90, "attn:value", heads=2),
        row("attn:value", 20, 90, "attn:attention", heads=2),
    ]
)


def planned(name: str, bit_width: int, granularity: Any = "per_tensor", offset: bool = False) -> PlannedSite:
    """The site `name` (module:tensor) at some bit-width."""
    site: Any = Site.parse(name)
    return PlannedSite(
        module=site.module,
        tensor=site.tensor,
        bit_width=bit_width,
        granularity=granularity,
        signed=True,
        offset=offset,
    )


def test_each_product_is_counted_once():
    """Both sides list a product; it is one edge, with the MACs of the weight, the query or the attention map."""
    assert accounting.edges(COST).to_dict("split")["data"] == [
        ["conv:weight", "conv:input", 900],
        ["qkv:weight.query", "qkv:input", 50],
        ["qkv:weight.key", "qkv:input", 50],
        ["qkv:weight.value", "qkv:input", 70],
        ["attn:query", "attn:key", 80],
        ["attn:attention", "attn:value", 90],
    ]
    with pytest.raises(ValueError, match="product of conv:input with conv:weight on one side only"):
        accounting.edges(COST.iloc[1:])


def test_totals_of_a_convolution_by_hand():
    """A convolution alone is planned, in a model of 100 parameters.

    weights 3 bits; input 5 bits with an offset. Bytes: ceil(27 * 3 / 8) = 11, 3 channel scales 12, the input's
    scale and offset 8, the 73 other parameters 292: 323. BitOps: 900 * 3 * 5 = 13500 for the
    convolution, and at 32 bits each way (50 + 50 + 70 + 80 + 90) * 1024 = 348160 for the rest: 361660.
    """
    totals = accounting.totals(
        [planned("conv:weight", 3, "per_channel"), planned("conv:input", 5, offset=True)], COST, 100
    )
    assert (totals.weight_bits, totals.activation_bits) == (3.0, 5.0)
    assert totals.size_bytes == 11 + 12 + 8 + 292
    assert totals.bitops == 13_500 + 348_160


def test_totals_of_attention_by_hand():
    """Means are weighted by elements; fused weights part by part; a partner outside the plan counts 32 bits.

    Weight bits: (27 * 8 + 10 * 2 + 10 * 3) / 47 = 266 / 47, the pinned convolution too, weight.value not planned.
    Activation bits: (40 * 4 + 20 * 8 + 60 * 2) / 120 = 440 / 120. Bytes: 27 + 3 + 4 codes; scales 1, 2 and 2 of
    weights, 1, 2 and 2 of activations: 40; 100 - 47 = 53 parameters: 212. BitOps: 900 * 8 * 32 + 50 * 2 * 4 +
    50 * 3 * 4 + 70 * 32 * 4 + 80 * 8 * 32 + 90 * 2 * 32.
    """
    plan = [
        planned("conv:weight", 8),
        planned("qkv:weight.query", 2, "per_head"),
        planned("qkv:weight.key", 3, "per_head"),
        planned("qkv:input", 4),
        planned("attn:query", 8, "per_head"),
        planned("attn:attention", 2, "per_head"),
    ]
    totals = accounting.totals(plan, COST, 100)
    assert totals.weight_bits == 266 / 47
    assert totals.activation_bits == 440 / 120
    assert totals.size_bytes == 27 + 3 + 4 + 40 + 212
    assert totals.activation_bytes == 20 + 20 + 15
    assert totals.bitops == 230_400 + 400 + 600 + 8_960 + 20_480 + 5_760


def test_latency_is_added_in_picoseconds():
    """Ten times 0.1 ms is 1 ms, although ten times the float 0.1 is less; an odd activation takes a whole last byte."""
    cost = pd.DataFrame([row(f"fc{i}:input", 3, 1, f"fc{i}:weight") for i in range(10)]
                        + [row(f"fc{i}:weight", 3, 1, f"fc{i}:input") for i in range(10)])  # fmt: skip
    plan = [planned(f"fc{i}:input", 3) for i in range(10)]
    latency = pd.DataFrame(
        [{"module": f"fc{i}", "tensor": "input", "bit_width": 3, "milliseconds": 0.1} for i in range(10)]
    )
    totals = accounting.totals(plan, cost, 30, latency)
    assert totals.latency_ms == 1.0 != sum([0.1] * 10)
    assert totals.activation_bytes == 10 * 2
    assert accounting.totals(plan, cost, 30).latency_ms is None


def test_nothing_planned_costs_what_the_float_model_costs():
    """Without a planned site: 4 bytes a parameter, 32 x 32 bits a MAC, and no mean of nothing."""
    totals = accounting.totals([], COST, 100)
    assert (totals.weight_bits, totals.activation_bits) == (None, None)
    assert (totals.size_bytes, totals.bitops) == (400, 1240 * 1024)


def test_a_site_that_the_model_lacks_is_refused():
    """An unknown site, heads where there are none, or fewer parameters than planned weights: no total."""
    with pytest.raises(InputError, match="no site conv2:weight; the nearest is conv:weight"):
        accounting.totals([planned("conv2:weight", 4)], COST, 100)
    with pytest.raises(InputError, match="conv:weight has no heads"):
        accounting.totals([planned("conv:weight", 4, "per_head")], COST, 100)
    with pytest.raises(InputError, match=r"has 20 parameters by run\.json, which is 7 less than the planned weights"):
        accounting.totals([planned("conv:weight", 4)], COST, 20)
