"""Batches of any structure: which part is the input, which the target, how many samples, and a part of them.

A batch is what a `DataLoader` yields: a tensor, a pair (inputs, targets), a dictionary, or a list of images of
different sizes, as torchvision's detectors take them. Nothing here looks at what a network computes of it.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quant.errors import InputError

TARGET_KEYS = ("labels", "label", "targets", "target")
"""Keys of a dictionary batch that hold what the network should answer; they are not given to it."""
_IMAGE_CHANNELS, _SMALLEST_IMAGE = (1, 3), 16


def is_image_list(value: Any) -> bool:
    """Whether `value` is a list of single images, each (1 or 3, height, width) at least 16 pixels each way.

    A `DataLoader` collates a pair into a list as well; its members have a batch axis.
    """
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(
            isinstance(x, Tensor)
            and x.ndim == 3
            and x.is_floating_point()
            and x.shape[0] in _IMAGE_CHANNELS
            and min(x.shape[1:]) >= _SMALLEST_IMAGE
            for x in value
        )
    )


def inputs_and_targets(batch: Any) -> tuple[Any, Any]:
    """The network's inputs and the targets of a batch; targets are None where the batch brings none.

    A pair is (inputs, targets); of a dictionary the targets are under one of `TARGET_KEYS`; everything else is input.
    Raises InputError for a tuple of three or more: write ((first, second), targets).

    >>> inputs_and_targets((torch.zeros(2, 3), torch.tensor([0, 1])))[1]
    tensor([0, 1])
    """
    if isinstance(batch, Mapping):
        key = next((key for key in TARGET_KEYS if key in batch), None)
        if key is None:
            return batch, None
        return {name: value for name, value in batch.items() if name not in TARGET_KEYS}, batch[key]
    if isinstance(batch, (tuple, list)) and not is_image_list(batch):
        if len(batch) == 1:
            return batch[0], None
        if len(batch) == 2:
            return batch[0], batch[1]
        raise InputError(
            f"a batch of {len(batch)} parts: expected inputs, or a pair (inputs, targets). Write several inputs as "
            "((first, second), targets) or as a dictionary, or give a Task with a `forward` of your own."
        )
    return batch, None


def forward(model: nn.Module, batch: Any) -> Any:
    """What the network returns for the inputs of a batch: `model(x)`, `model(first, second)` or `model(**inputs)`.

    A dictionary is spread over the parameters of the model's `forward`, or given whole where it takes one argument that
    is not a key. Raises InputError for keys that `forward` does not take.
    """
    inputs, _ = inputs_and_targets(batch)
    if isinstance(inputs, Mapping):
        return _spread(model, inputs)
    if isinstance(inputs, (tuple, list)) and not is_image_list(inputs):
        return model(*inputs)
    return model(list(inputs) if isinstance(inputs, tuple) else inputs)


def _spread(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    try:
        parameters = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return model(**inputs)
    kinds = [p.kind for p in parameters.values()]
    unknown = [key for key in inputs if key not in parameters]
    if not unknown or inspect.Parameter.VAR_KEYWORD in kinds:
        return model(**inputs)
    required = [p for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(required) == 1 and required[0].name not in inputs:
        return model(inputs)
    raise InputError(
        f"the batch has the key {unknown[0]!r}, which {type(model).__name__}.forward does not take; it takes "
        f"{', '.join(parameters)}. Rename the key, or give a Task with a `forward` of your own."
    )


def samples(batch: Any) -> int:
    """How many samples a batch holds: the leading dimension of its first tensor, or the images of a list.

    >>> samples({"pixels": torch.zeros(8, 3, 4, 4), "words": torch.zeros(8, 5)})
    8
    """
    inputs, _ = inputs_and_targets(batch)
    if is_image_list(inputs):
        return len(inputs)
    first = next(tensors(inputs), None)
    if first is None or first.ndim == 0:
        raise InputError(
            f"a batch of type {type(batch).__name__} holds no tensor with a batch axis. Expected a tensor, a pair "
            "(inputs, targets) or a dictionary of tensors; for anything else give a Task with `forward` and `samples`."
        )
    return len(first)


def take(batch: Any, start: int, stop: int) -> Any:
    """The samples `start` to `stop` of a batch, as a batch of the same structure.

    Every tensor with as many rows as there are samples is cut; others (a scalar, a mask for all samples) stay.
    """
    count = samples(batch)

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[start:stop] if value.ndim and len(value) == count else value
        if isinstance(value, Mapping):
            return rebuilt(value, {key: cut(part) for key, part in value.items()})
        if isinstance(value, (list, tuple)):
            if len(value) == count and (is_image_list(value) or not any(isinstance(v, Tensor) for v in value)):
                return type(value)(value[start:stop])  # one item a sample: images, target dictionaries, names
            return rebuilt(value, [cut(part) for part in value])
        return value

    return cut(batch)


def rebuilt(like: Any, parts: Any) -> Any:
    """A container of the type of `like` with other members: dictionary, `ModelOutput`, list, tuple or named tuple."""
    if isinstance(like, Mapping):
        if type(like) is dict:
            return dict(parts)
        try:
            return type(like)(**parts)
        except TypeError:
            return type(like)(parts)  # type: ignore[call-arg]  # dictionaries are made of dictionaries
    return type(like)(*parts) if hasattr(like, "_fields") else type(like)(parts)


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """`value` with every tensor in it changed; whatever is no tensor stays."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return rebuilt(value, {key: mapped(part, change) for key, part in value.items()})
    if isinstance(value, (list, tuple)):
        return rebuilt(value, [mapped(part, change) for part in value])
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in a batch or an output, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors(part)


def to_device(batch: Any, device: torch.device | str) -> Any:
    """The batch on a device; itself where it is there already."""
    return mapped(batch, lambda x: x.to(device, non_blocking=True))


class OnDevice(Sequence[Any]):
    """Batches that stay where they are, each moved to a device when it is asked for: the device holds one at a time."""

    def __init__(self, batches: Sequence[Any], device: torch.device | str) -> None:
        self._batches, self._device = batches, device

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return OnDevice(self._batches[place], self._device)
        return to_device(self._batches[place], self._device)


def signature(value: Any) -> tuple[tuple[int, ...], ...]:
    """The shapes of all tensors in a batch: equal for batches that run through a network in the same way."""
    return tuple(tuple(x.shape) for x in tensors(value))


def checked_data(data: Any) -> Iterable[Any]:
    """`data` where it is an iterable of batches that can be iterated more than once; InputError otherwise."""
    if isinstance(data, (Tensor, Mapping, str)) or is_image_list(data) or _is_pair_of_tensors(data):
        raise InputError(
            f"`data` is a single batch ({type(data).__name__}); expected batches. Wrap it in a list: [batch]."
        )
    if not isinstance(data, Iterable):
        raise InputError(f"`data` is a {type(data).__name__}; expected a DataLoader or a list of batches.")
    if isinstance(data, Iterator):
        raise InputError("`data` can be iterated only once. Give a DataLoader, or a list: list(data).")
    return data


def first_batch(data: Any) -> Any:
    """The first batch of `data`; InputError where there is none."""
    for batch in checked_data(data):
        return batch
    raise InputError("`data` holds no batch. Give at least one.")


def example_batch(example: Any) -> Any:
    """One batch, of what may be a batch or the data: a list of pairs or dictionaries, or of equally shaped tensors."""
    if isinstance(example, (Tensor, Mapping, tuple)) or is_image_list(example):
        return example
    if isinstance(example, list):
        first = example[0] if example else None
        shapes = [(x.shape[1:], x.dtype) if isinstance(x, Tensor) and x.ndim > 1 else None for x in example]
        if isinstance(first, Tensor) and (shapes[0] is None or any(shape != shapes[0] for shape in shapes)):
            return example  # a collated pair
    return first_batch(example)


def _is_pair_of_tensors(data: Any) -> bool:
    return isinstance(data, tuple) and len(data) > 0 and all(isinstance(x, Tensor) for x in data)
