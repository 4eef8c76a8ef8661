"""Rows of a log are taken up by their owner alone, and as they were written."""

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from analysis.storage.keyed_log import OwnRows, json_sha256

OWNER = {"weights": "aa", "images": 8}


@given(values=st.lists(st.floats(), max_size=5), text=st.text(max_size=5))
def test_rows_are_read_as_they_were_added(values, text, tmp_path_factory):
    """Floats to the last bit, NaN and infinities included, in their order."""
    log = OwnRows(tmp_path_factory.mktemp("log") / "rows.jsonl", OWNER)
    rows = [{"number": number, "value": value, "text": text} for number, value in enumerate(values)]
    for row in rows:
        log.append(row)
    own, others = log.read()
    assert not others
    assert json.dumps(own) == json.dumps(rows)


def test_rows_of_another_owner_and_changed_ones_are_left_out(tmp_path):
    """What was begun with other inputs, one changed digit, and lines that are no rows; the owner's stay."""
    path = tmp_path / "rows.jsonl"
    mine, other = OwnRows(path, OWNER), OwnRows(path, OWNER | {"images": 9})
    mine.append({"kl": 0.5})
    other.append({"kl": 0.25})
    mine.append({"kl": 0.75})
    assert mine.read() == ([{"kl": 0.5}, {"kl": 0.75}], True)
    assert other.read() == ([{"kl": 0.25}], True)
    lines = path.read_text().replace("0.75", "0.76") + "[]\nnull\nnonsense\n{}\n"
    path.write_text(lines)
    assert mine.read() == ([{"kl": 0.5}], True)


def test_the_hash_of_a_value_does_not_depend_on_the_order_of_keys():
    """Nor on tuples that JSON has as lists; it does on every value."""
    assert json_sha256({"a": 1, "b": (2, math.nan)}) == json_sha256({"b": [2, math.nan], "a": 1})
    assert json_sha256({"a": 1}) != json_sha256({"a": 2})
