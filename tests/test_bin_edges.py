"""Where latent weights lie around the edges of their bins, counted at some steps of a training."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant.config import QATConfig
from quant.insertion import latent_weights
from quant.oscillation import POSITIONS, edge_counts, edge_rows
from quant.quantizer import LSQQuantizer, Quantizer
from quant.scheme import QuantScheme
from quant.site import Site
from quant.train import binned_steps
from tests.test_train import dropping_vit, prepared, reports


def test_places_in_the_bins_are_kept_before_halfway_and_at_the_end(tmp_path):
    """Rows of three steps, `POSITIONS` a site; the last ones are of the trained weights."""
    config = QATConfig(steps=6, batch_size=16, learning_rate=1e-3)
    model, teacher = prepared(dropping_vit())
    rows = [row for report in reports(model, teacher, config, tmp_path) for row in report.bins]
    sites = [site for site, (_, quantizer) in latent_weights(model).items() if quantizer.scheme.bit_width <= 4]
    assert [row["step"] for row in rows] == [step for step in (0, 3, 6) for _ in range(POSITIONS * len(sites))]
    assert rows[-POSITIONS * len(sites) :] == edge_rows(latent_weights(model), 6)
    assert rows[: POSITIONS * len(sites)] != [{**row, "step": 0} for row in edge_rows(latent_weights(model), 0)]


@pytest.mark.parametrize(("total", "steps"), [(1, {0, 1}), (2, {0, 1, 2}), (101, {0, 50, 101})])
def test_binned_steps_end_with_the_training(total, steps):
    """Of the shortest training too, and without a step beyond it."""
    assert set(binned_steps(total)) == steps


@given(
    bit_width=st.integers(1, 4),
    signed=st.booleans(),
    offset=st.sampled_from([None, -0.3, 1.7]),
    values=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=50),
)
def test_places_are_those_of_the_nearest_edge(bit_width, signed, offset, values):
    """Against each value's distance to every edge, halfway between neighbouring codes; clipped ones are left out."""
    low, high = (-1, 1) if signed and bit_width == 1 else (
        (-(2 ** (bit_width - 1)), 2 ** (bit_width - 1) - 1) if signed else (0, 2**bit_width - 1))  # fmt: skip
    step = 2 if signed and bit_width == 1 else 1
    edges = [code + step / 2 for code in range(low, high, step)]
    x = torch.tensor(values, dtype=torch.float64)
    beta = None if offset is None else torch.tensor([offset], dtype=torch.float64)
    scale = torch.tensor([0.75], dtype=torch.float64)
    expected = [0] * POSITIONS
    for value in (x if offset is None else x - offset) / 0.75:
        if low < value < high:
            distance = min((float(value - edge) / step for edge in edges), key=lambda d: (abs(d), d))
            expected[min(POSITIONS - 1, int((distance + 0.5) * POSITIONS))] += 1
    counts = edge_counts(x.view(1, 1, -1), scale, beta, bit_width, signed).tolist()
    assert sum(counts) == sum(expected)
    moved = sum(abs(ours - theirs) for ours, theirs in zip(counts, expected, strict=True)) // 2
    on_a_border = ((((x - (offset or 0)) / 0.75 - low) / step * POSITIONS) % 1).sub(0.5).abs().gt(0.5 - 1e-9).sum()
    assert moved <= on_a_border  # rounding may put those on either side


def test_half_precision_values_are_placed_in_float32():
    """A network in bfloat16, scales too: counts are those of the same numbers in float32."""
    x = torch.randn(1, 4, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale, offset = torch.tensor([0.21, 0.3, 0.13, 0.5]).bfloat16(), torch.tensor([0.1, -0.2, 0.0, 0.3]).bfloat16()
    counts = edge_counts(x, scale, offset, 3, True)
    assert counts.equal(edge_counts(x.float(), scale.float(), offset.float(), 3, True))
    assert counts.sum() > 500


def test_rows_of_the_bins_name_each_place():
    """Weights at the edge of two codes are in the middle, those at the centres at both ends; heads by their scale."""
    scheme = QuantScheme(bit_width=3, signed=True, granularity="per_head")
    site = Site("blocks.0.attn.qkv", "weight.query")
    start = Quantizer(scheme=scheme, scale=torch.tensor([1.0, 10.0]), offset=None, axis=0, groups=2)
    weight = torch.tensor([[0.51, 1.51, -4.0, 3.2], [4.9, 1e-3, -1e-3, 29.9]])
    rows = edge_rows({site: (weight, LSQQuantizer(start, elements_per_scale=4))}, 9)
    assert len(rows) == POSITIONS
    assert [row["position"] for row in rows[:2]] == [-0.475, -0.425]
    assert {(row["step"], row["module"], row["tensor"]) for row in rows} == {(9, *site)}
    assert {row["position"]: row["weights"] for row in rows if row["weights"]} == {
        -0.475: 1, -0.025: 1, 0.025: 2, 0.475: 2
    }  # fmt: skip
