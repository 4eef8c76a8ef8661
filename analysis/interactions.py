"""Interactions: what the errors of two sites cost together beyond what each costs alone, and a plan that counts them.

To second order the KL of the logits is 1/2 E (sum over sites of g . delta)^2, with g the gradient of a random probe of
the logits' Fisher matrix and delta the error of each site (see fisher.py). Its squares are what single sites cost; the
products of two sites are their interaction, which CLADO (Deng et al., DAC 2025, arXiv:2307.05657) measures by a forward
pass for every pair. Here they cost nothing more than the one backward pass of `qvw sensitivity --proxies`.
"""

import time
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from analysis.choice_program import Program
from analysis.integer_program import solve
from analysis.plan_budgets import Unit
from quant.errors import InputError
from quant.site import Site

SHARE = 0.5
"""Of the products that count. An error upstream changes the rounding downstream, so that whole products overstate the
interaction of activations; half of them foretold held-out KL best on a ViT and a Swin."""
ROUNDS = 8  # of solving anew with the interactions of the last plan
LARGEST = 6000  # options of all sites: the matrix of their pairs has its square

Products = Mapping[tuple[Site, int], NDArray[np.float64]]


def interaction_matrix(units: Sequence[Unit], products: Products, *, share: float = SHARE) -> NDArray[np.float64]:
    """What pairs of options cost together, in nats: (K, K) for K options of all units, one unit after the other.

    `products` has g . delta of every image, (images,), for each site and bit-width. Options of one unit exclude each
    other: their entries are 0. InputError where an option has no products.
    """
    rows = []
    for unit in units:
        for bits in unit.bits:
            missing = [site for site in unit.sites if (site, bits) not in products]
            if missing:
                raise InputError(
                    f"proxy_images.parquet has no products of {missing[0]} at {bits} bits. Make them with the bits and "
                    "the estimator of the sweep: `qvw sensitivity --proxies`."
                )
            rows.append(np.sum([products[site, bits] for site in unit.sites], axis=0))
    if len(rows) > LARGEST:
        raise InputError(
            f"{len(rows)} options are too many for --interactions, which weighs every pair: {LARGEST} at most. Offer "
            "fewer bit-widths (--candidates), or plan without."
        )
    table = np.array(rows)
    matrix = share * (table @ table.T) / table.shape[1]
    of = _unit_of(units)
    matrix[of[:, None] == of[None, :]] = 0.0
    return matrix


def interaction(matrix: NDArray[np.float64], program: Program, choice: Sequence[int]) -> float:
    """What the pairs of a choice cost together: each pair once."""
    chosen = _first_options(program) + np.asarray(choice)
    return float(matrix[np.ix_(chosen, chosen)].sum()) / 2


def improved(
    program: Program, matrix: NDArray[np.float64], start: Sequence[int], *, relative_gap: float, deadline: float
) -> list[int]:
    """A choice within the budgets whose scores and interactions add up to less than those of `start`, or `start`.

    Exchanges one or two options at a time, the best exchange first, until none helps. Then the program is solved
    exactly with the interactions of the choice added to the scores, and exchanges begin anew from there, for as long
    as it helps, and until `deadline` (of time.monotonic). No proof of optimality: the program with products of all
    pairs is beyond exact solvers.
    """
    first = _first_options(program)
    best = _exchanged(program, matrix, list(start), deadline)
    value = program.total(best) + interaction(matrix, program, best)
    for _ in range(ROUNDS):
        extra = matrix[:, first + np.asarray(best)].sum(axis=1)
        score = [own + extra[at : at + len(own)] for own, at in zip(program.score, first, strict=True)]
        left = deadline - time.monotonic()
        if left <= 0:
            break
        try:
            linear = solve(Program(score, program.budgets), relative_gap=relative_gap, time_limit=left)
        except InputError:  # nothing in time: the best so far stands
            break
        found = _exchanged(program, matrix, linear.choice, deadline)
        total = program.total(found) + interaction(matrix, program, found)
        if total >= value - 1e-12 * abs(value):
            break
        best, value = found, total
    return best


def _exchanged(program: Program, matrix: NDArray[np.float64], choice: list[int], deadline: float) -> list[int]:
    """The choice after the best exchanges of one or two options, until none helps or the time is over."""
    first = _first_options(program)
    unit = np.repeat(np.arange(len(program.score)), [len(own) for own in program.score])
    place = np.arange(len(unit)) - first[unit]
    score = np.concatenate(program.score)
    costs = [_with_pairs(np.concatenate(budget.own), budget.pairs, first, len(unit)) for budget in program.budgets]
    other = unit[:, None] != unit[None, :]
    while time.monotonic() < deadline:
        now = first + np.asarray(choice)
        gain = _changes(score, matrix, now, unit)
        allowed = other | np.eye(len(unit), dtype=bool)
        for budget, (own, pairs) in zip(program.budgets, costs, strict=True):
            allowed &= budget.spent(choice) + _changes(own, pairs, now, unit) <= budget.room
        gain[~allowed] = np.inf
        k, l = np.unravel_index(int(gain.argmin()), gain.shape)  # noqa: E741
        if not gain[k, l] < -1e-12 * max(1.0, abs(program.total(choice))):
            return choice
        choice = list(choice)
        choice[unit[k]], choice[unit[l]] = int(place[k]), int(place[l])
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


def _with_pairs(
    own: NDArray[np.int64], pairs: Mapping[tuple[int, int], NDArray[np.int64]], first: NDArray[np.int64], size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The costs of a budget as those of options alone and of pairs of options."""
    matrix = np.zeros((size, size), dtype=np.int64)
    for (u, v), costs in pairs.items():
        rows, columns = first[u] + np.arange(costs.shape[0]), first[v] + np.arange(costs.shape[1])
        matrix[np.ix_(rows, columns)] += costs
        matrix[np.ix_(columns, rows)] += costs.T
    return own, matrix


def _first_options(program: Program) -> NDArray[np.int64]:
    return np.cumsum([0, *(len(own) for own in program.score[:-1])])


def _unit_of(units: Sequence[Unit]) -> NDArray[np.int64]:
    return np.repeat(np.arange(len(units)), [len(unit.bits) for unit in units])
