"""What each site costs: elements, multiply-accumulates, and the sites that it is multiplied with."""

from collections.abc import Mapping, Sequence

import pandas as pd

from quant.site import PRODUCT, Site, SiteInfo

COST_COLUMNS = (
    "module", "tensor", "numel", "elements_per_image", "macs", "edges", "channels", "heads", "kind", "order",
    "quantizable", "pinned",
)  # fmt: skip
SAME = "same_tensor"
"""A column that tables of earlier sweeps lack."""


def cost_table(sites: Sequence[SiteInfo], unplanned: Mapping[str, int] | None = None) -> pd.DataFrame:
    """The frame of cost.parquet: one row per weight, input and tensor inside attention, figures of ONE image.

    `unplanned` are the multiply-accumulates of products that are of no site, by module (`Trace.unplanned`): a row with
    the tensor `product`, without elements and multiplied with itself, which counts at 32 bits.

    `numel` counts elements (a weight's own, an activation's of one image), `elements_per_image` is NaN for weights.
    `macs` are those of the matrix products that the site takes part in; each product (edge) is told from both sides by
    `edges` (`module:tensor`). `channels` and `heads` count the scales of a per_channel or per_head quantizer. Sites
    that are not `quantizable`, or that the user left out, stay in floating point and cost all the same. `same_tensor`
    names an earlier input that is the very same tensor, or of a weight that several layers share the row of the first,
    whose bits it has.
    """
    own = {info.site: info.macs for info in sites}
    rows = []
    for info in sites:
        if not info.edges:  # outputs, and weights that never met an input
            continue
        rows.append(
            {
                "module": info.site.module,
                "tensor": info.site.tensor,
                "numel": info.numel,
                "elements_per_image": float("nan") if info.site.is_weight else float(info.numel),
                "macs": info.macs or sum(own[site] for site in info.edges),
                "edges": [str(site) for site in info.edges],
                "channels": info.channels,
                "heads": info.heads,
                "kind": info.kind,
                "order": info.order,
                "quantizable": info.quantizable,
                "pinned": info.pinned,
                SAME: None if info.same is None else str(info.same),
            }
        )
    for order, (module, macs) in enumerate((unplanned or {}).items(), start=1 + max(i.order for i in sites)):
        rows.append(
            {
                "module": module, "tensor": PRODUCT, "numel": 0, "elements_per_image": 0.0, "macs": macs,
                "edges": [str(Site(module, PRODUCT))], "channels": 0, "heads": 0, "kind": "other", "order": order,
                "quantizable": False, "pinned": False, SAME: None,
            }
        )  # fmt: skip
    return pd.DataFrame(rows, columns=[*COST_COLUMNS, SAME])
