"""Augmented images are a function of seed, epoch and image; the order of a training one of seed and step."""

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from analysis.data import load_data, resolve_input
from analysis.inputs.training_data import TrainingImages, training_batches
from analysis.models import ModelSource, load_model
from quant.config import QATConfig
from quant.errors import InputError
from quant.step_batches import StepBatches


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve image files of two classes."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (root / label).mkdir()
        for i in range(6):
            Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(root / label / f"{i}.png")
    return root


def images_of(spec, config, **options):
    """The training images of a data string, for a network of 32 x 32 pixels."""
    channels = 1 if spec == "digits" else 3
    kwargs = {"img_size": 32, "in_chans": channels, "num_classes": 10 if spec == "digits" else 2, "depth": 1,
              "embed_dim": 24, "num_heads": 2, "patch_size": 8}  # fmt: skip
    model = load_model(ModelSource(model="vit_tiny_patch16_224", kwargs=kwargs))
    input_config = resolve_input(model, spec)
    data = load_data(spec, split="train", images=None, seed=0, input_config=input_config, holdout=0.0,
                     num_classes=kwargs["num_classes"], **options)  # fmt: skip
    return TrainingImages(data, config, input_config), data


@pytest.mark.parametrize("kind", ["folder", "digits"])
def test_augmentation_is_a_function_of_seed_epoch_and_image(kind, folder):
    """The same key gives the same bits, in any order and beside other draws; another epoch or seed another view."""
    spec = f"folder:{folder}" if kind == "folder" else "digits"
    images, _ = images_of(spec, QATConfig(crop_area=0.3))
    first, label = images[(0, 3)].views[0], images[(0, 3)].label
    torch.manual_seed(5)
    state = torch.get_rng_state()
    images[(0, 1)]
    again = images[(0, 3)].views[0]
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)  # dropout, which draws from it, is not disturbed
    assert first.shape == images.images[3][0].shape
    assert label == images.images[3][1]
    assert not torch.equal(first, images[(1, 3)].views[0])
    assert not torch.equal(first, images_of(spec, QATConfig(crop_area=0.3, seed=1))[0][(0, 3)].views[0])


@pytest.mark.parametrize("kind", ["folder", "digits"])
def test_without_augmentation_images_are_those_of_evaluation(kind, folder):
    """Whole images, no flip: bit for bit what evaluation sees."""
    spec = f"folder:{folder}" if kind == "folder" else "digits"
    images, _ = images_of(spec, QATConfig(crop_area=1.0, horizontal_flip=0.0))
    assert torch.equal(images[(4, 2)].views[0], images.images[2][0])


def test_worker_processes_change_nothing(folder):
    """Two worker processes give the same batches as none."""
    images, data = images_of(f"folder:{folder}", QATConfig(crop_area=0.3, batch_size=4))
    passes = [
        list(training_batches(images, StepBatches(12, batch_size=4, steps=5, seed=0), data, num_workers=workers))
        for workers in (0, 2)
    ]
    assert len(passes[0]) == 5
    for (x, labels), (y, others) in zip(*passes, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(labels, others)


def test_a_broken_image_is_named_or_left_out(folder, tmp_path):
    """One unreadable file: an error with its name, or the next image in its place, so that the batch keeps its size."""
    root = shutil.copytree(folder, tmp_path / "images")
    (root / "a" / "3.png").write_bytes(b"no image")
    sampler = StepBatches(12, batch_size=12, steps=1, seed=0)
    images, data = images_of(f"folder:{root}", QATConfig())
    with pytest.raises(InputError, match=r"3\.png cannot be read"):
        list(training_batches(images, sampler, data, num_workers=0))
    images, data = images_of(f"folder:{root}", QATConfig(), skip_broken=True)
    ((x, labels),) = training_batches(images, sampler, data, num_workers=0)
    assert len(x) == len(labels) == 12
    assert data.skipped == ["a/3.png"]
    for file in root.glob("*/*.png"):
        file.write_bytes(b"no image")
    images, data = images_of(f"folder:{root}", QATConfig(), skip_broken=True)
    with pytest.raises(InputError, match="None of the 12 images"):
        list(training_batches(images, sampler, data, num_workers=0))


@given(
    images=st.integers(4, 60), batch=st.integers(1, 4), steps=st.integers(1, 40), first=st.integers(0, 40),
    world=st.integers(1, 3), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_steps_see_every_image_once_an_epoch_whatever_the_start(images, batch, steps, first, world, seed):
    """A later start gives the rest of the same batches; processes share each batch; no image twice in an epoch."""

    def drawn(**options):
        return list(StepBatches(images, batch_size=batch, steps=steps, seed=seed, **options))

    whole = drawn()
    assert drawn(first_step=first) == whole[first:]
    assert len(StepBatches(images, batch_size=batch, steps=steps, seed=seed)) == len(whole) == steps
    parts = [drawn(rank=rank, world=world) for rank in range(world)]
    for step, keys in enumerate(whole):
        assert len(keys) == batch
        assert sorted(key for part in parts for key in part[step]) == sorted(keys)
    for epoch in {key[0] for keys in whole for key in keys}:
        seen = [index for keys in whole for e, index in keys if e == epoch]
        assert len(set(seen)) == len(seen) <= images


def test_epochs_are_in_another_order():
    """Two epochs, and two seeds, are two permutations."""
    steps = list(StepBatches(50, batch_size=50, steps=2, seed=0))
    assert [i for _, i in steps[0]] != [i for _, i in steps[1]]
    assert steps[0] != next(iter(StepBatches(50, batch_size=50, steps=1, seed=1)))
