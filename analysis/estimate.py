"""Sensitivities estimated from gradients: one backward pass in place of a forward pass for every site and bit-width."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.proxies import small_batches
from analysis.scoring import outputs_of
from analysis.sensitivity import ROW_KEY
from analysis.sweeps.fisher import ErrorScores, fisher_scores
from analysis.sweeps.sweep import sample_activations, site_quantizer
from analysis.task import Task
from quant.batchnorm import batchnorms
from quant.choices import Estimator, Granularity
from quant.network import Network
from quant.quantizer import Quantizer
from quant.site import Site, SiteInfo

SOURCE = "fisher"
PRODUCT_COLUMNS = ("module", "tensor", "bit_width", "granularity", "estimator", "products")
_NO_GRADIENT = (
    "not estimated: no gradient of each sample (the module is called more than once, does not depend on the input, or "
    "overflows); measure_sensitivity measures it"
)
_AS_STORED = "BatchNorm keeps its stored statistics; a plan re-estimates them"


def estimated_rows(
    net: Network,
    sites: Sequence[SiteInfo],
    data: Sequence[Any],
    bit_widths: Sequence[int],
    *,
    task: Task,
    estimator: Estimator,
    granularity: Granularity | None,
) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """Rows as a sweep makes them, and the products of every sample (PRODUCT_COLUMNS).

    The divergence is 1/2 (gradient . error)^2 of the task's probe, mean over samples: the divergence to second order
    (FIT: Zandonati et al. 2022, arXiv:2210.08502; Martens, JMLR 2020, arXiv:1412.1193). BatchNorm keeps its stored
    statistics. Whatever else a sweep measures is NaN.
    """
    small = small_batches(data, task)
    if task.prepare is not None:
        task = task.prepared(outputs_of(lambda batch: task.forward(net.model, batch), data, task))
    samples = sample_activations(net, [info.site for info in sites], data, task.forward)
    quantizers: dict[Site, dict[int, Quantizer]] = {
        info.site: {
            bits: site_quantizer(net.model, info, bits, samples.get(info.site), estimator, granularity)
            for bits in sorted(bit_widths)
        }
        for info in sites
    }
    scores = fisher_scores(net, quantizers, small, task)
    count = sum(task.samples(batch) for batch in data)
    batchnorm = "stored" if batchnorms(net.model) else "none"
    how = _AS_STORED if batchnorm == "stored" else ""
    rows, products = [], []
    for info in sites:
        for bits, quantizer in quantizers[info.site].items():
            scheme = quantizer.scheme
            identity = {
                "module": info.site.module, "tensor": info.site.tensor, "group": "", "bit_width": bits,
                "protocol": "single", "granularity": scheme.granularity, "estimator": estimator, "batchnorm": batchnorm,
            }  # fmt: skip
            found, note = scores.get((info.site, bits)), "; ".join(filter(None, (info.note, how)))
            rows.append(
                {**identity, "model": net.name, "kind": info.kind, "order": info.order, "signed": scheme.signed,
                 "offset": scheme.offset, "source": SOURCE, "task": task.name, "images": count,
                 **_figures(found, note, classification=task.name == "classification")}
            )  # fmt: skip
            if found is not None:
                products.append({**{name: identity[name] for name in PRODUCT_COLUMNS[:-1]}, "products": found.products})
    return rows, pd.DataFrame(products, columns=list(PRODUCT_COLUMNS))


def _figures(found: ErrorScores | None, note: str, *, classification: bool) -> dict[str, Any]:
    """What a sweep's row has, as far as the gradients tell."""
    if found is None or not math.isfinite(found.fisher):
        return {"divergence": math.nan, "note": "; ".join(filter(None, (note, _NO_GRADIENT)))}
    each = found.products.astype(np.float64) ** 2 / 2
    error = each.std(ddof=1) / len(each) ** 0.5 if len(each) > 1 else math.nan
    same = {"kl": found.fisher, "kl_se": error} if classification else {}
    sqnr = -10 * math.log10(found.noise) if found.noise > 0 else math.inf if found.noise == 0 else math.nan
    return {
        "divergence": found.fisher, "divergence_se": error, **same, "sqnr_db": sqnr, "note": note,
        "image_divergence": each.astype(np.float32).tolist(), "image_delta_loss": [math.nan] * len(each),
    }  # fmt: skip


assert set(PRODUCT_COLUMNS[:-1]) < {*ROW_KEY}
