"""Sensitivity: what the network's answers lose when one site is quantized and all else stays in floating point."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pandas as pd
from torch import Tensor, nn

from analysis.evaluation import compare_logits, logits_of
from analysis.noise import MeasuredQuantizer, Noise, output_noise
from quant.batchnorm import batchnorm_reestimated, batchnorms
from quant.calibrate import default_scheme, granularity_of, make_quantizer, observe_activations
from quant.choices import Estimator, Granularity
from quant.intercept import intercept
from quant.prepare import quantized
from quant.quantizer import Quantizer
from quant.site import Site, SiteInfo
from quant.trace import Trace

SENSITIVITY_COLUMNS = (
    "model", "module", "kind", "order", "tensor", "group", "bit_width", "protocol", "granularity", "signed", "offset",
    "estimator", "batchnorm", "images", "loss", "delta_loss", "delta_loss_se", "top1", "delta_top1", "top1_se", "kl",
    "kl_se", "logit_nmse", "sqnr_db", "sqnr_output_db", "rank_low", "rank_high", "note",
)  # fmt: skip
ROW_KEY = ("module", "tensor", "group", "bit_width", "protocol", "granularity", "estimator", "batchnorm")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Every choice that changes the figures of a sweep.

    `granularity` concerns weights; None is each site's default. `batchnorm` is `stored`, `re-estimate` or `both`.
    """

    bit_widths: tuple[int, ...] = (2, 3, 4, 8)
    estimator: Estimator = "mse"
    granularity: Granularity | None = None
    batchnorm: str = "both"


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
            "group": "",
            "bit_width": bit_width,
            "protocol": "single",
            "granularity": granularity_of(info, model, config.granularity),
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
    batches: Sequence[tuple[Tensor, Tensor]],
    keys: Sequence[Mapping[str, Any]],
    *,
    name: str,
) -> Iterator[dict[str, Any]]:
    """One row of sensitivity.parquet for each of `keys`, over `batches` of (images, labels).

    Protocol `single`: one site is quantized, its scale estimated on these same images, all else is floating point.
    Differences are taken against the floating-point model in the same form: sites inside attention against attention
    computed by its formula. The model comes back bit for bit, also when the sweep ends early.
    """
    by_site = {info.site: info for info in sites}
    wanted = {Site(key["module"], key["tensor"]) for key in keys}
    samples = observe_activations(
        model, trace, {s: i for s, i in by_site.items() if s in wanted}, [x for x, _ in batches], count=len(batches)
    )
    references = _References(model, trace, batches)
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
            **_measure(model, trace, info, quantizer, references, re_estimated=key["batchnorm"] == "re_estimated"),
            "rank_low": math.nan,
            "rank_high": math.nan,
        }


def row_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What names a row of the table: two rows of the same key are the same measurement."""
    return tuple(row[name] for name in ROW_KEY)


def sensitivity_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The frame of sensitivity.parquet: sites in network order, bit-widths ascending."""
    ordered = sorted(rows, key=lambda row: (row["order"], row["protocol"], *row_key(row)))
    return pd.DataFrame(ordered, columns=list(SENSITIVITY_COLUMNS))


def preferred_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The single-site rows of one treatment for each site, in the order of the table.

    Where a site was measured in several ways, all its rows are of the first of: BatchNorm re-estimated before stored,
    estimator mse, percentile, minmax, scales per head, per channel, per tensor. Mixing them would compare bit-widths
    that were not measured alike.
    """
    rows = table[(table["protocol"] == "single") & (table["group"] == "")]
    order = {
        "batchnorm": {"re_estimated": 0, "stored": 1, "none": 1},
        "estimator": {"mse": 0, "percentile": 1, "minmax": 2},
        "granularity": {"per_head": 0, "per_channel": 1, "per_tensor": 2},
    }
    rank = sum(rows[name].map(places) * 10**i for i, (name, places) in enumerate(reversed(order.items())))
    return rows[rank == rank.groupby([rows["module"], rows["tensor"]]).transform("min")]


class _References:
    """Logits of the floating-point model: as it is, with attention by its formula, with BatchNorm re-estimated."""

    def __init__(self, model: nn.Module, trace: Trace, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.model, self.trace, self.batches = model, trace, batches
        self.known: dict[tuple[bool, bool], Tensor] = {}

    @contextmanager
    def form(self, *, explicit_attention: bool) -> Iterator[None]:
        """Let every attention module compute by its formula, as those with a quantized site do, or none."""
        untouched = {Site(m, "attention"): _leave for m in self.trace.attention} if explicit_attention else {}
        with intercept(self.model, self.trace, untouched):
            yield

    def batchnorm(self, re_estimated: bool) -> AbstractContextManager[None]:
        """Let BatchNorm take its statistics from the images, or leave the stored ones."""
        return batchnorm_reestimated(self.model, (x for x, _ in self.batches)) if re_estimated else nullcontext()

    def logits(self, *, explicit_attention: bool, re_estimated: bool) -> Tensor:
        """The reference of one form, computed at its first use."""
        key = (explicit_attention, re_estimated)
        if key not in self.known:
            with self.form(explicit_attention=explicit_attention), self.batchnorm(re_estimated):
                self.known[key], _ = logits_of(self.model, self.batches)
        return self.known[key]


def _leave(_x: Tensor) -> None:
    return None


def _measure(
    model: nn.Module, trace: Trace, info: SiteInfo, quantizer: Quantizer, references: _References, *, re_estimated: bool
) -> dict[str, Any]:
    """Figures of one quantized site, and a note on what could not be measured."""
    site = info.site
    measured = MeasuredQuantizer(quantizer)
    reference = references.logits(explicit_attention=site.is_attention, re_estimated=re_estimated)
    original = model.get_submodule(site.module)._parameters.get("weight")
    with (
        references.form(explicit_attention=site.is_attention),
        quantized(model, trace, {site: info}, {site: measured}),
        references.batchnorm(re_estimated),
    ):
        if not site.is_weight:  # what the passes for BatchNorm added is not of these logits
            measured.tensor_noise = Noise()
        with output_noise(model, site.module, original) as module_noise:
            logits, labels = logits_of(model, references.batches)
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
