"""Names of the options that tell of a model, for errors: those of a teacher are others."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class OptionNames:
    """The options that tell of a model, by which an error names what was typed."""

    pretrained: str = "--pretrained"
    weights: str = "--weights"
    kwargs: str = "--model-kwargs"
    entry: str = "--weights-entry"


MODEL_OPTIONS = OptionNames()
TEACHER_OPTIONS = OptionNames(
    pretrained="--teacher-pretrained", weights="--teacher-weights", kwargs="--teacher-kwargs",
    entry="--teacher-weights-entry",
)  # fmt: skip
