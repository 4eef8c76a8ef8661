"""Uniform bits as a person writes them; importing this costs nothing, so that they are checked before all else."""

import re

from quant.choices import ALLOWED_BIT_WIDTHS
from quant.errors import InputError


def parse_uniform(text: str, option: str = "--uniform") -> tuple[int, int]:
    """Weight and activation bits of `w3a4`; `option` is where it was given. InputError for anything else.

    >>> parse_uniform("w3a4")
    (3, 4)
    """
    match = re.fullmatch(r"w(\d{1,2})a(\d{1,2})", text)
    if match is None or not {int(match[1]), int(match[2])} <= set(ALLOWED_BIT_WIDTHS):
        raise InputError(f"{option} {text!r} is not understood; write w4a4, with bit-widths 1 to 8 or 16.")
    return int(match[1]), int(match[2])
