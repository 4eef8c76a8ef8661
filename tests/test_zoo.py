"""The benchmark over every timm family: what it measures of a few, and that it finds what is wrong."""

import csv

import pytest
import timm
import torch
from torch import nn

from benchmarks.executed import executed
from benchmarks.zoo import Result, check, main, smallest
from quant.sites import find_sites


def causes(model):
    """What keeps a model from passing, at 64 x 64."""
    torch.manual_seed(0)
    return list(check(model.eval(), 64, Result(family="test")))


def test_the_smallest_variant_is_taken():
    """The fewest parameters of a family; one that is too large is made with fewer blocks."""
    assert smallest("starnet") == ("starnet_s050", {})
    assert smallest("gemma4_vit") == ("gemma4_vit_167m", {"depth": 2})


def test_families_pass_and_are_written_down(tmp_path, capsys):
    """One line a model and a row of the file: layers and attention observed, and what is no attention of a query."""
    names = ["test_resnet", "test_vit", "xcit_nano_12_p8_224", "lambda_resnet26t"]
    assert main(["--variants", ",".join(names), "--out", str(tmp_path / "zoo.csv")]) == 0
    printed = capsys.readouterr().out
    assert "4 of 4 pass." in printed
    assert (
        "lambda_resnet26t: its softmax is not of a product of query and key (stages.2.1.self_attn, 3 in all)" in printed
    )
    with open(tmp_path / "zoo.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == names
    assert [row["attention"] for row in rows] == ["0 of 0", "6 of 6", "14 of 14", "0 of 0"]
    assert [row["layers"] for row in rows[:2]] == ["16 of 16", "26 of 26"]
    assert all(float(row["weights"]) > 0.9 for row in rows)


def test_a_model_that_fails_is_told_with_its_cause(capsys, monkeypatch):
    """A crash in one model is counted, and the next one follows."""
    monkeypatch.setattr("benchmarks.zoo.SIZES", (8,))
    assert main(["--variants", "test_vit,test_resnet"]) == 1
    printed = capsys.readouterr().out
    assert "1 of 2 pass." in printed
    assert "not passed:\n  test_vit: ValueError: takes none of the sizes (8,)" in printed


@pytest.mark.parametrize(
    ("blind", "cause"),
    [
        ("attention", "attention not observed, without a reason: blocks.0.attn"),
        ("shapes", "not observed: patch_embed.proj"),
    ],
)
def test_what_is_not_observed_is_found_without_the_trace(monkeypatch, blind, cause):
    """Torch's own operators say what was executed: a trace that misses some of it does not pass."""

    def find_less(model, images, **options):
        trace, sites = find_sites(model, images, **options)
        hidden = {i.site for i in sites if i.site.is_attention} if blind == "attention" else {sites[1].site}
        lost = trace.attention if blind == "attention" else {}
        for name in list(lost):
            del lost[name]
        for site in hidden:
            del trace.shapes[site]
        return trace, [i for i in sites if i.site not in hidden]

    monkeypatch.setattr("quant.network.find_sites", find_less)
    assert any(found.startswith(cause) for found in causes(timm.create_model("test_vit", img_size=64)))


def test_a_model_that_answers_otherwise_the_second_time_does_not_pass():
    """The answers under observation, and after it, are compared with those before, bit for bit."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.calls = nn.Conv2d(3, 4, 8, stride=8), 0

        def forward(self, x):
            self.calls += 1
            return self.layer(x).mean(dim=(2, 3)) + 1e-6 * self.calls

    assert {"observed outside attention, the model answers otherwise", "the model answers otherwise afterwards"} <= set(
        causes(Counting())
    )


def test_weights_used_by_other_functions_are_executed():
    """A layer that nobody calls counts as executed where its weight reaches a function of torch."""

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return x * self.read.weight.sum() + self.idle.weight.shape[0]

    used, _ = executed(Reader(), torch.rand(1, 3))
    assert used == {"read"}
