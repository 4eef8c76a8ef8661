"""What the trainings of an ablation came to: a row a training, and a row an arm with its interval over seeds."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy import stats

from analysis.runs import Run
from analysis.storage.columns import HISTORY_COLUMNS, OSCILLATION_COLUMNS
from analysis.training.ablation_config import Ablation, Job
from quant.errors import InputError

RESULT_COLUMNS = (
    "subject", "arm", "seed", "weight_bits", "activation_bits", "val_images", "top1_start", "top1_last", "top1_best",
    "best_epoch", "loss_last", "oscillating", "oscillating_ema", "steps", "seconds", "images_per_second",
)  # fmt: skip
SUMMARY_COLUMNS = (
    "subject", "arm", "title", "against", "seeds", "weight_bits", "activation_bits", "top1_start", "top1_last",
    "top1_low", "top1_high", "top1_best", "ahead", "ahead_low", "ahead_high", "oscillating", "images_per_second",
)  # fmt: skip

_MEANS = ("weight_bits", "activation_bits", "top1_start", "top1_last", "top1_best", "oscillating", "images_per_second")


def result(run: Run, job: Job) -> dict[str, object]:
    """The row of a finished training: accuracies are fractions of the validation images.

    `top1_start` is that of the calibrated network before its first step, `top1_best` that of the best epoch, which was
    chosen on the same images and is therefore a little too good; `oscillating` the share of the weights of at most four
    bits after the last step.
    """
    history = run.read_table(f"qat-{job.name}/history", HISTORY_COLUMNS)
    val = history[history["split"] == "val"].sort_values("step", kind="stable")
    row: dict[str, object] = {
        "subject": job.subject, "arm": job.arm, "seed": job.seed,
        "top1_start": val["top1"].iloc[0], "top1_last": val["top1"].iloc[-1], "top1_best": val["top1"].iloc[1:].max(),
        "best_epoch": int(val["epoch"].iloc[1:].iloc[val["top1"].iloc[1:].argmax()]), "loss_last": val["loss"].iloc[-1],
        "steps": int(history["step"].max()), "seconds": val["seconds"].iloc[-1],
        "images_per_second": val["images"].iloc[-1] / max(val["seconds"].iloc[-1], 1e-9),
    }  # fmt: skip
    verify = run.read_table("verify")
    rows = verify[verify["plan"] == f"qat-{job.name}"]
    if rows.empty:
        raise InputError(
            f"{run.path / 'verify.parquet'} has no row of qat-{job.name} any more. Measure it again: `qvw eval --run "
            f"{run.path} --checkpoint {run.path / f'qat-{job.name}'}`."
        )
    measured = rows.iloc[-1]
    row |= {name: measured[name] for name in ("weight_bits", "activation_bits")} | {"val_images": measured["images"]}
    oscillation = run.read_table(f"qat-{job.name}/oscillation", OSCILLATION_COLUMNS)
    last = oscillation[oscillation["step"] == oscillation["step"].max()]
    for name in ("oscillating", "oscillating_ema"):
        share = np.average(last[name], weights=last["weights"]) if len(last) else float("nan")
        row[name] = float(share)
    return row


def results_frame(rows: Iterable[dict[str, object]]) -> pd.DataFrame:
    """The rows of `result` as a frame, columns RESULT_COLUMNS."""
    return pd.DataFrame(list(rows), columns=list(RESULT_COLUMNS))


def summarized(results: pd.DataFrame, ablation: Ablation) -> pd.DataFrame:
    """A row for each network and arm that has results, columns SUMMARY_COLUMNS; figures are means over seeds.

    Intervals are 95 % by Student's t over the seeds, NaN for one seed: they hold for other seeds on these validation
    images. `ahead` is top1_last minus that of the arm `against` with the same seed, over the seeds that both have.
    """
    rows = []
    for name, subject in ablation.subjects.items():
        own = results[results["subject"] == name]
        for arm in ablation.arms if subject.arms is None else subject.arms:
            found = own[own["arm"] == arm].set_index("seed")
            if found.empty:
                continue
            against = ablation.arms[arm].against or ablation.baseline
            base = own[own["arm"] == against].set_index("seed")["top1_last"]
            _, low, high = mean_and_interval(found["top1_last"])
            ahead, ahead_low, ahead_high = mean_and_interval((found["top1_last"] - base).dropna())
            rows.append(
                {column: found[column].mean() for column in _MEANS}
                | {"subject": name, "arm": arm, "title": ablation.arms[arm].title, "against": against}
                | {"seeds": len(found), "top1_low": low, "top1_high": high}
                | {"ahead": ahead, "ahead_low": ahead_low, "ahead_high": ahead_high}
            )
    return pd.DataFrame(rows, columns=list(SUMMARY_COLUMNS))


def mean_and_interval(values: pd.Series) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % interval by Student's t with n - 1 degrees of freedom; NaN where there is none."""
    values = values.dropna()
    if values.empty:
        return (float("nan"),) * 3
    mean = float(values.mean())
    if len(values) == 1:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
    return mean, mean - half, mean + half


def verdicts(summary: pd.DataFrame, ablation: Ablation) -> list[str]:
    """A sentence for each network and compared arm: which arms help, which harm, and which cannot be told.

    Each difference has its own 95 % interval: of twenty arms without effect one is told to have some.
    """
    lines = []
    for (name, against), rows in summary.groupby(["subject", "against"], sort=False):
        others = rows[(rows["arm"] != against) & rows["ahead"].notna()]
        # Equal differences of a few hundred images are chance; of shares of images they are equal but for rounding.
        spread = others["ahead_high"] - others["ahead_low"] > 1e-9
        groups = {
            "better": others[spread & (others["ahead_low"] > 0)],
            "worse": others[spread & (others["ahead_high"] < 0)],
            "not significantly different": others[
                ~spread & others["ahead_low"].notna() | (others["ahead_low"] <= 0) & (others["ahead_high"] >= 0)
            ],
            "one seed only": others[others["ahead_low"].isna()],
        }
        told = [f"{what}: {', '.join(_with_points(row) for row in some.itertuples())}"
                for what, some in groups.items() if len(some)]  # fmt: skip
        if told:
            title = ablation.arms[against].title
            lines.append(f"{name}, against {title} (points, 95 % over seeds): {'; '.join(told)}.")
    return lines


def _with_points(row: object) -> str:
    ahead, half = 100 * row.ahead, 50 * (row.ahead_high - row.ahead_low)  # type: ignore[attr-defined]
    interval = "" if np.isnan(half) else f" ± {half:.2f}"
    return f"{row.title} {ahead:+.2f}{interval}"  # type: ignore[attr-defined]
