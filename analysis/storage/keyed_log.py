"""A log of rows that know whose they are: those of another owner, and damaged ones, are never taken for one's own."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analysis.storage.files import RowLog
from analysis.storage.step_inputs import plain


class OwnRows:
    """Rows of one owner, each on the disk when it is added, so that a long step can be resumed.

    `owner` is all that fixes the rows: each holds the hash of both.
    """

    def __init__(self, path: Path, owner: Mapping[str, Any]) -> None:
        self.log, self._owner = RowLog(path), json_sha256(owner)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row. Raises InputError where it cannot be written."""
        self.log.append([{**row, "sha256": self._seal(plain(row))}])

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """The owner's rows in their order, without their hash; and whether there are others, or damaged ones."""
        lines = self.log.read(damaged=True)
        rows = [line for line in lines if isinstance(line, dict)]
        own = [row for row in rows if row.pop("sha256", None) == self._seal(row)]
        return own, len(own) < len(lines)

    def _seal(self, row: Mapping[str, Any]) -> str:
        return json_sha256({"owner": self._owner, "row": row})


def json_sha256(value: Mapping[str, Any]) -> str:
    """Hexadecimal SHA-256 of a value as JSON, the order of its keys left aside."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()
