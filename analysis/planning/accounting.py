"""What a plan costs: mean bits, bytes and BitOps, by one accounting for every plan and baseline.

`stored` is the network as a file holds it, from which sizes are exact; of tables that were made without it only its
number of parameters, and then header and buffers are not counted.

`cost` is the frame of cost.parquet, one row per site: module, tensor, numel (of the weight, or of one image's
activation), elements_per_image (NaN for weights), macs (per image, of the matrix products that the site takes part
in), edges (the `module:tensor` it is multiplied with), channels, heads (0 if none), kind, order, quantizable, pinned.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from analysis.planning.user_tables import LATENCY_COLUMNS
from quant.bit_plan import PlannedSite, PlanTotals, check_known_sites
from quant.errors import InputError
from quant.site import PRODUCT, Site
from quant.stored_model import StoredModel

Stored = StoredModel | int

FLOAT_BITS = 32  # of a tensor that the plan does not name
FLOAT_BYTES = 4  # of a scale, an offset, and a parameter outside the plan
PICOSECONDS = 10**9  # in a millisecond; latencies are added in whole picoseconds
_MOST_MS = 10**6  # of a site: the sum over a network still fits into int64


def cost_rows(cost: pd.DataFrame) -> dict[Site, Any]:
    """The rows of `cost` as named tuples by site, in network order."""
    return {Site(row.module, row.tensor): row for row in cost.itertuples(index=False)}


def edges(cost: pd.DataFrame) -> pd.DataFrame:
    """The matrix products between two sites, each once.

    Columns: site_a, site_b (as `module:tensor`), macs (per image). site_a is the weight, the query or the attention
    map; its row gives the MACs, because one input meets the three parts of a fused qkv weight. For a weight that
    several layers share it is that of the first, which has the bits. ValueError if a product is known from its other
    side alone.
    """
    macs_of: dict[tuple[str, str], int] = {}
    known: set[tuple[str, str]] = set()
    other_side: set[tuple[str, str]] = set()
    for site, row in cost_rows(cost).items():
        if site.is_weight or site.tensor in ("query", "attention", PRODUCT):
            same = getattr(row, "same_tensor", None)
            owner = same if site.is_weight and isinstance(same, str) else str(site)
            macs_of.update({(owner, partner): int(row.macs) for partner in row.edges})
            known.update((str(site), partner) for partner in row.edges)
        else:
            other_side.update((partner, str(site)) for partner in row.edges)
    missing = sorted(other_side - known)
    if missing:
        raise ValueError(f"`cost` lists the product of {missing[0][1]} with {missing[0][0]} on one side only.")
    return pd.DataFrame(
        [(a, b, macs) for (a, b), macs in macs_of.items()], columns=pd.Index(["site_a", "site_b", "macs"])
    )


def elements(site: Site, row: Any) -> int:
    """Elements that the site's bits are paid for: of the weight, or of the activation of one image."""
    return int(row.numel if site.is_weight else row.elements_per_image)


def site_bytes(planned: PlannedSite, row: Any) -> int:
    """Bytes that a planned site adds to the stored model: packed weight codes, scales and offsets."""
    scales = {"per_tensor": 1, "per_channel": row.channels, "per_head": row.heads}[planned.granularity]
    if not scales > 0:  # NaN too
        raise InputError(
            f"{planned.site} has no {planned.granularity.removeprefix('per_')}s to give a scale each "
            f"({planned.granularity}). Plan it per_tensor, or plan again for this model."
        )
    codes = (elements(planned.site, row) * planned.bit_width + 7) // 8 if planned.site.is_weight else 0
    return codes + FLOAT_BYTES * int(scales) * (2 if planned.offset else 1)


def activation_bytes(planned: PlannedSite, row: Any) -> int:
    """Bytes of a planned activation of one image, packed; 0 for a weight."""
    return 0 if planned.site.is_weight else (elements(planned.site, row) * planned.bit_width + 7) // 8


def latency_table(latency: pd.DataFrame, cost: pd.DataFrame) -> dict[tuple[Site, int], int]:
    """Whole picoseconds by site and bit-width, from a frame with LATENCY_COLUMNS, rounded to the nearest.

    InputError: a column is missing, a site is not in `cost` (it would cost nothing under its right name), a bit-width
    is not whole, a time is not a number >= 0, or a site has two times at one bit-width.
    """
    missing = [name for name in LATENCY_COLUMNS if name not in latency.columns]
    if missing:
        raise InputError(
            f"The latency table has no column {missing[0]}. It needs {', '.join(LATENCY_COLUMNS)} (one row per site "
            "and bit-width)."
        )
    names = latency[["module", "tensor"]].fillna("").astype(str)  # the network itself has no name
    sites = [Site(*key) for key in names.itertuples(index=False, name=None)]
    check_known_sites(sites, cost_rows(cost), what="the latency table")
    numbers = latency[["bit_width", "milliseconds"]].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=float)
    table: dict[tuple[Site, int], int] = {}
    for i, (site, (bits, milliseconds)) in enumerate(zip(sites, numbers, strict=True)):
        if not (0 < bits <= FLOAT_BITS and bits % 1 == 0):
            raise InputError(
                f"The latency table has {site} at {latency['bit_width'].iloc[i]} bits; expected a whole number from 1 "
                f"to {FLOAT_BITS}. Fix the row."
            )
        if not 0 <= milliseconds <= _MOST_MS:
            raise InputError(
                f"The latency of {site} at {bits:g} bits is {latency['milliseconds'].iloc[i]}; expected milliseconds, "
                f"0 to {_MOST_MS}. Fix the row."
            )
        if (site, int(bits)) in table:
            raise InputError(f"{site} has two latencies at {bits:g} bits. Keep one row of them.")
        table[site, int(bits)] = round(milliseconds * PICOSECONDS)
    return table


def site_latency(planned: PlannedSite, latency: Mapping[tuple[Site, int], int]) -> int:
    """Picoseconds of a planned site by the table; InputError if it has no row."""
    try:
        return latency[planned.site, planned.bit_width]
    except KeyError as error:
        raise InputError(
            f"The latency table has no row for {planned.site} at {planned.bit_width} bits. Add it, "
            "or do not offer the bit-width."
        ) from error


def bitops(bits: Mapping[Site, int], cost: pd.DataFrame) -> int:
    """Sum over matrix products of MACs times the bits of both operands, per image; 32 bits outside `bits`."""
    return sum(
        macs * bits.get(Site.parse(a), FLOAT_BITS) * bits.get(Site.parse(b), FLOAT_BITS)
        for a, b, macs in edges(cost).itertuples(index=False)
    )


def totals(
    plan_sites: Iterable[PlannedSite], cost: pd.DataFrame, stored: Stored, latency: pd.DataFrame | None = None
) -> PlanTotals:
    """The cost of quantizing `plan_sites` and nothing else, pinned sites included.

    Mean bits are over the elements of the planned sites; bytes are those of the packed file: ceil(numel * bits / 8) per
    weight, 4 per scale or offset, the parameters outside the plan, buffers and header; activation bytes count
    ceil(elements * bits / 8) per planned activation of one image. The latency is the sum over the planned sites, by a
    frame with LATENCY_COLUMNS, in whole picoseconds. InputError for a site that `cost` or `latency` lacks, for a
    granularity that it cannot have, and for fewer parameters than planned weights.
    """
    plan_sites, rows = tuple(plan_sites), cost_rows(cost)
    check_known_sites((planned.site for planned in plan_sites), rows)
    weights = [(p, elements(p.site, rows[p.site])) for p in plan_sites if p.site.is_weight]
    activations = [(p, elements(p.site, rows[p.site])) for p in plan_sites if not p.site.is_weight]
    times = None if latency is None else latency_table(latency, cost)
    parameters = stored if isinstance(stored, int) else stored.parameters
    outside = parameters - sum(numel for _, numel in weights)
    if outside < 0:
        raise InputError(
            f"The model has {parameters} parameters by run.json, which is {-outside} less than the planned weights "
            "hold. Correct it there, or measure again: `qvw sensitivity` with --overwrite."
        )
    return PlanTotals(
        weight_bits=_mean_bits(weights),
        activation_bits=_mean_bits(activations),
        size_bytes=stored_bytes(plan_sites, rows, stored),
        activation_bytes=sum(activation_bytes(p, rows[p.site]) for p in plan_sites),
        bitops=bitops({p.site: p.bit_width for p in plan_sites}, cost),
        latency_ms=None if times is None else sum(site_latency(p, times) for p in plan_sites) / PICOSECONDS,
    )


def stored_bytes(plan_sites: Iterable[PlannedSite], rows: Mapping[Site, Any], stored: Stored) -> int:
    """Bytes of the network's file with these sites quantized; `rows` are those of `cost_rows`."""
    plan_sites = tuple(plan_sites)
    own = sum(site_bytes(p, rows[p.site]) for p in plan_sites)  # refuses what no site can have
    if not isinstance(stored, int):
        return stored.size(plan_sites)
    return own + FLOAT_BYTES * (stored - sum(elements(p.site, rows[p.site]) for p in plan_sites if p.site.is_weight))


def _mean_bits(parts: list[tuple[PlannedSite, int]]) -> float | None:
    count = sum(numel for _, numel in parts)
    return sum(p.bit_width * numel for p, numel in parts) / count if count else None
