"""The plan file: both ways without loss, and nothing but a plan is read as one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

import quant.bit_plan
from quant.bit_plan import (
    BitPlan,
    PlanBudget,
    PlanModel,
    PlannedSite,
    PlanSolver,
    PlanTotals,
    TensorName,
    json_schema,
)
from quant.choices import ALLOWED_BIT_WIDTHS, GRANULARITIES
from quant.errors import InputError
from quant.site import ATTENTION_TENSORS, WEIGHT_TENSORS, Site

SCHEMA_FILE = Path(quant.bit_plan.__file__).with_name("bit_plan.schema.json")


def planned(module: str = "fc1", tensor: Any = "weight", bit_width: int = 4) -> PlannedSite:
    """A site as a plan has it."""
    return PlannedSite(
        module=module, tensor=tensor, bit_width=bit_width, granularity="per_tensor", signed=True, offset=False
    )


PLAN = BitPlan(
    model=PlanModel(name="resnet18", kwargs={"zero_init_last": False}, weights_sha256="ab" * 32),
    layout="paper",
    budget=PlanBudget(weight_bits=3.0),
    sites=(planned(), planned(tensor="input", bit_width=8), planned("blocks.0.mlp.fc1", bit_width=2)),
    totals=PlanTotals(weight_bits=2.5, activation_bits=8.0, size_bytes=1234, bitops=56789),
    predicted_delta_loss=-0.01,
    solver=PlanSolver(name="highs", status="optimal", gap=0.0, lower_bound=-0.01),
)

finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | finite | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
sites = st.builds(
    PlannedSite,
    module=st.text(min_size=1, max_size=8),
    tensor=st.sampled_from((*WEIGHT_TENSORS, "input", *ATTENTION_TENSORS)),
    bit_width=st.sampled_from(ALLOWED_BIT_WIDTHS),
    granularity=st.sampled_from(GRANULARITIES),
    signed=st.booleans(),
    offset=st.booleans(),
)
positive = st.floats(min_value=1e-3, max_value=16)
counts = st.integers(min_value=1, max_value=10**21)
losses = st.floats(min_value=-1e200, max_value=1e200)
plans = st.builds(
    BitPlan,
    model=st.builds(
        PlanModel,
        name=st.text(max_size=8),
        kwargs=st.dictionaries(st.text(max_size=5), json_values, max_size=3),
        weights_sha256=st.none() | st.text(max_size=8),
    ),
    layout=st.sampled_from(["paper", "strict"]),
    budget=st.builds(
        PlanBudget,
        weight_bits=st.none() | positive,
        activation_bits=st.none() | positive,
        size_bytes=st.none() | counts,
        activation_bytes=st.none() | counts,
        bitops=st.none() | counts,
        latency_ms=st.none() | positive,
    ),
    sites=st.lists(sites, max_size=4, unique_by=lambda one: one.site).map(tuple),
    totals=st.builds(
        PlanTotals,
        weight_bits=st.none() | positive,
        activation_bits=st.none() | positive,
        size_bytes=counts,
        bitops=counts,
        activation_bytes=st.none() | counts,
        latency_ms=st.none() | positive,
    ),
    predicted_delta_loss=st.none() | losses,
    solver=st.builds(
        PlanSolver,
        name=st.text(max_size=8),
        status=st.text(max_size=8),
        gap=st.none() | st.floats(min_value=0, allow_infinity=False),
        lower_bound=st.none() | losses,
    ),
)


@given(plan=plans)
def test_a_plan_survives_its_file(plan):
    """Writing and reading gives the same plan, the file fits the schema, and written again it is the same text."""
    text = plan.to_json()
    assert BitPlan.from_json(text) == plan
    assert BitPlan.from_json(text).to_json() == text
    jsonschema.validate(json.loads(text), json_schema())


def test_a_plan_from_before_latencies_is_read():
    """A file whose totals lack activation bytes and latency is a plan all the same, without them."""
    content = json.loads(PLAN.to_json())
    del content["totals"]["activation_bytes"], content["totals"]["latency_ms"]
    assert BitPlan.from_json(json.dumps(content)) == PLAN


def test_the_file_has_the_documented_keys_in_order():
    """The keys and their order are the contract; a budget that is not set is absent; one site takes one line."""
    text = PLAN.to_json()
    content = json.loads(text)
    assert list(content) == [
        "format", "version", "model", "layout", "budget", "sites", "totals", "predicted_delta_loss", "solver",
    ]  # fmt: skip
    assert list(content["sites"][0]) == ["module", "tensor", "bit_width", "granularity", "signed", "offset"]
    assert content["budget"] == {"weight_bits": 3.0}
    assert sum('"module"' in line for line in text.splitlines()) == 3
    assert PLAN.bits == {Site("fc1", "weight"): 4, Site("fc1", "input"): 8, Site("blocks.0.mlp.fc1", "weight"): 2}


def test_the_published_schema_is_the_one_of_the_code():
    """quant/bit_plan.schema.json is `json_schema()`: valid, with all bit-widths, tensors and granularities."""
    schema = json_schema()
    assert json.loads(SCHEMA_FILE.read_text()) == schema
    jsonschema.Draft202012Validator.check_schema(schema)
    assert get_args(TensorName) == (*WEIGHT_TENSORS, "input", *ATTENTION_TENSORS)
    site = schema["$defs"]["PlannedSite"]["properties"]
    assert site["bit_width"]["enum"] == list(ALLOWED_BIT_WIDTHS)
    assert site["granularity"]["enum"] == list(GRANULARITIES)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"bit_width": 4', '"bit_width": 9', r"p\.json: sites\.0\.bit_width: .*one of 1, 2, .*got '9'"),
        ('"bit_width": 4', '"bit_width": true', r"sites\.0\.bit_width: .*valid integer, got 'True'"),
        ('"bit_width": 4', '"bit_width": 4.0', r"sites\.0\.bit_width: .*valid integer"),
        ('"tensor": "input"', '"tensor": "output"', r"sites\.1\.tensor: .*'weight'.*got 'output'"),
        ('"per_tensor"', '"per_row"', r"sites\.0\.granularity: .*'per_head'.*got 'per_row'"),
        ('"signed": true', '"signed": 1', r"sites\.0\.signed: .*boolean"),
        ('"signed": true', '"sgined": true', r"sites\.0\.signed: field required \(and 1 more\)"),
        ('"tensor": "input"', '"tensor": "weight"', r"The site fc1:weight is named twice"),
        ('"module": "fc1"', '"module": "fc1", "module": "fc2"', r"key 'module' of fc1 is given twice"),
        ('"gap": 0.0', '"gap": NaN', "NaN is not a number"),
        ('"gap": 0.0', '"gap": -Infinity', "-Infinity is not a number"),
        ('"gap": 0.0', '"gap": 1e999', "1e999 is not a number"),
        ('"zero_init_last": false', '"x": [1e999]', "1e999 is not a number"),
        ('"size_bytes": 1234', '"size_bytes": -1', r"totals\.size_bytes: .*greater than or equal to 0"),
        ('"size_bytes": 1234', '"size_bytes": ' + "9" * 5000, "not readable as JSON"),
        (
            '"size_bytes": 1234',
            '"size_bytes": 1' + "0" * 400,
            r"totals\.size_bytes: .*less than or equal to 1e\+21, got",
        ),
        ('"bitops": 56789', '"bitops": 1e300', r"totals\.bitops: .*valid integer"),
        (
            '"weight_bits": 2.5',
            '"weight_bits": 1e300',
            r"totals\.weight_bits: .*less than or equal to 32, got '1e\+300'",
        ),
        ('"weight_bits": 2.5', '"weight_bits": -2.5', r"totals\.weight_bits: .*greater than or equal to 0"),
        ('"activation_bytes": null', '"activation_bytes": 1' + "0" * 30, r"totals\.activation_bytes: .*less than or"),
        ('"latency_ms": null', '"latency_ms": 1e99', r"totals\.latency_ms: .*less than or equal to 1e\+12, got"),
        ('"predicted_delta_loss": -0.01', '"predicted_delta_loss": -1e308', r"predicted_delta_loss: .*greater than or"),
        ('"gap": 0.0', '"gap": -0.5', r"solver\.gap: .*greater than or equal to 0, got '-0\.5'"),
        ('"lower_bound": -0.01', '"lower_bound": 1e308', r"solver\.lower_bound: .*less than or equal to 1e\+200"),
        ('"weight_bits": 3.0', '"weight_bits": 0', r"budget\.weight_bits: .*greater than 0"),
        ('"weight_bits": 3.0', '"weight_bits": 33', r"budget\.weight_bits: .*less than or equal to 32, got '33'"),
        (
            '"weight_bits": 3.0',
            '"size_bytes": 1' + "0" * 400,
            r"budget\.size_bytes: .*less than or equal to 1e\+21, got",
        ),
        ('"weight_bits": 3.0', '"latency_ms": 1e300', r"budget\.latency_ms: .*less than or equal to"),
        ('"weight_bits": 3.0', '"weights": 3.0', r"budget\.weights: "),
        ('"layout": "paper"', '"layout": "Paper"', r"layout: .*'paper' or 'strict', got 'Paper'"),
        ('"format": "qvw-bit-plan"', '"format": "other"', "not a bit plan"),
        ('"version": 1', '"version": 2', "version is '2', expected 1"),
        ('"version": 1', '"version": true', "version is 'True', expected 1"),
        ('  "version": 1,\n', "", "version is 'None', expected 1"),
        ('"resnet18"', '"\\ud800"', r"p\.json: the file: "),
        ('"resnet18"', '"\ud800"', r"p\.json"),
        ('"zero_init_last": false', '"x": ' + "[" * 100_000 + "]" * 100_000, "not readable as JSON"),
    ],
)
def test_a_wrong_entry_is_named(old, new, message):
    """Each kind of wrong entry is an InputError that names the file, the place and what came, in at most two lines."""
    text = PLAN.to_json()
    assert old in text
    with pytest.raises(InputError, match=message) as caught:
        BitPlan.from_json(text.replace(old, new, 1), source="p.json")
    assert len(str(caught.value)) < 400
    assert "p.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "3", '"qvw-bit-plan"', "{}", "\ufeff{}", "\x00"])
def test_other_files_are_not_plans(text):
    """What is no plan at all is said to be none, whatever it is."""
    with pytest.raises(InputError, match=r"not a bit plan|not readable as JSON"):
        BitPlan.from_json(text)


def test_a_plan_cut_short_is_refused():
    """Every proper beginning of a plan file is an InputError."""
    text = PLAN.to_json().rstrip()
    for length in range(len(text)):
        with pytest.raises(InputError, match="not readable as JSON"):
            BitPlan.from_json(text[:length])


@given(data=st.data())
def test_a_damaged_plan_is_read_or_refused(data):
    """Any text put anywhere into a plan file gives a plan or an InputError, never another error."""
    text = PLAN.to_json()
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, min(start + 20, len(text))))
    middle = data.draw(st.text(max_size=6) | st.sampled_from(["NaN", "1e400", "[", '{"a":1}', "9" * 400, "-", "null"]))
    try:
        plan = BitPlan.from_json(text[:start] + middle + text[stop:])
    except InputError:
        return
    assert BitPlan.from_json(plan.to_json()) == plan


def _places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, value in inner for place in _places(value, (*path, key)))]


@given(data=st.data(), value=json_values | st.integers() | st.sampled_from([10**30, -1, 1e300]))
def test_what_the_schema_refuses_the_reader_refuses(data, value):
    """With any entry replaced by any value, a file that breaks the published schema is an InputError."""
    content = json.loads(PLAN.to_json())
    place = data.draw(st.sampled_from([place for place in _places(content) if place]))
    parent = content
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    fits = jsonschema.Draft202012Validator(json_schema()).is_valid(content)
    try:
        BitPlan.from_json(json.dumps(content))
    except InputError:
        return
    assert fits


def test_a_plan_of_ours_that_breaks_the_schema_is_a_defect():
    """`to_json` checks what it writes."""
    with pytest.raises(ValueError, match="size_bytes"):
        replace(PLAN, totals=replace(PLAN.totals, size_bytes=-1)).to_json()


def test_a_site_that_cannot_be_planned_cannot_be_made():
    """Bits, a tensor or a granularity that there is not, and a site named twice, are refused where they are made."""
    with pytest.raises(
        InputError, match=r"The bit_width of fc1:weight is 9\. Choose from 1, 2, 3, 4, 5, 6, 7, 8, 16\."
    ):
        planned(bit_width=9)
    with pytest.raises(InputError, match=r"The tensor of fc1:output is 'output'\. Choose from weight, weight\.query"):
        planned(tensor="output")
    with pytest.raises(InputError, match=r"The granularity of fc1:weight is 'per_row'\. Choose from per_tensor"):
        replace(planned(), granularity="per_row")
    with pytest.raises(InputError, match="fc1:weight is named twice"):
        replace(PLAN, sites=(planned(), planned(bit_width=2)))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 32.5])
def test_a_budget_is_a_positive_number(value):
    """A budget that is no positive number, or more than floating point takes, is refused where it is made."""
    with pytest.raises(InputError, match=r"weight_bits=.* is not a positive number of at most 32\. Give one"):
        PlanBudget(weight_bits=value)
    with pytest.raises(InputError, match=r"bitops=10+ is not a positive number of at most 1e\+21\."):
        PlanBudget(bitops=10**400)


@pytest.mark.parametrize(
    "model", [{"kwargs": {"drop": [float("nan")]}}, {"name": "\udcff"}, {"weights_sha256": "\ud800"}]
)
def test_a_model_that_json_cannot_name_is_refused(model):
    """NaN among its arguments, and bytes of a path that are no text, are told before a file is written."""
    with pytest.raises(InputError, match=r"A plan cannot name the model '.*': .*Give it another name, or other arg"):
        PlanModel(**({"name": "a", "kwargs": {}, "weights_sha256": None} | model))


def test_unknown_sites_are_named_with_the_nearest():
    """A plan for another model is an InputError that names the first unknown site and the nearest known one."""
    PLAN.check_sites(dict.fromkeys(PLAN.bits))
    known = {Site("fc1", "weight"): 0, Site("fc1", "input"): 0, Site("blocks.0.mlp.fc2", "weight"): 0}
    with pytest.raises(
        InputError, match=r"no site blocks\.0\.mlp\.fc1:weight; the nearest is blocks\.0\.mlp\.fc2:weight"
    ):
        PLAN.check_sites(known)
    with pytest.raises(InputError, match=r"no site fc1:weight \(and 2 more\); it has none"):
        PLAN.check_sites({})
