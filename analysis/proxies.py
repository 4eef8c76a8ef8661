"""Proxies: scores that predict the sensitivity of a site without a forward pass for each."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from analysis.sweeps.fisher import fisher_scores
from analysis.sweeps.hessian import hessian_traces
from analysis.sweeps.sweep import sample_activations, site_quantizer
from analysis.task import Task
from quant.batches import samples as samples_of
from quant.batches import take
from quant.choices import PROXIES, Estimator, Granularity
from quant.network import Network
from quant.quantizer import Quantizer
from quant.site import Site, SiteInfo

PROXY_COLUMNS = ("module", "tensor", "bit_width", "proxy", "score", "granularity", "estimator", "note")
PROXY_IMAGE_COLUMNS = ("module", "tensor", "bit_width", "granularity", "estimator", "products")
STATS_PROXIES = tuple(name for name in PROXIES if name.startswith("stats_"))
_NO_GRADIENT = "no finite gradient image by image: called more than once, not dependent on the image, or overflow"
IMAGES_AT_ONCE = 16  # with gradients a pass keeps every activation


def proxy_table(
    net: Network,
    sites: Sequence[SiteInfo],
    data: Sequence[Any],
    bit_widths: Sequence[int],
    *,
    task: Task,
    estimator: Estimator,
    granularity: Granularity | None,
    stats: pd.DataFrame | None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The frames of proxies.parquet and proxy_images.parquet, for each site and bit-width, over batches.

    A greater score predicts greater harm; the second frame has the `products` of ErrorScores. The quantizers are those
    of the sweep on the same batches. `hessian_trace` needs labels, the proxies of STATS_PROXIES the frame of
    stats.parquet; where that is missing they are too.
    """
    by_site = {info.site: info for info in sites}
    samples = sample_activations(net, by_site, data, task.forward)
    quantizers: dict[Site, dict[int, Quantizer]] = {}
    for site, info in by_site.items():
        sample = samples.get(site)
        for bits in bit_widths:
            made = site_quantizer(net.model, info, bits, sample, estimator, granularity)
            quantizers.setdefault(site, {})[bits] = made
    small = small_batches(data, task)
    scores = fisher_scores(net, quantizers, small, task)
    once = {site: info for site, info in by_site.items() if net.trace.calls.get(site.module, 0) == 1}
    traces = hessian_traces(net, once, small, task) if labelled(net, small, task) else {}
    noisy = {site for site, found in traces.items() if not found.error <= abs(found.trace) / 3}
    rows: list[tuple[object, ...]] = []
    for site, bits in ((site, bits) for site in by_site for bits in bit_widths):
        score = scores.get((site, bits))
        if score is None:
            rows += [(*site, bits, proxy, math.nan) for proxy in PROXIES if proxy not in STATS_PROXIES]
            continue
        known = score._asdict()
        if site in traces:
            known["hessian_trace"] = traces[site].trace / 2 * score.squared_error
        known = {proxy: value if np.all(np.isfinite(value)) else math.nan for proxy, value in known.items()}
        rows += [(*site, bits, proxy, value) for proxy, value in known.items() if proxy in PROXIES]
    table = pd.DataFrame(rows, columns=list(PROXY_COLUMNS[:5]))
    if stats is not None:
        table = pd.concat([table, stats_scores(stats, by_site, bit_widths)], ignore_index=True)
    used = {site: by_bits[bit_widths[0]].scheme.granularity for site, by_bits in quantizers.items()}
    table = table.assign(
        granularity=[used[Site(*key)] for key in zip(table["module"], table["tensor"], strict=True)],
        estimator=estimator,
        note=np.where(table["score"].isna(), _NO_GRADIENT, ""),
    )
    of_noisy = np.array([Site(*key) in noisy for key in zip(table["module"], table["tensor"], strict=True)], dtype=bool)
    table.loc[of_noisy & (table["proxy"] == "hessian_trace") & table["score"].notna(), "note"] = NOISY_TRACE
    products = [(*site, bits, used[site], estimator, score.products) for (site, bits), score in scores.items()]
    return table, pd.DataFrame(products, columns=list(PROXY_IMAGE_COLUMNS))


NOISY_TRACE = "its standard error is more than a third of it"
"""The note on a Hessian trace that its random probes leave uncertain."""


def small_batches(data: Sequence[Any], task: Task) -> list[Any]:
    """The batches in parts of at most `IMAGES_AT_ONCE` samples; whole where the task counts samples in its own way."""
    if task.samples is not samples_of and any(task.samples(batch) > IMAGES_AT_ONCE for batch in data):
        return list(data)
    return [
        take(batch, start, start + IMAGES_AT_ONCE)
        for batch in data
        for start in range(0, task.samples(batch), IMAGES_AT_ONCE)
    ]


def labelled(net: Network, data: Sequence[Any], task: Task) -> bool:
    """Whether the task has a loss, and every sample of `data` what it needs."""
    if task.loss is None:
        return False
    with torch.no_grad():
        return all(bool(task.loss(task.forward(net.model, batch), batch).isfinite().all()) for batch in data)


def stats_scores(stats: pd.DataFrame, sites: Mapping[Site, SiteInfo], bit_widths: Sequence[int]) -> pd.DataFrame:
    """Scores from stats.parquet alone, in the first five columns of proxies.parquet.

    A uniform grid of b bits over [-m, m] has the step 2 m / (2^b - 1), and its rounding error the variance step^2 / 12;
    `stats_range` is that over the tensor's variance. The other two are the statistics themselves at any bit-width.
    """
    rows = []
    for row in stats.itertuples():
        site = Site(str(row.module), str(row.tensor))
        if site not in sites:
            continue
        for bits in bit_widths:
            step = 2 * row.abs_max_over_std / (2**bits - 1)
            rows += [
                (*site, bits, "stats_range", step**2 / 12),
                (*site, bits, "stats_kurtosis", row.excess_kurtosis),
                (*site, bits, "stats_outliers", row.outlier_fraction),
            ]
    return pd.DataFrame(rows, columns=list(PROXY_COLUMNS[:5]))
