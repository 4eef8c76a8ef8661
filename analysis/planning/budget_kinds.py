"""The kinds of budget of a bit plan, in the words and units in which they are shown."""

from dataclasses import dataclass
from typing import Literal

from quant.bit_plan import PlanBudget


@dataclass(frozen=True, kw_only=True)
class BudgetKind:
    """How one kind of budget is shown; its figures in tables and plan files are in the unit of `PlanTotals`."""

    label: str  # of an axis or a column
    words: str  # after a number
    next_unit: str  # what a shadow price is for
    unit: float  # of what is shown, in the unit of the file
    counts: Literal["weights", "activations", "all"]  # the tensors whose bits it counts


MIB = 2**20
BUDGET_KINDS = {
    "weight_bits": BudgetKind(
        label="mean weight bits", words="mean weight bits", next_unit="a weight bit on average", unit=1,
        counts="weights",
    ),
    "activation_bits": BudgetKind(
        label="mean activation bits", words="mean activation bits", next_unit="an activation bit on average", unit=1,
        counts="activations",
    ),
    "size_bytes": BudgetKind(label="size (MiB)", words="MiB", next_unit="a MiB", unit=2**20, counts="weights"),
    "activation_bytes": BudgetKind(
        label="activations (MiB)", words="MiB of activations", next_unit="a MiB of activations", unit=2**20,
        counts="activations",
    ),
    "bitops": BudgetKind(
        label="GBitOps per image", words="GBitOps", next_unit="a GBitOp", unit=10**9, counts="all"
    ),
    "latency_ms": BudgetKind(label="latency (ms)", words="ms", next_unit="a ms", unit=1, counts="all"),
}  # fmt: skip
"""By the name of a field of `PlanBudget` and `PlanTotals`, in the order in which they are shown."""


def amount(kind: str, value: float, digits: int = 4) -> str:
    """A cost in words, such as `3.07 mean weight bits`; `value` is in the unit of the file. Below 1 MiB in bytes.

    >>> amount("size_bytes", 3 * 2**20), amount("size_bytes", 50_000)
    ('3 MiB', '50,000 bytes')
    """
    shown = BUDGET_KINDS[kind]
    if in_bytes(kind, value):
        return f"{value:,.0f} {shown.words.replace('MiB', 'bytes')}"
    return f"{value / shown.unit:.{digits}g} {shown.words}"


def in_bytes(kind: str, value: float) -> bool:
    """Whether a figure of this kind is too small for MiB."""
    return BUDGET_KINDS[kind].unit == MIB and value < MIB


def budget_words(budget: PlanBudget) -> str:
    """The budgets that are set, such as `3.07 mean weight bits and 0.5 MiB`; empty where none is."""
    *most, last = [amount(kind, value) for kind, value in budget.as_dict().items()] or [""]
    return f"{', '.join(most)} and {last}" if most else last
