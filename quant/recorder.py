"""What a traced forward pass keeps: the modules that are running, and the tensors that each call shows."""

from math import prod
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from quant.attention import AttentionForm
from quant.attention_search import CallFrame
from quant.products import Product, first_tensor
from quant.site import Site

if TYPE_CHECKING:
    from quant.trace import Trace


class Recorder:
    """Writes into `trace` what the running modules, `frames`, show; `products` are those that no site claims."""

    def __init__(self, trace: "Trace", layers: set[str]) -> None:
        super().__init__()
        self.trace, self.layers = trace, layers
        self.frames: list[CallFrame] = []
        self.forms: dict[str, AttentionForm] = {}
        self.products: list[Product] = []
        self.readers: Any = WeakTensorKeyDictionary()

    def enter(self, frame: CallFrame) -> None:
        """A module's forward begins."""
        self.frames.append(frame)
        self.trace.calls[frame.name] = self.trace.calls.get(frame.name, 0) + 1

    def leave(self) -> None:
        """The innermost running module's forward ends."""
        form = self.frames.pop().form()
        before = self.forms.setdefault(form.module, form)
        if form == before:
            return
        self.forms[form.module] = form if form.fused else before
        if form.values or form.values_first or before.values or before.values_first:
            self.trace.unobserved[form.module] = "its calls compute attention in different ways"

    def owner(self) -> CallFrame | None:
        """The innermost running module that owns parameters: the softmax of a bare `nn.Softmax` is its parent's."""
        return next((frame for frame in reversed(self.frames) if frame.owns_parameters), None)

    def record(self, module: str, tensor: str, x: Any) -> None:
        """Note a call's tensor, the first of several."""
        found = first_tensor(x)
        if found is not None:
            self.record_shape(module, tensor, tuple(found[1].shape))
            if tensor == "input" and module in self.layers:
                self._note_reader(Site(module, tensor), found[1])
            if found[0] is not None:
                returned = f"the first tensor of a {type(x).__name__} of {len(x)}"
                self.trace.notes[Site(module, tensor)] = returned

    def _note_reader(self, site: Site, x: Tensor) -> None:
        first, version = self.readers.get(x, (site, x._version))
        if version != x._version:  # changed in place since
            first = site
        self.readers[x] = (first, x._version)
        if first != site:
            self.trace.same[site] = first

    def record_shape(self, module: str, tensor: str, shape: tuple[int, ...]) -> None:
        """Note the shape of a call's tensor."""
        site = Site(module, tensor)
        if self.trace.shapes.setdefault(site, shape) != shape:
            self.trace.other_shapes.setdefault(site, set()).add(shape)
        self.trace.elements[site] = self.trace.elements.get(site, 0) + prod(shape)

    def count(self, module: str, tensor: str, macs: int) -> None:
        """Add multiply-accumulates, of one sample, to those of a site."""
        site = Site(module, tensor)
        self.trace.macs[site] = self.trace.macs.get(site, 0) + macs
