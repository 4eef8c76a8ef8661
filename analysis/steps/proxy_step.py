"""`qvw sensitivity --proxies`: scores that predict the sweep, and how well they do, into the run folder."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.figures.panels import figure_files, save_figure
from analysis.figures.proxy_plots import proxies_figure
from analysis.proxies import NOISY_TRACE, STATS_PROXIES, proxy_table
from analysis.sensitivity import SweepConfig
from analysis.session.session import Session
from analysis.sweeps.proxy_correlation import SITE_KEY, measured_beside, proxy_correlations
from analysis.terminal.console import as_text
from quant.choices import PROXIES
from quant.errors import InputError, first_line
from quant.site import SiteInfo

PROXY_FILES = (
    "proxies.parquet", "proxy_images.parquet", "proxy_correlation.parquet", *figure_files("proxies"),
)  # fmt: skip
GOOD = 0.9
"""From this Spearman correlation on a proxy is said to rank the sites as well as the sweep."""


def run_proxies(session: Session, sites: Sequence[SiteInfo], batches: Sequence[Any], config: SweepConfig) -> str:
    """Write proxies, proxy_images, proxy_correlation and a figure; returns how each proxy ranks the sites, in words.

    Scores of earlier sweeps of the run stay, as its rows do. InputError where the model has no gradients, or memory
    runs out: the sweep is kept.
    """
    run, start = session.run, time.monotonic()
    stats = run.read_table("stats") if (run.path / "stats.parquet").exists() else None
    try:
        table, products = proxy_table(
            session.network, sites, batches, sorted(config.bit_widths), task=session.task, estimator=config.estimator,
            granularity=config.granularity, stats=stats,
        )  # fmt: skip
    except (MemoryError, RuntimeError) as error:  # the model is the user's: not every one can be differentiated
        raise InputError(
            f"the proxies cannot be computed: {first_line(error)}. The sweep is kept; do without --proxies, or with "
            "fewer modules (--include)."
        ) from error
    seconds = time.monotonic() - start
    table = with_earlier(session, "proxies", table, [*SITE_KEY, "proxy"])
    run.write_table("proxy_images", with_earlier(session, "proxy_images", products, SITE_KEY))
    run.write_table("proxies", table)
    swept, images = run.read_table("sensitivity"), run.read_table("sensitivity_images")
    measured = measured_beside(table, swept)
    correlation = proxy_correlations(table, measured, images)
    run.write_table("proxy_correlation", correlation)
    if (measured["divergence"] > 0).any():
        save_figure(proxies_figure(table, measured, correlation, session.network.name), run.path / "proxies")
    told = _summary(table, correlation, measured, min(config.bit_widths), seconds)
    again = measured_beside(table, swept[swept["batchnorm"] == "re_estimated"])
    if len(again) and (measured["batchnorm"] == "stored").any():
        other = proxy_correlations(table, again, images)
        rows = other[(other["tensors"] == "all") & (other["proxy"] == "fisher")]
        found = ", ".join(f"{row.spearman:.2f} at {row.bit_width} bits" for row in rows.itertuples())
        told += f"\nWith BatchNorm re-estimated, of which no proxy knows, fisher's correlation is {found}."
    return told


def with_earlier(session: Session, name: str, table: pd.DataFrame, key: list[str]) -> pd.DataFrame:
    """The rows of a table of the run with those of `table`, which take the place of earlier ones, in network order."""
    if (session.run.path / f"{name}.parquet").exists():
        earlier = session.run.read_table(name, table.columns.tolist())
        kept = earlier.merge(table[key], on=key, how="left", indicator=True)
        table = pd.concat([kept[kept["_merge"] == "left_only"][table.columns], table], ignore_index=True)
    order = {(info.site.module, info.site.tensor): i for i, info in enumerate(session.sites)}
    places = [order[site] for site in zip(table["module"], table["tensor"], strict=True)]
    return table.iloc[np.lexsort((table["bit_width"], places))].reset_index(drop=True)


def _summary(table: pd.DataFrame, correlation: pd.DataFrame, measured: pd.DataFrame, bits: int, seconds: float) -> str:
    """How each proxy ranks all sites at one bit-width, what could not be scored, and the verdict."""
    lines = [f"Proxies of all sites and bit-widths took {seconds:.1f} s."]
    unscored = table[table["score"].isna() & (table["proxy"] == "fisher")][["module", "tensor"]].drop_duplicates()
    if len(unscored):
        first = ", ".join(f"{row.module}:{row.tensor}" for row in unscored.head(3).itertuples())
        lines.append(f"Not scored: {len(unscored)} sites, {first}{', ...' if len(unscored) > 3 else ''} (see `note`).")
    noisy = table.loc[table["note"] == NOISY_TRACE, ["module", "tensor"]].drop_duplicates()
    if len(noisy):
        of = table.loc[table["proxy"] == "hessian_trace", ["module", "tensor"]].drop_duplicates()
        lines.append(
            f"hessian_trace of {len(noisy)} of {len(of)} sites has a standard error above a third of it: its random "
            "probes need more images (see `note`)."
        )
    missing = [name for name in ("hessian_trace", *STATS_PROXIES) if not (table["proxy"] == name).any()]
    if "hessian_trace" in missing:
        lines.append("hessian_trace needs labels.")
    shown = correlation[(correlation["bit_width"] == bits) & (correlation["tensors"] == "all")]
    if shown.empty:
        lines.append("No rank correlation: it takes five single sites at the same bit-width, measured by the same "
                     "quantizers (`qvw sensitivity` without --groups and --protocol), and two images.")  # fmt: skip
        return "\n".join(lines)
    how = {"none": "", "stored": ", BatchNorm as stored", "re_estimated": ", BatchNorm re-estimated"}
    treatment = how[measured["batchnorm"].iloc[0]]
    columns = ["proxy", "sites", "spearman", "spearman_low", "spearman_high", "kendall", "ceiling"]
    lines += [
        f"Rank correlation with the measured KL at {bits} bits{treatment}; 95 % over sites; ceiling: limit by noise:",
        as_text(shown[columns].round(3)),
    ]
    sure = shown.loc[shown["spearman_low"] >= GOOD, "proxy"].tolist()
    perhaps = shown.loc[(shown["spearman"] >= GOOD) & (shown["spearman_low"] < GOOD), "proxy"].tolist()
    if sure:
        lines.append(f"As good as the sweep for ranking these sites (at least {GOOD} in 95 %): {', '.join(sure)}.")
    if perhaps:
        lines.append(f"Perhaps as good, with so few sites: {', '.join(perhaps)}.")
    if not sure and not perhaps:
        lines.append(f"No proxy reaches {GOOD} here: use the sweep.")
    lines += [f"  {proxy}: {meaning}" for proxy, meaning in PROXIES.items() if (shown["proxy"] == proxy).any()]
    predicted = table[table["proxy"] == "fisher"].merge(measured[[*SITE_KEY, "divergence"]], on=SITE_KEY)
    ratios = (
        (predicted["score"] / predicted["divergence"])[predicted["divergence"] > 0]
        .groupby(predicted["bit_width"])
        .median()
    )
    shares = ", ".join(f"{ratio:.2f} at {width} bits" for width, ratio in ratios.items())
    lines.append(f"Fisher predicts the KL itself; median of predicted / measured: {shares}.")
    if "stats_range" in missing:
        lines.append("With `qvw stats` in the same run folder the statistics are tried as proxies too.")
    return "\n".join(lines)
