"""Sensitivity: what the network's answers lose when one site is quantized and all else stays in floating point."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from analysis.sweeps.groups import EVERYTHING, groups_of
from analysis.sweeps.rank_bands import rank_bands
from quant.batchnorm import batchnorms
from quant.calibrate import granularity_of
from quant.choices import ESTIMATORS, Estimator, Granularity, Grouping, Protocol
from quant.site import Site, SiteInfo

SENSITIVITY_COLUMNS = (
    "model", "module", "kind", "order", "tensor", "group", "bit_width", "protocol", "granularity", "signed", "offset",
    "estimator", "batchnorm", "source", "task", "images", "divergence", "divergence_se", "loss", "delta_loss",
    "delta_loss_se", "score", "delta_score", "score_se", "metric", "delta_metric", "metric_se", "top1", "delta_top1",
    "top1_se", "kl", "kl_se", "logit_nmse", "sqnr_db", "sqnr_output_db", "rank_low", "rank_high", "note",
)  # fmt: skip
IMAGE_COLUMNS = ("image_divergence", "image_delta_loss")  # of sensitivity_images.parquet
PINNED_BITS = 8
ROW_KEY = ("module", "tensor", "group", "bit_width", "protocol", "granularity", "estimator", "batchnorm")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Every choice that changes the figures of a sweep.

    `granularity` concerns weights; None is each site's default. `batchnorm` is `stored`, `re_estimate` or `both`.
    `single` quantizes one site, or with `groups` the sites of one group, and nothing else; `leave_one_out` everything
    but these. Where everything is quantized, first layer and classifier keep at least `PINNED_BITS`.
    """

    bit_widths: tuple[int, ...] = (2, 3, 4, 8)
    estimator: Estimator = "mse"
    granularity: Granularity | None = None
    batchnorm: str = "both"
    protocol: Protocol = "single"
    groups: Grouping | None = None


def sweep_keys(
    model: nn.Module, sites: Sequence[SiteInfo], config: SweepConfig, *, blocks: Collection[str] = ()
) -> list[dict[str, Any]]:
    """The rows that a sweep will have, each named by `ROW_KEY`: in network order, bit-widths ascending.

    A row of a group has no module; `tensor` says which tensors of the group are meant. With `leave_one_out` comes a
    row of everything quantized, the group `all`; a row that would quantize nothing is left out. `blocks` are the names
    of the network's blocks.
    """
    if not batchnorms(model):
        modes = ["none"]
    else:
        modes = {"stored": ["stored"], "re_estimate": ["re_estimated"], "both": ["stored", "re_estimated"]}[
            config.batchnorm.replace("-", "_")
        ]
    together = {"module": "", "tensor": tensors_of(sites), "granularity": config.granularity or "default"}
    items: list[dict[str, Any]] = []
    if config.protocol == "leave_one_out":
        items.append({**together, "group": EVERYTHING, "protocol": "single"})
    if config.groups is not None:
        names = groups_of(sites, config.groups, blocks=blocks)
        items += [{**together, "group": name, "protocol": config.protocol} for name in names]
    else:
        items += [
            {"module": info.site.module, "tensor": info.site.tensor, "group": "", "protocol": config.protocol,
             "granularity": granularity_of(info, model, config.granularity)}
            for info in sites
        ]  # fmt: skip
    keys = [
        {**item, "bit_width": bit_width, "estimator": config.estimator, "batchnorm": mode}
        for item in items
        for bit_width in sorted(config.bit_widths)
        for mode in modes
    ]
    return [key for key in keys if quantized_sites(key, sites, blocks=blocks)]


def tensors_of(sites: Sequence[SiteInfo]) -> str:
    """Which classes of tensors `sites` hold, such as `weight+input`."""
    classes = ("weight", "input", "query", "key", "value", "attention")
    held = {info.site.tensor.partition(".")[0] for info in sites}
    return "+".join(name for name in classes if name in held)


def quantized_sites(
    key: Mapping[str, Any], sites: Sequence[SiteInfo], *, blocks: Collection[str]
) -> list[tuple[SiteInfo, int]]:
    """The sites that a row of this key quantizes, of all `sites` of the sweep, with their bit-widths."""
    bits, group = key["bit_width"], key["group"]
    if group == EVERYTHING:
        named: list[SiteInfo] = []
    elif group:
        by = group.partition(":")[0]
        named = groups_of(sites, by, blocks=blocks)[group]
    else:
        site = Site(key["module"], key["tensor"])
        named = [info for info in sites if info.site == site]
    if key["protocol"] == "single" and group != EVERYTHING:
        return [(info, bits) for info in named]
    left_out = {info.site for info in named}
    return [(info, max(bits, PINNED_BITS) if info.pinned else bits) for info in sites if info.site not in left_out]


def row_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What names a row of the table: two rows of the same key are the same measurement."""
    return tuple(row[name] for name in ROW_KEY)


def sensitivity_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The frame of sensitivity.parquet: sites in network order, bit-widths ascending, with their rank bands."""
    ordered = _in_order(rows)
    table = pd.DataFrame(ordered, columns=list(SENSITIVITY_COLUMNS))
    values = [row.get("image_divergence") for row in ordered]
    for every in comparable(table).values():
        places = [i for i in every if values[i] is not None]
        if len(places) > 1:
            costs = np.array([values[i] for i in places], dtype=np.float64)
            left_out = table["protocol"].iloc[places[0]] == "leave_one_out"  # what helps most has the least cost
            low, high = rank_bands(-costs if left_out else costs)
            table.loc[places, "rank_low"], table.loc[places, "rank_high"] = low, high
    return table


def images_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The frame of sensitivity_images.parquet: `ROW_KEY`, divergence and growth of the loss of samples, as lists."""
    known = [row for row in _in_order(rows) if row.get("image_divergence") is not None]
    return pd.DataFrame(known, columns=[*ROW_KEY, *IMAGE_COLUMNS])


def _in_order(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(rows, key=lambda row: (row["order"], row["protocol"], *row_key(row)))


def comparable(table: pd.DataFrame) -> dict[tuple[Any, ...], list[int]]:
    """Places of the rows whose figures can be ranked together: one bit-width, protocol, treatment and kind of group.

    A site that was measured at several granularities is ranked once, at that of `preferred_rows`.
    """
    grouped = table["group"] != ""
    kind_of_group = table["group"].str.partition(":")[0]
    together = (table["tensor"] + " " + table["granularity"]).where(grouped, "")
    keys = [table["bit_width"], table["protocol"], table["estimator"], table["batchnorm"], kind_of_group, together]
    order = table["granularity"].map(_PREFERENCE["granularity"]).where(~grouped, 0)
    site = [*keys, table["module"], table["tensor"].where(~grouped, ""), table["group"]]
    ranked = order == order.groupby(site).transform("min")
    found = table.groupby(keys, sort=False).indices
    return {key: [place for place in places.tolist() if ranked.iloc[place]] for key, places in found.items()}


def preferred_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The single-site rows of one treatment for each site, in the order of the table.

    Where a site was measured in several ways, all its rows are of the first of: BatchNorm re-estimated before stored,
    estimator mse, percentile, minmax, scales per head, per channel, per tensor. Mixing them would compare bit-widths
    that were not measured alike.
    """
    rows = table[(table["protocol"] == "single") & (table["group"] == "")]
    if rows.empty:
        return rows
    rank = _preference(rows)
    return rows[rank == rank.groupby([rows["module"], rows["tensor"]]).transform("min")]


def group_rows(table: pd.DataFrame, protocol: Protocol) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of groups in one treatment for each way of grouping, and those of everything quantized in the same.

    Of several, the one with the most classes of tensors, then as `preferred_rows`.
    """
    groups = table[table["group"] != ""]
    rows = groups[(groups["protocol"] == protocol) & (groups["group"] != EVERYTHING)]
    if rows.empty:
        return rows, rows
    rank = _preference(rows) - 1000 * rows["tensor"].str.count(r"\+")
    rows = rows[rank == rank.groupby(rows["group"].str.partition(":")[0]).transform("min")]
    treatment = ["tensor", "granularity", "estimator", "batchnorm"]
    return rows, groups[groups["group"] == EVERYTHING].merge(rows[treatment].drop_duplicates(), on=treatment)


_PREFERENCE = {
    "batchnorm": {"re_estimated": 0, "stored": 1, "none": 1},
    "estimator": {name: place for place, name in enumerate(ESTIMATORS)},
    "granularity": {"default": 0, "per_head": 0, "per_channel": 1, "per_tensor": 2},
}


def _preference(rows: pd.DataFrame) -> pd.Series:
    """A number for the treatment of each row; the least is preferred."""
    places = [rows[name].map(order) * 10**i for i, (name, order) in enumerate(reversed(_PREFERENCE.items()))]
    return places[0] + places[1] + places[2]


def stored_rows(table: pd.DataFrame) -> pd.DataFrame:
    """`preferred_rows` with BatchNorm as stored where it was measured so: what proxies are compared with."""
    stored = table[table["batchnorm"] != "re_estimated"]
    return preferred_rows(table if stored.empty else stored)
