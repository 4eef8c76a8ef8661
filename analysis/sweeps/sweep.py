"""The sweep: one site quantized at a time, all else in floating point, and what the network's answers lose by it."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from analysis.replay import Replay, find_cuts
from analysis.scoring import Reference, check_divergence, compare, outputs_of, reference_of
from analysis.sensitivity import quantized_sites
from analysis.sweeps.entry_points import EntryPoint, Forward
from analysis.sweeps.noise import CleanOutputs, MeasuredQuantizer, Noise, output_noise
from analysis.task import Task
from quant.batches import samples, take
from quant.batchnorm import batchnorm_kept, batchnorms, reestimate_batchnorm_
from quant.calibrate import ActivationSample, default_scheme, make_quantizer, observe_activations
from quant.choices import Estimator, Granularity
from quant.insertion import quantized
from quant.intercept import intercept
from quant.network import Network
from quant.quantizer import Quantizer
from quant.site import Site, SiteInfo

CACHE_MIB = 1024


def _silent(_text: str) -> None:
    return None


def sweep(
    net: Network,
    sites: Sequence[SiteInfo],
    data: Sequence[Any],
    keys: Sequence[Mapping[str, Any]],
    *,
    task: Task,
    cache_mib: int = CACHE_MIB,
    tell: Callable[[str], None] = _silent,
) -> Iterator[dict[str, Any]]:
    """One row of sensitivity.parquet for each of `keys`, over the batches `data`.

    Each row quantizes the sites of `quantized_sites`, their scales estimated on these same batches; all else is
    floating point. Differences are taken against the floating-point model in the same form: sites inside attention
    against attention computed by its formula. Where the network can be entered midway it is (`Replay`, in at most
    `cache_mib` MiB), with the same bits as in full. The model comes back bit for bit, also when the sweep ends early.
    What keeps it from being entered goes to `tell`. Besides the columns of the table a row has `image_divergence` and
    `image_delta_loss`, lists over the samples.
    """
    chosen = [quantized_sites(key, sites, blocks=net.blocks) for key in keys]
    wanted = dict.fromkeys(info.site for items in chosen for info, _ in items)
    samples = sample_activations(net, wanted, data, task.forward)
    forms = _Forms(net, data, task, _forms_of(keys, chosen), cache_bytes=cache_mib << 20, tell=tell)
    made: dict[tuple[Site, int, str, str], Quantizer] = {}
    for key, items in zip(keys, chosen, strict=True):
        quantizers = {}
        for info, bits in items:
            which = (info.site, bits, key["estimator"], key["granularity"])
            if which not in made:
                granularity = None if key["granularity"] == "default" else key["granularity"]
                sample = samples.get(info.site)
                made[which] = site_quantizer(net.model, info, bits, sample, key["estimator"], granularity)
            quantizers[info] = made[which]
        info, alone = items[0][0], len(items) == 1 and not key["group"]
        quantizer = next(iter(quantizers.values()))
        yield {
            **key,
            "model": net.name,
            "source": "measured",
            "kind": info.kind if alone or len({i.kind for i, _ in items}) == 1 else "",
            "order": _order(key, sites, items),
            "signed": quantizer.scheme.signed if alone else None,
            "offset": quantizer.scheme.offset if alone else None,
            **_measure(forms, quantizers, alone=alone, re_estimated=key["batchnorm"] == "re_estimated"),
            "rank_low": math.nan,
            "rank_high": math.nan,
        }


def site_quantizer(
    model: nn.Module,
    info: SiteInfo,
    bit_width: int,
    sample: ActivationSample | None,
    estimator: Estimator,
    granularity: Granularity | None,
) -> Quantizer:
    """The quantizer by which a site is measured; `sample` is that of `sample_activations`, None for a weight."""
    scheme = default_scheme(model, info, bit_width, sample=sample, granularity=granularity)
    return make_quantizer(model, info, scheme, sample=sample, estimator=estimator)


def sample_activations(
    net: Network, sites: Iterable[Site], data: Sequence[Any], forward: Forward
) -> dict[Site, ActivationSample]:
    """A sample of each activation site over `data`, the same whatever other sites are asked for.

    Attention by its formula gives other last bits than the fused kernel, and so all that comes after it: the sites
    inside attention are sampled in a pass of their own.
    """
    inside, outside = ([site for site in sites if site.is_attention is wanted] for wanted in (True, False))
    samples = observe_activations(net, outside, data, count=len(data), forward=forward)
    untouched = {Site(module, "attention"): _leave for module in net.trace.attention} if inside else {}
    with intercept(net, untouched):
        return samples | observe_activations(net, inside, data, count=len(data), forward=forward)


def _order(key: Mapping[str, Any], sites: Sequence[SiteInfo], items: Sequence[tuple[SiteInfo, int]]) -> int:
    """The place of a row in the table: that of its site, or of the first one that its group quantizes or leaves out."""
    site = Site(key["module"], key["tensor"])
    own = next((info.order for info in sites if info.site == site), None)
    if own is not None:
        return own
    held = {info.site for info, _ in items}
    named = [info for info in sites if (info.site in held) == (key["protocol"] == "single")]
    return min((info.order for info in named), default=0)


def _forms_of(keys: Sequence[Mapping[str, Any]], chosen: Sequence[Sequence[tuple[SiteInfo, int]]]) -> int:
    """How many kinds of clean run the keys need: their inputs share the cache."""
    kinds = {
        (any(info.site.is_attention for info, _ in items), key["batchnorm"] == "re_estimated")
        for key, items in zip(keys, chosen, strict=True)
    }
    return sum(2 if re_estimated else 1 for _, re_estimated in kinds)


class _Forms:
    """The floating-point model in the forms that the rows are compared with, each entered midway.

    A form says whether attention is computed by its formula (`explicit`), and how BatchNorm works: `stored`
    statistics, `batch` statistics while new ones are taken, or `re_estimated` ones.
    """

    def __init__(
        self,
        net: Network,
        data: Sequence[Any],
        task: Task,
        forms: int,
        *,
        cache_bytes: int,
        tell: Callable[[str], None],
    ) -> None:
        self.net, self.model, self.data, self.tell = net, net.model, data, tell
        self.task, self.run = task, partial(task.forward, net.model)
        self.room = cache_bytes // (2 * max(1, forms))  # half for the inputs of cuts, half for outputs of the module
        self._cuts: list[EntryPoint] | None = None
        self._replays: dict[tuple[bool, str], Replay] = {}
        self._references: dict[tuple[bool, bool], Reference] = {}
        self._statistics: dict[bool, list[dict[str, Tensor]]] = {}
        self._outputs: dict[tuple[bool, bool], CleanOutputs] = {}

    @contextmanager
    def attention(self, explicit: bool) -> Iterator[None]:
        """Let every attention module compute by its formula, as those with a quantized site do, or none."""
        untouched = {Site(m, "attention"): _leave for m in self.net.trace.attention} if explicit else {}
        with intercept(self.net, untouched):
            yield

    def replay(self, modules: Sequence[str], explicit: bool, batchnorm: str) -> Replay:
        """The run of one form, at the last cut before `modules`; the model must be clean, its attention in the form."""
        key = explicit, batchnorm
        if key not in self._replays:
            if self._cuts is None:
                one = take(self.data[0], 0, 1) if self.room else None
                self._cuts = find_cuts(self.model, one, self.task.forward) if self.room else []
                if not self._cuts and self.room:
                    self.tell("This network cannot be entered midway: every row is a full forward pass.")
            # Statistics are taken from batches of two samples at least (`reestimate_batchnorm_`).
            data = self.data
            if batchnorm == "batch" and any(samples(x) < 2 for x in data):
                data = [x for x in data if samples(x) > 1]
            self._replays[key] = Replay(self.model, data, self._cuts, cache_bytes=self.room, forward=self.task.forward)
        with batchnorm_kept(self.model):
            if batchnorm == "batch":
                for layer in batchnorms(self.model):
                    layer.train()
            elif batchnorm == "re_estimated":
                self.load_statistics(explicit)
            refused = len(self._replays[key].refused)
            self._replays[key].move_to(*modules)
        for name in self._replays[key].refused[refused:]:
            self.tell(f"Entered at {name} the network gives other bits: rows start at an earlier module.")
        return self._replays[key]

    def reference(self, explicit: bool, re_estimated: bool) -> Reference:
        """The reference of one form, computed at its first use."""
        key = explicit, re_estimated
        if key not in self._references:
            with self.attention(explicit), batchnorm_kept(self.model):
                if re_estimated:
                    self.load_statistics(explicit)
                outputs = outputs_of(self.run, self.data, self.task)
            if not self._references:
                self.task = self.task.prepared(outputs)
                check_divergence(self.task, outputs, self.data)
            self._references[key] = reference_of(self.task, outputs, self.data)
        return self._references[key]

    def load_statistics(self, explicit: bool, among: Sequence[str] | None = None) -> None:
        """Give BatchNorm, or those layers that lie in the modules `among`, what the clean network re-estimates."""
        layers = batchnorms(self.model)
        if explicit not in self._statistics:
            with batchnorm_kept(self.model):
                reestimate_batchnorm_(self.model, self.data, self.run)
                self._statistics[explicit] = [{k: v.clone() for k, v in m.named_buffers(recurse=False)} for m in layers]
        inside = None
        if among is not None:
            inside = {id(m) for name in among for m in self.model.get_submodule(name).modules()}
        for layer, buffers in zip(layers, self._statistics[explicit], strict=True):
            if inside is None or id(layer) in inside:
                for name, value in buffers.items():
                    getattr(layer, name).copy_(value)

    def outputs(self, module: str, explicit: bool, re_estimated: bool) -> CleanOutputs:
        """What `module` gives on its clean inputs: kept from one bit-width to the next."""
        key = explicit, re_estimated
        if key not in self._outputs or self._outputs[key].module != module:
            self._outputs[key] = CleanOutputs(module, self.room)
        return self._outputs[key]


def _leave(_x: Tensor) -> None:
    return None


def _measure(
    forms: _Forms, quantizers: Mapping[SiteInfo, Quantizer], *, alone: bool, re_estimated: bool
) -> dict[str, Any]:
    """Figures of the quantized sites, and a note on what could not be measured."""
    model = forms.model
    explicit = any(info.site.is_attention for info in quantizers)
    reference = forms.reference(explicit, re_estimated)
    first = next(iter(quantizers))
    measured: dict[Site, Any] = {info.site: quantizer for info, quantizer in quantizers.items()}
    tensor = MeasuredQuantizer(quantizers[first])
    if alone:
        measured[first.site] = tensor
    original = model.get_submodule(first.site.module)._parameters.get(first.parameter)
    module_noise = Noise()
    with ExitStack() as stack:
        stack.enter_context(forms.attention(explicit))
        modules = sorted({name for info in quantizers for name in (info.site.module, *info.shared_with)})
        run = forms.replay(modules, explicit, "re_estimated" if re_estimated else "stored")
        estimating = forms.replay(modules, explicit, "batch") if re_estimated else None
        stack.enter_context(quantized(forms.net, measured))
        if estimating is not None:
            stack.enter_context(batchnorm_kept(model))
            skipped = () if estimating.cut is None else estimating.cut.skipped
            reestimate_batchnorm_(model, forms.data, estimating)
            forms.load_statistics(explicit, skipped)  # these did not run: theirs are those of the clean network
            if not first.site.is_weight:  # what the passes for BatchNorm added is not of these outputs
                tensor.tensor_noise = Noise()
        if alone:
            clean = forms.outputs(first.site.module, explicit, re_estimated)
            module_noise = stack.enter_context(output_noise(model, first.site.module, original, clean, first.parameter))
        outputs = outputs_of(run, forms.data, forms.task)
    figures, images = compare(forms.task, outputs, reference, forms.data)
    called_once = forms.net.trace.calls.get(first.site.module, 0) == 1
    inside = re_estimated and bool(batchnorms(model.get_submodule(first.site.module)))
    notes = [first.note] if alone and first.note else []
    if forms.task.loss is not None and math.isnan(figures["loss"]):
        notes.append("no labels: loss and score not measured")
    degenerate = sum(quantizer.degenerate for quantizer in quantizers.values())
    if degenerate:
        notes.append(f"degenerate: {degenerate} of {sum(q.groups for q in quantizers.values())} scales borrowed")
    if not alone:
        notes.append(f"{len(quantizers)} sites: no SQNR")
    elif not called_once:  # a later call gets an input that the earlier one has already changed
        notes.append("sqnr_output_db not measured: the module is called more than once")
    elif inside:
        notes.append("sqnr_output_db not measured: its BatchNorm layers are not those of the clean network")
    elif not module_noise.seen:
        notes.append("sqnr_output_db: the module's forward is not called")
    return {
        **figures,
        "sqnr_db": tensor.tensor_noise.sqnr_db if alone else math.nan,
        "sqnr_output_db": module_noise.sqnr_db if alone and called_once and not inside else math.nan,
        "note": "; ".join(notes),
        "image_divergence": images.divergence.float().tolist(),
        "image_delta_loss": images.delta_loss.float().tolist(),
    }
