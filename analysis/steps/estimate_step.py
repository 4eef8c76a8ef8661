"""An estimate of sensitivities in a run folder: the tables of a sweep, `source` telling them apart."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.estimate import SOURCE
from analysis.sensitivity import row_key
from analysis.session.session import Session
from analysis.steps.proxy_step import with_earlier
from analysis.steps.sensitivity_step import FILES, write_rows, written_rows
from analysis.sweeps.proxy_correlation import SITE_KEY

Estimated = tuple[list[dict[str, Any]], pd.DataFrame]


def estimate_sensitivity_in(
    session: Session, keys: Sequence[Mapping[str, Any]], estimate: Callable[[], Estimated]
) -> Estimated:
    """The rows of `keys` and their products, read from the run folder, or of `estimate` and written there.

    A folder with measured sensitivities is refused: a plan would mix them.
    """
    run, inputs = session.run, {"source": SOURCE}
    if session.overwrite or not run.is_done("sensitivity", {**session.inputs, **inputs}) or _missing(session, keys):
        with session.step("sensitivity", FILES, {}, inputs):
            rows, products = estimate()
            rows_by_key = {row_key(row): row for row in [*written_rows(run), *rows]}
            write_rows(session, list(rows_by_key.values()))
            run.write_table("proxy_images", with_earlier(session, "proxy_images", products, SITE_KEY))
        return rows, products
    wanted = {row_key(key) for key in keys}
    products = run.read_table("proxy_images")
    asked = pd.DataFrame([*keys])[SITE_KEY].drop_duplicates()
    return [row for row in written_rows(run) if row_key(row) in wanted], products.merge(asked, on=SITE_KEY)


def _missing(session: Session, keys: Sequence[Mapping[str, Any]]) -> bool:
    there = {row_key(row) for row in written_rows(session.run)}
    return any(row_key(key) not in there for key in keys)
