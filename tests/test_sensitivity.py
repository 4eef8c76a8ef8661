"""The single-site sweep: its figures against figures made by hand, and a model that comes back bit for bit."""

import copy
import itertools
import math
from functools import partialmethod

import numpy as np
import pandas as pd
import pytest
import scipy.special
import timm
import torch
import torch.nn.functional as F

from analysis.replay import Replay
from analysis.scoring import compare, reference_of
from analysis.sensitivity import SENSITIVITY_COLUMNS, SweepConfig, sensitivity_table, sweep_keys
from analysis.sweeps.sweep import sweep
from analysis.tasks import classification
from quant.batchnorm import batchnorm_reestimated
from quant.calibrate import default_scheme, make_quantizer, observe_activations
from quant.errors import InputError
from quant.insertion import quantized
from quant.site import Site
from quant.sites import find_sites
from tests.networks import logits_of, net_of

pytestmark = pytest.mark.filterwarnings("ignore:the float network has")  # random weights have large logits

IMAGES = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24) % 10
BATCHES = list(zip(IMAGES.split(8), LABELS.split(8), strict=True))


def model_of(name):
    """A small network; its BatchNorm statistics and biases are not the trivial ones of a fresh network."""
    torch.manual_seed(0)
    if name == "resnet":
        model = timm.create_model("resnet18", layers=(1, 1, 1, 1), channels=(8, 16, 16, 16), stem_width=8,
                                  num_classes=10, zero_init_last=False)  # fmt: skip
    elif name == "vit":
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4,
                                  num_classes=10)  # fmt: skip
    else:
        model = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, patch_size=4, window_size=4,
                                  embed_dim=24, depths=(2, 2), num_heads=(2, 4), num_classes=10)  # fmt: skip
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(IMAGES)
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model.eval()


def opened(name):
    """A network with its trace and the sites that can be quantized."""
    model = model_of(name)
    trace, sites = find_sites(model, IMAGES[:2])
    return model, trace, [info for info in sites if info.quantizable]


def quantizer_of(model, info, bit_width, sample=None):
    """The quantizer of a site with its default scheme."""
    scheme = default_scheme(model, info, bit_width, sample=sample)
    return make_quantizer(model, info, scheme, sample=sample, estimator="mse")


def rows_of(model, trace, sites, config):
    """All rows of a sweep."""
    keys = sweep_keys(model, sites, config)
    return list(sweep(net_of(model, trace, sites, "m"), sites, BATCHES, keys, task=classification()))


def compared(logits, reference, labels):
    """The figures of logits against those of the float network."""
    batches = [(torch.zeros(len(labels), 1), labels)]
    return compare(classification(), [logits], reference_of(classification(), [reference], batches), batches)[0]


@pytest.mark.parametrize("name", ["resnet", "vit", "swin"])
def test_every_row_has_every_column_and_the_model_comes_back(name):
    """One row a site and bit-width in network order; the state is bit for bit what it was, and no hook is left."""
    model, trace, sites = opened(name)
    before = copy.deepcopy(model.state_dict())
    rows = rows_of(model, trace, sites, SweepConfig(bit_widths=(2, 8), batchnorm="stored"))
    table = sensitivity_table(rows)
    assert list(table.columns) == list(SENSITIVITY_COLUMNS)
    assert list(zip(table["module"], table["tensor"], table["bit_width"], strict=True)) == [
        (*info.site, bits) for info in sites for bits in (2, 8)
    ]
    measured = ["loss", "delta_loss", "delta_loss_se", "top1", "delta_top1", "top1_se", "kl", "kl_se", "logit_nmse",
                "sqnr_db", "sqnr_output_db"]  # fmt: skip
    assert np.isfinite(table[measured].to_numpy(dtype=float)).all()
    kl = table.pivot(index=["module", "tensor"], columns="bit_width", values="kl")
    assert (kl[8] < kl[2]).mean() > 0.95
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_weight_row_is_what_quantizing_a_copy_by_hand_gives():
    """Loss, KL and both SQNRs of one weight, computed with a deep copy, numpy and scipy in float64."""
    model, trace, sites = opened("resnet")
    info = next(i for i in sites if i.site == Site("layer2.0.conv1", "weight"))
    row = rows_of(model, trace, [info], SweepConfig(bit_widths=(3,), estimator="minmax"))[0]
    changed = copy.deepcopy(model)
    weight = model.layer2[0].conv1.weight.detach().double().numpy()
    scale = np.abs(weight).max(axis=(1, 2, 3), keepdims=True) / 3
    weight_q = np.clip(np.round(weight / scale), -4, 3) * scale
    changed.layer2[0].conv1.weight.data = torch.from_numpy(weight_q).float()
    logits, labels = logits_of(changed, BATCHES), LABELS
    reference = logits_of(model, BATCHES)
    p = scipy.special.log_softmax(reference.double().numpy(), axis=1)
    q = scipy.special.log_softmax(logits.double().numpy(), axis=1)
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    index = (np.arange(24), labels.numpy())
    delta = p[index] - q[index]
    assert row["delta_loss"] == pytest.approx(delta.mean(), rel=1e-4)
    assert row["delta_loss_se"] == pytest.approx(delta.std(ddof=1) / math.sqrt(24), rel=1e-4)
    assert row["kl"] == pytest.approx(kl.mean(), rel=1e-4)
    assert row["kl_se"] == pytest.approx(kl.std(ddof=1) / math.sqrt(24), rel=1e-4)
    hits = (q.argmax(axis=1) == labels.numpy()).astype(float) - (p.argmax(axis=1) == labels.numpy())
    assert row["delta_top1"] == pytest.approx(hits.mean())
    assert row["top1_se"] == pytest.approx(hits.std(ddof=1) / math.sqrt(24))
    noise = ((weight - weight_q) ** 2).sum()
    assert row["sqnr_db"] == pytest.approx(10 * np.log10((weight**2).sum() / noise), rel=1e-4)
    inputs = []
    handle = model.layer2[0].conv1.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    logits_of(model, BATCHES)
    handle.remove()
    with torch.no_grad():
        clean = torch.cat([model.layer2[0].conv1(x) for x in inputs]).double()
        noisy = torch.cat([changed.layer2[0].conv1(x) for x in inputs]).double()
    expected = 10 * torch.log10(clean.square().sum() / (clean - noisy).square().sum()).item()
    assert row["sqnr_output_db"] == pytest.approx(expected, rel=1e-4)


def test_the_value_part_of_a_fused_qkv_changes_only_its_own_rows():
    """Rows of query and key stay; the scales are one a head, along the rows."""
    model, trace, sites = opened("vit")
    info = next(i for i in sites if i.site == Site("blocks.0.attn.qkv", "weight.value"))
    quantizer = quantizer_of(model, info, 2)
    weight = model.blocks[0].attn.qkv.weight.detach().clone()
    with quantized(net_of(model, trace, [info]), {info.site: quantizer}):
        during = model.blocks[0].attn.qkv.weight.detach().clone()
    assert torch.equal(during[:64], weight[:64])
    assert quantizer.scale.shape == (4,)
    for head in range(4):
        rows = during[64 + 8 * head : 64 + 8 * (head + 1)]
        assert rows.unique().numel() <= 4
        assert not torch.equal(rows, weight[64 + 8 * head : 64 + 8 * (head + 1)])
    assert quantizer.scale.unique().numel() == 4


def test_the_projection_has_one_scale_per_head_along_its_input_columns():
    """Heads lie along dimension 1 of proj's weight; along dimension 0 they would be mixed."""
    model, _, sites = opened("vit")
    info = next(i for i in sites if i.site == Site("blocks.0.attn.proj", "weight"))
    with torch.no_grad():
        model.blocks[0].attn.proj.weight[:, 8:16] *= 10
    quantizer = quantizer_of(model, info, 4)
    assert quantizer.scale.shape == (4,)
    assert quantizer.scale[1] > 5 * quantizer.scale[[0, 2, 3]].max()


def test_attention_sites_have_at_most_2_to_the_b_codes_in_each_head():
    """Query, key, value and attention are quantized where the products take them, with scales of their own per head."""
    model, trace, sites = opened("swin")
    name = "layers.0.blocks.1.attn"
    chosen = {i.site: i for i in sites if i.site.module == name}
    samples = observe_activations(net_of(model, trace, chosen), chosen, IMAGES.split(8), count=3)
    quantizers = {s: quantizer_of(model, i, 3, samples[s]) for s, i in chosen.items()}
    assert {s.tensor for s in chosen} == {"query", "key", "value", "attention"}
    seen = {}

    def recorded(site):
        def handler(x):
            seen[site] = quantizers[site](x)
            return seen[site]

        return handler

    with torch.no_grad(), quantized(net_of(model, trace, chosen), {site: recorded(site) for site in chosen}):
        model(IMAGES)
    for x in seen.values():
        assert x.shape[1] == 2
        assert all(x[:, head].unique().numel() <= 8 for head in range(2))
    assert all(q.scale.shape == (2,) and q.scale[0] != q.scale[1] for q in quantizers.values())
    assert not quantizers[Site(name, "attention")].scheme.signed


def test_delta_loss_of_attention_sites_is_against_attention_by_its_formula():
    """At 16 bits an attention site changes next to nothing: its reference is computed in the same form."""
    model, trace, sites = opened("vit")
    info = next(i for i in sites if i.site == Site("blocks.1.attn", "key"))
    row = rows_of(model, trace, [info], SweepConfig(bit_widths=(16,), estimator="minmax"))[0]
    assert abs(row["delta_loss"]) < 1e-4
    assert row["kl"] < 1e-6


def test_a_sweep_that_fails_in_the_middle_leaves_the_model_as_it_was():
    """Stopped inside a forward with a quantized weight in place, the own parameter object comes back."""
    model, trace, sites = opened("resnet")
    weights = {name: parameter for name, parameter in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())
    calls = itertools.count()

    def fail(_module, _args):
        if next(calls) == 7:
            raise RuntimeError("pulled the plug")

    handle = model.fc.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        rows_of(model, trace, sites, SweepConfig(bit_widths=(2,), batchnorm="both"))
    handle.remove()
    assert all(parameter is weights[name] for name, parameter in model.named_parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not model.training


def test_a_sweep_continued_gives_the_rows_of_one_that_was_not_interrupted():
    """Rows do not depend on which rows came before them in the same process."""
    model, trace, sites = opened("swin")
    keys = sweep_keys(model, sites[:6], SweepConfig(bit_widths=(2, 4)))
    whole = list(sweep(net_of(model, trace, sites[:6], "m"), sites[:6], BATCHES, keys, task=classification()))
    parts = [
        row
        for part in (keys[:5], keys[5:])
        for row in sweep(net_of(model, trace, sites[:6], "m"), sites[:6], BATCHES, part, task=classification())
    ]
    assert sensitivity_table(whole).equals(sensitivity_table(parts))


def test_reestimated_batchnorm_takes_the_statistics_of_the_quantized_network():
    """While re-estimated, each BatchNorm normalises the images to mean 0; afterwards the stored ones are back."""
    model = model_of("resnet")
    stored = copy.deepcopy(model.state_dict())
    seen = []
    with batchnorm_reestimated(model, IMAGES.split(8)), torch.no_grad():
        outputs = [F.conv2d(x, model.conv1.weight, stride=2, padding=3) for x in IMAGES.split(8)]
        mean = torch.stack([y.mean(dim=(0, 2, 3)) for y in outputs])
        torch.testing.assert_close(model.bn1.running_mean, mean.mean(dim=0), atol=1e-5, rtol=1e-4)
        handle = model.bn1.register_forward_hook(lambda m, _i, o: seen.append((o - m.bias[None, :, None, None]).mean()))
        model(IMAGES)
        handle.remove()
        assert not model.training
    assert abs(seen[0].item()) < 1e-4
    assert all(torch.equal(value, stored[key]) for key, value in model.state_dict().items())


def test_reestimated_batchnorm_weighs_batches_by_their_images():
    """A last batch of 2 images counts 2, not as much as one of 22; a batch of one image is passed over."""
    model = model_of("resnet")
    with batchnorm_reestimated(model, (IMAGES[:21], IMAGES[21:23], IMAGES[23:])), torch.no_grad():
        y = F.conv2d(IMAGES[:23], model.conv1.weight, stride=2, padding=3)
        torch.testing.assert_close(model.bn1.running_mean, y.mean(dim=(0, 2, 3)), atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="at least two samples"), batchnorm_reestimated(model, (IMAGES[:1],)):
        pass


def test_degenerate_channels_are_noted_and_stay_what_they_are():
    """An all-zero output channel borrows a scale, is said in the note, and remains zero."""
    model, trace, sites = opened("resnet")
    with torch.no_grad():
        model.layer1[0].conv1.weight[3] = 0
    info = next(i for i in sites if i.site == Site("layer1.0.conv1", "weight"))
    row = rows_of(model, trace, [info], SweepConfig(bit_widths=(4,)))[0]
    assert row["note"] == "degenerate: 1 of 8 scales borrowed"
    assert math.isfinite(row["sqnr_db"])


def test_granularity_concerns_weights_that_have_the_axis():
    """per_tensor for every weight; activations keep their own; per_head only where there are heads."""
    model, trace, sites = opened("vit")
    table = sensitivity_table(rows_of(model, trace, sites[:8], SweepConfig(bit_widths=(4,), granularity="per_tensor")))
    weights = table[table["tensor"].str.startswith("weight")]
    assert set(weights["granularity"]) == {"per_tensor"}
    assert set(table[table["tensor"] == "key"]["granularity"]) == {"per_head"}
    keys = sweep_keys(model, sites, SweepConfig(bit_widths=(4,), granularity="per_head"))
    by_module = {(k["module"], k["tensor"]): k["granularity"] for k in keys}
    assert by_module[("blocks.0.mlp.fc1", "weight")] == "per_tensor"
    assert by_module[("blocks.0.attn.proj", "weight")] == "per_head"


def test_without_labels_the_loss_is_nan_and_kl_is_measured():
    """Labels of -1: nothing is invented."""
    reference = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    figures = compared(reference + 0.1 * torch.randn(5, 4), reference, torch.full((5,), -1))
    assert all(math.isnan(figures[k]) for k in ("loss", "delta_loss", "top1", "delta_top1"))
    assert figures["kl"] > 0


def test_a_label_beyond_the_head_is_an_error():
    """A class index that the model cannot predict is wrong input, not a crash in torch."""
    with pytest.raises(InputError, match="label 7 is beyond"):
        compared(torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([0, 7]))


@pytest.mark.parametrize("name", ["resnet", "vit", "swin"])
def test_entering_midway_changes_no_bit(name, monkeypatch):
    """All sites, both treatments of BatchNorm: the rows are those of full passes, with room for none, some or all."""
    model, trace, sites = opened(name)
    keys = sweep_keys(model, sites, SweepConfig(bit_widths=(2, 4)))
    begin, tables = Replay.__init__, []
    for room in (0, 40_000, 1 << 30):
        limited = partialmethod(
            lambda self, *given, room, cache_bytes, forward: begin(self, *given, cache_bytes=room, forward=forward),
            room=room,
        )
        monkeypatch.setattr(Replay, "__init__", limited)
        tables.append(
            sensitivity_table(
                list(sweep(net_of(model, trace, sites, "m"), sites, BATCHES, keys, task=classification()))
            )
        )
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0], check_exact=True)
