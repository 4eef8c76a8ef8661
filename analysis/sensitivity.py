"""Sensitivity: what the network's answers lose when one site is quantized and all else stays in floating point."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from torch import nn

from quant.batchnorm import batchnorms
from quant.calibrate import granularity_of
from quant.choices import Estimator, Granularity
from quant.site import SiteInfo

SENSITIVITY_COLUMNS = (
    "model", "module", "kind", "order", "tensor", "group", "bit_width", "protocol", "granularity", "signed", "offset",
    "estimator", "batchnorm", "images", "loss", "delta_loss", "delta_loss_se", "top1", "delta_top1", "top1_se", "kl",
    "kl_se", "logit_nmse", "sqnr_db", "sqnr_output_db", "rank_low", "rank_high", "note",
)  # fmt: skip
ROW_KEY = ("module", "tensor", "group", "bit_width", "protocol", "granularity", "estimator", "batchnorm")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Every choice that changes the figures of a sweep.

    `granularity` concerns weights; None is each site's default. `batchnorm` is `stored`, `re-estimate` or `both`.
    """

    bit_widths: tuple[int, ...] = (2, 3, 4, 8)
    estimator: Estimator = "mse"
    granularity: Granularity | None = None
    batchnorm: str = "both"


def sweep_keys(model: nn.Module, sites: Sequence[SiteInfo], config: SweepConfig) -> list[dict[str, Any]]:
    """The rows that a sweep will have, each named by `ROW_KEY`: sites in network order, bit-widths ascending."""
    if not batchnorms(model):
        modes = ["none"]
    else:
        modes = {"stored": ["stored"], "re-estimate": ["re_estimated"], "both": ["stored", "re_estimated"]}[
            config.batchnorm
        ]
    return [
        {
            "module": info.site.module,
            "tensor": info.site.tensor,
            "group": "",
            "bit_width": bit_width,
            "protocol": "single",
            "granularity": granularity_of(info, model, config.granularity),
            "estimator": config.estimator,
            "batchnorm": mode,
        }
        for info in sites
        for bit_width in sorted(config.bit_widths)
        for mode in modes
    ]


def row_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What names a row of the table: two rows of the same key are the same measurement."""
    return tuple(row[name] for name in ROW_KEY)


def sensitivity_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The frame of sensitivity.parquet: sites in network order, bit-widths ascending."""
    ordered = sorted(rows, key=lambda row: (row["order"], row["protocol"], *row_key(row)))
    return pd.DataFrame(ordered, columns=list(SENSITIVITY_COLUMNS))


def preferred_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The single-site rows of one treatment for each site, in the order of the table.

    Where a site was measured in several ways, all its rows are of the first of: BatchNorm re-estimated before stored,
    estimator mse, percentile, minmax, scales per head, per channel, per tensor. Mixing them would compare bit-widths
    that were not measured alike.
    """
    rows = table[(table["protocol"] == "single") & (table["group"] == "")]
    order = {
        "batchnorm": {"re_estimated": 0, "stored": 1, "none": 1},
        "estimator": {"mse": 0, "percentile": 1, "minmax": 2},
        "granularity": {"per_head": 0, "per_channel": 1, "per_tensor": 2},
    }
    rank = sum(rows[name].map(places) * 10**i for i, (name, places) in enumerate(reversed(order.items())))
    return rows[rank == rank.groupby([rows["module"], rows["tensor"]]).transform("min")]
