"""What the planner chooses between, and its budgets in whole numbers: units of tied sites, and what they cost."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.planning import accounting
from analysis.planning.budget_kinds import BUDGET_KINDS, amount, in_bytes
from analysis.solver.choice_program import Budget
from quant.bit_plan import PlanBudget, PlannedSite, check_known_sites
from quant.errors import InputError
from quant.site import Site

_OF_ONE_SORT = ("weight_bits", "activation_bits", "activation_bytes")  # these count weights, or activations, alone


@dataclass(frozen=True)
class Unit:
    """Sites that share one choice, with the bit-widths open to them in rising order and the score of each."""

    sites: tuple[Site, ...]
    bits: tuple[int, ...]
    score: NDArray[np.float64]


@dataclass(frozen=True)
class PlanLimit:
    """A budget of the plan as the solver gets it: (constant + what `costs` counts) / per <= limit."""

    name: str
    limit: float
    costs: Budget
    constant: int
    per: int

    @property
    def words(self) -> str:
        """The limit as a message shows it, such as `3 mean weight bits`."""
        return amount(self.name, self.limit, digits=10)

    def figure(self, spent: int) -> str:
        """The plan's figure, rounded up, for what `costs` counts: asking for it is asking for enough."""
        if in_bytes(self.name, self.limit):
            return f"{math.ceil(Fraction(self.constant + spent, self.per)):,}"
        figure = Fraction(self.constant + spent, self.per * int(BUDGET_KINDS[self.name].unit))
        return f"{math.ceil(figure * 10**6) / 10**6:.10g}"


def tied_units(
    planned: Mapping[Site, Mapping[int, PlannedSite]],
    scores: Mapping[tuple[Site, int], float],
    ties: Iterable[Collection[Site]],
) -> list[Unit]:
    """Tied sites as one unit each (ties that overlap are one), the other sites alone, in network order."""
    group_of = {site: [site] for site in planned}
    for tie in ties:
        check_known_sites(tie, planned)
        merged = list(dict.fromkeys(member for site in tie for member in group_of[site]))
        group_of.update(dict.fromkeys(merged, merged))
    units = []
    for group in {id(group): group for group in group_of.values()}.values():
        bits = tuple(sorted(set.intersection(*(set(planned[site]) for site in group))))
        if not bits:
            raise InputError(
                f"The tied sites {', '.join(map(str, group[:4]))} have no bit-width in common. "
                "Untie or unpin one of them, or measure the bit-width that is missing."
            )
        units.append(Unit(tuple(group), bits, np.array([math.fsum(scores[s, b] for s in group) for b in bits])))
    return units


def fixed_bytes(
    planned: Mapping[Site, Mapping[int, PlannedSite]], cost: pd.DataFrame, stored: accounting.Stored
) -> tuple[int, int]:
    """The least and the most bytes of the file beside codes, scales and offsets, whatever bits are chosen.

    They differ by the digits of numbers in the header, which grow with what the file holds.
    """
    rows = accounting.cost_rows(cost)
    found = []
    for pick, some in ((min, all), (max, any)):
        sites = [
            replace(options[pick(options)], offset=some(option.offset for option in options.values()))
            for options in planned.values()
        ]
        own = sum(accounting.site_bytes(one, rows[one.site]) for one in sites)
        found.append(accounting.stored_bytes(sites, rows, stored) - own)
    return found[0], found[1]


def binding_limits(
    units: Sequence[Unit],
    planned: Mapping[Site, Mapping[int, PlannedSite]],
    cost: pd.DataFrame,
    budget: PlanBudget,
    fixed_bytes: int,
    latency: Mapping[tuple[Site, int], int] | None = None,
) -> list[PlanLimit]:
    """The budgets that can bind, in whole numbers; InputError for one that no plan can meet.

    `fixed_bytes` are those of the file that no choice changes, `latency` is that of accounting.latency_table.
    """
    limits = [_limit(name, float(limit), units, planned, cost, fixed_bytes, latency) for name, limit in
              budget.as_dict().items()]  # fmt: skip
    for one in limits:
        every = [*one.costs.own, *one.costs.pairs.values()]
        cheapest = sum(int(costs.min()) for costs in every)
        if one.costs.room < cheapest:
            raise InputError(
                f"No plan is within {one.words}: the cheapest has {one.figure(cheapest)}, "
                f"the most expensive {one.figure(one.costs.most_expensive)}, with these pins, bounds, ties and "
                "candidates. "
                "Raise the budget, offer a smaller bit-width, or narrow the choice less (layout='strict')."
            )
    return [one for one in limits if one.costs.room < one.costs.most_expensive]


def _limit(
    name: str,
    limit: float,
    units: Sequence[Unit],
    planned: Mapping[Site, Mapping[int, PlannedSite]],
    cost: pd.DataFrame,
    fixed_bytes: int,
    latency: Mapping[tuple[Site, int], int] | None,
) -> PlanLimit:
    rows = accounting.cost_rows(cost)

    def bits_paid(option: PlannedSite, *, weights: bool) -> int:
        paid = option.site.is_weight == weights
        return option.bit_width * accounting.elements(option.site, rows[option.site]) if paid else 0

    def per_unit(cost_of: Callable[[PlannedSite], int]) -> list[NDArray[np.int64]]:
        return [
            np.array([sum(cost_of(planned[site][b]) for site in unit.sites) for b in unit.bits], dtype=np.int64)
            for unit in units
        ]

    pairs: dict[tuple[int, int], NDArray[np.int64]] = {}
    constant, per = 0, 1
    acts_on = [site for site in planned if name not in _OF_ONE_SORT or site.is_weight == (name == "weight_bits")]
    if not acts_on:
        raise InputError(f"The budget {name}={limit:g} has no site to act on. Measure such sites or leave it out.")
    if name == "bitops":
        own, pairs, constant = _bitops(units, cost)
    elif name == "size_bytes":
        own = per_unit(lambda option: accounting.site_bytes(option, rows[option.site]))
        constant = fixed_bytes
    elif name == "activation_bytes":
        own = per_unit(lambda option: accounting.activation_bytes(option, rows[option.site]))
    elif name == "latency_ms":
        if latency is None:
            raise InputError(f"The budget latency_ms={limit:g} needs a latency table. Give one or leave it out.")
        table, per = latency, accounting.PICOSECONDS
        own = per_unit(lambda option: accounting.site_latency(option, table))
    else:
        own = per_unit(partial(bits_paid, weights=name == "weight_bits"))
        per = sum(accounting.elements(site, rows[site]) for site in acts_on)
    room = math.floor(Fraction(limit) * per) - constant
    costs = Budget(own, room, pairs)
    # A mean is a rounded quotient: 29/10 is within 2.9, although the float 2.9 is a little less.
    while per > 1 and room < costs.most_expensive and (constant + room + 1) / per <= limit:
        room += 1
    return PlanLimit(name, limit, Budget(own, room, pairs), constant, per)


def _bitops(
    units: Sequence[Unit], cost: pd.DataFrame
) -> tuple[list[NDArray[np.int64]], dict[tuple[int, int], NDArray[np.int64]], int]:
    """BitOps per unit alone, per pair of units that both have a choice, and of the products outside the plan."""
    unit_of = {site: u for u, unit in enumerate(units) for site in unit.sites}
    bits = [np.array(unit.bits, dtype=np.int64) for unit in units]
    own = [np.zeros_like(b) for b in bits]
    pairs: dict[tuple[int, int], NDArray[np.int64]] = {}
    constant = 0
    for a, b, macs in accounting.edges(cost).itertuples(index=False):
        ends = sorted(unit_of[site] for site in (Site.parse(a), Site.parse(b)) if site in unit_of)
        if not ends:
            constant += macs * accounting.FLOAT_BITS**2
        elif len(ends) == 1:
            own[ends[0]] += macs * accounting.FLOAT_BITS * bits[ends[0]]
        elif ends[0] == ends[1]:
            own[ends[0]] += macs * bits[ends[0]] ** 2
        else:
            u, v = ends
            if len(bits[u]) == 1:
                u, v = v, u
            if len(bits[v]) == 1:
                own[u] += macs * int(bits[v][0]) * bits[u]
            else:
                pairs[u, v] = pairs.get((u, v), 0) + macs * np.outer(bits[u], bits[v])
    return own, pairs, constant
