"""The networks of an ablation as the options of a command; importing this costs little."""

from pathlib import Path

from analysis.session.setup import Setup
from analysis.training.ablation_config import Subject


def setup_of(run: Path, subject: Subject) -> Setup:
    """The options that the commands share, for a network of an ablation."""
    return Setup(
        run=run, model=subject.model, pretrained=subject.pretrained,
        weights=None if subject.weights is None else Path(subject.weights), model_kwargs=subject.model_kwargs,
        include=subject.include, exclude=subject.exclude, data=subject.data, images=subject.images,
        holdout=subject.holdout, mean=subject.mean, std=subject.std, input_size=subject.input_size,
        class_map=None if subject.class_map is None else Path(subject.class_map), class_order=subject.class_order,
        white_level=subject.white_level,
    )  # fmt: skip
