"""Networks of Hugging Face's transformers: named inputs, outputs as objects with logits."""

import copy

import pandas as pd
import pytest
import torch

import analysis
import quant

transformers = pytest.importorskip("transformers")


def vit():
    """ViT of two blocks for images of 32 x 32."""
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=32,
            patch_size=8, num_labels=5,
        )
    )  # fmt: skip


def swin():
    """Swin of two stages for images of 32 x 32."""
    return transformers.SwinForImageClassification(
        transformers.SwinConfig(
            image_size=32, patch_size=4, embed_dim=24, depths=[1, 1], num_heads=[2, 4], window_size=4, num_labels=5
        )
    )


@pytest.fixture(params=[vit, swin], ids=["vit", "swin"])
def model(request):
    """Each network with fixed random weights."""
    torch.manual_seed(0)
    return request.param().eval()


@pytest.fixture
def data():
    """Two batches as a transformers collator makes them."""
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "pixel_values": torch.randn(4, 3, 32, 32, generator=generator),
            "labels": torch.randint(5, (4,), generator=generator),
        }
        for _ in range(2)
    ]


def test_from_a_model_to_a_packed_file_that_loads(model, data, tmp_path):
    """The whole way; the figures equal those of the same network called by hand, the file loads to the same answers."""
    net = analysis.Network(model, data)
    with torch.no_grad():
        logits = torch.cat([model(pixel_values=batch["pixel_values"]).logits for batch in data])
    labels = torch.cat([batch["labels"] for batch in data])
    assert len(analysis.measure_stats(net, data).table)

    estimates = analysis.estimate_sensitivity(net, data, bits=(2, 4, 8))
    plan = analysis.plan_bits(net, estimates, like="w4a4")
    table = analysis.evaluate(net, data, {"float": None, "planned": plan}, calibration=data).set_index("plan")
    float_row = table.loc["float"]
    assert float_row["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert float_row["score"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert table.loc["planned", "divergence"] > 0

    fresh = copy.deepcopy(model)
    quant.prepare_qat_(net, plan, data)
    quant.save_packed(model, tmp_path / "planned.safetensors")
    assert (tmp_path / "planned.safetensors").stat().st_size == plan.totals.size_bytes
    quant.load_packed(fresh, tmp_path / "planned.safetensors")
    with torch.no_grad():
        assert torch.equal(model(data[0]["pixel_values"]).logits, fresh(data[0]["pixel_values"]).logits)


def test_softmax_is_a_site_of_every_attention(model, data):
    """Attention functions that transformers looks up by name are followed, one softmax site a block."""
    sites = analysis.Network(model, data).sites
    assert (sites["tensor"] == "attention").sum() == 2


def test_both_ways_of_attention_measure_the_same(data):
    """`sdpa` and `eager` attention are one network with the same sites and statistics."""
    torch.manual_seed(0)
    one = vit().eval()
    other = copy.deepcopy(one)
    one.set_attn_implementation("eager")
    other.set_attn_implementation("sdpa")
    first, second = (analysis.measure_stats(analysis.Network(m, data, name="vit"), data).table for m in (one, other))
    pd.testing.assert_frame_equal(first, second, check_exact=False, rtol=1e-4, atol=1e-5)
