"""The included loop on live networks: it learns, resumes to the same weights, and takes tasks of any kind."""

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import analysis
from analysis.task import Task
from quant.config import QATConfig
from quant.errors import InputError
from quant.insertion import is_prepared

DIGITS = load_digits(n_class=4)
IMAGES = torch.tensor(DIGITS.images, dtype=torch.float32)[:512, None] / 16
LABELS = torch.tensor(DIGITS.target[:512])
DATA = list(zip(IMAGES.split(64), LABELS.split(64), strict=True))
FAST = QATConfig(epochs=2, learning_rate=3e-3, log_every=1, gradient_norms_every=4)


def small() -> nn.Module:
    """A network for digits, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Flatten(),
            nn.Linear(32, 4),
        )  # fmt: skip


def trained_float() -> nn.Module:
    """The same, trained in floating point by the loop itself."""
    model = small()
    list(analysis.train_qat(model, None, DATA, config=QATConfig(epochs=4, learning_rate=1e-2), teacher=None))
    return model


def plan_of(model: nn.Module, bits: str = "w3a4") -> analysis.BitPlan:
    """A plan at the cost of uniform bits."""
    net = analysis.Network(model, DATA[0])
    quick = analysis.estimate_sensitivity(net, DATA[:2], bits=(2, 3, 4, 8))
    return analysis.plan_bits(net, quick, like=bits)


def test_a_plan_is_trained():
    """The loss falls, every term has a column and a norm, the model ends prepared and in evaluation mode."""
    model = trained_float()
    rows = list(analysis.train_qat(model, plan_of(model, "w2a3"), DATA, config=FAST, validation=DATA))
    history = pd.DataFrame(rows)
    val = history[history["split"] == "val"]
    assert val["loss"].iloc[-1] < val["loss"].iloc[0]
    assert val["score"].iloc[-1] > 0.8
    train = history[history["split"] == "train"]
    terms = train[["task", "kd", "obr_distance", "obr_variance"]].sum(axis=1)
    assert torch.allclose(torch.tensor(terms.to_numpy()), torch.tensor(train["loss"].to_numpy()), rtol=1e-4)
    assert {"grad_task", "grad_kd", "lr", "seconds", "epoch", "top1"} <= set(history)
    assert train["images"].tolist() == [64 * step for step in range(1, 17)]
    assert is_prepared(model)
    assert not model.training


def test_a_training_that_was_stopped_resumes_to_the_same_weights(tmp_path):
    """Checkpoints every three steps, stopped after eight: the weights are those of a training in one go, to the bit."""
    start, config = trained_float().state_dict(), QATConfig(epochs=2, checkpoint_every=3, learning_rate=1e-3)
    models = [small(), small(), small()]
    for model in models:
        model.load_state_dict(start)
    plan = plan_of(models[0])
    list(analysis.train_qat(models[0], plan, DATA, config=config))
    for row in analysis.train_qat(models[1], plan, DATA, config=config, checkpoints=tmp_path):
        if row["step"] >= 8:
            break
    list(analysis.train_qat(models[2], plan, DATA, config=config, checkpoints=tmp_path))
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[2].state_dict()[name]), name


def test_a_dictionary_and_a_task_of_ones_own():
    """Two inputs, a regression output, loss and distillation by the task."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.out = nn.Linear(4, 16), nn.Linear(3, 16), nn.Linear(16, 1)

        def forward(self, a, b):
            return {"value": self.out((self.first(a) + self.second(b)).relu())}

    torch.manual_seed(0)
    a, b = torch.randn(128, 4), torch.randn(128, 3)
    data = [{"a": x, "b": y, "target": x[:, 0] + y[:, 1]} for x, y in zip(a.split(32), b.split(32), strict=True)]
    task = Task(
        name="sum", forward=lambda model, batch: model(batch["a"], batch["b"]),
        divergence=lambda output, reference: (output["value"] - reference["value"]).square().mean(1),
        loss=lambda output, batch: (output["value"][:, 0] - batch["target"]).square(),
    )  # fmt: skip
    model = Two()
    config = QATConfig(epochs=20, learning_rate=1e-2)
    rows = list(analysis.train_qat(model, None, data, config=config, task=task, validation=data))
    losses = [row["loss"] for row in rows if row["split"] == "val"]
    assert losses[-1] < losses[0] / 3
    assert any("kd" in row for row in rows)


def test_dense_outputs_are_trained():
    """A segmentation task: a loss for each pixel, a dictionary from the network."""

    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return {"out": self.b(self.a(x).relu())}

    data = [(x, (x[:, 0] > 0.5).long()) for x, _ in DATA[:4]]
    model = Dense()
    rows = list(
        analysis.train_qat(model, None, data, config=QATConfig(epochs=10, learning_rate=1e-2),
                           task=analysis.tasks.segmentation(), validation=data)
    )  # fmt: skip
    scores = [row["score"] for row in rows if row["split"] == "val"]
    assert scores[-1] > 0.9


def test_parts_of_a_batch_add_up_to_it():
    """Accumulated gradients are those of the whole batch where nothing depends on the batch."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    other.load_state_dict(model.state_dict())
    for each, parts in ((model, 1), (other, 4)):
        config = QATConfig(steps=3, accumulate=parts, optimizer="sgd", learning_rate=0.1, warmup=0.0)
        list(analysis.train_qat(each, None, DATA, config=config, teacher=None))
    for x, y in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(x, y, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"data": iter(DATA)}, "once"),
        ({"data": DATA[0]}, "batch"),
        ({"data": [x for x, _ in DATA]}, "targets"),
        ({"data": []}, "batch"),
        ({"teacher": "other"}, "teacher"),
        ({"task": analysis.tasks.embedding()}, "loss"),
        ({"config": QATConfig(task_weight=0.0, kd_weight=0.0)}, "kd_weight"),
        ({"config": QATConfig(learning_rate=1e6, steps=40, optimizer="sgd")}, "diverged"),
    ],
)
def test_what_cannot_be_trained_is_told(arguments, word):
    """One InputError with the cause."""
    given = {"data": DATA, "config": QATConfig(steps=2), **arguments}
    with pytest.raises(InputError, match=word):
        list(analysis.train_qat(small(), None, given.pop("data"), **given))


def test_the_loss_is_that_of_torch():
    """The first step's task term is the mean cross-entropy of the first batch."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    expected = F.cross_entropy(model(IMAGES[:64]), LABELS[:64]).item()
    config = QATConfig(steps=1, kd_weight=0.0, log_every=1)
    row = list(analysis.train_qat(model, None, DATA, config=config))[-1]
    assert row["task"] == pytest.approx(expected, rel=1e-6)
