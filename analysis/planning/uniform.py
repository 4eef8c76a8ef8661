"""Bit-widths as a person writes them; importing this costs nothing, so that they are checked before all else."""

import re

from quant.choices import ALLOWED_BIT_WIDTHS
from quant.errors import InputError


def parse_uniform(text: str, option: str = "uniform bits") -> tuple[int, int]:
    """Weight and activation bits of `w3a4`; `option` is where it was given. InputError for anything else.

    >>> parse_uniform("w3a4")
    (3, 4)
    """
    match = re.fullmatch(r"w(\d{1,2})a(\d{1,2})", text)
    if match is None or not {int(match[1]), int(match[2])} <= set(ALLOWED_BIT_WIDTHS):
        raise InputError(f"{option} {text!r} is not understood; write w4a4, with bit-widths 1 to 8 or 16.")
    return int(match[1]), int(match[2])


def parse_widths(text: str) -> tuple[int, ...]:
    """The bit-widths of `2,4,8`, `2-8` or `2-4,8`, rising, each once; a range holds the allowed ones between its ends.

    Raises ValueError for anything else; its text says what is wrong.

    >>> parse_widths("2-4,8")
    (2, 3, 4, 8)
    >>> parse_widths("6-16")
    (6, 7, 8, 16)
    """
    widths: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,2})\s*(?:-\s*(\d{1,2})\s*)?", part)
        if match is None:
            raise ValueError(f"{text!r} is not a list of bit-widths. Write such as 2,4,8 or 2-8 or 2-4,8.")
        low, high = int(match[1]), int(match[2] or match[1])
        wrong = [width for width in (low, high) if width not in ALLOWED_BIT_WIDTHS]
        if wrong:
            raise ValueError(f"{wrong[0]} is not offered; choose from {', '.join(map(str, ALLOWED_BIT_WIDTHS))}.")
        if low > high:
            raise ValueError(f"the range {part.strip()!r} runs down. Write {high}-{low}.")
        widths.update(width for width in ALLOWED_BIT_WIDTHS if low <= width <= high)
    return tuple(sorted(widths))
