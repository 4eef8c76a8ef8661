"""Interactions of sites: their total against its definition, and the search against every exchange and enumeration."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from analysis.planning.budgets import Unit
from analysis.planning.interactions import MOST_OPTIONS, SHARE, Interactions, improved, interactions, predicted, total
from analysis.solver.choice_program import Budget, Program
from analysis.solver.integer_program import solve
from quant.errors import InputError
from quant.site import Site
from tests.choice_programs import programs, within

SITES = [Site(name, "weight") for name in "abcd"]


def random_interactions(program: Program, seed: int, scale: float) -> Interactions:
    """The program's scores with pairs of random products."""
    sizes = [len(own) for own in program.score]
    products = np.random.default_rng(seed).normal(size=(sum(sizes), 6))
    pairs = scale * products @ products.T
    unit = np.repeat(np.arange(len(sizes)), sizes)
    pairs[unit[:, None] == unit[None, :]] = 0
    return Interactions(program.score, pairs)


def search(program, found, start):
    """The choice of `improved`, which ended by itself."""
    choice, ended = improved(found, program.budgets, start, relative_gap=0.0, deadline=time.monotonic() + 60)
    assert ended
    return choice


def measured(seed=0, images=50, bits=(2, 4, 8)):
    """Scores of sites and bit-widths, and products of images."""
    generator = np.random.default_rng(seed)
    keys = [(site, width) for site in SITES for width in bits]
    return {key: generator.uniform(0, 1) for key in keys}, {key: generator.normal(size=images) for key in keys}


def units_of(scores, *groups):
    """Units of tied sites with these bit-widths."""
    return [Unit(sites, bits, np.array([sum(scores[site, b] for site in sites) for b in bits]))
            for sites, bits in groups]  # fmt: skip


def test_the_total_is_that_of_the_products_each_scaled_to_its_score():
    """(1 - share) sum of scores + share/2 E (sum of scaled products)^2, tied or not; never below 0."""
    scores, products = measured()
    scaled = {key: r * np.sqrt(2 * scores[key] / np.mean(r**2)) for key, r in products.items()}
    units = units_of(scores, ((SITES[0], SITES[3]), (2, 4)), ((SITES[1],), (2, 4, 8)), ((SITES[2],), (8,)))
    found = interactions(units, scores, products)
    for choice in itertools.product(*(range(len(unit.bits)) for unit in units)):
        bits = {site: unit.bits[k] for unit, k in zip(units, choice, strict=True) for site in unit.sites}
        joint = 0.5 * np.mean(np.sum([scaled[key] for key in bits.items()], axis=0) ** 2)
        expected = (1 - SHARE) * sum(scores[key] for key in bits.items()) + SHARE * joint
        assert total(found, choice) == pytest.approx(expected)
        assert predicted(bits, scores, products) == pytest.approx(expected)
        assert expected > 0


def test_products_that_are_missing_or_not_finite_are_told():
    """No plan is made of half of them."""
    scores, products = measured()
    units = units_of(scores, *(((site,), (2, 4)) for site in SITES))
    for damaged in (
        {key: r for key, r in products.items() if key != (SITES[1], 4)},
        products | {(SITES[1], 4): np.full(50, np.inf)},
        products | {(SITES[1], 4): np.array(np.nan)},
    ):
        with pytest.raises(InputError, match=r"no finite products of b:weight at 4 bits"):
            interactions(units, scores, damaged)
    silent = interactions(units, scores, products | {(SITES[1], 4): np.zeros(50)})
    assert not silent.pairs[3].any()


def test_too_many_options_are_refused():
    """Before a matrix of all their pairs is made."""
    sites = [Site(f"m{i}", "weight") for i in range(MOST_OPTIONS // 2 + 1)]
    scores = {(site, bits): 1.0 for site in sites for bits in (2, 4)}
    units = units_of(scores, *(((site,), (2, 4)) for site in sites))
    with pytest.raises(InputError, match=r"too many for interactions"):
        interactions(units, scores, dict.fromkeys(scores, np.ones(2)))


@given(programs(products=True), st.integers(0, 2**32 - 1), st.sampled_from((0.0, 0.01, 1.0, 100.0)))
def test_no_exchange_of_one_or_two_options_improves_the_choice(program, seed, scale):
    """The choice is within every budget, never worse than the optimum of the sum, and locally the best."""
    feasible = within(program)
    assume(feasible)
    found = random_interactions(program, seed, scale)
    start = solve(program, relative_gap=0.0, time_limit=10.0).choice
    choice = search(program, found, start)
    assert program.fits(choice)
    best, rounding = total(found, choice), 1e-9 * (1 + scale)
    assert best <= total(found, start)
    for other in feasible:
        if sum(a != b for a, b in zip(choice, other, strict=True)) <= 2:
            assert total(found, other) >= best - rounding
    if scale == 0:
        assert best == pytest.approx(min(program.total(choice) for choice in feasible))


def test_the_search_finds_the_optimum_of_nearly_all_programs():
    """Of 200 programs of six units with three options under one budget at least 180; the others miss it by little."""
    generator = np.random.default_rng(0)
    missed = []
    for _ in range(200):
        score = [np.sort(generator.uniform(0, 1, 3))[::-1] for _ in range(6)]
        own = [np.array([2, 4, 8]) * int(generator.integers(1, 9)) for _ in range(6)]
        room = int(0.5 * sum(costs.max() for costs in own))
        program = Program(score, [Budget(own, room)])
        found = random_interactions(program, int(generator.integers(2**32)), 0.02)
        start = solve(program, relative_gap=0.0, time_limit=10.0).choice
        best = min(total(found, choice) for choice in within(program))
        missed.append((total(found, search(program, found, start)) - best) / abs(best))
    assert sum(excess < 1e-9 for excess in missed) >= 180
    assert np.mean(missed) < 0.005


def test_equal_units_do_not_send_the_search_in_circles():
    """Twins with large products and no scores: rounding alone must not look like an improvement."""
    generator = np.random.default_rng(1)
    for _ in range(20):
        half = 100 * generator.normal(size=(8, 6))
        products = np.concatenate([half, half])
        pairs = products @ products.T
        unit = np.repeat(np.arange(8), 2)
        pairs[unit[:, None] == unit[None, :]] = 0
        program = Program([np.zeros(2)] * 8, [])
        search(program, Interactions(program.score, pairs), [0] * 8)
