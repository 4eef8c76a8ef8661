"""Options of the command line that several commands share, and the types of their values."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from analysis.planning.uniform import parse_widths

F = TypeVar("F", bound=Callable[..., Any])


class ListOf(click.ParamType):
    """A comma-separated list of one type, such as `2,3,4,8`: of `length` values, above 0, or some of `choices`."""

    def __init__(
        self, kind: type, length: int | None = None, *, positive: bool = False, choices: Sequence[Any] = ()
    ) -> None:
        self.kind, self.length, self.positive, self.choices = kind, length, positive, choices
        self.name = "LIST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The values as a tuple."""
        if isinstance(value, tuple):
            return value
        try:
            items = tuple(self.kind(part.strip()) for part in str(value).split(","))
        except ValueError:
            self.fail(
                f"{value!r} is not a comma-separated list of {self.kind.__name__} values, such as 2,3,4.", param, ctx
            )
        if self.length is not None and len(items) != self.length:
            self.fail(f"{value!r} has {len(items)} values, expected {self.length}.", param, ctx)
        if self.positive and not all(item > 0 for item in items):
            self.fail(f"{value!r} has values that are not above 0.", param, ctx)
        unknown = [item for item in items if self.choices and item not in self.choices]
        if unknown:
            self.fail(f"{unknown[0]!r} is not offered; choose from {', '.join(map(str, self.choices))}.", param, ctx)
        return items


class BitWidths(click.ParamType):
    """Bit-widths: a comma-separated list of numbers and ranges, such as `2,4,8`, `2-8` or `2-4,8`."""

    name = "BITS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The bit-widths as a rising tuple."""
        if isinstance(value, tuple):
            return value
        try:
            return parse_widths(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Bytes(click.ParamType):
    """A size: a number of bytes, or with a unit of 1,000 (KB, MB, GB) or 1,024 (KiB, MiB, GiB)."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The size in whole bytes, rounded down."""
        found = _SIZE.fullmatch(str(value).strip())
        size = float(found["number"]) * _UNITS[found["unit"].lower()] if found else 0.0
        if not 1 <= size < 2**60:
            self.fail(f"{str(value)[:80]!r} is not a size. Write 50KB, 1.5MiB or a number of bytes.", param, ctx)
        return int(size)


_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{unit}": base**power
    for unit, base in (("b", 1000), ("ib", 1024))
    for power, prefix in enumerate("kmg", start=1)
}
_SIZE = re.compile(r"(?P<number>\d+(\.\d*)?|\.\d+)\s*(?P<unit>(?:[KMG]i?)?B|)", re.IGNORECASE)


class JsonObject(click.ParamType):
    """A JSON object."""

    name = "JSON"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The object as a dictionary."""
        if isinstance(value, dict):
            return value
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError) as error:
            self.fail(
                f"{str(value)[:80]!r} is not valid JSON: {error}. Write such as '{{\"num_classes\": 10}}'.", param, ctx
            )
        if not isinstance(parsed, dict):
            self.fail(f"{value!r} is not a JSON object; write such as '{{\"num_classes\": 10}}'.", param, ctx)
        return parsed


class CommandWithSettings(click.Command):
    """A command whose help ends with the settings of a training and their defaults."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the settings below the options."""
        from dataclasses import fields

        from quant.config import QATConfig

        defaults = [f"{field.name}={'none' if field.default is None else field.default}" for field in fields(QATConfig)]
        with formatter.section("Settings (--set, --config) and their defaults; quant/config.py explains each"):
            formatter.write_text(", ".join(defaults))


def _stacked(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def file_option(*names: str, metavar: str = "FILE", **settings: Any) -> Callable[[F], F]:
    """An option that names an existing file: a wrong path is reported at once, before a model is loaded."""
    return click.option(*names, type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar=metavar,
                        **settings)  # fmt: skip


quiet_option = click.option("--quiet", is_flag=True, help="No progress bar, no table.")
run_option = click.option(
    "--run",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="The run folder, which records model, images and results; created if missing.",
)
model_options = _stacked(
    click.argument("model", required=False),
    file_option("--weights", help="Weights of MODEL: a state dict or checkpoint, as torch or safetensors write it (no "
                "code in it is run)."),
    click.option("--weights-entry", metavar="NAME", show_default="the one that fits", help="Which weights of a "
                 "checkpoint that holds several: state_dict, state_dict_ema."),
    click.option("--pretrained", is_flag=True, help="timm's published weights (needs a network or a cache)."),
    click.option("--model-kwargs", type=JsonObject(), help="Arguments of the model's constructor, as JSON: "
                 "'{\"num_classes\": 10}'.", show_default="none"),
)  # fmt: skip
pattern_options = _stacked(
    click.option("--include", multiple=True, metavar="PATTERN", show_default="all", help="Only modules whose name "
                 "matches this shell pattern; may be repeated."),
    click.option("--exclude", multiple=True, metavar="PATTERN", show_default="none", help="Leave out modules that "
                 "match; may be repeated."),
)  # fmt: skip
preparation_options = _stacked(
    click.option("--input-size", type=ListOf(int, 3, positive=True), show_default="the model's own",
                 help="Channels, height, width: 3,32,32."),
    click.option("--mean", type=ListOf(float), show_default="the model's own", help="Mean of each channel, for "
                 "pixels from 0 to 1: 0.49,0.48,0.45."),
    click.option("--std", type=ListOf(float, positive=True), show_default="the model's own", help="Standard deviation "
                 "of each channel: 0.25,0.24,0.26."),
    click.option("--crop-pct", type=click.FloatRange(0, 1, min_open=True), show_default="the model's own",
                 help="Fraction of the resized image that the centre crop keeps."),
    click.option("--holdout", type=click.FloatRange(0, 1, max_open=True), show_default="0.5",
                 help="Fraction of data without splits that becomes the validation split; 0: all images for both."),
    file_option("--class-map", help="File with lines `class` or `class,index`, if the data has only some of the head's "
                "classes; without it, classes are numbered as --class-order says."),
    click.option("--class-order", metavar="plain|natural|FILE", show_default="asked for where it matters",
                 help="How class names were numbered when the network was trained: plain as torchvision's ImageFolder, "
                 "natural as timm, or a FILE with a class per line."),
    click.option("--white-level", type=click.IntRange(min=1), show_default="asked for where it matters",
                 help="What is white in images of more than 8 bits: 65535, 4095."),
    click.option("--data-root", type=click.Path(exists=True, path_type=Path), metavar="FOLDER",
                 help="Folder of a timm data set."),
    click.option("--skip-broken", is_flag=True, help="Leave out images that cannot be read, and count them; without "
                 "it one ends the command."),
)  # fmt: skip
task_option = click.option(
    "--task", metavar="NAME|FILE.py:FUNCTION", show_default="the run folder's, or classification",
    help="What the output means: classification, multilabel, segmentation, regression, embedding, detection, "
         "language_modeling, or a function of yours that returns a Task.",
)  # fmt: skip
num_workers_option = click.option(
    "--num-workers", type=click.IntRange(min=0), default=2, show_default=True, help="Processes that decode images."
)


def data_options(*, images: str, split: str | None = None) -> Callable[[F], F]:
    """The options that name images; `images` and `split` tell the command's defaults, a `split` of None no option."""
    choice = click.option(
        "--split", type=click.Choice(["train", "val"]), show_default=split, help="Split of the images."
    )
    return _stacked(
        click.option("--data", show_default="the run folder's", help="digits, folder:PATH, csv:FILE, or a timm data "
                     "set (torch/cifar10, hfds/..., wds/...)."),
        click.option("--images", type=click.IntRange(min=1), show_default=images,
                     help="Number of images, balanced over the classes."),
        *([] if split is None else [choice]),
        preparation_options,
    )  # fmt: skip


batch_size_option = click.option(
    "--batch-size", type=click.IntRange(1, 2**16), default=64, show_default=True, help="Images per forward pass."
)
seed_option = click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), show_default="0", help="Seed for the choice of images, the splits "
    "and untrained weights."
)  # fmt: skip
common_options = _stacked(
    click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, mps."),
    num_workers_option,
    click.option(
        "--overwrite", is_flag=True, help="Start from scratch if the run folder has other results of this step."
    ),
    quiet_option,
)
