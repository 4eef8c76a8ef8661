"""A network ready to be measured: the model, one traced forward pass of it, and the sites found."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from quant import batches
from quant.errors import ForwardError, InputError, first_line
from quant.layers import is_quantized
from quant.multihead import without_fast_path
from quant.site import Site, SiteInfo
from quant.sites import classifier_names, find_sites
from quant.stored_model import StoredModel
from quant.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

Forward = Callable[[nn.Module, Any], Any]


class Network:
    """A model with the sites that one forward pass of it showed.

    `example` is one batch, or the data; of it one sample runs through the model, in evaluation mode and twice, to see
    whether the answer is always the same. Building a network changes nothing in the model. `include` and `exclude` are
    shell patterns over module names: what they leave out stays in floating point, and still costs. `name` is what
    tables call it. `forward(model, batch)` returns the output, where the model is not simply called with the batch's
    inputs, and `samples(batch)` counts samples where that is not the leading dimension of the first tensor; a `Task`
    brings its own of both.

    Raises InputError for a model that cannot be measured (compiled, scripted, exported, half precision, lazy layers,
    another answer each time), and where the batch does not fit.

    >>> net = Network(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2)), torch.randn(2, 3, 8, 8))
    >>> net.sites[["module", "tensor", "elements"]].head(2).to_dict("records")
    [{'module': '0', 'tensor': 'weight', 'elements': nan}, {'module': '0', 'tensor': 'input', 'elements': 192.0}]
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        name: str | None = None,
        forward: Forward | None = None,
        samples: Callable[[Any], int] | None = None,
        classifier: Sequence[str] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"`model` is a {type(model).__name__}; expected a torch.nn.Module.")
        self.model, self.name = model, name or type(model).__name__
        self.forward: Forward = forward or batches.forward
        self.samples: Callable[[Any], int] = samples or batches.samples
        check_form(model, self.name)
        batch = batches.to_device(batches.example_batch(example), self.device)
        if not any(x.numel() for x in batches.tensors(batch)) and any(True for _ in batches.tensors(batch)):
            raise InputError("the first batch has no sample. Give one with at least one.")
        self.example = one_sample(batch) if self.samples is batches.samples else batch
        self.include, self.exclude = _patterns(include, "include"), _patterns(exclude, "exclude")
        heads = classifier_names(model) if classifier is None else tuple(classifier)
        self.trace: Trace
        self.infos: list[SiteInfo]
        self.trace, self.infos = self._traced(heads)
        self.stored = StoredModel.of(self)
        warn_of_unobserved(self.trace, self.name)

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are; the CPU where it has none."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @cached_property
    def by_site(self) -> dict[Site, SiteInfo]:
        """What is known of each site."""
        return {info.site: info for info in self.infos}

    @cached_property
    def blocks(self) -> set[str]:
        """The names of the modules that are blocks."""
        return {info.site.module for info in self.infos if info.kind == "block"}

    @property
    def unobserved(self) -> Mapping[str, str]:
        """What is not observed, by module, with the reason."""
        return self.trace.unobserved

    @cached_property
    def sites(self) -> "pd.DataFrame":
        """One row per tensor that enters a product, in network order.

        Columns: module, tensor, kind, order, shape (of a weight, or of an activation of one sample), elements (of one
        sample; NaN for weights), numel, macs (multiply-accumulates of one sample), quantizable, pinned (the first layer
        and the head, which layout `paper` keeps at 8 bits), note.
        """
        import pandas as pd

        rows = [
            {
                "module": info.site.module, "tensor": info.site.tensor, "kind": info.kind, "order": info.order,
                "shape": info.shape, "elements": float("nan") if info.site.is_weight else float(info.numel),
                "numel": info.numel, "macs": info.macs, "quantizable": info.quantizable, "pinned": info.pinned,
                "note": info.note,
            }
            for info in self.infos
            if info.site.tensor != "output"
        ]  # fmt: skip
        columns = ["module", "tensor", "kind", "order", "shape", "elements", "numel", "macs", "quantizable", "pinned",
                   "note"]  # fmt: skip
        return pd.DataFrame(rows, columns=columns)

    def __call__(self, batch: Any) -> Any:
        """The model's output for a batch, which is moved to the model's device."""
        return self.forward(self.model, batches.to_device(batch, self.device))

    def __repr__(self) -> str:
        """The name, and how much there is to quantize."""
        return f"Network({self.name}: {sum(info.quantizable for info in self.infos)} sites that can be quantized)"

    def _traced(self, heads: Sequence[str]) -> tuple[Trace, list[SiteInfo]]:
        try:
            with unchanged(self.model), without_fast_path():
                check_evaluation_mode(self.model, self.name)
                check_repeatable(lambda batch: self.forward(self.model, batch), self.example, self.name)
                return find_sites(
                    self.model, self.example, include=self.include, exclude=self.exclude, classifier=heads,
                    forward=self.forward, samples=self.samples,
                )  # fmt: skip
        except InputError:
            raise
        except Exception as error:  # the model is the user's: whatever its forward raises is told
            raise ForwardError(_does_not_run(self.model, self.example, self.name, error)) from error


def warn_of_unobserved(trace: Trace, name: str) -> None:
    """Warn, once for a network, of products that no site stands for: how many modules make them, and their share."""
    if not trace.unobserved:
        return
    outside, inside = sum(trace.unplanned.values()), sum(trace.macs.values())
    share = outside / max(1, outside + inside)
    first = "; ".join(f"{module or name}: {reason}" for module, reason in list(trace.unobserved.items())[:2])
    more = f" (and {len(trace.unobserved) - 2} more)" if len(trace.unobserved) > 2 else ""
    warnings.warn(
        f"{share:.1%} of the multiply-accumulates of {name} are not observed and stay in floating point "
        f"({len(trace.unobserved)} of its modules). {first}{more}. `unobserved` lists all.",
        stacklevel=3,
    )


def one_sample(batch: Any) -> Any:
    """The first sample as a batch of its own; the whole batch where it cannot be cut."""
    try:
        return batches.take(batch, 0, 1)
    except InputError:
        return batch


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode while the block runs; training flags and random state come back."""
    training = [(module, module.training) for module in model.modules()]
    cuda = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    try:
        with torch.random.fork_rng(devices=cuda):
            model.eval()
            yield
    finally:
        for module, mode in training:
            module.training = mode


def check_form(model: nn.Module, name: str) -> None:
    """Raise InputError for a model whose layers cannot be reached, have no size yet, or are not float32."""
    if isinstance(model, torch.fx.GraphModule):
        raise InputError(
            f"{name} comes from torch.export or torch.fx: its layers are lowered to functions. Give the module that it "
            "was made from."
        )
    for where, module in model.named_modules():
        what = f"{where} of {name}" if where else name
        # torch.compile returns a wrapper of the module, and Module.compile notes its compiled call.
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise InputError(
                f"{what} is compiled by torch.compile: its layers cannot be reached. Give the plain module; "
                "training can compile its quantizers (QATConfig.compile)."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(f"{what} is a TorchScript module: its layers cannot be reached. Give the plain module.")
        if is_quantized(module) or hasattr(module, "attention_quantizers"):
            raise InputError(
                f"{what} is prepared for training: its weights are quantized already. Measure the float model, before "
                "prepare_qat_ or after restore_float_(model)."
            )
        for tensor, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if value.is_meta:
                raise InputError(f"{what} has a {tensor} on the meta device, without values. Load weights into it.")
            if is_lazy(value):
                raise InputError(
                    f"{what} has a {tensor} without a size: a lazy layer ({type(module).__name__}) that has seen no "
                    "data. Call the model once before."
                )
            if value.is_floating_point() and value.dtype != torch.float32:
                raise InputError(
                    f"{what} has a {tensor} of type {str(value.dtype).removeprefix('torch.')}; figures are measured "
                    "in float32. Give `model.float()`; training can use bfloat16 autocast."
                )


def check_evaluation_mode(model: nn.Module, name: str) -> None:
    """Raise InputError for a BatchNorm or dropout that stays in training mode after `eval()`."""
    for where, module in model.named_modules():
        kind = type(module).__name__
        if module.training and (isinstance(module, nn.modules.batchnorm._BatchNorm) or "Drop" in kind):
            raise InputError(
                f"{where} of {name}, a {kind}, stays in training mode after eval(), so that every pass differs. "
                "Let its train() follow the mode that it is given."
            )


def check_repeatable(run: Callable[[Any], Any], batch: Any, name: str) -> None:
    """Raise InputError where the network writes into its batch, or gives two answers to the same one."""
    for x in batches.tensors(batch):
        if x.is_floating_point() and bool(x.isnan().any()):  # masks may hold infinities
            raise InputError(f"the batch of {name} holds NaN. Look at how it is prepared.")
    untouched = [x.clone() for x in batches.tensors(batch)]
    with torch.no_grad():
        first, second = run(batch), run(batch)
    if any(not torch.equal(x, y) for x, y in zip(batches.tensors(batch), untouched, strict=True)):
        raise InputError(
            f"{name} writes into the batch that it is given: every measurement would see others. "
            "Let its forward begin with `x = x.clone()`."
        )
    pairs = zip(batches.tensors(first), batches.tensors(second), strict=False)
    if not all(_alike(a, b) for a, b in pairs if a.is_floating_point()):
        raise InputError(
            f"{name} gives two answers to the same batch: its forward pass is random, or changes the model. "
            "Switch dropout and noise off in evaluation mode."
        )


def _alike(first: Tensor, second: Tensor) -> bool:
    """Whether two answers are the same but for rounding, measured by the largest of them."""
    scale = float(first.nan_to_num(0.0, 0.0, 0.0).abs().max()) if first.numel() else 0.0
    return first.shape == second.shape and torch.allclose(first, second, rtol=1e-3, atol=1e-4 * scale, equal_nan=True)


def _patterns(patterns: Sequence[str] | str, name: str) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _does_not_run(model: nn.Module, batch: Any, name: str, error: Exception) -> str:
    """What is told of a forward pass that failed."""
    inputs, _ = batches.inputs_and_targets(batch)
    shapes = ", ".join(str(tuple(x.shape)) for x in batches.tensors(inputs))
    try:
        parameters = inspect.signature(model.forward).parameters.values()
        required = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    except (TypeError, ValueError):
        required = []
    takes = f" Its forward takes {', '.join(required)}." if len(required) != 1 else ""
    return (
        f"{name} does not run on a batch with tensors of shape {shapes or 'none'}: {type(error).__name__}: "
        f"{first_line(error)}.{takes} Check the batch, or give a Task with a `forward` of your own."
    )
