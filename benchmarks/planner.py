"""What a plan costs: seconds to a proven gap, for programs from 300 to 2000 units and for one the size of swin_base.

    python benchmarks/planner.py [--rounds 3]

`300x49` and `2000x49` are layers with 7 x 7 pairs of weight and input bits as one choice, `2000x7` are weights alone;
scores fall about fourfold a bit with noise on top, sizes and MACs spread over four decades. Each is solved under one
budget (BitOps, for `2000x7` mean weight bits) and, where there are activations, under three at once (mean weight bits,
mean activation bits, BitOps). `edges` is `plan_bits` itself on the sites of swin_base (24 blocks, 14 sites each, bits
2, 3, 4, 6 and 8) under BitOps, and with mean weight bits as well. Each round draws a new program from its seed. Aims:
a gap of 1e-4 in 2 s for the first two, of 1e-2 in 10 s for the third. Everything runs on one thread; on a busy machine
the processor's seconds say more than the clock's.

The last line is one JSON object: for each size the slowest median of its budgets in seconds, and its largest gap.
"""

import os
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy

import json
import math
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import click
import numpy as np
import pandas as pd

from analysis.planner import plan_bits
from analysis.planning.accounting import edges
from analysis.solver.choice_program import Budget, Program
from analysis.solver.integer_program import solve
from quant.bit_plan import PlanBudget
from quant.site import Site

BITS = np.arange(2, 9)
SWIN_BASE = ((2, 128, 56), (2, 256, 28), (18, 512, 14), (2, 1024, 7))  # blocks, width, side of the map
WINDOW = 49  # tokens
Timing = tuple[float, float, float]  # seconds of the processor and of the clock, and the proven gap


def layers(units: int, *, activations: bool, seed: int, budgets: int) -> Program:
    """A program of `units` layers with the first `budgets` of BitOps, mean weight bits and mean activation bits.

    An option is a bit-width of the weight, and with `activations` one of the input too.
    """
    random = np.random.default_rng(seed)
    weight, image = (10 ** random.uniform(3, 7, units)).astype(int), (10 ** random.uniform(3, 6, units)).astype(int)
    macs = (10 ** random.uniform(6, 9, units)).astype(int)
    bits_w, bits_a = (grid.ravel() for grid in np.meshgrid(BITS, BITS if activations else [8], indexing="ij"))

    def sensitivity() -> np.ndarray:
        return 10 ** random.uniform(-4, 0, (units, 1))

    score = sensitivity() * 4.0**-bits_w + (sensitivity() * 4.0**-bits_a if activations else 0.0)
    score = score * (1 + 0.02 * random.normal(size=score.shape))
    costs = [
        (np.outer(macs, bits_w * bits_a), 4 * 4),
        (np.outer(weight, bits_w), 4),
        (np.outer(image, bits_a), 5),
    ]
    if not activations:
        costs = [costs[1]]
    per_bit = (macs, weight, image) if activations else (weight,)
    return Program(
        list(score),
        [
            Budget(list(cost), int(each.sum()) * mean)
            for (cost, mean), each in zip(costs[:budgets], per_bit, strict=False)
        ],
    )


def swin_base(seed: int) -> tuple[pd.DataFrame, pd.DataFrame, int]:
    """Options, costs and parameters of swin_base's blocks: 336 sites with drawn scores, 8 products a block."""
    random = np.random.default_rng(seed)
    products: list[tuple[str, str, int]] = []
    numel: dict[str, int] = {}
    for block, (width, side) in enumerate((w, s) for blocks, w, s in SWIN_BASE for _ in range(blocks)):
        name, tokens = f"blocks.{block}", side * side
        for layer, parts, wide_in, wide_out in (
            ("attn.qkv", (".query", ".key", ".value"), width, width),
            ("attn.proj", ("",), width, width),
            ("mlp.fc1", ("",), width, 4 * width),
            ("mlp.fc2", ("",), 4 * width, width),
        ):
            numel[f"{name}.{layer}:input"] = tokens * wide_in
            for part in parts:
                numel[f"{name}.{layer}:weight{part}"] = wide_in * wide_out
                products.append((f"{name}.{layer}:weight{part}", f"{name}.{layer}:input", tokens * wide_in * wide_out))
        numel |= {f"{name}.attn:{tensor}": tokens * width for tensor in ("query", "key", "value")}
        numel[f"{name}.attn:attention"] = tokens * WINDOW * width // 32
        products.append((f"{name}.attn:query", f"{name}.attn:key", tokens * WINDOW * width))
        products.append((f"{name}.attn:attention", f"{name}.attn:value", tokens * WINDOW * width))
    rows, options = [], []
    for order, (key, count) in enumerate(numel.items()):
        site = Site.parse(key)
        partners = [a if b == key else b for a, b, _ in products if key in (a, b)]
        rows.append(
            {
                "module": site.module, "tensor": site.tensor, "numel": count,
                "elements_per_image": math.nan if site.is_weight else float(count),
                "macs": sum(macs for a, b, macs in products if key in (a, b)), "edges": partners,
                "channels": 1, "heads": 1, "kind": "other", "order": order, "quantizable": True, "pinned": False,
            }
        )  # fmt: skip
        size = 10 ** random.uniform(-4, 0)
        options += [
            {
                "module": site.module, "tensor": site.tensor, "bit_width": bits, "granularity": "per_tensor",
                "signed": True, "offset": False, "score": size * 4.0**-bits * (1 + 0.02 * random.normal()),
            }
            for bits in (2, 3, 4, 6, 8)
        ]  # fmt: skip
    parameters = sum(count for key, count in numel.items() if "weight" in key)
    return pd.DataFrame(options), pd.DataFrame(rows), parameters


def timed_layers(units: int, *, activations: bool, budgets: int, gap: float, seed: int) -> Timing:
    """Processor seconds, seconds by the clock and proven gap of one program of layers."""
    program = layers(units, activations=activations, seed=seed, budgets=budgets)
    start = time.process_time(), time.perf_counter()
    found = solve(program, relative_gap=gap, time_limit=60)
    end = time.process_time(), time.perf_counter()
    assert program.fits(found.choice)
    total = program.total(found.choice)
    return end[0] - start[0], end[1] - start[1], (total - found.lower_bound) / abs(total)


def timed_edges(*, budgets: int, gap: float, seed: int) -> Timing:
    """Seconds and proven gap of plan_bits on swin_base's sites: BitOps of 4 x 4 bits, and mean weight bits of 4."""
    options, cost, parameters = swin_base(seed)
    bitops = int(edges(cost)["macs"].sum()) * 16
    budget = PlanBudget(bitops=bitops, weight_bits=4.0 if budgets > 1 else None)
    start = time.process_time(), time.perf_counter()
    solution = plan_bits(options, cost, budget=budget, stored=parameters, relative_gap=gap)
    return time.process_time() - start[0], time.perf_counter() - start[1], solution.gap


@click.command(help=__doc__)
@click.option("--rounds", default=3, show_default=True)
def main(rounds: int) -> None:
    """Print one line a program and a JSON object."""
    runs: list[tuple[str, int, float, Callable[..., Timing]]] = []
    for name, units, activations, gap in (
        ("300x49", 300, True, 1e-4), ("2000x7", 2000, False, 1e-4), ("2000x49", 2000, True, 1e-2),
    ):  # fmt: skip
        runs += [
            (name, budgets, gap, partial(timed_layers, units, activations=activations))
            for budgets in ((1, 3) if activations else (1,))
        ]
    runs += [("edges", budgets, 1e-4, timed_edges) for budgets in (1, 2)]
    result: dict[str, dict[str, float]] = {}
    print(f"{'program':9}{'budgets':>8}{'gap asked':>11}{'seconds (range)':>24}{'of processor':>14}{'largest gap':>13}")
    for name, budgets, gap, run in runs:
        busy, seconds, gaps = zip(*(run(budgets=budgets, gap=gap, seed=seed) for seed in range(rounds)), strict=True)
        spread = f"{median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
        print(f"{name:9}{budgets:8}{gap:11.0e}{spread:>24}{median(busy):14.2f}{max(gaps):13.1e}", flush=True)
        before = result.setdefault(name, {"seconds": 0.0, "gap": 0.0})
        result[name] = {
            "seconds": round(max(before["seconds"], median(seconds)), 3),
            "gap": float(f"{max(before['gap'], *gaps):.2g}"),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
