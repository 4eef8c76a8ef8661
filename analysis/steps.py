"""The steps that measure: statistics, sensitivity, comparison. Each reads and writes a run folder."""

from collections.abc import Sequence
from pathlib import Path

import click
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from analysis import comparison, panels
from analysis.cost import cost_table
from analysis.figures import save_figure
from analysis.files import RowLog, write_bytes
from analysis.runs import Run
from analysis.sensitivity import SweepConfig, row_key, sensitivity_table, sweep, sweep_keys
from analysis.setup import Setup, Workbench, open_workbench, tensors_of
from analysis.tensor_stats import collect_stats
from analysis.variation import variation
from quant.errors import InputError
from quant.range_estimators import Estimator
from quant.scheme import Granularity
from quant.site import ALLOWED_BIT_WIDTHS

STATS_IMAGES = 2000
SENSITIVITY_IMAGES = 256


def run_stats(setup: Setup) -> None:
    """`qvw stats`: stats, channels, histograms and variation of one model; weights only where no images are known."""
    bench = open_workbench(setup, needs_data=False)
    data = None
    if bench.setup.data is not None:
        data = bench.images(setup.split or "train", setup.images, at_most=STATS_IMAGES)
    files = ("stats.parquet", "channels.parquet", "histograms.parquet", "variation.json", *_figure("distribution"))
    if setup.overwrite or not bench.run.is_done("stats", bench.inputs(data)):
        with bench.step("stats", data, files):
            batches = None if data is None else (images for images, _ in bench.stream(data, "statistics"))
            tables = collect_stats(bench.model, bench.trace, bench.sites, batches, name=bench.name)
            bench.run.write_table("channels", tables.channels)
            bench.run.write_table("histograms", tables.histograms)
            bench.run.write_json("variation", variation(tables.stats))
            bench.run.write_table("stats", tables.stats)
            _save(panels.distribution_figure(tables.stats, bench.name), bench.run.path / "distribution")
    stats = bench.run.read_table("stats")
    bench.say(_stats_summary(stats))
    bench.say(f"{len(stats)} sites in {bench.run.path / 'stats.parquet'}")


def _figure(name: str) -> tuple[str, str]:
    return f"{name}.png", f"{name}.svg"


def _save(figure: Figure, path: Path) -> None:
    save_figure(figure, path, write_bytes)
    plt.close(figure)


def _stats_summary(stats: pd.DataFrame) -> str:
    shown = stats[~stats["kind"].isin(("norm", "block"))].nlargest(8, "excess_kurtosis")
    columns = ["module", "tensor", "kind", "std", "excess_kurtosis", "outlier_fraction", "channel_range_ratio"]
    return "Heaviest tails:\n" + shown[columns].to_string(index=False, float_format=lambda value: f"{value:.4g}")


def run_sensitivity(
    setup: Setup,
    *,
    bit_widths: tuple[int, ...],
    tensors: Sequence[str],
    granularity: Granularity | None,
    estimator: Estimator,
    batchnorm: str,
) -> None:
    """`qvw sensitivity`: the single-site sweep; finished rows are kept one by one and never measured twice."""
    wrong = [bits for bits in bit_widths if bits not in ALLOWED_BIT_WIDTHS]
    if wrong:
        raise InputError(f"--bits {wrong[0]} is not offered; choose from {', '.join(map(str, ALLOWED_BIT_WIDTHS))}.")
    bench = open_workbench(setup, needs_data=True)
    data = bench.images(setup.split or "train", setup.images, at_most=SENSITIVITY_IMAGES)
    config = SweepConfig(
        bit_widths=tuple(sorted(set(bit_widths))), estimator=estimator, granularity=granularity, batchnorm=batchnorm
    )
    sites = tensors_of(bench, tensors)
    if not sites:
        raise InputError(f"no site of {bench.name} holds {', '.join(tensors)}; see --tensors, --include and --exclude.")
    keys = sweep_keys(bench.model, sites, config)
    log = RowLog(bench.run.path / "sensitivity.partial.jsonl")
    files = ("sensitivity.parquet", "cost.parquet", log.path.name, *_figure("sensitivity"))
    with bench.step("sensitivity", data, files):
        finished = log.read()
        if (bench.run.path / "sensitivity.parquet").exists():
            finished += bench.run.read_table("sensitivity").to_dict("records")
        done = {row_key(row) for row in finished}
        todo = [key for key in keys if row_key(key) not in done]
        if todo:
            batches = list(bench.stream(data, "images"))
            with bench.progress(len(todo), "sensitivity", "row") as bar:
                for row in sweep(bench.model, bench.trace, sites, batches, todo, name=bench.name):
                    log.append([row])
                    finished.append(row)
                    bar.update()
            bench.run.write_table("cost", cost_table(bench.sites))
            bench.run.write_table("sensitivity", sensitivity_table(finished))
            log.remove()
            _draw_sensitivity(bench, bench.run.read_table("sensitivity"))
    table = bench.run.read_table("sensitivity")
    bench.say(_sensitivity_summary(table))
    bench.say(f"{len(table)} rows in {bench.run.path / 'sensitivity.parquet'}, figure sensitivity.png")


def _draw_sensitivity(bench: Workbench, table: pd.DataFrame) -> None:
    rows = preferred_rows(table)
    value = "delta_loss" if rows["delta_loss"].notna().any() else "kl"
    _save(panels.sensitivity_figure(rows, bench.name, value=value), bench.run.path / "sensitivity")


def preferred_rows(table: pd.DataFrame) -> pd.DataFrame:
    """One row per (module, tensor, bit_width): re-estimated BatchNorm before stored, mse before other estimators."""
    rank = pd.DataFrame(
        {
            "batchnorm": table["batchnorm"].map({"re_estimated": 0, "stored": 1, "none": 1}),
            "estimator": table["estimator"].map({"mse": 0, "percentile": 1, "minmax": 2}),
            "granularity": table["granularity"].map({"per_head": 0, "per_channel": 1, "per_tensor": 2}),
        }
    )
    best = table.loc[rank.sort_values(["batchnorm", "estimator", "granularity"], kind="stable").index]
    return best.drop_duplicates(["module", "tensor", "bit_width"]).sort_index()


def _sensitivity_summary(table: pd.DataFrame) -> str:
    shown = preferred_rows(table)
    value = "delta_loss" if shown["delta_loss"].notna().any() else "kl"
    lowest = shown[shown["bit_width"] == shown["bit_width"].min()].nlargest(8, value)
    columns = ["module", "tensor", "bit_width", "delta_loss", "delta_loss_se", "delta_top1", "kl", "sqnr_db"]
    text = lowest[columns].to_string(index=False, float_format=lambda value: f"{value:.4g}")
    if (shown[value].abs() <= 0).all():
        text += "\nEvery change is 0: are residual branches zero-initialised (timm: zero_init_last)?"
    return f"Most sensitive at {lowest['bit_width'].iloc[0]} bit:\n{text}"


def run_compare(runs: Sequence[Path], out: Path, *, quiet: bool = False) -> None:
    """`qvw compare`: statistics of several runs side by side, as tables and figures in `out`."""
    if len(runs) < 2:
        raise InputError("one run was given; name at least two run folders to compare.")
    loaded: list[comparison.Run] = []
    for path in runs:
        run = Run(path)
        stats, figures = run.read_table("stats"), run.read_json("variation")
        loaded.append((_unique_name(path, [name for name, _, _ in loaded]), stats, figures))
    table = comparison.compare(loaded)
    write_bytes(out / "comparison.csv", table.to_csv(index=False).encode())
    for tensor in ("weight", "input"):
        frame = comparison.depth_frame(loaded, tensor=tensor)
        if frame.empty:
            continue
        write_bytes(out / f"depth_{tensor}.csv", frame.to_csv(index=False).encode())
        _save(panels.depth_figure(frame, tensor), out / f"variation_{tensor}")
    if not quiet:
        models = [name for name, _, _ in loaded]
        shown = table[["tensor", "measure", *models]]
        click.echo(shown.to_string(index=False, float_format=lambda value: f"{value:.4g}"))
        click.echo(f"comparison.csv and figures in {out}")


def _unique_name(path: Path, taken: Sequence[str]) -> str:
    """The run folder's name, which the user chose; with its parent's where two are named alike."""
    path = path.resolve()
    return path.name if path.name not in taken else f"{path.parent.name}/{path.name}"
