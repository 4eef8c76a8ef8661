"""`qvw stats`: the statistics of every tensor, into a run folder."""

import pandas as pd

from analysis.console import as_text, say
from analysis.panels import distribution_figure, figure_files, save_figure
from analysis.setup import Setup, open_run
from analysis.tensor_stats import collect_stats
from analysis.variation import variation
from quant.errors import InputError

IMAGES = 2000
FILES = ("stats.parquet", "channels.parquet", "histograms.parquet", "variation.json", *figure_files("distribution"))


def run_stats(setup: Setup) -> None:
    """Write stats, channels, histograms and variation of one model; weights only where no images are known."""
    opened = open_run(setup, needs_data=False)
    run, quiet, data = opened.run, setup.quiet, None
    if opened.setup.data is not None:
        data = opened.step_images("stats", "train", at_most=IMAGES)
    if not any(info.site.tensor == "input" and not info.excluded for info in opened.sites):
        raise InputError("no convolution or linear is left to describe; see --include and --exclude.")
    if setup.overwrite or not run.is_done("stats", opened.inputs(data)):
        with opened.step("stats", data, FILES, {}):
            batches = None if data is None else (images for images, _ in opened.stream(data, "statistics"))
            sites = [info for info in opened.sites if not info.excluded]
            tables = collect_stats(opened.model, opened.trace, sites, batches, name=opened.name)
            run.write_table("channels", tables.channels)
            run.write_table("histograms", tables.histograms)
            run.write_json("variation", variation(tables.stats))
            run.write_table("stats", tables.stats)
            save_figure(distribution_figure(tables.stats, opened.name), run.path / "distribution")
    stats = run.read_table("stats")
    say(_summary(stats), quiet=quiet)
    say(f"{len(stats)} tensors in {run.path / 'stats.parquet'}, figure distribution.png", quiet=quiet)


def _summary(stats: pd.DataFrame) -> str:
    shown = stats[~stats["kind"].isin(("norm", "block"))].nlargest(8, "excess_kurtosis")
    columns = ["module", "tensor", "kind", "std", "excess_kurtosis", "outlier_fraction", "channel_range_ratio"]
    return "Heaviest tails:\n" + as_text(shown[columns])
