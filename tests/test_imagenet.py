"""The recipes of benchmarks/imagenet: every setting is known, and two steps of each run on photographs."""

import os
from pathlib import Path

import pandas as pd
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_sample_images

from analysis.training.training_options import read_config
from tests.digits_vit import qvw

RECIPES = Path(__file__).parent.parent / "benchmarks" / "imagenet"
MODELS = {"deit_tiny": "deit_tiny_patch16_224", "swin_tiny": "swin_tiny_patch4_window7_224"}


@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_is_the_papers(name):
    """AdamW at 5e-4 for 512 crops, four an image, cosine without warm-up, the teacher alone, the module scheme."""
    config = read_config(RECIPES / f"{name}.yaml", [])
    assert (config.optimizer, config.learning_rate, config.batch_size) == ("adamw", 5e-4, 512)
    assert (config.schedule, config.warmup, config.weight_decay, config.epochs) == ("cosine", 0, 1e-4, 150)
    assert (config.task_weight, config.kd_weight, config.crops_per_image) == (0, 1, 4)
    assert config.gradient_scale == "module"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """--data of photographs: those that $QVW_IMAGENET_CSV lists, or scikit-learn's two in eight pieces each."""
    if "QVW_IMAGENET_CSV" in os.environ:
        return f"csv:{os.environ['QVW_IMAGENET_CSV']}"
    folder = tmp_path_factory.mktemp("photographs")
    rows = []
    for label, pixels in enumerate(load_sample_images().images):
        for piece in range(8):
            left = 40 * piece
            Image.fromarray(pixels[100:356, left : left + 256]).save(folder / f"{label}-{piece}.jpg")
            rows.append({"file": f"{label}-{piece}.jpg", "class_index": label})
    pd.DataFrame(rows).to_csv(folder / "index.csv", index=False)
    return f"csv:{folder / 'index.csv'}"


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["w4a4", "w3a3", "w2a2"])
@pytest.mark.parametrize("name", MODELS)
def test_two_steps_of_a_recipe(name, bits, photographs, tmp_path):
    """Soft labels of a teacher, then two optimizer steps with all terms; weights are not trained."""
    smaller = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    smaller |= {"steps": 2, "batch_size": 8, "calibration_images": 4, "compile": False}
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(smaller))
    run, labels = tmp_path / "run", tmp_path / "labels"
    data = ["--data", photographs, "--images", 8, "--num-workers", 0]
    assert qvw("eval", MODELS[name], *data, "--float", "--run", run) == 0
    assert qvw("soft-labels", "resnet18", *data, "--run", run, "--crops", 4, "--out", labels) == 0
    assert qvw("train", "--run", run, "--images", 8, "--val-images", 2, "--num-workers", 0, "--uniform", bits,
               "--config", config, "--soft-labels", labels) == 0  # fmt: skip
    history = pd.read_parquet(run / "qat" / "history.parquet")
    steps = history[history["split"] == "train"]
    assert steps["step"].tolist() == [1, 2]
    assert (steps["images"] == [8, 16]).all()
    assert steps["soft"].notna().all()
