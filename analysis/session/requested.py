"""What a command asks for, completed from its run folder and checked before torch is imported."""

import re

from analysis.inputs.data_string import check_data, per_channel
from analysis.inputs.model_source import ModelSource, check_source
from analysis.inputs.task_option import check_task
from analysis.runs import Run
from analysis.session.setup import Setup, completed
from quant.errors import InputError

DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia")
"""Sorts of device that torch computes on; whether one is there, torch says later."""


def asked(setup: Setup, *, needs_data: bool, split: str | None = None) -> tuple[ModelSource, Setup]:
    """Where the model comes from, and the options completed from the run folder; nothing is loaded or written.

    `split` is the one that the command reads where `setup` does not say; None for one that is not known. Raises
    InputError for what can be seen without torch: no model or images named or known, a damaged run.json, names and
    paths that do not exist.
    """
    run = Run(setup.run)
    known = run.record.model
    if setup.model is None and (setup.pretrained or setup.weights is not None or setup.model_kwargs is not None):
        raise InputError("--pretrained, --weights and --model-kwargs need MODEL before them: name the model too.")
    if setup.weights_entry is not None and setup.weights is None:
        raise InputError("--weights-entry needs --weights: the file that has the entry.")
    if setup.model is not None:
        weights = None if setup.weights is None else str(setup.weights.resolve())
        source = ModelSource(
            model=setup.model, pretrained=setup.pretrained, weights=weights, weights_entry=setup.weights_entry,
            kwargs=setup.model_kwargs or {}, seed=setup.seed or 0,
        )  # fmt: skip
    elif known is not None:
        source = ModelSource(
            model=known.factory or known.typed, pretrained=known.pretrained, weights=known.weights,
            weights_entry=known.weights_entry, kwargs=known.kwargs, seed=known.seed,
        )  # fmt: skip
    else:
        raise InputError(f"No model is recorded in {setup.run}. Name one: a timm name, or path/to/file.py:factory.")
    setup = completed(setup, run)
    if needs_data and setup.data is None:
        raise InputError(f"No images are recorded in {setup.run}. Name them: --data digits, folder:PATH or csv:FILE.")
    try:
        check_source(source)
    except InputError as error:
        raise moved(error, setup) from error
    if setup.data is not None:
        check_data(
            setup.data, split=setup.split or split, data_root=setup.data_root, class_map=setup.class_map,
            class_order=setup.class_order,
        )  # fmt: skip
    if setup.task is not None:
        check_task(setup.task)
    channels = None if setup.input_size is None else setup.input_size[0]
    for option, values in (("mean", setup.mean), ("std", setup.std)):
        if values is not None:
            per_channel(option, values, channels)
    check_device(setup.device)
    return source, setup


def moved(error: InputError, setup: Setup) -> InputError:
    """The error of a model that cannot be loaded; of one that the run folder names, with what to do about it."""
    if setup.model is not None:
        return error
    return type(error)(f"{error} It is recorded in {setup.run}: if it has moved, give MODEL and --weights.")


def check_device(device: str) -> None:
    """Raise InputError for a device that torch has no name for; whether it is there is not asked."""
    if re.fullmatch(rf"(?:{'|'.join(DEVICES)})(?::\d+)?", device) is None:
        raise InputError(f"device {device!r} is unknown. Give --device cpu, cuda, cuda:1 or mps.")
