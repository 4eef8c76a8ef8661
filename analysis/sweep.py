"""The sweep: one site quantized at a time, all else in floating point, and what the network's answers lose by it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from analysis.evaluation import compare_logits, logits_of
from analysis.noise import CleanOutputs, MeasuredQuantizer, Noise, output_noise
from analysis.replay import Cut, Replay, find_cuts
from quant.batchnorm import batchnorm_kept, batchnorms, reestimate_batchnorm_
from quant.calibrate import default_scheme, make_quantizer, observe_activations
from quant.intercept import intercept
from quant.prepare import quantized
from quant.quantizer import Quantizer
from quant.site import Site, SiteInfo
from quant.trace import Trace

CACHE_MIB = 1024


def sweep(
    model: nn.Module,
    trace: Trace,
    sites: Sequence[SiteInfo],
    batches: Sequence[tuple[Tensor, Tensor]],
    keys: Sequence[Mapping[str, Any]],
    *,
    name: str,
    cache_mib: int = CACHE_MIB,
) -> Iterator[dict[str, Any]]:
    """One row of sensitivity.parquet for each of `keys`, over `batches` of (images, labels).

    Protocol `single`: one site is quantized, its scale estimated on these same images, all else is floating point.
    Differences are taken against the floating-point model in the same form: sites inside attention against attention
    computed by its formula. Where the network can be entered midway it is (`Replay`, in at most `cache_mib` MiB), with
    the same bits as in full. The model comes back bit for bit, also when the sweep ends early.
    """
    by_site = {info.site: info for info in sites}
    wanted = {Site(key["module"], key["tensor"]) for key in keys}
    samples = observe_activations(
        model, trace, {s: i for s, i in by_site.items() if s in wanted}, [x for x, _ in batches], count=len(batches)
    )
    forms = _Forms(model, trace, batches, _forms_of(keys), cache_bytes=cache_mib << 20)
    for key in keys:
        info = by_site[Site(key["module"], key["tensor"])]
        sample = samples.get(info.site)
        scheme = default_scheme(model, info, key["bit_width"], sample=sample, granularity=key["granularity"])
        quantizer = make_quantizer(model, info, scheme, sample=sample, estimator=key["estimator"])
        yield {
            **key,
            "model": name,
            "kind": info.kind,
            "order": info.order,
            "signed": quantizer.scheme.signed,
            "offset": quantizer.scheme.offset,
            **_measure(forms, info, quantizer, re_estimated=key["batchnorm"] == "re_estimated"),
            "rank_low": math.nan,
            "rank_high": math.nan,
        }


def _forms_of(keys: Sequence[Mapping[str, Any]]) -> int:
    """How many kinds of clean run the keys need: their inputs share the cache."""
    kinds = {(Site(key["module"], key["tensor"]).is_attention, key["batchnorm"] == "re_estimated") for key in keys}
    return sum(2 if re_estimated else 1 for _, re_estimated in kinds)


class _Forms:
    """The floating-point model in the forms that the rows are compared with, each entered midway.

    A form says whether attention is computed by its formula (`explicit`), and how BatchNorm works: `stored`
    statistics, `batch` statistics while new ones are taken, or `re_estimated` ones.
    """

    def __init__(
        self, model: nn.Module, trace: Trace, batches: Sequence[tuple[Tensor, Tensor]], forms: int, *, cache_bytes: int
    ) -> None:
        self.model, self.trace, self.batches = model, trace, batches
        self.images = [images for images, _ in batches]
        self.room = cache_bytes // (2 * max(1, forms))  # half for the inputs of cuts, half for outputs of the module
        self._cuts: list[Cut] | None = None
        self._replays: dict[tuple[bool, str], Replay] = {}
        self._references: dict[tuple[bool, bool], Tensor] = {}
        self._statistics: dict[bool, list[dict[str, Tensor]]] = {}
        self._outputs: dict[tuple[bool, bool], CleanOutputs] = {}

    @contextmanager
    def attention(self, explicit: bool) -> Iterator[None]:
        """Let every attention module compute by its formula, as those with a quantized site do, or none."""
        untouched = {Site(m, "attention"): _leave for m in self.trace.attention} if explicit else {}
        with intercept(self.model, self.trace, untouched):
            yield

    def replay(self, module: str, explicit: bool, batchnorm: str) -> Replay:
        """The run of one form, at the last cut before `module`; the model must be clean, its attention in the form."""
        key = explicit, batchnorm
        if key not in self._replays:
            if self._cuts is None:
                self._cuts = find_cuts(self.model, self.images[0][:1])
            self._replays[key] = Replay(self.model, self.images, self._cuts, cache_bytes=self.room)
        with batchnorm_kept(self.model):
            if batchnorm == "batch":
                for layer in batchnorms(self.model):
                    layer.train()
            elif batchnorm == "re_estimated":
                self.load_statistics(explicit)
            self._replays[key].move_to(module)
        return self._replays[key]

    def logits(self, explicit: bool, re_estimated: bool) -> Tensor:
        """The reference of one form, computed at its first use."""
        key = explicit, re_estimated
        if key not in self._references:
            with self.attention(explicit), batchnorm_kept(self.model):
                if re_estimated:
                    self.load_statistics(explicit)
                self._references[key], _ = logits_of(self.model, self.batches)
        return self._references[key]

    def load_statistics(self, explicit: bool, among: Sequence[str] | None = None) -> None:
        """Give BatchNorm, or those layers that lie in the modules `among`, what the clean network re-estimates."""
        layers = batchnorms(self.model)
        if explicit not in self._statistics:
            with batchnorm_kept(self.model):
                reestimate_batchnorm_(self.model, self.images)
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


def _measure(forms: _Forms, info: SiteInfo, quantizer: Quantizer, *, re_estimated: bool) -> dict[str, Any]:
    """Figures of one quantized site, and a note on what could not be measured."""
    site, model, trace = info.site, forms.model, forms.trace
    explicit = site.is_attention
    measured = MeasuredQuantizer(quantizer)
    reference = forms.logits(explicit, re_estimated)
    original = model.get_submodule(site.module)._parameters.get("weight")
    with ExitStack() as stack:
        stack.enter_context(forms.attention(explicit))
        run = forms.replay(site.module, explicit, "re_estimated" if re_estimated else "stored")
        estimating = forms.replay(site.module, explicit, "batch") if re_estimated else None
        stack.enter_context(quantized(model, trace, {site: info}, {site: measured}))
        if estimating is not None:
            stack.enter_context(batchnorm_kept(model))
            skipped = () if estimating.cut is None else estimating.cut.skipped
            reestimate_batchnorm_(model, forms.images, estimating)
            forms.load_statistics(explicit, skipped)  # these did not run: theirs are those of the clean network
            if not site.is_weight:  # what the passes for BatchNorm added is not of these logits
                measured.tensor_noise = Noise()
        outputs = forms.outputs(site.module, explicit, re_estimated)
        module_noise = stack.enter_context(output_noise(model, site.module, original, outputs))
        logits, labels = logits_of(run, forms.batches)
    notes = [info.note] if info.note else []
    if (labels < 0).any():
        notes.append("no labels: loss and top-1 not measured")
    if quantizer.degenerate:
        notes.append(f"degenerate: {quantizer.degenerate} of {quantizer.groups} scales borrowed")
    called_once = trace.calls.get(site.module, 0) == 1
    if not called_once:  # a later call gets an input that the earlier one has already changed
        notes.append("sqnr_output_db not measured: the module is called more than once")
    elif not module_noise.seen:
        notes.append("sqnr_output_db: the module's forward is not called")
    notes.append("rank bands not measured")
    return {
        **compare_logits(logits, reference, labels),
        "sqnr_db": measured.tensor_noise.sqnr_db,
        "sqnr_output_db": module_noise.sqnr_db if called_once else math.nan,
        "note": "; ".join(notes),
    }
