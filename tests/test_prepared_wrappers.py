"""Prepared models in what training is wrapped in: processes, Accelerate, a scaler of gradients, Lightning."""

import copy
import os
import socket

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import distributed, nn
from torch.utils.data import DataLoader, TensorDataset

from quant.optimizer import parameter_groups
from quant.own_loop import attach_, oscillation_table, regularization
from quant.quantizer import LSQQuantizer
from tests.test_prepared_model import IMAGES, LABELS, assert_same_gradients, prepared, step_of

needs_gloo = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="this torch is built without gloo, by which processes on CPUs talk",
)


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def join(rank, world, port):
    """Become one of the processes."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.init_process_group("gloo", rank=rank, world_size=world)


@needs_gloo
@pytest.mark.parametrize("name", ["conv", "vit", "unused forward"])
def test_one_process_of_ddp_gives_the_plain_gradients(name):
    """The wrapped model has the same logits and gradients, and the loop's functions take it as it is."""
    model, images = prepared(name)
    expected, gradients = step_of(model, model, images)
    join(0, 1, free_port())
    try:
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        logits, found = step_of(wrapped, wrapped.module, images)
        optimizer = torch.optim.AdamW(parameter_groups(wrapped))
        attach_(optimizer, wrapped)
        (wrapped(images).sum() + regularization(wrapped, kurtosis=1.0)).backward()
        optimizer.step()
    finally:
        distributed.destroy_process_group()
    assert torch.equal(logits, expected)
    assert_same_gradients(found, gradients)
    table = oscillation_table(wrapped)
    assert table["steps"].eq(1).all()
    assert table["module"].tolist() == oscillation_table(model)["module"].tolist()


def worker(rank, port, results):
    """One of two processes, each with half of the images, three steps."""
    torch.set_num_threads(1)
    join(rank, 2, port)
    model, images = prepared("conv")
    wrapped = nn.parallel.DistributedDataParallel(model)
    results[rank] = {k: v.detach().clone() for k, v in three_steps(wrapped, images[rank * 8 : rank * 8 + 8],
                                                                  LABELS[rank * 8 : rank * 8 + 8]).items()}  # fmt: skip
    distributed.destroy_process_group()


def three_steps(model, images, labels):
    """The state dict, without a wrapper's prefix, after three steps of SGD in evaluation mode."""
    optimizer = torch.optim.SGD(parameter_groups(model, learning_rate=0.05))
    attach_(optimizer, model)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return {key.removeprefix("module."): value for key, value in model.state_dict().items()}


@needs_gloo
def test_two_processes_train_as_one():
    """Each with half of the images: the same weights and scales in both, those of one process with all images."""
    model, images = prepared("conv")
    expected = three_steps(model, images, LABELS)
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(worker, args=(free_port(), results), nprocs=2)
        first, second = results[0], results[1]
    for key, value in expected.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-5)


def test_accelerate_hands_its_optimizer_on():
    """`attach_` takes the wrapped optimizer and model; scales are trained and kept within bounds."""
    model, images = prepared("conv")
    accelerator = Accelerator(cpu=True)
    groups = parameter_groups(model, learning_rate=1e-3, scale_learning_rate=10.0)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(groups))
    attach_(optimizer, wrapped)
    wrapped.train()
    for _ in range(3):
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(wrapped(images), LABELS))
        optimizer.step()
    quantizers = [m for m in model.modules() if isinstance(m, LSQQuantizer)]
    assert all((q.scale >= q.min_scale).all() for q in quantizers)
    assert oscillation_table(model)["steps"].eq(3).all()


def test_a_step_that_the_scaler_skips_does_not_count():
    """Of two steps the one with infinite gradients leaves weights and counts alone."""
    model, images = prepared("conv")
    optimizer = torch.optim.AdamW(parameter_groups(model))
    attach_(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor in (1.0, float("inf")):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(images), LABELS) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert oscillation_table(model)["steps"].eq(1).all()


@pytest.mark.filterwarnings("ignore")  # Lightning advises on loggers and workers
def test_lightning_trains_and_restores_a_prepared_model(tmp_path):
    """Its hooks for optimizer, step and checkpoint; a checkpoint goes into another prepared model, strictly."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(parameter_groups(self.model, learning_rate=1e-2))
            attach_(optimizer, self)
            return optimizer

        def training_step(self, batch, _):
            images, labels = batch
            return F.cross_entropy(self.model(images), labels) + regularization(self, obr=1e-3)

    model, images = prepared("conv")
    before = model(images)
    trainer = lightning.Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False,
                                enable_progress_bar=False, enable_model_summary=False,
                                default_root_dir=tmp_path)  # fmt: skip
    module = Module(model)
    trainer.fit(module, DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    model.eval()
    assert not torch.equal(model(images), before)
    assert oscillation_table(model)["steps"].eq(6).all()
    restored = Module.load_from_checkpoint(tmp_path / "last.ckpt", model=prepared("conv")[0]).eval()
    assert torch.equal(restored.model(images), model(images))
