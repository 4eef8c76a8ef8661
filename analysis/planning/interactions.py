"""Interactions: what the errors of two sites cost together beyond what each costs alone, and a plan that counts them.

To second order the KL of the logits is 1/2 E (sum over sites of g . delta)^2, with g the gradient of a random probe of
the logits' Fisher matrix and delta the error of each site (see fisher.py). Its squares are what single sites cost; the
products of two sites are their interaction, which CLADO (Deng et al., DAC 2025, arXiv:2307.05657) measures by a forward
pass for every pair. Here they cost nothing more than the one backward pass of `qvw sensitivity --proxies`.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.planning.budgets import Unit
from analysis.solver.choice_program import Budget, Program
from analysis.solver.integer_program import solve
from quant.errors import InputError
from quant.site import Site

SHARE = 0.5
"""Of the products that count: one probe an image makes them noisy, and a search seeks what noise makes cheap. Plans
with half of them had the least held-out KL on a ViT and a Swin (of 0, 1/4, 1/2 and 1); with all of them some were worse
than the plan of the sum."""
ROUNDS = 8  # of solving again with the interactions of the last plan
MOST_OPTIONS = 2500  # of all sites: the matrix of their pairs has its square, and each exchange looks at all of it
FEW_IMAGES = 256  # with fewer the products are mostly noise

Scores = Mapping[tuple[Site, int], float]
Products = Mapping[tuple[Site, int], NDArray[np.float64]]


@dataclass(frozen=True)
class Interactions:
    """What options cost, in nats: one array a unit, pairs inside a tied unit counted, and (K, K) for pairs of all K.

    Options of one unit exclude each other: their entries of `pairs` are 0.
    """

    score: Sequence[NDArray[np.float64]]
    pairs: NDArray[np.float64]


def interactions(units: Sequence[Unit], scores: Scores, products: Products, *, share: float = SHARE) -> Interactions:
    """Scores and interactions of the options of `units`.

    `products` has g . delta of every image, (images,), for each site and bit-width. Each is scaled so that half its
    mean square is the site's score: with scores that are KLs the total of any plan is then (1 - share) sum KL + share/2
    E (sum of products)^2, never below 0. InputError where products are missing or not finite.
    """
    score, rows = [], []
    for unit in units:
        parts = np.array([[_scaled(site, bits, scores, products) for site in unit.sites] for bits in unit.bits])
        together = parts.sum(axis=1)  # (options, images)
        inside = (together**2).mean(axis=1) - (parts**2).mean(axis=2).sum(axis=1)
        score.append(unit.score + share / 2 * inside)
        rows.append(together)
    if sum(map(len, rows)) > MOST_OPTIONS:
        raise InputError(
            f"{sum(map(len, rows))} options are too many for interactions, which weighs every pair: at most "
            f"{MOST_OPTIONS}. Offer fewer bit-widths (`candidates`), or plan without."
        )
    table = np.concatenate(rows)
    pairs = share * (table @ table.T) / table.shape[1]
    unit_of = np.repeat(np.arange(len(units)), [len(unit.bits) for unit in units])
    pairs[unit_of[:, None] == unit_of[None, :]] = 0.0
    return Interactions(score, pairs)


def predicted(bits: Mapping[Site, int], scores: Scores, products: Products, *, share: float = SHARE) -> float:
    """What a plan of these bits costs with its interactions, in the unit of the scores; as of `interactions`."""
    units = [Unit((site,), (width,), np.array([scores[site, width]])) for site, width in bits.items()]
    found = interactions(units, scores, products, share=share)
    return float(np.sum(found.score) + found.pairs.sum() / 2)


def _scaled(site: Site, bits: int, scores: Scores, products: Products) -> NDArray[np.float64]:
    found = products.get((site, bits))
    if found is None or not np.isfinite(found).all():
        raise InputError(
            f"proxy_images.parquet has no finite products of {site} at {bits} bits. Make them with the estimator of "
            f"the sweep at {bits} bits (`qvw sensitivity --proxies`), or offer fewer bit-widths (`candidates`)."
        )
    power = float((found**2).mean())
    return found * (2 * max(scores[site, bits], 0.0) / power) ** 0.5 if power > 0 else found


def total(found: Interactions, choice: Sequence[int]) -> float:
    """What a choice costs, each pair once."""
    chosen = _first_options(found.score) + np.asarray(choice)
    alone = math.fsum(float(score[k]) for score, k in zip(found.score, choice, strict=True))
    return alone + float(found.pairs[np.ix_(chosen, chosen)].sum()) / 2


def improved(
    found: Interactions, budgets: Sequence[Budget], start: Sequence[int], *, relative_gap: float, deadline: float
) -> tuple[list[int], bool]:
    """A choice within the budgets that costs less with its interactions than `start`, or `start`; and whether it ended.

    Exchanges one or two options at a time, the best exchange first, until none helps. Then the program is solved
    exactly with the interactions of the choice added to the scores, and exchanges start again from there, for as long
    as it helps, and until `deadline` (of time.monotonic). No proof of optimality: the program with products of all
    pairs is beyond exact solvers.
    """
    first = _first_options(found.score)
    best = _exchanged(found, budgets, list(start), deadline)
    for _ in range(ROUNDS):
        extra = found.pairs[:, first + np.asarray(best)].sum(axis=1)
        score = [own + extra[at : at + len(own)] for own, at in zip(found.score, first, strict=True)]
        left = deadline - time.monotonic()
        if left <= 0:
            return best, False
        try:
            linear = solve(Program(score, budgets), relative_gap=relative_gap, time_limit=left)
        except InputError:  # nothing in time: the best so far stands
            return best, False
        other = _exchanged(found, budgets, linear.choice, deadline)
        if not total(found, other) < total(found, best):
            break
        best = other
    return best, time.monotonic() < deadline


def _exchanged(found: Interactions, budgets: Sequence[Budget], choice: list[int], deadline: float) -> list[int]:
    """The choice after the best exchanges of one or two options, until none helps or the time is over."""
    first = _first_options(found.score)
    unit = np.repeat(np.arange(len(found.score)), [len(own) for own in found.score])
    place = np.arange(len(unit)) - first[unit]
    score = np.concatenate(found.score)
    costs = [(np.concatenate(budget.own), _pair_costs(budget, first, len(unit))) for budget in budgets]
    possible = (unit[:, None] != unit[None, :]) | np.eye(len(unit), dtype=bool)
    value = total(found, choice)
    while time.monotonic() < deadline:
        now = first + np.asarray(choice)
        change = _changes(score, found.pairs, now, unit)
        allowed = possible
        for budget, (own, pairs) in zip(budgets, costs, strict=True):
            allowed = allowed & (budget.spent(choice) + _changes(own, pairs, now, unit) <= budget.room)
        change[~allowed] = np.inf
        one, two = np.unravel_index(int(change.argmin()), change.shape)
        other = list(choice)
        other[unit[one]], other[unit[two]] = int(place[one]), int(place[two])
        if not total(found, other) < value:  # counted again: sums of rounded changes could go round in a circle
            break
        choice, value = other, total(found, other)
    return choice


def _changes(own: NDArray, pairs: NDArray, now: NDArray[np.int64], unit: NDArray[np.int64]) -> NDArray:
    """What changes where option k, and l of another unit, take the places of those chosen: (K, K); k alone at (k, k).

    `own` is what each option adds alone, `pairs` what two add together (0 within a unit), `now` the chosen options.
    """
    replaced = now[unit]
    marginal = own + pairs[:, now].sum(axis=1)
    marginal = marginal - marginal[replaced] - pairs[np.arange(len(own)), replaced]
    both = pairs - pairs[:, replaced] - pairs[replaced, :] + pairs[np.ix_(replaced, replaced)]
    change = marginal[:, None] + marginal[None, :] + both
    np.fill_diagonal(change, marginal)
    return change


def _pair_costs(budget: Budget, first: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """What pairs of options cost of a budget: (K, K), symmetric."""
    matrix = np.zeros((size, size), dtype=np.int64)
    for (u, v), costs in budget.pairs.items():
        rows, columns = first[u] + np.arange(costs.shape[0]), first[v] + np.arange(costs.shape[1])
        matrix[np.ix_(rows, columns)] += costs
        matrix[np.ix_(columns, rows)] += costs.T
    return matrix


def _first_options(score: Sequence[NDArray[np.float64]]) -> NDArray[np.int64]:
    return np.cumsum([0, *(len(own) for own in score[:-1])])
