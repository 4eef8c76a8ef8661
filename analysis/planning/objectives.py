"""What a plan is to keep small: a measured change, its upper confidence bound, a proxy, or the user's own scores."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.planning.plan_request import unknown_objective
from analysis.planning.user_tables import SCORE_COLUMNS, check_csv
from analysis.proxies import PROXY_COLUMNS, PROXY_IMAGE_COLUMNS
from analysis.runs import Run
from analysis.terminal.console import warn
from quant.bit_plan import PlannedSite, check_known_sites
from quant.choices import PROXIES
from quant.errors import InputError, first_line
from quant.site import Site

MEASURED = {
    "divergence": ("divergence", "divergence_se", 1), "kl": ("divergence", "divergence_se", 1),
    "score": ("delta_score", "score_se", -1), "metric": ("delta_metric", "metric_se", -1),
    "loss": ("delta_loss", "delta_loss_se", 1), "top1": ("delta_top1", "top1_se", -1),
    "logit_nmse": ("logit_nmse", "", 1),
}  # fmt: skip
"""Column of sensitivity.parquet, that of its standard error, and the sign that makes it something to minimise."""
UPPER = 1.6449  # standard errors: the value that the truth exceeds once in twenty times
Products = Mapping[tuple[Site, int], NDArray[np.float64]]
_KEY = ["module", "tensor", "bit_width"]
_SCHEME = ["granularity", "estimator"]


def scored(run: Run, rows: pd.DataFrame, objective: str, *, robust: bool, scores: Path | None) -> pd.DataFrame:
    """`rows` (single-site rows of sensitivity.parquet) with a column `score`; those without a score are left out.

    `robust` takes the upper end of a one-sided 95 % interval in place of the measured change: sites that were measured
    badly look worse. `scores` is a CSV file with SCORE_COLUMNS that takes the place of the objective. InputError for an
    unknown objective, one that was not measured, and a file with other columns, unknown sites or no finite number.
    """
    if scores is not None:
        if robust:
            raise InputError("--robust needs a standard error, which --scores has not; leave out one of them.")
        return _own(rows, scores)
    if objective in MEASURED:
        return measured_scores(rows, objective, robust=robust)
    if objective not in PROXIES:
        raise unknown_objective(objective)
    if robust:
        raise InputError(f"--robust needs a standard error, which the proxy {objective} has not; use --objective kl.")
    table = run.read_table("proxies", PROXY_COLUMNS)
    table = table[table["proxy"] == objective]
    if table.empty:
        raise InputError(f"proxies.parquet has no scores of {objective} (it may need labels, or `qvw stats` before).")
    scores_of = table[[*_KEY, *_SCHEME, "score"]].dropna(subset="score")
    found = rows.drop(columns="score", errors="ignore").merge(scores_of, on=[*_KEY, *_SCHEME])  # not the task's score
    lacking = sorted(set(rows["bit_width"]) - set(found["bit_width"]))
    if lacking:
        bits = ",".join(map(str, lacking))
        warn(f"no {objective} at {bits} bits, which are not offered: `qvw sensitivity --bits {bits} --proxies`.")
    if (rows["batchnorm"] == "re_estimated").any():
        warn(f"the sweep re-estimated BatchNorm, of which {objective} knows nothing: on such networks kl ranks better.")
    return found


def measured_scores(rows: pd.DataFrame, objective: str, *, robust: bool) -> pd.DataFrame:
    """`rows` with a column `score`: a column of the table, made something to minimise (`scored`)."""
    if objective not in MEASURED:
        raise InputError(f"the objective {objective!r} is unknown; choose from {', '.join(MEASURED)}.")
    column, error, sign = MEASURED[objective]
    if rows[column].isna().all():
        raise InputError(f"{column} was not measured (samples without labels?); use the objective divergence.")
    if not robust:
        return rows.assign(score=sign * rows[column])
    if not error or rows[error].isna().any():
        raise InputError(f"{objective} has no standard error to be robust against; use the objective divergence, "
                         "and two samples at least.")  # fmt: skip
    return rows.assign(score=sign * rows[column] + UPPER * rows[error])


def products_of(table: pd.DataFrame, options: pd.DataFrame) -> Products:
    """Gradient times error of every sample, (samples,), for each site and bit-width of `options` that has them."""
    kept = options[[*_KEY, *_SCHEME]].merge(table, on=[*_KEY, *_SCHEME])
    return {
        (Site(row.module, row.tensor), int(row.bit_width)): np.asarray(row.products, dtype=np.float64)
        for row in kept.itertuples(index=False)
    }


def site_products(run: Run, options: pd.DataFrame) -> Products:
    """Gradient times error of every image, (images,), for each site and bit-width of `options` that has them.

    InputError for a network whose BatchNorm was re-estimated in the sweep: the products are those of stored statistics,
    and what they predict there is wrong by far.
    """
    if (options["batchnorm"] == "re_estimated").any():
        raise InputError(
            "--interactions come from proxies, which know nothing of re-estimated BatchNorm: here they would mislead. "
            "Plan without them."
        )
    table = run.read_table("proxy_images", PROXY_IMAGE_COLUMNS)
    return products_of(table, options)


def summed(sites: Sequence[PlannedSite], measured: pd.DataFrame, column: str) -> float:
    """What the bits of `sites` change each alone, added up; NaN where one of them was not measured.

    `measured` has at most one row per (module, tensor, bit_width): of sensitivity.parquet, or options made of it.
    """
    if column not in measured:
        return math.nan
    chosen = measured.set_index(_KEY)[column].reindex([(s.module, s.tensor, s.bit_width) for s in sites])
    return math.nan if chosen.isna().any() else float(chosen.sum())


def read_csv(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """A table of the user's; InputError where it cannot be read, or lacks one of `columns`."""
    check_csv(path, columns)
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:  # pandas' errors of parsing are ValueErrors
        raise InputError(f"{path} cannot be read: {first_line(error)}. Expected a CSV file with a header.") from error
    return table


def _own(rows: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Scores of the user; granularity, sign and offset of each site are those of the sweep."""
    table = read_csv(path, SCORE_COLUMNS)
    numbers = table[["bit_width", "score"]].apply(pd.to_numeric, errors="coerce")
    if table.empty:
        raise InputError(f"{path} has no row.")
    bad = table.index[~np.isfinite(numbers).all(axis=1) | (numbers["bit_width"] % 1 != 0)]
    if len(bad):
        raise InputError(f"{path}, line {bad[0] + 2}: bit_width must be a whole, score a finite number.")
    table = table[["module", "tensor"]].join(numbers.astype({"bit_width": int}))
    doubled = table.index[table.duplicated(_KEY)]
    if len(doubled):
        raise InputError(f"{path}, line {doubled[0] + 2} scores a site and bit-width for the second time. Keep one.")
    known = rows.drop_duplicates(["module", "tensor"])
    sites = [Site(*key) for key in known[["module", "tensor"]].itertuples(index=False, name=None)]
    check_known_sites((Site(*key) for key in table[["module", "tensor"]].itertuples(index=False, name=None)), sites)
    kept = ["module", "tensor", "kind", "order", "granularity", "signed", "offset"]
    return table.merge(known[kept], on=["module", "tensor"])
