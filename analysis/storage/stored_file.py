"""stored.json of a run folder: the names and shapes of the network, from which the size of its packed file follows."""

from pathlib import Path

from analysis.terminal.console import warn
from quant.errors import InputError, first_line
from quant.stored_model import StoredModel

STORED = "stored.json"


def read_stored(run: Path, parameters: int) -> StoredModel | int:
    """The network as the sweep saw it; of a folder of an earlier version the number of parameters, with a warning."""
    path = run / STORED
    if not path.exists():
        warn(
            f"{run} was measured by an earlier version and has no {STORED}: bytes are without header and buffers. "
            "`qvw sensitivity` with --overwrite measures again."
        )
        return parameters
    try:
        return StoredModel.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged ({first_line(error)}). Measure again: `qvw sensitivity` with --overwrite."
        ) from error
