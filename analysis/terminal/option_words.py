"""What libraries call arguments and functions, in the words of the command line."""

import re

_SETTINGS = (
    "batch_size|optimizer|learning_rate|scale_learning_rate|precision|clip_grad_norm|obr_weight|dampening_weight|"
    "kurtosis_weight|kd_weight|task_weight|kd_temperature"
)
_WORDS = (
    (rf"`({_SETTINGS})`", r"--set \1"),
    (
        r"`(exclude|include|like|weight_bits|activation_bits|size_bytes|gbitops|activation_mib|latency_ms|objective|pin|bounds|tie|candidates_of|candidates)`",
        lambda found: "--" + found[1].replace("_bytes", "").replace("_", "-"),
    ),
    (r"`path`", "--out"),
    (r"`run`", "`--run`"),
    (r"`overwrite=True`", "`--overwrite`"),
    (r"from scratch(?! with)", "from scratch with --overwrite"),
    (r"layout='strict'", "--layout strict"),
    (r"\bmeasure_sensitivity\b", "`qvw sensitivity`"),
    (r"\bplan_bits\b", "`qvw plan`"),
    (r"\bmeasure_stats\b", "`qvw stats`"),
    (r"\(mean and deviation\)", "(--mean, --std)"),
    (r"a SoftLabelWriter makes one", "`qvw soft-labels TEACHER --data D --out FILE` makes one"),
    (r"[Mm]ake the soft labels again", r"\g<0> with `qvw soft-labels ... --overwrite`"),
)


def as_options(message: str) -> str:
    """The message of an InputError, arguments named as options.

    >>> as_options("Lower `learning_rate`; then start from scratch.")
    'Lower --set learning_rate; then start from scratch with --overwrite.'
    """
    for pattern, words in _WORDS:
        message = re.sub(pattern, words, message)
    return message
