"""What a plan costs: mean bits, bytes and BitOps, by one accounting for every plan and baseline.

`cost` is the frame of cost.parquet, one row per site: module, tensor, numel (of the weight, or of one image's
activation), elements_per_image (NaN for weights), macs (per image, of the matrix products that the site takes part
in), edges (the `module:tensor` it is multiplied with), channels, heads (0 if none), kind, order, quantizable, pinned.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from quant.bit_plan import PlannedSite, PlanTotals, check_known_sites
from quant.errors import InputError
from quant.site import Site

FLOAT_BITS = 32  # of a tensor that the plan does not name
FLOAT_BYTES = 4  # of a scale, an offset, and a parameter outside the plan


def cost_rows(cost: pd.DataFrame) -> dict[Site, Any]:
    """The rows of `cost` as named tuples by site, in network order."""
    return {Site(row.module, row.tensor): row for row in cost.itertuples(index=False)}


def edges(cost: pd.DataFrame) -> pd.DataFrame:
    """The matrix products between two sites, each once.

    Columns: site_a, site_b (as `module:tensor`), macs (per image). site_a is the weight, the query or the attention
    map; its row gives the MACs, because one input meets the three parts of a fused qkv weight. ValueError if a
    product is known from its other side alone.
    """
    macs_of: dict[tuple[str, str], int] = {}
    other_side: set[tuple[str, str]] = set()
    for site, row in cost_rows(cost).items():
        if site.is_weight or site.tensor in ("query", "attention"):
            macs_of.update({(str(site), partner): int(row.macs) for partner in row.edges})
        else:
            other_side.update((partner, str(site)) for partner in row.edges)
    missing = sorted(other_side - macs_of.keys())
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


def bitops(bits: Mapping[Site, int], cost: pd.DataFrame) -> int:
    """Sum over matrix products of MACs times the bits of both operands, per image; 32 bits outside `bits`."""
    return sum(
        macs * bits.get(Site.parse(a), FLOAT_BITS) * bits.get(Site.parse(b), FLOAT_BITS)
        for a, b, macs in edges(cost).itertuples(index=False)
    )


def totals(plan_sites: Iterable[PlannedSite], cost: pd.DataFrame, parameters: int) -> PlanTotals:
    """The cost of quantizing `plan_sites` and nothing else, pinned sites included.

    Mean bits are over the elements of the planned sites; bytes count ceil(numel * bits / 8) per weight, 4 per scale
    or offset, and 4 per parameter outside the plan, of `parameters` in the whole model. InputError for a site
    that `cost` lacks, or a granularity that it cannot have.
    """
    plan_sites, rows = tuple(plan_sites), cost_rows(cost)
    check_known_sites((planned.site for planned in plan_sites), rows)
    weights = [(p, elements(p.site, rows[p.site])) for p in plan_sites if p.site.is_weight]
    activations = [(p, elements(p.site, rows[p.site])) for p in plan_sites if not p.site.is_weight]
    outside = parameters - sum(numel for _, numel in weights)
    if outside < 0:
        raise ValueError(f"`parameters`={parameters} is {-outside} less than the planned weights hold.")
    return PlanTotals(
        weight_bits=_mean_bits(weights),
        activation_bits=_mean_bits(activations),
        size_bytes=sum(site_bytes(p, rows[p.site]) for p in plan_sites) + FLOAT_BYTES * outside,
        bitops=bitops({p.site: p.bit_width for p in plan_sites}, cost),
    )


def _mean_bits(parts: list[tuple[PlannedSite, int]]) -> float | None:
    count = sum(numel for _, numel in parts)
    return sum(p.bit_width * numel for p, numel in parts) / count if count else None
