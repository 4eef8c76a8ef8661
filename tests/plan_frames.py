"""Options and costs of small networks, for the tests of the planner."""

import math
from typing import Any

import numpy as np
import pandas as pd

from quant.site import Site

# Networks as lists of products: weight x input, one input with three weights, and the two products of attention.
NETWORKS = (
    (("a:weight", "a:input"), ("b:weight", "b:input")),
    (("a:weight", "a:input"), ("b:weight", "b:input"), ("c:weight", "c:input")),
    (("qkv:weight.query", "qkv:input"), ("qkv:weight.key", "qkv:input"), ("qkv:weight.value", "qkv:input")),
    (("attn:query", "attn:key"), ("attn:attention", "attn:value"), ("proj:weight", "proj:input")),
)


def cost_frame(products: Any, numel: dict[str, int], macs: list[int], pinned: tuple[str, ...] = ()) -> pd.DataFrame:
    """cost.parquet of a network: each product is told from both of its sides."""
    rows = []
    for order, name in enumerate(dict.fromkeys(name for product in products for name in product)):
        mine = [i for i, product in enumerate(products) if name in product]
        site = Site.parse(name)
        rows.append(
            {
                "module": site.module,
                "tensor": site.tensor,
                "numel": numel[name],
                "elements_per_image": math.nan if site.is_weight else float(numel[name]),
                "macs": sum(macs[i] for i in mine),
                "edges": [other for i in mine for other in products[i] if other != name],
                "channels": 3,
                "heads": 2,
                "kind": "other",
                "order": order,
                "quantizable": True,
                "pinned": name in pinned,
            }
        )
    return pd.DataFrame(rows)


def option_frame(scores: dict[tuple[str, int], float], offset: tuple[str, ...] = ()) -> pd.DataFrame:
    """The options of a plan from scores by (module:tensor, bit_width)."""
    return pd.DataFrame(
        [
            {
                "module": Site.parse(name).module,
                "tensor": Site.parse(name).tensor,
                "bit_width": bit_width,
                "score": score,
                "granularity": "per_channel" if "weight" in name else "per_tensor",
                "signed": True,
                "offset": name in offset,
            }
            for (name, bit_width), score in scores.items()
        ]
    )


def chain(
    length: int, bit_widths: tuple[int, ...] = (2, 3, 4, 8), seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame, int]:
    """Options and cost of `length` linear layers with scores that fall about fourfold a bit, with noise."""
    generator = np.random.default_rng(seed)
    names = [(f"fc{i}:weight", f"fc{i}:input") for i in range(length)]
    numel = {name: int(10 ** generator.uniform(2, 6)) for pair in names for name in pair}
    macs = [int(10 ** generator.uniform(6, 9)) for _ in names]
    scores = {}
    for name in numel:
        size = 10 ** generator.uniform(-3, 0)
        scores.update({(name, b): size * 4.0**-b + 1e-4 * size * generator.normal() for b in bit_widths})
    weights = sum(count for name, count in numel.items() if "weight" in name)
    return option_frame(scores), cost_frame(names, numel, macs), weights + 1000
