"""What is wrong with the input is said before torch is imported, which takes seconds."""

import os
from collections.abc import Callable


def first_word(check: Callable[[], object]) -> None:
    """Run a check of what was typed; it raises InputError, and imports nothing large.

    A step repeats its checks, so nothing depends on this one: where `torchrun` has started several processes only that
    of rank 0 runs it, so that one message appears.
    """
    if os.environ.get("RANK", "0") == "0":
        check()
