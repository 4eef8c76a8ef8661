"""A plan as a plain table: one row per site in network order, with what it holds and what it takes."""

import pandas as pd

from analysis.planning import accounting
from quant.bit_plan import BitPlan, check_known_sites

PLAN_CSV_COLUMNS = (
    "module", "tensor", "kind", "bit_width", "granularity", "signed", "offset", "numel", "bytes",
)  # fmt: skip


def plan_frame(plan: BitPlan, cost: pd.DataFrame) -> pd.DataFrame:
    """The sites of a plan in network order; columns PLAN_CSV_COLUMNS.

    `cost` is the frame of cost.parquet. `numel` counts elements: a weight's own, an activation's of one image. `bytes`
    are those in the stored model, by analysis/planning/accounting.py: packed codes of a weight, scales and offsets of
    both. InputError for a site that `cost` lacks.
    """
    rows = accounting.cost_rows(cost)
    check_known_sites((planned.site for planned in plan.sites), rows)
    found = [
        {
            "module": planned.module,
            "tensor": planned.tensor,
            "kind": rows[planned.site].kind,
            "bit_width": planned.bit_width,
            "granularity": planned.granularity,
            "signed": planned.signed,
            "offset": planned.offset,
            "numel": int(rows[planned.site].numel),
            "bytes": accounting.site_bytes(planned, rows[planned.site]),
            "order": rows[planned.site].order,
        }
        for planned in plan.sites
    ]
    frame = pd.DataFrame(found, columns=[*PLAN_CSV_COLUMNS, "order"])
    return frame.sort_values("order", kind="stable", ignore_index=True).drop(columns="order")
