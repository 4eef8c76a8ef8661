"""The stored soft labels of a training: opened, and refused where they belong to another one."""

from dataclasses import fields
from pathlib import Path

import torch

from analysis.data import ImageData
from analysis.session.loaded_run import LoadedRun
from quant.config import QATConfig
from quant.errors import InputError
from quant.soft_labels import SoftLabels

_FILE_DECIDES = ("crop_area", "horizontal_flip")
"""Settings of random crops: those of stored ones are in the file."""


def open_soft_labels(path: Path, opened: LoadedRun, train: ImageData, config: QATConfig) -> SoftLabels:
    """The soft labels of a file, checked; InputError where they do not fit the network, the images or the settings."""
    labels = SoftLabels(path)
    with torch.inference_mode():
        classes = opened.model(opened.probe_image()).shape[-1]
    if labels.header.classes != classes:
        raise InputError(
            f"{path} has soft labels of {labels.header.classes} classes, {opened.name} has {classes}. Choose another "
            "file, or ask a teacher of these classes."
        )
    _check_images(labels, train)
    _check_settings(labels, config)
    return labels


def _check_images(labels: SoftLabels, train: ImageData) -> None:
    header = labels.header
    if (header.images, header.data_sha256) != (train.images, train.sha256):
        raise InputError(
            f"{labels.path} is of other images: it has {header.images} of split {header.split!r}, this training "
            f"{train.images} of split {train.split!r}{'' if header.images != train.images else ', and not the same'}. "
            "Give the same --data, --images and --seed, or make it again with the --run of this training."
        )


def _check_settings(labels: SoftLabels, config: QATConfig) -> None:
    header, path = labels.header, labels.path
    defaults = {field.name: field.default for field in fields(QATConfig)}
    for name in _FILE_DECIDES:
        if getattr(config, name) != defaults[name]:
            raise InputError(
                f"{name}={getattr(config, name):g} was set, but the crops are those of {path} (scale "
                f"{_shown(header.scale)}, flip {header.flip:g}). Leave out one of them."
            )
    if config.crops_per_image > header.crops:
        raise InputError(
            f"crops_per_image={config.crops_per_image}, but {path} has {header.crops} crops of each image. Lower it."
        )
    if config.kd_temperature != header.temperature:
        raise InputError(
            f"kd_temperature={config.kd_temperature:g}, but {path} was made with the temperature "
            f"{header.temperature:g}. Set the same (--set), or make the labels with --temperature."
        )


def _shown(value: object) -> str:
    return ",".join(f"{x:g}" for x in value) if isinstance(value, tuple) else str(value)
