"""The one exception for a user's wrong input."""


class InputError(ValueError):
    """What the user gave is wrong; the message says what came, what was expected and the next step.

    `qvw` prints it in one or two lines on standard error and exits with 2. Every other exception is a
    defect of ours and keeps its traceback.
    """
