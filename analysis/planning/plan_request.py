"""What is asked of a plan, as typed and checked: budgets, candidates, objective, exceptions."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from analysis.planning.uniform import parse_uniform, parse_widths
from quant.bit_plan import PlanBudget
from quant.choices import ALLOWED_BIT_WIDTHS, PROXIES, Layout
from quant.errors import InputError

if TYPE_CHECKING:  # a request is checked without pandas
    import pandas as pd

    from analysis.planning.accounting import Stored

OBJECTIVES = (
    "divergence", "kl", "score", "metric", "loss", "top1", "logit_nmse", *PROXIES,
)  # fmt: skip
"""What a plan can minimise: measured changes, then proxies."""


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What is asked of a plan: budgets, candidates, objective, exceptions."""

    weight_bits: float | None = None
    activation_bits: float | None = None
    size_bytes: int | None = None
    gbitops: float | None = None
    activation_mib: float | None = None
    latency_ms: float | None = None
    latency: Path | None = None
    candidates: tuple[int, ...] | None = None
    like: str | None = None  # w3a4: the budgets that these uniform bits take
    candidates_of: tuple[str, ...] = ()
    objective: str | None = None  # kl, where there are no scores
    scores: Path | None = None
    robust: bool = False
    interactions: bool | None = None  # None: where `verify` can measure that they help
    pin: tuple[str, ...] = ()
    bounds: tuple[str, ...] = ()
    tie: tuple[str, ...] = ()
    layout: Layout = "paper"
    pareto: bool = False
    verify: bool = False
    images: int | None = None  # of the verification
    batch_size: int = 64
    num_workers: int = 2
    device: str = "cpu"
    task: str | None = None
    out: Path | None = None
    quiet: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "PlanRequest":
        """The options of a command line, checked."""
        request = TypeAdapter(cls).validate_python(dict(options))
        if request.scores is not None and request.objective is not None:
            raise InputError("--scores takes the place of --objective; leave out one of them.")
        if request.minimised not in OBJECTIVES:
            raise unknown_objective(request.minimised)
        if request.interactions and (
            request.scores is not None or request.minimised not in ("divergence", "kl", "fisher")
        ):
            raise InputError("interactions are in the unit of the divergence: plan for it, or without them.")
        if request.interactions and request.pareto:
            raise InputError("--pareto is of the sum over sites, without interactions: ask for one of the two.")
        for parse, texts in (
            (parse_pin, request.pin), (parse_bound, request.bounds), (parse_kind, request.candidates_of),
            (parse_tie, request.tie),
        ):  # fmt: skip
            for text in texts:
                parse(text)
        request.check_budgets()
        return request

    @property
    def offers_any_width(self) -> bool:
        """Whether bits are limited by what was measured alone, not by a wish (hardware that has 2, 4 and 8)."""
        return self.candidates is None and not self.candidates_of and not self.bounds and self.latency is None

    @property
    def minimised(self) -> str:
        """The objective, where no scores take its place."""
        return self.objective or "divergence"

    def check_budgets(self) -> None:
        """Raise InputError for no budget, one out of range, or some that exclude each other."""
        for option, value, largest in (
            ("gbitops", self.gbitops, 1e12),
            ("activation_mib", self.activation_mib, 2**40), ("size_bytes", self.size_bytes, 2**60),
        ):  # fmt: skip
            if value is not None and not 0 < value <= largest:
                raise InputError(f"`{option}`={value:g} is no budget; give a number above 0, {largest:g} at most.")
        if self.like is not None:
            parse_uniform(self.like, "`like`")
            if self.weight_bits is not None or self.activation_bits is not None:
                raise InputError("`like` sets the mean bits; leave out `weight_bits` and `activation_bits`.")
        kinds = (
            self.weight_bits, self.activation_bits, self.like, self.size_bytes, self.gbitops,
            self.activation_mib, self.latency_ms,
        )  # fmt: skip
        if all(kind is None for kind in kinds):
            raise InputError(
                "no budget was given; set `weight_bits`, `activation_bits`, `like`, `size_bytes`, `activation_mib`, "
                "`gbitops` or `latency_ms`."
            )
        if (self.latency_ms is None) != (self.latency is None):
            raise InputError("--latency-ms and --latency FILE.csv need each other: the budget, and what sites cost.")

    def budget(self, options: "pd.DataFrame", cost: "pd.DataFrame", stored: "Stored") -> PlanBudget:
        """The budgets in the units of the plan file; at least one must be set."""
        self.check_budgets()
        weight_bits, activation_bits = self.weight_bits, self.activation_bits
        if self.like is not None:
            from analysis.planning import accounting
            from analysis.planning.baselines import uniform

            same = accounting.totals(uniform(options, cost, *parse_uniform(self.like, "`like`")), cost, stored)
            weight_bits, activation_bits = same.weight_bits, same.activation_bits
        return PlanBudget(
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            size_bytes=self.size_bytes,
            bitops=None if self.gbitops is None else max(1, int(self.gbitops * 1e9)),
            activation_bytes=None if self.activation_mib is None else max(1, int(self.activation_mib * 2**20)),
            latency_ms=self.latency_ms,
        )


def unknown_objective(name: str) -> InputError:
    """The error for something that a plan cannot minimise."""
    return InputError(f"the objective {name!r} is unknown; choose from {', '.join(OBJECTIVES)}.")


def parse_pin(text: str) -> tuple[str, int]:
    """Pattern and bits of `head*=8`."""
    pattern, _, bits = text.rpartition("=")
    if not pattern or not re.fullmatch(r"[0-9]{1,2}", bits):
        raise InputError(f"`pin` {text!r} is not understood; write PATTERN=BITS, such as 'head*=8'.")
    if int(bits) not in ALLOWED_BIT_WIDTHS:
        allowed = ", ".join(map(str, ALLOWED_BIT_WIDTHS))
        raise InputError(f"`pin` {text!r}: {bits} is not offered; choose from {allowed}.")
    return pattern, int(bits)


def parse_bound(text: str) -> tuple[str, int, int]:
    """Pattern, lowest and highest bits of `blocks.0.*=4-8`."""
    pattern, _, bits = text.rpartition("=")
    found = re.fullmatch(r"([0-9]{1,2})-([0-9]{1,2})", bits)
    if not pattern or found is None:
        raise InputError(f"`bounds` {text!r} is not understood; write PATTERN=LOW-HIGH, such as 'blocks.0.*=4-8'.")
    if int(found[1]) > int(found[2]):
        raise InputError(f"`bounds` {text!r} goes from {found[1]} down to {found[2]}; write the lower bits first.")
    return pattern, int(found[1]), int(found[2])


def parse_tie(text: str) -> list[str]:
    """The patterns of `a:input,b:input`."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise InputError(f"`tie` {text!r} is not understood; write PATTERN,PATTERN, or qkv, or shared.")
    return parts


def parse_kind(text: str) -> tuple[str, list[int]]:
    """Pattern over kinds and bit-widths of `mlp.fc2=4,8` or `mlp.*=2-8`."""
    pattern, _, bits = text.rpartition("=")
    try:
        if pattern:
            return pattern, list(parse_widths(bits))
        reason = "it names no kind"
    except ValueError as error:
        reason = str(error).rstrip(".")
    raise InputError(
        f"`candidates_of` {text!r} is not understood ({reason}); write KIND=BITS, such as 'mlp.fc2=4,8' or 'mlp.*=2-8'."
    )
