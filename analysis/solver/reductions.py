"""Exact reductions of a choice program: options that no best plan needs, and units that are better chosen together."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.solver.choice_program import Budget, NoPlanError, Program

_JOINT_OPTIONS = 8192  # most options of a joint choice before pruning; beyond, products stay products
_BLOCK = 256  # options that are compared with each other at once


@dataclass(frozen=True)
class Reduced:
    """A smaller program with the same optimum, and the way back to the original one.

    Unit i of `program` stands for the original units `members[i]`; its options are the rows of `options[i]`, one
    original option per member.
    """

    program: Program
    members: Sequence[tuple[int, ...]]
    options: Sequence[NDArray[np.int64]]

    def expand(self, choice: Sequence[int]) -> list[int]:
        """The original option of each original unit."""
        expanded = {
            unit: int(option)
            for units, rows, k in zip(self.members, self.options, choice, strict=True)
            for unit, option in zip(units, rows[k], strict=True)
        }
        return [expanded[unit] for unit in range(len(expanded))]


def reduce_program(program: Program) -> Reduced:
    """The program without options that no best plan needs, and with products of few options made joint choices.

    A joint choice of the units of a product (a weight and its input, say) has the product's cost for its own, so the
    program loses the pair, and combinations of the two that no best plan needs go as well. NoPlanError: no option of
    some unit is within the budgets.
    """
    program = Program(program.score, [budget.least_at_zero() for budget in program.budgets])
    members: list[tuple[int, ...]] = [(u,) for u in range(len(program.score))]
    program, kept = _pruned(program)
    options = [k[:, None] for k in kept]
    groups = _joint_groups(program)
    if len(groups) < len(members):
        joint, rows = _joined(program, groups)
        members = [tuple(group) for group in groups]
        options = [
            np.column_stack([options[u][grid[:, i], 0] for i, u in enumerate(group)])
            for group, grid in zip(groups, rows, strict=True)
        ]
        program, kept = _pruned(joint)
        options = [table[k] for table, k in zip(options, kept, strict=True)]
    return Reduced(program, members, options)


def undominated(costs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of `costs` (options, criteria) that no other row undercuts or equals in every criterion, in rising order.

    Of equal rows the last stays.
    """
    ranks = np.column_stack([np.unique(column, return_inverse=True)[1] for column in costs.T])
    order = np.lexsort((-np.arange(len(costs)), ranks.sum(axis=1)))  # whatever dominates a row comes before it
    front = np.empty((0, ranks.shape[1]), dtype=ranks.dtype)
    kept: list[int] = []
    for start in range(0, len(order), _BLOCK):
        block = order[start : start + _BLOCK]
        block = block[~_covered(ranks[block], front).any(axis=0)]
        among = _covered(ranks[block], ranks[block])
        block = block[~np.triu(among, 1).any(axis=0)]
        front = np.concatenate([front, ranks[block]])
        kept += block.tolist()
    return np.array(sorted(kept), dtype=np.int64)


def _covered(rows: NDArray[np.int64], by: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether row i of `by` is nowhere more than row j of `rows`, as an array (by, rows)."""
    covered = np.ones((len(by), len(rows)), dtype=bool)
    for mine, other in zip(rows.T, by.T, strict=True):
        covered &= other[:, None] <= mine
    return covered


def _pruned(program: Program) -> tuple[Program, list[NDArray[np.int64]]]:
    """The program without options beyond a budget's room or dominated by another, and the options that stayed.

    An option is dominated if another of its unit has no greater score and no greater cost in any budget, whatever is
    chosen elsewhere: product by product, for each option of the partner. What is pruned makes others' room smaller,
    so this is done until nothing changes.
    """
    kept = [np.arange(len(score)) for score in program.score]
    while True:
        if any(budget.room < 0 for budget in program.budgets):
            raise NoPlanError
        binding = [budget for budget in program.budgets if budget.most_expensive > budget.room]
        program = Program(program.score, binding)
        criteria: list[list[NDArray[np.int64]]] = [
            [np.unique(score, return_inverse=True)[1][:, None]] for score in program.score
        ]
        affordable = [np.ones(len(score), dtype=bool) for score in program.score]
        for budget in program.budgets:
            for u, costs in enumerate(budget.own):
                criteria[u].append(costs[:, None])
                affordable[u] &= costs <= budget.room
            for (u, v), costs in budget.pairs.items():
                criteria[u].append(costs)
                criteria[v].append(costs.T)
                affordable[u] &= costs.min(axis=1) <= budget.room
                affordable[v] &= costs.min(axis=0) <= budget.room
        stay = []
        for columns, open_ in zip(criteria, affordable, strict=True):
            index = np.flatnonzero(open_)
            stay.append(index[undominated(np.column_stack(columns)[index])] if len(index) else index)
        if all(len(index) == len(score) for index, score in zip(stay, program.score, strict=True)):
            return program, kept
        program = program.restricted(stay)
        kept = [k[index] for k, index in zip(kept, stay, strict=True)]


def _joint_groups(program: Program) -> list[list[int]]:
    """Units in groups that share products, where a group has few enough combinations; the others alone."""
    group_of = {u: [u] for u in range(len(program.score))}
    for u, v in program.pairs:
        if group_of[u] is not group_of[v]:
            merged = sorted(group_of[u] + group_of[v])
            group_of.update(dict.fromkeys(merged, merged))
    groups = []
    for group in {id(group): group for group in group_of.values()}.values():
        few = math.prod(len(program.score[u]) for u in group) <= _JOINT_OPTIONS
        groups += [group] if few else [[u] for u in group]
    return groups


def _joined(program: Program, groups: Sequence[Sequence[int]]) -> tuple[Program, list[NDArray[np.int64]]]:
    """The program with one unit per group, and the combinations (options, members) that are its options."""
    grids = [np.indices([len(program.score[u]) for u in group]).reshape(len(group), -1).T for group in groups]
    place = {u: (g, i) for g, group in enumerate(groups) for i, u in enumerate(group)}
    score = [_sum_over(program.score, group, grid) for group, grid in zip(groups, grids, strict=True)]
    budgets = []
    for budget in program.budgets:
        own = [_sum_over(budget.own, group, grid) for group, grid in zip(groups, grids, strict=True)]
        pairs = {}
        for (u, v), costs in budget.pairs.items():
            (g, i), (h, j) = place[u], place[v]
            if g == h:
                own[g] = own[g] + costs[grids[g][:, i], grids[g][:, j]]
            else:  # both are units alone, in a group too large to join
                pairs[(g, h) if g < h else (h, g)] = costs if g < h else costs.T
        budgets.append(Budget(own, budget.room, pairs).least_at_zero())
    return Program(score, budgets), grids


def _sum_over(values: Sequence[NDArray], group: Iterable[int], grid: NDArray[np.int64]) -> NDArray:
    return sum(itertools.starmap(np.take, ((values[u], grid[:, i]) for i, u in enumerate(group))), start=np.array(0))
