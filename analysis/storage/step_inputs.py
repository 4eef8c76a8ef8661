"""What differs between the inputs of a step that a run folder holds and those of a new one, in words."""

import json
import re
from collections.abc import Mapping
from typing import Any

from analysis.storage.files import json_scalar

_HASH = re.compile(r'"[0-9a-f]{64}"')  # in JSON
_OTHER = {"weights_sha256": "other weights", "images_sha256": "other images",
          "data_sha256": "other data, or in another order", "val_sha256": "other validation images",
          "soft_labels_sha256": "other soft labels", "model_sha256": "another trained model"}  # fmt: skip
"""Words for inputs that are hashes, which say nothing to a person."""


def input_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs, as `key: old -> new`, hashes in words; JSON's eyes see a tuple as a list and NaN as itself."""
    before, after = ({k: json.dumps(v) for k, v in plain(x).items()} for x in (old, new))
    keys = [k for k in {**before, **after} if before.get(k) != after.get(k)]
    told = [
        _OTHER.get(k, f"another {k.removesuffix('_sha256')}")
        if k.endswith("sha256") or any(_HASH.fullmatch(x.get(k, "")) for x in (before, after))
        else f"{k}: {before.get(k, 'absent')} -> {after.get(k, 'absent')}"
        for k in keys
        if k != "images_sha256" or "images" not in keys  # another number of images says it
    ]
    return ", ".join(told)


def plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """The value as JSON reads it back."""
    return json.loads(json.dumps(dict(value), default=json_scalar))
