"""`qvw sensitivity --proxies`: scores that foretell the sweep, and how well they do, into the run folder."""

import time
from collections.abc import Sequence

import pandas as pd
from torch import Tensor

from analysis.console import as_text
from analysis.opened import Opened
from analysis.panels import figure_files, save_figure
from analysis.proxies import DEFINITIONS, PROXIES, proxy_table
from analysis.proxy_correlation import proxy_correlations
from analysis.proxy_plots import proxies_figure
from analysis.sensitivity import SweepConfig, stored_rows
from quant.site import SiteInfo

PROXY_FILES = (
    "proxies.parquet", "proxy_images.parquet", "proxy_correlation.parquet", *figure_files("proxies"),
)  # fmt: skip
GOOD = 0.9
"""From this Spearman correlation on a proxy is said to rank the sites nearly as the sweep does."""


def run_proxies(
    opened: Opened, sites: Sequence[SiteInfo], batches: Sequence[tuple[Tensor, Tensor]], config: SweepConfig
) -> str:
    """Write proxies, proxy_images, proxy_correlation and a figure; returns how each proxy ranks the sites, in words.

    At the bit-widths of all single-site rows that the run's sensitivity.parquet has of this estimator. BatchNorm is as
    stored: the proxies know of no other, and are compared with the rows where it is.
    """
    run, start = opened.run, time.monotonic()
    measured = run.read_table("sensitivity")
    measured = stored_rows(measured[measured["estimator"] == config.estimator])
    bit_widths = sorted({*config.bit_widths, *measured["bit_width"]})
    stats = run.read_table("stats") if (run.path / "stats.parquet").exists() else None
    table, products = proxy_table(
        opened.model, opened.trace, sites, batches, bit_widths, estimator=config.estimator,
        granularity=config.granularity, stats=stats,
    )  # fmt: skip
    seconds = time.monotonic() - start
    run.write_table("proxy_images", products)
    run.write_table("proxies", table)
    correlation = proxy_correlations(table, measured, run.read_table("sensitivity_images"))
    run.write_table("proxy_correlation", correlation)
    save_figure(proxies_figure(table, measured, correlation, opened.name), run.path / "proxies")
    foretold = table[table["proxy"] == "fisher"].merge(measured, on=["module", "tensor", "bit_width"])
    ratios = (foretold["score"] / foretold["kl"])[foretold["kl"] > 0].groupby(foretold["bit_width"]).median()
    return _summary(correlation, ratios, seconds, without_stats=stats is None)


def _summary(correlation: pd.DataFrame, ratios: pd.Series, seconds: float, *, without_stats: bool) -> str:
    """How each proxy ranks all sites at the lowest bit-width; `ratios` are fisher / measured KL by bit-width."""
    lines = [f"Proxies of all sites and bit-widths took {seconds:.1f} s."]
    if correlation.empty:
        return f"{lines[0]} Fewer than five sites were measured alone: no rank correlation."
    bits = correlation["bit_width"].min()
    shown = correlation[(correlation["bit_width"] == bits) & (correlation["tensors"] == "all")]
    columns = ["proxy", "sites", "spearman", "spearman_low", "spearman_high", "kendall", "ceiling"]
    lines += [
        f"Rank correlation with the measured KL at {bits} bit, 95 % over sites; ceiling: what its noise allows:",
        as_text(shown[columns].round(3)),
    ]
    good = shown.loc[shown["spearman"] >= GOOD, "proxy"].tolist()
    if good:
        lines.append(f"On this model {', '.join(good)} ranks the sites nearly as the sweep does (at least {GOOD}).")
    else:
        lines.append(f"No proxy reaches {GOOD} on this model: use the sweep.")
    lines += [f"  {proxy}: {DEFINITIONS[proxy]}" for proxy in PROXIES if (shown["proxy"] == proxy).any()]
    shares = ", ".join(f"{ratio:.2f} at {bits} bit" for bits, ratio in ratios.items())
    lines.append(f"Fisher foretells the KL itself; median of foretold / measured: {shares}.")
    if without_stats:
        lines.append("With `qvw stats` in the same run folder the statistics are tried as proxies too.")
    return "\n".join(lines)
