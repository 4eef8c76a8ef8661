"""From the options of a command and its run folder to the model, loaded, placed on its device and traced."""

from functools import partial

import torch
from torch import nn

from analysis.data import input_channels, resolve_input
from analysis.inputs.listing import InputConfig
from analysis.inputs.task_option import resolve_task
from analysis.inputs.weights import weights_sha256
from analysis.models import load_model
from analysis.runs import Run
from analysis.session.loaded_run import LoadedRun, image_of_noise
from analysis.session.requested import asked, moved
from analysis.session.setup import Setup
from analysis.storage.run_record import ModelRecord
from analysis.task import Task
from analysis.tasks import check_head, classification
from analysis.terminal.console import say, warn
from quant.errors import ForwardError, InputError, first_line
from quant.network import Network


def open_run(setup: Setup, *, needs_data: bool) -> LoadedRun:
    """The model of `setup`, or of its run folder, loaded and traced on an image of the right size; writes nothing.

    Raises InputError where neither names a model, and if `needs_data`, where neither names images or the model returns
    no logits.
    """
    run = Run(setup.run)
    source, setup = asked(setup, needs_data=needs_data)
    known = run.record.model
    try:
        model = load_model(source, partial(say, quiet=setup.quiet))
    except InputError as error:
        raise moved(error, setup) from error
    if setup.model is not None and source.untrained:
        warn(f"{setup.model} has untrained weights: give --pretrained or --weights FILE for trained ones.")
    record = ModelRecord(
        typed=setup.model or (known.typed if known is not None else source.model), pretrained=source.pretrained,
        weights=source.weights, weights_entry=source.weights_entry, kwargs=dict(source.kwargs), seed=source.seed,
        name=source.model.rpartition(":")[2],
        factory=None if source.factory is None else f"{source.factory[0].resolve()}:{source.factory[1]}",
        weights_sha256=weights_sha256(model), parameters=sum(p.numel() for p in model.parameters()),
    )  # fmt: skip
    if known is not None and setup.model is None and known.weights_sha256 != record.weights_sha256:
        raise InputError(
            f"{known.typed} is not the model that {setup.run} holds: its weights have changed since. "
            "Put the old file back, or name the model and another --run."
        )
    input_config = _input_config(model, setup)
    _place(model, setup.device)
    task = classification() if setup.task is None else resolve_task(setup.task)
    network = _traced(model, setup, record.name, input_config, task if needs_data else None)
    return LoadedRun(setup=setup, run=run, record=record, input_config=input_config, network=network, task=task)


def _input_config(model: nn.Module, setup: Setup) -> InputConfig:
    if setup.data is not None:
        return resolve_input(
            model, setup.data, mean=setup.mean, std=setup.std, input_size=setup.input_size, crop_pct=setup.crop_pct,
            white_level=setup.white_level,
        )  # fmt: skip
    if setup.input_size is None and not getattr(model, "pretrained_cfg", None):
        raise InputError(
            "the model does not say which images it takes. Give --input-size 3,32,32, or --data, --mean and --std."
        )
    channels = setup.input_size[0] if setup.input_size else input_channels(model) or 3
    plain = (0.5,) * channels  # no image will be read: only the size matters
    return resolve_input(model, "noise", mean=plain, std=plain, input_size=setup.input_size)


def _place(model: nn.Module, device: str) -> None:
    try:
        model.to(device)
    except Exception as error:  # torch raises by device: RuntimeError, AssertionError, NotImplementedError
        reason = first_line(error)
        raise InputError(f"device {device!r} cannot be used: {reason}. Try --device cpu.") from error


def _traced(model: nn.Module, setup: Setup, name: str, config: InputConfig, task: Task | None) -> Network:
    """The network, of one image of noise, which also shows whether the model takes images of this size.

    One image, so that tensors with no batch axis (tables of relative positions) are counted once. `task` is checked on
    the output where it is given.
    """
    image = image_of_noise(config, setup.device)
    forward = None if task is None else task.forward
    try:
        network = Network(model, image, include=setup.include, exclude=setup.exclude, name=name, forward=forward)
    except ForwardError as error:
        raise InputError(f"{error} Or give --input-size, or the constructor's arguments by --model-kwargs.") from error
    if task is not None and task.name == "classification":
        check_head(model)
    if task is not None and task.check is not None:
        with torch.inference_mode():
            task.check(network(image), image)
    return network
