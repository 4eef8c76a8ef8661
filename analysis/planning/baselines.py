"""Plans to compare with, at the same budget, layout, ties and accounting: greedy, worst-first, random, uniform."""

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.planner import read_options
from analysis.planning import accounting
from analysis.planning.budgets import tied_units
from quant.bit_plan import PlanBudget, PlannedSite, PlanTotals
from quant.choices import ALLOWED_BIT_WIDTHS
from quant.site import Site

Choose = Callable[[Sequence[float]], int]
"""Which of the steps is taken next, by what each costs in score for what it saves."""


def greedy(rates: Sequence[float]) -> int:
    """The step that costs least for what it saves."""
    return int(np.argmin(rates))


def worst_first(rates: Sequence[float]) -> int:
    """The step that costs most: what a plan must beat that reads the sensitivities the wrong way round."""
    return int(np.argmax(rates))


def random_choice(seed: int) -> Choose:
    """Any step, by a generator of its own."""
    generator = np.random.default_rng(seed)
    return lambda rates: int(generator.integers(len(rates)))


def within_budget(
    options: pd.DataFrame,
    cost: pd.DataFrame,
    choose: Choose,
    *,
    budget: PlanBudget,
    stored: accounting.Stored,
    ties: Sequence[Collection[Site]] = (),
    latency: pd.DataFrame | None = None,
) -> tuple[PlannedSite, ...] | None:
    """A plan that starts with the most bits everywhere and takes one step down at a time until it is within `budget`.

    `options` and `cost` are those of planner.plan_bits. Steps are those of sites on which an exceeded budget depends;
    tied sites step together. None where the least bits still exceed it.
    """
    rows = accounting.cost_rows(cost)
    planned, scores = read_options(options, cost)
    units = tied_units(planned, scores, ties)
    place = [len(unit.bits) - 1 for unit in units]

    def chosen() -> tuple[PlannedSite, ...]:
        bits = {site: unit.bits[k] for unit, k in zip(units, place, strict=True) for site in unit.sites}
        return tuple(by_bits[bits[site]] for site, by_bits in planned.items())

    while exceeded := _exceeded(accounting.totals(chosen(), cost, stored, latency), budget):
        steps, rates = [], []
        for u, (unit, k) in enumerate(zip(units, place, strict=True)):
            saved = sum(_per_bit(site, rows[site], exceeded) for site in unit.sites)
            if k > 0 and saved:
                steps.append(u)
                rates.append(float(unit.score[k - 1] - unit.score[k]) / (saved * (unit.bits[k] - unit.bits[k - 1])))
        if not steps:
            return None
        place[steps[choose(rates)]] -= 1
    return chosen()


def uniform(options: pd.DataFrame, cost: pd.DataFrame, weight_bits: int, activation_bits: int) -> list[PlannedSite]:
    """One bit-width for the weights of `options` and one for the activations, but for sites with a single option.

    These are pinned. What a plan costs needs no score, so the bit-widths need not be among the options.
    """
    plan = []
    for site, open_to in read_options(options, cost)[0].items():
        bits, one = weight_bits if site.is_weight else activation_bits, next(iter(open_to.values()))
        plan.append(one if len(open_to) == 1 else replace(one, bit_width=bits))
    return plan


def largest_uniform(
    options: pd.DataFrame,
    cost: pd.DataFrame,
    *,
    budget: PlanBudget,
    stored: accounting.Stored,
    latency: pd.DataFrame | None = None,
    any_width: bool = False,
) -> tuple[PlannedSite, ...] | None:
    """The uniform plan within `budget` with the most weight bits, then the most activation bits; None where none is.

    Of the bit-widths that all sites have which are not pinned; with `any_width` of all from the least to the most of
    these, for which there may be no score.
    """
    free = [(site, set(open_to)) for site, open_to in read_options(options, cost)[0].items() if len(open_to) > 1]
    widths = [
        sorted(set.intersection(*chosen), reverse=True) if chosen else [0]
        for chosen in ([bits for site, bits in free if site.is_weight == weights] for weights in (True, False))
    ]
    if any_width:
        widths = [
            [bits for bits in sorted(ALLOWED_BIT_WIDTHS, reverse=True) if offered and offered[-1] <= bits <= offered[0]]
            or offered
            for offered in widths
        ]
    for weight_bits, activation_bits in itertools.product(*widths):
        plan = uniform(options, cost, weight_bits, activation_bits)
        if not _exceeded(accounting.totals(plan, cost, stored, latency), budget):
            return tuple(plan)
    return None


def _exceeded(totals: PlanTotals, budget: PlanBudget) -> set[str]:
    return {name for name, limit in budget.as_dict().items() if (getattr(totals, name, None) or 0) > limit}


def _per_bit(site: Site, row: Any, exceeded: set[str]) -> float:
    """What a bit less of a site saves of the exceeded budgets, in elements, or in products where those are counted."""
    saved = 0.0
    if exceeded & ({"weight_bits", "size_bytes"} if site.is_weight else {"activation_bits", "activation_bytes"}):
        saved += accounting.elements(site, row)
    if exceeded & {"bitops", "latency_ms"}:
        saved += row.macs
    return saved
