"""Interactions of sites: the matrix against its definition, and the search against every exchange and enumeration."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from analysis.choice_program import Program
from analysis.integer_program import solve
from analysis.interactions import SHARE, improved, interaction, interaction_matrix
from analysis.plan_budgets import Unit
from quant.errors import InputError
from quant.site import Site
from tests.choice_programs import programs, within


def random_matrix(program: Program, seed: int, scale: float) -> np.ndarray:
    """Interactions of random products, as of `interaction_matrix`."""
    sizes = [len(own) for own in program.score]
    products = np.random.default_rng(seed).normal(size=(sum(sizes), 6))
    matrix = scale * products @ products.T
    unit = np.repeat(np.arange(len(sizes)), sizes)
    matrix[unit[:, None] == unit[None, :]] = 0
    return matrix


def value(program, matrix, choice):
    """The score of a choice with its interactions."""
    return program.total(choice) + interaction(matrix, program, choice)


def test_the_interaction_of_a_choice_is_that_of_its_products():
    """1/2 E (sum of products)^2 - 1/2 sum of E product^2, of the sites of each unit, times the share that counts."""
    generator = np.random.default_rng(0)
    sites = [Site(name, "weight") for name in "abcd"]
    products = {(site, bits): generator.normal(size=50) for site in sites for bits in (2, 4, 8)}
    units = [Unit((sites[0], sites[3]), (2, 4), np.zeros(2)), Unit((sites[1],), (2, 4, 8), np.zeros(3)),
             Unit((sites[2],), (8,), np.zeros(1))]  # fmt: skip
    matrix = interaction_matrix(units, products)
    program = Program([unit.score for unit in units], [])
    for choice in itertools.product(*(range(len(unit.bits)) for unit in units)):
        parts = [sum(products[site, unit.bits[k]] for site in unit.sites)
                 for unit, k in zip(units, choice, strict=True)]  # fmt: skip
        joint = 0.5 * np.mean(np.sum(parts, axis=0) ** 2)
        alone = 0.5 * sum(np.mean(part**2) for part in parts)
        assert interaction(matrix, program, choice) == pytest.approx(SHARE * (joint - alone))
    with pytest.raises(InputError, match=r"no products of b:weight at 3 bits"):
        interaction_matrix([Unit((sites[1],), (3,), np.zeros(1))], products)


@given(programs(products=True), st.integers(0, 2**32 - 1), st.sampled_from((0.0, 0.01, 1.0)))
def test_no_exchange_of_one_or_two_options_improves_the_choice(program, seed, scale):
    """The choice is within every budget, never worse than the optimum of the sum, and locally the best."""
    feasible = within(program)
    assume(feasible)
    matrix = random_matrix(program, seed, scale)
    start = solve(program, relative_gap=0.0, time_limit=10.0).choice
    found = improved(program, matrix, start, relative_gap=0.0, deadline=time.monotonic() + 10)
    assert program.fits(found)
    best = value(program, matrix, found)
    assert best <= value(program, matrix, start) + 1e-9
    for other in feasible:
        if sum(a != b for a, b in zip(found, other, strict=True)) <= 2:
            assert value(program, matrix, other) >= best - 1e-9
    if scale == 0:
        assert best == pytest.approx(min(program.total(choice) for choice in feasible))


@given(programs(products=False), st.integers(0, 2**32 - 1))
def test_the_search_finds_the_optimum_of_nearly_all_small_programs(program, seed):
    """Up to two units every choice is one exchange away; beyond, the optimum is missed by little at the most."""
    feasible = within(program)
    assume(feasible)
    matrix = random_matrix(program, seed, 0.3)
    start = solve(program, relative_gap=0.0, time_limit=10.0).choice
    found = value(program, matrix, improved(program, matrix, start, relative_gap=0.0, deadline=time.monotonic() + 10))
    optimum = min(value(program, matrix, choice) for choice in feasible)
    if len(program.score) <= 2:
        assert found == pytest.approx(optimum)
    spread = max(value(program, matrix, choice) for choice in feasible) - optimum
    assert found <= optimum + 0.5 * spread + 1e-9
