"""The bit plan: how many bits each site gets, as a file that people read, compare and hand on."""

import difflib
import hashlib
import json
import math
import os
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import AfterValidator, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

from quant.choices import ALLOWED_BIT_WIDTHS, GRANULARITIES, Granularity, Layout
from quant.errors import InputError, first_line
from quant.site import Site

if TYPE_CHECKING:  # these bring torch and pandas, which a plan file can be checked without
    import pandas as pd

    from quant.scheme import QuantScheme

FORMAT: Literal["qvw-bit-plan"] = "qvw-bit-plan"
VERSION: Literal[1] = 1

# No network comes near these; far beyond them sums and differences would overflow.
_MOST_BITS, _MOST_COUNT, _MOST_MS, _MOST_LOSS = 32, 10**21, 1e12, 1e200


def _allowed(bit_width: int) -> int:
    if bit_width not in ALLOWED_BIT_WIDTHS:
        raise ValueError(f"bit-width should be one of {', '.join(map(str, ALLOWED_BIT_WIDTHS))}")
    return bit_width


# Not a Literal: pydantic takes `true` for Literal[1].
BitWidth = Annotated[int, AfterValidator(_allowed), Field(json_schema_extra={"enum": list(ALLOWED_BIT_WIDTHS)})]
# Written out, because a type checker cannot read a Literal from a tuple; a test keeps it in step with quant/site.py.
TensorName = Literal[
    "weight", "weight.query", "weight.key", "weight.value", "input", "query", "key", "value", "attention"
]

_KNOWN = {"tensor": get_args(TensorName), "bit_width": ALLOWED_BIT_WIDTHS, "granularity": GRANULARITIES}

MeanBits = Annotated[float, Field(ge=0, le=_MOST_BITS)]
Count = Annotated[int, Field(ge=0, le=_MOST_COUNT)]
Milliseconds = Annotated[float, Field(ge=0, le=_MOST_MS)]
Score = Annotated[float, Field(ge=-_MOST_LOSS, le=_MOST_LOSS)]

_CONFIG = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True)
class PlannedSite:
    """The quantization of one tensor; a site that no plan names stays in floating point."""

    __pydantic_config__ = _CONFIG

    module: str
    tensor: TensorName
    bit_width: BitWidth
    granularity: Granularity
    signed: bool
    offset: bool

    def __post_init__(self) -> None:
        """Refuse bits that no quantizer has, and a tensor or granularity that there is not."""
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                choices = ", ".join(map(str, known))
                raise InputError(f"The {name} of {self.site} is {getattr(self, name)!r}. Choose from {choices}.")

    @classmethod
    def of(cls, site: Site, scheme: "QuantScheme") -> "PlannedSite":
        """The plan's line for a site at a scheme."""
        return cls(
            module=site.module, tensor=site.tensor,  # type: ignore[arg-type]  # a Site's tensor is one of TensorName
            bit_width=scheme.bit_width, granularity=scheme.granularity, signed=scheme.signed, offset=scheme.offset,
        )  # fmt: skip

    @property
    def site(self) -> Site:
        """The tensor's name."""
        return Site(self.module, self.tensor)


@dataclass(frozen=True, kw_only=True)
class PlanModel:
    """The model that was measured: its timm name or factory, its arguments, the hash of its weights."""

    __pydantic_config__ = _CONFIG

    name: str
    kwargs: dict[str, JsonValue]
    weights_sha256: str | None

    def __post_init__(self) -> None:
        """Refuse what no file of JSON can say: NaN among the arguments, bytes of a path that are no text."""
        try:
            json.dumps(asdict(self), ensure_ascii=False, allow_nan=False).encode()
        except ValueError as error:
            raise InputError(
                f"A plan cannot name the model {self.name!a}: {error}. Give it another name, or other arguments."
            ) from error


@dataclass(frozen=True, kw_only=True)
class PlanBudget:
    """What a plan may cost at most; None leaves a cost free. Units as in `PlanTotals`."""

    __pydantic_config__ = _CONFIG

    weight_bits: Annotated[float, Field(gt=0, le=_MOST_BITS)] | None = None
    activation_bits: Annotated[float, Field(gt=0, le=_MOST_BITS)] | None = None
    size_bytes: Annotated[int, Field(gt=0, le=_MOST_COUNT)] | None = None
    activation_bytes: Annotated[int, Field(gt=0, le=_MOST_COUNT)] | None = None
    bitops: Annotated[int, Field(gt=0, le=_MOST_COUNT)] | None = None
    latency_ms: Annotated[float, Field(gt=0, le=_MOST_MS)] | None = None

    def __post_init__(self) -> None:
        """Refuse a budget that no plan can have."""
        for name, value in asdict(self).items():
            most = _MOST_BITS if name.endswith("_bits") else _MOST_MS if name == "latency_ms" else _MOST_COUNT
            if value is not None and not 0 < value <= most:
                raise InputError(
                    f"The budget {name}={str(value)[:60]} is not a positive number of at most {most:g}. "
                    "Give one that is."
                )

    def as_dict(self) -> dict[str, float]:
        """The budgets that are set, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class PlanTotals:
    """What a plan costs: mean bits per weight and per activation element, bytes of the model, BitOps per image.

    Counted by `accounting.py` of the planner. A mean is None where the plan names no tensor of that sort.
    `activation_bytes` are those of all planned activations of one image (None in files from before they were counted),
    `latency_ms` is None without a table of latencies. All are None in a file that leaves them out: what a plan costs
    follows from the network.
    """

    __pydantic_config__ = _CONFIG

    weight_bits: MeanBits | None = None
    activation_bits: MeanBits | None = None
    size_bytes: Count | None = None
    bitops: Count | None = None
    activation_bytes: Count | None = None
    latency_ms: Milliseconds | None = None


@dataclass(frozen=True, kw_only=True)
class PlanSolver:
    """Where a plan comes from (`highs`, `uniform`, ...) and its certificate; None where nothing was optimised.

    `objective` names the column of sensitivity.parquet that was minimised; `lower_bound` is in its unit: no plan within
    the budget has a smaller one.
    """

    __pydantic_config__ = _CONFIG

    name: str
    status: str
    gap: Annotated[float, Field(ge=0)] | None = None
    lower_bound: Score | None = None
    objective: str | None = None


@dataclass(frozen=True, kw_only=True)
class BitPlan:
    """Bits per site, with the model, budget and solver that they belong to; sites are in network order.

    `predicted_delta_loss` is in nats, and None where no loss was measured (images without labels). `plan_bits` makes a
    plan; `table` has a row per site, `totals` what it costs; `save` and `load` keep it as JSON, `diff` compares two. A
    file may be edited: `totals`, `predicted_delta_loss` and `solver` may be stale or left out, since costs are counted
    from the sites where the plan is used.

    >>> import torch
    >>> import analysis as qv
    >>> model, data = torch.nn.Linear(4, 2), [(torch.randn(8, 4), torch.arange(8) % 2)]
    >>> plan = qv.plan_bits(model, qv.estimate_sensitivity(model, data), like="w4a8", layout="strict")
    >>> plan.table[["tensor", "bit_width"]].values.tolist(), plan.totals.weight_bits
    ([['weight', 4], ['input', 8]], 4.0)
    """

    __pydantic_config__ = _CONFIG

    format: Literal["qvw-bit-plan"] = FORMAT
    version: Literal[1] = VERSION
    model: PlanModel
    layout: Layout
    budget: PlanBudget
    sites: tuple[PlannedSite, ...]
    totals: PlanTotals = PlanTotals()
    predicted_delta_loss: Score | None = None
    solver: PlanSolver = PlanSolver(name="hand", status="given")

    def __post_init__(self) -> None:
        """Refuse a site named twice."""
        seen: set[Site] = set()
        for planned in self.sites:
            if planned.site in seen:
                raise InputError(f"The site {planned.site} is named twice. Keep one of the two.")
            seen.add(planned.site)

    @property
    def bits(self) -> dict[Site, int]:
        """The bit-width of each planned site."""
        return {planned.site: planned.bit_width for planned in self.sites}

    @property
    def table(self) -> "pd.DataFrame":
        """One row per planned site, in network order: module, tensor, bit_width, granularity, signed, offset."""
        import pandas as pd

        columns = [field.name for field in fields(PlannedSite)]
        return pd.DataFrame([asdict(site) for site in self.sites], columns=columns)

    def save(self, path: "str | Path") -> None:
        """Write the plan file, whole or not at all. InputError where it cannot be written."""
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(self.to_json(), encoding="utf-8")
            os.replace(temporary, target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise InputError(f"{target} cannot be written: {first_line(error)}.") from error

    @classmethod
    def load(cls, path: "str | Path") -> "BitPlan":
        """The plan in a file; InputError where it cannot be read or is not a plan."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"the plan {path} cannot be read: {first_line(error)}. Make one with plan_bits."
            ) from error
        return cls.from_json(text, source=str(path))

    def diff(self, other: "BitPlan") -> "pd.DataFrame":
        """The sites that the two plans quantize differently: module, tensor, bits_a, bits_b, change, scheme_differs.

        Bits are those of this plan (a) and of `other` (b), NaN where a plan leaves the site in floating point; `change`
        is b minus a. Sites in the order of this plan, then those of `other` alone.
        """
        import pandas as pd

        own, theirs = ({site.site: site for site in plan.sites} for plan in (self, other))
        rows = []
        for site in dict.fromkeys([*own, *theirs]):
            a, b = own.get(site), theirs.get(site)
            if a == b:
                continue
            bits = [float("nan") if one is None else float(one.bit_width) for one in (a, b)]
            same_bits = a is not None and b is not None and replace(a, bit_width=b.bit_width) == b
            rows.append((*site, *bits, bits[1] - bits[0], not same_bits))
        columns = ["module", "tensor", "bits_a", "bits_b", "change", "scheme_differs"]
        return pd.DataFrame(rows, columns=pd.Index(columns))

    def _repr_html_(self) -> str:
        """The totals and the first sites, for a notebook."""
        costs = ", ".join(f"{name} {value:g}" for name, value in asdict(self.totals).items() if value is not None)
        return f"<p>BitPlan of {len(self.sites)} sites: {costs}</p>{self.table.head(8).to_html(index=False)}"

    def check_sites(self, known: Collection[Site]) -> None:
        """Raise InputError if the plan names a site that is not in `known`."""
        check_known_sites((planned.site for planned in self.sites), known)

    @property
    def sha256(self) -> str:
        """The hash of the plan file's text."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The text of the plan file: one site a line, so that two plans can be compared line by line."""
        content = asdict(self) | {"budget": self.budget.as_dict()}
        lines = [
            f'  "{key}": ' + (_one_per_line(value) if key == "sites" else json.dumps(value, allow_nan=False))
            for key, value in content.items()
        ]
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        _ADAPTER.validate_json(text)  # a plan of ours that breaks its own schema is a defect, not an InputError
        return text

    @classmethod
    def from_json(cls, text: str, source: str = "plan.json") -> "BitPlan":
        """The plan in `text`, or InputError with the place; `source` is the file's name for messages."""
        try:
            content = json.loads(
                text, object_pairs_hook=_unique_keys, parse_constant=_refuse_number, parse_float=_finite_float
            )
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source} is not readable as JSON: {error}. Restore the file or plan again.") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise InputError(f'{source} is not a bit plan: "format" is not "{FORMAT}". Make one with plan_bits.')
        if type(content.get("version")) is not int or content["version"] != VERSION:  # True equals 1
            came = str(content.get("version"))[:40]
            raise InputError(f"{source}: version is {came!r}, expected {VERSION}. Plan again with this version.")
        try:
            return _ADAPTER.validate_json(text)
        except ValidationError as error:
            raise InputError(f"{source}: {_describe(error)}. Fix the file (quant/bit_plan.schema.json).") from error
        except UnicodeError as error:
            raise InputError(f"{source} is not valid Unicode: {error}. Restore the file or plan again.") from error


def json_schema() -> dict[str, Any]:
    """The JSON schema of the plan file, as published in quant/bit_plan.schema.json."""
    schema = _ADAPTER.json_schema()
    # Constants to us, so they have defaults; a file must carry them to be recognised.
    schema["required"] = ["format", "version", *schema["required"]]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def check_known_sites(sites: Iterable[Site], known: Collection[Site], what: str = "the plan") -> None:
    """Raise InputError, naming the nearest known site, if one of `sites`, which `what` names, is not in `known`."""
    unknown = [site for site in sites if site not in known]
    if not unknown:
        return
    more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
    close = difflib.get_close_matches(str(unknown[0]), [str(site) for site in known], n=1, cutoff=0.0)
    nearest = f"the nearest is {close[0]}" if close else "it has none"
    raise InputError(f"The model has no site {unknown[0]}{more}; {nearest}. Check that {what} is for this model.")


def _one_per_line(items: Iterable[dict[str, Any]]) -> str:
    lines = ",\n".join(f"    {json.dumps(item, allow_nan=False)}" for item in items)
    return f"[\n{lines}\n  ]" if lines else "[]"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            place = f" of {content['module']}" if "module" in content else ""
            raise ValueError(f"the key {key[:80]!r}{place} is given twice")
        content[key] = value
    return content


def _refuse_number(text: str) -> float:
    raise ValueError(f"{text} is not a number that JSON allows")


def _finite_float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_number(text[:40])


def _describe(error: ValidationError) -> str:
    """The first error as `place: what is wrong, got what came`."""
    first, *others = error.errors(include_url=False)
    place = ".".join(str(part) for part in first["loc"]) or "the file"
    if isinstance(first.get("ctx", {}).get("error"), InputError):
        return f"{place}: {first['ctx']['error']}".rstrip(".")
    got = "" if not first["loc"] or isinstance(first["input"], dict | list) else f", got {str(first['input'])[:60]!r}"
    more = f" (and {len(others)} more)" if others else ""
    wrong = first["msg"].removeprefix("Value error, ")
    limit = first.get("ctx", {}).get("le", first.get("ctx", {}).get("ge"))
    if limit is not None:  # pydantic writes all digits of 1e200
        wrong = f"{wrong.rpartition(' ')[0]} {limit:g}"
    return f"{place}: {wrong[0].lower()}{wrong[1:]}{got}{more}"


_ADAPTER = TypeAdapter(BitPlan)
