"""Which split a folder or a cell names: `train` or `val`, however it is written."""

import re
from collections.abc import Collection

from quant.errors import InputError

_PARTS = r"(?:[ _.-]*(?:set|split|data|images?|imgs?|folder))?(?:[ _.-]*\d{4})?"
_NAMES = {
    "train": rf"train(?:ing)?{_PARTS}",
    "val": rf"(?:val(?:id(?:ation)?)?|dev(?:el(?:opment)?)?|eval(?:uation)?){_PARTS}",
    "test": rf"test(?:ing)?{_PARTS}",
}


def kind_of_split(name: str) -> str | None:
    """`train`, `val` or `test`; None for a name that is none of a split."""
    text = name.strip().lower()
    return next((kind for kind, pattern in _NAMES.items() if re.fullmatch(pattern, text)), None)


def is_numbered_part(name: str) -> bool:
    """Whether a name is one of several parts of a data set, such as `fold0` or `split_2`."""
    return re.fullmatch(r"(?:fold|split|part|subset|cv)[ _.-]*\d+", name.strip().lower()) is not None


def chosen_splits(names: Collection[str], where: str) -> dict[str, str]:
    """The name of each split among `names`: `train`, and `val`, for which a test set serves where there is no other.

    Raises InputError where two names stand for one split.
    """
    found: dict[str, str] = {}
    for kind in ("train", "val", "test"):
        same = sorted(name for name in names if kind_of_split(name) == kind)
        if len(same) > 1:
            raise InputError(f"{where} has {' and '.join(same)}: which of them is {kind}? Rename or move the others.")
        if same:
            found.setdefault("val" if kind == "test" else kind, same[0])
    return found
