"""Entries evaluated side by side: figures by an independent computation, pairing, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import analysis
from analysis.measure import measure_sensitivity
from quant.errors import InputError

torch.manual_seed(0)
IMAGES, LABELS = torch.randn(24, 3, 8, 8), torch.randint(3, (24,))
DATA = list(zip(IMAGES.split(10), LABELS.split(10), strict=True))


def small() -> nn.Module:
    """A network of two layers, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()


def plan_of(net: analysis.Network) -> analysis.BitPlan:
    """A mixed plan."""
    sens = measure_sensitivity(net, DATA, bits=(2, 4, 8))
    return analysis.plan_bits(net, sens, weight_bits=4, activation_bits=6, layout="strict")


def test_the_float_network_has_its_own_figures_and_no_divergence():
    """Loss, score and their errors are those of torch on all samples at once."""
    model = small()
    row = analysis.evaluate(model, DATA, {"float": None}).iloc[0]
    with torch.no_grad():
        losses = F.cross_entropy(model(IMAGES).double(), LABELS, reduction="none")
        hits = (model(IMAGES).argmax(1) == LABELS).double()
    assert row["loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
    assert row["loss_se"] == pytest.approx(losses.std().item() / 24**0.5, rel=1e-6)
    assert (row["score"], row["divergence"], row["samples"]) == (pytest.approx(hits.mean().item()), 0.0, 24)
    assert math.isnan(row["metric"])
    assert (row["weight_bits"], row["activation_bits"]) == (32.0, 32.0)


def test_a_plan_is_evaluated_as_it_is_prepared_for_training():
    """The calibrated network is the one that prepare_qat_ makes, BatchNorm re-estimated; the model stays as it was."""
    model = small()
    net = analysis.Network(model, DATA[0])
    plan = plan_of(net)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    row = analysis.evaluate(net, DATA, {"planned": plan}, calibration=DATA).iloc[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        reference = model(IMAGES).double().log_softmax(1)
        analysis.prepare_qat_(net, plan, DATA)
        output = torch.cat([model(x) for x, _ in DATA]).double().log_softmax(1)
    expected = (reference.exp() * (reference - output)).sum(1)
    assert row["divergence"] == pytest.approx(expected.mean().item(), rel=1e-4)
    assert row["divergence_se"] == pytest.approx(expected.std().item() / 24**0.5, rel=1e-4)


def test_differences_are_paired_with_the_first_quantized_entry():
    """The difference of an entry with itself is 0 with error 0; of two entries, that of their means."""
    net = analysis.Network(small(), DATA[0])
    entries = {"float": None, "rough": "w2a2", "again": "w2a2", "fine": "w8a8"}
    table = analysis.evaluate(net, DATA, entries, calibration=DATA, layout="strict").set_index("plan")
    assert table.loc["rough", "divergence_difference"] == table.loc["again", "divergence_difference"] == 0
    assert table.loc["again", "loss_difference_se"] == 0
    expected = table.loc["fine", "divergence"] - table.loc["rough", "divergence"]
    assert table.loc["fine", "divergence_difference"] == pytest.approx(expected)
    assert table.loc["fine", "divergence"] < table.loc["rough", "divergence"]


def test_a_trained_model_is_an_entry_too():
    """A prepared model of the same architecture is evaluated as it stands; its costs are not known."""
    model, other = small(), small()
    net = analysis.Network(other, DATA[0])
    analysis.prepare_qat_(net, plan_of(net), DATA)
    table = analysis.evaluate(model, DATA, {"trained": other})
    assert table["divergence"].item() > 0
    assert math.isnan(table["size_bytes"].item())


def test_data_in_another_order_is_refused():
    """Figures are paired sample by sample: a loader that shuffles would pair different ones."""
    shuffled = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(IMAGES, LABELS), batch_size=6, shuffle=True,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    with pytest.raises(InputError, match="order"):
        analysis.evaluate(small(), shuffled, {"float": None, "uniform": "w4a4"}, calibration=DATA)


@pytest.mark.parametrize(
    ("plans", "word"), [({}, "plans"), ({"a": "4w4a"}, "w4a4"), ({"a": 4}, "int"), ({"a": "w9a4"}, "w4a4")]
)
def test_wrong_entries_are_refused(plans, word):
    """Before anything runs."""
    with pytest.raises(InputError, match=word):
        analysis.evaluate(small(), DATA, plans, calibration=DATA)


def test_without_calibration_data_a_warning_says_what_serves():
    """Scales from the data that is evaluated are optimistic."""
    with pytest.warns(UserWarning, match="calibration"):
        analysis.evaluate(small(), DATA, {"uniform": "w4a4"}, layout="strict")
