"""A live call with a run folder: the tables of the command line and of a call without one, resumed, never mixed."""

import json

import pandas as pd
import pytest
import torch
from torch import nn

import analysis
from analysis.data import batches, load_data
from analysis.inputs.listing import InputConfig
from tests.digits_vit import DATA, KWARGS, qvw

CONV = """
import torch
from torch import nn

def conv():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    ).eval()
"""
PREPROCESSING = ["--input-size", "1,16,16", "--mean", "0.5", "--std", "0.5"]
IMAGES, BATCH = 24, 16
BITS = (2, 4)


def conv():
    """The network of the file above."""
    scope: dict = {}
    exec(CONV, scope)
    return scope["conv"]()


def vit():
    """A digits ViT, as the command line makes it."""
    import timm

    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **KWARGS).eval()


@pytest.fixture(scope="module")
def digits():
    """Two batches of different size, those that the command line reads."""
    config = InputConfig(input_size=(1, 16, 16), mean=(0.5,), std=(0.5,), crop_pct=1.0, interpolation="bilinear")
    data = load_data("digits", split="train", images=IMAGES, seed=0, input_config=config, num_classes=10)
    return list(batches(data, batch_size=BATCH))


def plain_cell(value):
    """A list, tuple or array as JSON, which has floats to the last bit; other values as they are."""
    if isinstance(value, str) or not hasattr(value, "__len__"):
        return value
    return json.dumps([x if isinstance(x, str) else float(x) for x in value])


def assert_same(first, second):
    """Equal frames, whatever holds the lists in them."""
    frames = [frame.map(plain_cell).convert_dtypes() for frame in (first, second)]
    pd.testing.assert_frame_equal(*frames, check_exact=True)


@pytest.mark.parametrize("name", ["conv", "vit"])
def test_same_tables_with_and_without_a_run_and_from_the_command_line(name, digits, tmp_path):
    """Three ways to one measurement: values to the last bit."""
    (tmp_path / "net.py").write_text(CONV)
    if name == "conv":
        model, typed = conv(), [f"{tmp_path / 'net.py'}:conv"]
    else:
        model, typed = vit(), ["vit_tiny_patch16_224", "--model-kwargs", json.dumps(KWARGS), "--seed", "0"]
    folder, shell = tmp_path / "live", tmp_path / "shell"
    common = [*typed, *PREPROCESSING, *DATA, "--images", IMAGES, "--batch-size", BATCH, "--run", shell, "--quiet"]
    net = analysis.Network(model, digits, name="conv" if name == "conv" else "vit_tiny_patch16_224")
    assert qvw("stats", *common) == 0
    plain, written = analysis.measure_stats(net, digits), analysis.measure_stats(net, digits, run=folder)
    again = analysis.measure_stats(net, digits, run=folder)
    for sort, attribute in (("stats", "table"), ("channels", "channels"), ("histograms", "histograms")):
        assert_same(getattr(plain, attribute), getattr(written, attribute))
        assert_same(getattr(plain, attribute), getattr(again, attribute))
        assert_same(getattr(plain, attribute), pd.read_parquet(shell / f"{sort}.parquet"))
    assert (folder / "variation.json").read_bytes() == (shell / "variation.json").read_bytes()

    assert qvw("sensitivity", *common, "--bits", "2,4", "--bn", "re-estimate") == 0
    plain = analysis.measure_sensitivity(net, digits, bits=BITS)
    written = analysis.measure_sensitivity(net, digits, bits=BITS, run=folder)
    again = analysis.measure_sensitivity(net, digits, bits=BITS, run=folder)
    for sort, attribute in (("sensitivity", "table"), ("sensitivity_images", "per_sample")):
        for other in (
            getattr(written, attribute),
            getattr(again, attribute),
            pd.read_parquet(shell / f"{sort}.parquet"),
        ):
            assert_same(getattr(plain, attribute), other)
    assert_same(pd.read_parquet(folder / "cost.parquet"), pd.read_parquet(shell / "cost.parquet"))
    assert {path.name for path in shell.iterdir()} == {path.name for path in folder.iterdir()}


def test_an_estimate_is_kept_and_not_mixed_with_measurements(digits, tmp_path):
    """The same frames with and without a run; more bits are added; a sweep in the same folder is refused."""
    model, run = vit(), tmp_path / "run"
    plain = analysis.estimate_sensitivity(model, digits, bits=BITS)
    for _ in range(2):
        written = analysis.estimate_sensitivity(model, digits, bits=BITS, run=run)
        for attribute in ("table", "per_sample", "products"):
            assert_same(getattr(plain, attribute), getattr(written, attribute))
    analysis.estimate_sensitivity(model, digits, bits=(8,), run=run)
    assert set(pd.read_parquet(run / "sensitivity.parquet")["bit_width"]) == {2, 4, 8}
    with pytest.raises(analysis.InputError, match="source"):
        analysis.measure_sensitivity(model, digits, bits=BITS, run=run)


class Stopping(nn.Sequential):
    """Raises KeyboardInterrupt in the given forward pass."""

    left = -1

    def forward(self, x):
        """As nn.Sequential."""
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().forward(x)


def stopping(after=-1):
    """The network of CONV, which is interrupted in a forward pass."""
    model = Stopping(*conv())
    model.left = after
    return model


def test_an_interrupted_sweep_resumes(digits, tmp_path, monkeypatch):
    """Rows before the interrupt are kept, and not measured again; the table is that of an uninterrupted sweep."""
    from analysis.steps import sensitivity_step

    measured = []
    rows_of = sensitivity_step.measured_rows

    def counted(*arguments, **options):
        for row in rows_of(*arguments, **options):
            measured.append(row)
            if stop and len(measured) == 3:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(sensitivity_step, "measured_rows", counted)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        analysis.measure_sensitivity(conv(), digits, bits=BITS, run=tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["steps"]["sensitivity"]["status"] == "interrupted"
    stop, before = False, len(measured)
    resumed = analysis.measure_sensitivity(conv(), digits, bits=BITS, run=tmp_path)
    whole = analysis.measure_sensitivity(conv(), digits, bits=BITS)
    assert_same(resumed.table, whole.table)
    assert len(measured) == before + len(whole.table) - 2
    analysis.measure_sensitivity(conv(), digits, bits=BITS[:1], run=tmp_path)
    assert len(measured) == before + len(whole.table) - 2


def test_interrupted_statistics_resume_after_the_last_batch(digits, tmp_path):
    """The second start reads the first batch and measures the second alone."""
    assert len(digits) == 2
    model = stopping()
    net = analysis.Network(model, digits)
    model.left = 2
    with pytest.raises(KeyboardInterrupt):
        analysis.measure_stats(net, digits, run=tmp_path)
    assert (tmp_path / "stats.partial.safetensors").exists()
    model.left = 2
    resumed = analysis.measure_stats(net, digits, run=tmp_path)
    assert model.left == 1
    model.left = -1
    whole = analysis.measure_stats(net, digits)
    assert_same(resumed.table, whole.table)
    assert_same(resumed.histograms, whole.histograms)
    assert not (tmp_path / "stats.partial.safetensors").exists()


def test_other_weights_data_or_tasks_are_refused(digits, tmp_path):
    """What changed is told, nothing is touched; overwrite starts from scratch."""
    analysis.measure_stats(conv(), digits, run=tmp_path)
    analysis.measure_sensitivity(conv(), digits, bits=(2,), sites=("weight",), run=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = conv()
    with torch.no_grad():
        other[0].weight += 1
    moved = [(images + 1, labels) for images, labels in digits]
    for call, words in (
        (lambda: analysis.measure_stats(other, digits, run=tmp_path), "another model"),
        (lambda: analysis.measure_stats(conv(), moved, run=tmp_path), "other inputs"),
        (lambda: analysis.measure_sensitivity(conv(), moved, bits=(2,), run=tmp_path), "other inputs"),
        (lambda: analysis.measure_sensitivity(conv(), digits, bits=(2,), task=analysis.tasks.regression(),
                                              run=tmp_path), "task"),
    ):  # fmt: skip
        with pytest.raises(analysis.InputError, match=words) as told:
            call()
        assert "--" not in str(told.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    fresh = analysis.measure_stats(conv(), moved, run=tmp_path, overwrite=True)
    assert_same(fresh.table, analysis.measure_stats(conv(), moved).table)


def test_own_tasks_of_other_text_are_not_mixed(digits, tmp_path):
    """Two tasks of the same name are told by the text of their functions."""

    def first(output, reference):
        return (output - reference).square().mean(1)

    def second(output, reference):
        return (output - reference).abs().mean(1)

    tasks = [analysis.Task(forward=lambda model, batch: model(batch[0]), divergence=d) for d in (first, second)]
    analysis.measure_sensitivity(conv(), digits, bits=(2,), sites=("weight",), task=tasks[0], run=tmp_path)
    with pytest.raises(analysis.InputError, match="task"):
        analysis.measure_sensitivity(conv(), digits, bits=(2,), sites=("weight",), task=tasks[1], run=tmp_path)


def test_a_limited_sweep_is_completed_later(digits, tmp_path):
    """With no time one row is measured; the others are NaN in the result, not in the folder, and measured later."""
    part = analysis.measure_sensitivity(conv(), digits, bits=BITS, sites=("weight",), run=tmp_path, time_limit=0)
    assert part.table["divergence"].notna().sum() == 1
    assert len(pd.read_parquet(tmp_path / "sensitivity.parquet")) == 1
    rest = analysis.measure_sensitivity(conv(), digits, bits=BITS, sites=("weight",), run=tmp_path)
    assert_same(rest.table, analysis.measure_sensitivity(conv(), digits, bits=BITS, sites=("weight",)).table)


def test_a_run_of_a_live_network_can_be_planned_and_reported(digits, tmp_path):
    """The command line resumes from its tables."""
    run = tmp_path / "run"
    analysis.measure_stats(conv(), digits, run=analysis.Run(run))
    analysis.measure_sensitivity(conv(), digits, bits=BITS, run=analysis.Run(run))
    assert qvw("plan", "--run", run, "--weight-bits", 3, "--layout", "strict", "--quiet") == 0
    assert qvw("report", run, "--out", tmp_path / "report") == 0


def test_without_a_run_nothing_touches_the_disk(digits, tmp_path, monkeypatch):
    """No file appears where the process works."""
    monkeypatch.chdir(tmp_path)
    analysis.measure_stats(conv(), digits)
    analysis.measure_sensitivity(conv(), digits, bits=(2,), sites=("weight",))
    analysis.estimate_sensitivity(conv(), digits, bits=(2,), sites=("weight",))
    assert not list(tmp_path.iterdir())


class Stream(torch.utils.data.IterableDataset):
    """Images one by one, of which nobody knows how many there are."""

    def __init__(self, pairs):
        self.images = torch.cat([images for images, _ in pairs])

    def __iter__(self):
        """Always the same."""
        return iter(self.images)


def test_streams_and_weights_alone(digits, tmp_path):
    """A loader without a length is counted; a Network without data has its weights in the folder."""
    loader = torch.utils.data.DataLoader(Stream(digits), batch_size=BATCH)
    net = analysis.Network(conv(), digits)
    streamed = analysis.measure_stats(net, loader, run=tmp_path / "stream")
    assert_same(streamed.table, analysis.measure_stats(net, digits).table)
    weights = analysis.measure_stats(net, run=tmp_path / "weights")
    assert set(weights.table["tensor"]) == {"weight"}
    assert_same(weights.table, analysis.measure_stats(net).table)
