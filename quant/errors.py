"""The one exception for a user's wrong input."""

import errno
import re


class InputError(ValueError):
    """What the user gave is wrong; the message says what came, what was expected and the next step.

    `qvw` prints it in one or two lines on standard error and exits with 2. Every other exception is a
    defect of ours and keeps its traceback.
    """


class ForwardError(InputError):
    """The model does not run on the batch that it is given."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, 200 characters at most, without its full stop; else its type's name.

    A system error is told in words alone, without the number of Python's text, with the file that it names.
    """
    if isinstance(error, OSError) and error.errno and error.strerror:
        file = f": {error.filename}" if error.filename else ""
        return f"{error.strerror[0].lower()}{error.strerror[1:]}{file}"[:200]
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(error))  # torch prints some words in bold
    return (text.strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")


def system_error(error: BaseException) -> int | None:
    """The errno of an exception; safetensors and torch tell it in words only. None where it is no system error."""
    if isinstance(error, OSError):
        return error.errno or 0
    match = re.search(r"os error (\d+)", str(error))
    if match:
        return int(match[1])
    return errno.ENOSPC if "No space left" in str(error) else None
