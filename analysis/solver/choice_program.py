"""A choice program: one option per unit, scores that add up, and budgets in whole numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


class NoPlanError(Exception):
    """The budgets exclude each other: no choice is within all of them."""


@dataclass(frozen=True)
class Budget:
    """The cost of each option of each unit, plus that of each pair of options of two units, <= room: whole numbers.

    `own` has one array per unit; `pairs` maps units u < v to an array (options of u, options of v).
    """

    own: Sequence[NDArray[np.int64]]
    room: int
    pairs: Mapping[tuple[int, int], NDArray[np.int64]] = field(default_factory=dict)

    def spent(self, choice: Sequence[int]) -> int:
        """The exact cost of a choice."""
        alone = sum(int(costs[k]) for costs, k in zip(self.own, choice, strict=True))
        return alone + sum(int(costs[choice[u], choice[v]]) for (u, v), costs in self.pairs.items())

    @property
    def most_expensive(self) -> int:
        """At least the cost of every choice; budgets with more room never bind."""
        return sum(int(costs.max()) for costs in (*self.own, *self.pairs.values()))

    def least_at_zero(self) -> "Budget":
        """The same budget with costs above each unit's (and each pair's) least, and the room that they leave.

        Costs are then never negative, and the least of each is 0, as the solvers expect.
        """
        every = [*self.own, *self.pairs.values()]
        return Budget(
            [costs - costs.min() for costs in self.own],
            self.room - sum(int(costs.min()) for costs in every),
            {pair: costs - costs.min() for pair, costs in self.pairs.items()},
        )


@dataclass(frozen=True)
class Program:
    """Minimise the sum of the chosen options' scores (one array per unit) within every budget."""

    score: Sequence[NDArray[np.float64]]
    budgets: Sequence[Budget]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The pairs of units whose product some budget pays for."""
        return sorted({pair for budget in self.budgets for pair in budget.pairs})

    def total(self, choice: Sequence[int]) -> float:
        """The score of a choice."""
        return math.fsum(float(score[k]) for score, k in zip(self.score, choice, strict=True))

    def fits(self, choice: Sequence[int]) -> bool:
        """Whether a choice is within every budget, exactly."""
        return all(budget.spent(choice) <= budget.room for budget in self.budgets)

    def restricted(self, kept: Sequence[NDArray[np.int64]]) -> "Program":
        """The program with the `kept` options of each unit only; NoPlanError if a unit has none left."""
        if not all(len(options) for options in kept):
            raise NoPlanError
        return Program(
            [score[options] for score, options in zip(self.score, kept, strict=True)],
            [
                Budget(
                    [costs[options] for costs, options in zip(budget.own, kept, strict=True)],
                    budget.room,
                    {(u, v): costs[np.ix_(kept[u], kept[v])] for (u, v), costs in budget.pairs.items()},
                ).least_at_zero()
                for budget in self.budgets
            ],
        )
