"""The run folders that the notebooks read: the demo's, or those of timm networks, measured where they are not yet."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image

from analysis.data import load_data
from analysis.inputs.listing import InputConfig
from analysis.sensitivity import SweepConfig
from analysis.session.setup import Setup
from analysis.steps.demo import RECIPES, SWEEP, TENSORS, measure_demo, run_demo
from analysis.steps.sensitivity import run_sensitivity
from analysis.steps.stats import run_stats
from quant.errors import InputError

IMAGES, BIT_WIDTHS = 64, (2, 4, 8)  # of timm networks: a first view, which takes a quarter of a whole sweep's time


def network_runs(
    demo: str | Path,
    *,
    runs: str | Path,
    models: Sequence[str] = (),
    weights: Mapping[str, str] | None = None,
    pretrained: bool = True,
    data: str = "",
    images: int = IMAGES,
    device: str = "cpu",
    trained: bool = False,
) -> list[Path]:
    """The folders of the demo's networks or, where `models` names timm's, of these: RUNS/NAME for each.

    They hold statistics and sensitivity; what is missing is measured, which for networks of ImageNet's size takes
    hours on a CPU and minutes on a GPU. `weights` has a file for a name in place of timm's, which need a network.
    `data` is that of `--data`, `images` how many of them are measured on. With `trained` the demo's folders hold its
    trainings too.

    Raises InputError where images or weights cannot be had; the message says what to set in the notebook.
    """
    if not models:
        if trained and not all((Path(demo) / each.name / "qat-w2a2/model.safetensors").exists() for each in RECIPES):
            run_demo(Path(demo), quiet=True)
        return measure_demo(Path(demo), quiet=True)
    if not data:
        raise InputError(
            f"`models` names {', '.join(models)}, and `data` is empty. In the parameters cell set data = "
            '"folder:/path/to/images", with train/CLASS/* and val/CLASS/* in it.'
        )
    return [
        _measured(name, Path(runs) / name, (weights or {}).get(name), pretrained, data, images, device)
        for name in models
    ]


def copy_of(run: Path, to: str | Path) -> Path:
    """A run folder with all that `run` holds, in place of an earlier copy: what is planned there leaves `run` alone."""
    to = Path(to)
    if to.exists():
        if not (to / "run.json").exists():
            raise InputError(f"{to} is there already, and no run folder. Set `runs` to another folder.")
        shutil.rmtree(to)
    return Path(shutil.copytree(run, to))


def write_digits(folder: str | Path) -> Path:
    """FOLDER/train/DIGIT/*.png and FOLDER/val/DIGIT/*.png, the bundled digits as grey images of 32 x 32."""
    plain = InputConfig(input_size=(1, 32, 32), mean=(0.0,), std=(1.0,))
    for split in ("train", "val"):
        images = load_data("digits", split=split, images=None, seed=0, input_config=plain, num_classes=10).dataset
        for i, name in enumerate(images.names):
            pixels, label = images[i]
            place = Path(folder) / split / str(label)
            place.mkdir(parents=True, exist_ok=True)
            to_pil_image((255 * pixels).round().to(torch.uint8)).save(place / f"{Path(name).name}.png")
    return Path(folder)


def _measured(name: str, run: Path, weights: str | None, pretrained: bool, data: str, images: int, device: str) -> Path:
    """The run folder of a timm network, with its statistics and sensitivity."""
    setup = Setup(
        run=run, model=name, pretrained=pretrained and not weights, weights=Path(weights) if weights else None,
        data=data, images=images, device=device, quiet=True,
    )  # fmt: skip
    try:
        run_stats(setup)
    except InputError as error:
        if not setup.pretrained or "could not be had" not in str(error):
            raise
        raise InputError(
            f"timm.create_model({name!r}, pretrained=True) failed: {error} In the parameters cell that is weights = "
            f'{{{name!r}: "FILE.safetensors"}}; pretrained = False goes on with untrained weights.'
        ) from None  # the traceback of a download is long and says no more
    run_sensitivity(setup, SweepConfig(bit_widths=BIT_WIDTHS, batchnorm=SWEEP.batchnorm), tensors=TENSORS)
    return run
