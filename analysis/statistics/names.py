"""Short names of modules and sites, as every figure writes them and `--module` takes them."""

import re

_SHORT = ((r"\b(l)ayers\.(\d+)", r"\1\2"), (r"\b(b)locks\.(\d+)", r"\1\2"), (r"\b(s)tages\.(\d+)", r"\1\2"),
          (r"\bpatch_embed\b", "patch"), (r"\bdownsample\b", "down"))  # fmt: skip


def shorten(name: str) -> str:
    """A module's name as every figure writes it: `layers.0.blocks.1.mlp.fc1` becomes `l0.b1.mlp.fc1`.

    `layers.N`, `blocks.N` and `stages.N` become `lN`, `bN`, `sN`; `patch_embed` and `downsample` become `patch` and
    `down`; all else stays. Different modules stay different unless a network uses both spellings itself.

    >>> shorten("layers.0.blocks.1.mlp.fc1")
    'l0.b1.mlp.fc1'
    """
    for pattern, replacement in _SHORT:
        name = re.sub(pattern, replacement, name)
    return name


def shorten_site(module: str, tensor: str) -> str:
    """The label of a site: the part of a fused weight or the attention tensor follows the module's short name."""
    part = tensor.removeprefix("weight.") if tensor != "weight" else ""
    return shorten(module) if tensor in ("weight", "input") else f"{shorten(module)} {part}"
