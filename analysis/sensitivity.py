"""Sensitivity: what the network's answers lose when one site is quantized and all else stays in floating point."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from analysis.evaluation import all_logits, compare_logits
from quant.calibrate import ActivationSample, batchnorm_reestimated, batchnorms, make_quantizer, observe_activations
from quant.intercept import intercept
from quant.prepare import quantized
from quant.quantizer import Quantizer
from quant.range_estimators import Estimator
from quant.scheme import Granularity
from quant.site import Site, SiteInfo
from quant.trace import Trace

SENSITIVITY_COLUMNS = (
    "model", "module", "kind", "order", "tensor", "group", "bit_width", "protocol", "granularity", "signed", "offset",
    "estimator", "batchnorm", "images", "loss", "delta_loss", "delta_loss_se", "top1", "delta_top1", "top1_se", "kl",
    "kl_se", "logit_nmse", "sqnr_db", "sqnr_output_db", "rank_low", "rank_high", "note",
)  # fmt: skip
ROW_KEY = ("module", "tensor", "bit_width", "granularity_asked", "estimator", "batchnorm")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Every choice that changes the figures of a sweep.

    `granularity` concerns weights; None is each site's default. `batchnorm` is `stored`, `re-estimate` or `both`.
    """

    bit_widths: tuple[int, ...] = (2, 3, 4, 8)
    estimator: Estimator = "mse"
    granularity: Granularity | None = None
    batchnorm: str = "stored"


def sweep_keys(model: nn.Module, sites: Sequence[SiteInfo], config: SweepConfig) -> list[dict[str, Any]]:
    """The rows that a sweep will have, each named by `ROW_KEY`: sites in network order, bit-widths ascending."""
    if not batchnorms(model):
        modes = ["none"]
    else:
        modes = {"stored": ["stored"], "re-estimate": ["re_estimated"], "both": ["stored", "re_estimated"]}[
            config.batchnorm
        ]
    return [
        {
            "module": info.site.module,
            "tensor": info.site.tensor,
            "bit_width": bit_width,
            "granularity_asked": config.granularity or "default",
            "estimator": config.estimator,
            "batchnorm": mode,
        }
        for info in sites
        for bit_width in sorted(config.bit_widths)
        for mode in modes
    ]


def sweep(
    model: nn.Module,
    trace: Trace,
    sites: Sequence[SiteInfo],
    images: Sequence[Tensor],
    labels: Tensor,
    keys: Sequence[Mapping[str, Any]],
    *,
    name: str,
) -> Iterator[dict[str, Any]]:
    """One row of sensitivity.parquet for each of `keys`, over `images` (a list of batches) and their labels.

    Protocol `single`: one site is quantized, its scale estimated on these same images, all else is floating point.
    Differences are taken against the floating-point model in the same form: sites inside attention against attention
    computed by its formula. The model comes back bit for bit, also when the sweep ends early.
    """
    by_site = {info.site: info for info in sites}
    wanted = {Site(key["module"], key["tensor"]) for key in keys}
    granularities: dict[str, Granularity | None] = {key["granularity_asked"]: None for key in keys}
    samples = observe_activations(
        model, trace, {s: i for s, i in by_site.items() if s in wanted}, images, count=len(images)
    )
    references = _References(model, trace, images)
    for key in keys:
        info = by_site[Site(key["module"], key["tensor"])]
        asked = key["granularity_asked"]
        granularities[asked] = None if asked == "default" else asked
        quantizer = make_quantizer(
            model, info, key["bit_width"], sample=samples.get(info.site), estimator=key["estimator"],
            granularity=granularities[asked],
        )  # fmt: skip
        yield {
            **key,
            "model": name,
            "kind": info.kind,
            "order": info.order,
            "group": "",
            "protocol": "single",
            "granularity": quantizer.scheme.granularity,
            "signed": quantizer.scheme.signed,
            "offset": quantizer.scheme.offset,
            **_measure(model, trace, info, quantizer, images, labels, references, key["batchnorm"]),
            "rank_low": math.nan,
            "rank_high": math.nan,
        }


def sensitivity_table(rows: Sequence[Mapping[str, Any]], keys: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The frame of sensitivity.parquet, in the order of `keys`."""
    order = {tuple(key[k] for k in ROW_KEY): i for i, key in enumerate(keys)}
    ordered = sorted(rows, key=lambda row: order[tuple(row[k] for k in ROW_KEY)])
    return pd.DataFrame(ordered, columns=list(SENSITIVITY_COLUMNS))


class _References:
    """Logits of the floating-point model: as it is, with attention by its formula, with BatchNorm re-estimated."""

    def __init__(self, model: nn.Module, trace: Trace, images: Sequence[Tensor]) -> None:
        self.model, self.trace, self.images = model, trace, images
        self.known: dict[tuple[bool, bool], Tensor] = {}

    def logits(self, *, explicit_attention: bool, re_estimated: bool) -> Tensor:
        """The reference of one form, computed at its first use."""
        form = (explicit_attention, re_estimated)
        if form not in self.known:
            untouched = {Site(m, "attention"): _leave for m in self.trace.attention} if explicit_attention else {}
            with intercept(self.model, self.trace, untouched), self.batchnorm(re_estimated):
                self.known[form] = all_logits(self.model, self.images)
        return self.known[form]

    def batchnorm(self, re_estimated: bool) -> Any:
        """A context that lets BatchNorm take its statistics from the images, or none."""
        return batchnorm_reestimated(self.model, self.images) if re_estimated else nullcontext()


def _leave(_x: Tensor) -> None:
    return None


def _measure(
    model: nn.Module,
    trace: Trace,
    info: SiteInfo,
    quantizer: Quantizer,
    images: Sequence[Tensor],
    labels: Tensor,
    references: _References,
    batchnorm: str,
) -> dict[str, Any]:
    """Figures of one quantized site, and a note on what could not be measured."""
    site, re_estimated = info.site, batchnorm == "re_estimated"
    measured = _Measured(quantizer)
    reference = references.logits(explicit_attention=site.is_attention, re_estimated=re_estimated)
    original = model.get_submodule(site.module)._parameters.get("weight")
    with quantized(model, trace, {site: info}, {site: measured}), references.batchnorm(re_estimated):
        if not site.is_weight:
            measured.tensor_noise = Noise()
        with _output_noise(model, site.module, original) as output_noise:
            logits = all_logits(model, images)
    notes = [info.note] if info.note else []
    if quantizer.degenerate:
        notes.append(f"degenerate: {quantizer.degenerate} of {quantizer.groups} scales borrowed")
    if not output_noise.seen:
        notes.append("sqnr_output_db: the module's forward is not called")
    return {
        **compare_logits(logits, reference, labels),
        "sqnr_db": measured.tensor_noise.sqnr_db,
        "sqnr_output_db": output_noise.sqnr_db,
        "note": "; ".join(notes),
    }


class Noise:
    """Signal and noise power of a tensor and its quantized form, summed in float64."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0
        self.seen = False

    def add(self, clean: Tensor, noisy: Tensor) -> None:
        """Add one tensor and its noisy form, of the same shape."""
        self.seen = True
        self.signal += torch.linalg.vector_norm(clean, dtype=torch.float64).item() ** 2
        self.noise += torch.linalg.vector_norm(clean - noisy, dtype=torch.float64).item() ** 2

    @property
    def sqnr_db(self) -> float:
        """10 log10(E[x^2] / E[(x - x_q)^2]); inf where nothing was lost, NaN where there was no signal."""
        if self.signal == 0:
            return math.nan
        return math.inf if self.noise == 0 else 10 * math.log10(self.signal / self.noise)


class _Measured:
    """A quantizer that adds up what it does to its tensor."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer, self.tensor_noise = quantizer, Noise()

    def __call__(self, x: Tensor) -> Tensor:
        x_q = self.quantizer(x)
        self.tensor_noise.add(x, x_q)
        return x_q


@contextmanager
def _output_noise(model: nn.Module, name: str, weight: nn.Parameter | None) -> Iterator[Noise]:
    """Compare each output of a module with what it gives on the same, untouched input and `weight`.

    The module's forward runs a second time, without hooks: its input is the clean one because no earlier site is
    quantized.
    """
    module, noise = model.get_submodule(name), Noise()
    clean: list[tuple[Any, Any]] = []

    def keep(_module: nn.Module, args: Any, kwargs: Any) -> None:
        clean.append((args, kwargs))

    def compare(module: nn.Module, _args: Any, output: Any) -> None:
        args, kwargs = clean.pop()
        if not isinstance(output, Tensor):
            return
        current = module._parameters.get("weight")
        try:
            if weight is not None:
                module._parameters["weight"] = weight
            noise.add(type(module).forward(module, *args, **kwargs), output)
        finally:
            if weight is not None:
                module._parameters["weight"] = current

    before = module.register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
    after = module.register_forward_hook(compare)
    try:
        yield noise
    finally:
        before.remove()
        after.remove()
