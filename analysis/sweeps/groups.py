"""Groups of sites that are quantized together, or left out together: by kind, block, stage or module."""

from collections.abc import Callable, Collection, Sequence

from quant.choices import Grouping
from quant.site import SiteInfo

EVERYTHING = "all"

# name -> which sites of a transformer it holds besides those of its own kind; a site may be in several
_ATTENTION = ("attn.qkv", "attn.query", "attn.key", "attn.value", "attn.softmax", "attn.proj")
_KINDS: dict[str, Callable[[SiteInfo], bool]] = {
    "mhsa": lambda info: info.kind in _ATTENTION,
    "ffn": lambda info: info.kind in ("mlp.fc1", "mlp.fc2"),
    "query": lambda info: info.site.tensor in ("query", "weight.query") or info.kind == "attn.query",
    "key": lambda info: info.site.tensor in ("key", "weight.key") or info.kind == "attn.key",
    "value": lambda info: info.site.tensor in ("value", "weight.value") or info.kind == "attn.value",
}


def groups_of(sites: Sequence[SiteInfo], by: Grouping, *, blocks: Collection[str]) -> dict[str, list[SiteInfo]]:
    """Name of each group, such as `kind:ffn` or `block:layers.0.blocks.1`, and its sites, in network order.

    Kinds are those of the sites, and where there are any: `mhsa` (all of attention), `ffn` (both layers of the MLP),
    `query`, `key`, `value` (rows of the weight and tensor). `blocks` are the names of the network's blocks; what lies
    in none is a group of the network's first level. A stage holds the blocks of one parent.
    """
    groups: dict[str, list[SiteInfo]] = {}
    if by == "kind":
        for info in sites:
            names = [name for name, holds in _KINDS.items() if holds(info)]
            for name in dict.fromkeys([*names, info.kind.removeprefix("attn.")]):
                groups.setdefault(f"kind:{name}", []).append(info)
        return groups
    stages = {stage_of(block) for block in blocks}
    for info in sites:
        module = info.site.module
        if by == "module":
            name = module
        elif by == "block":
            name = _innermost(module, blocks) or module.split(".")[0]
        else:
            block = _innermost(module, blocks)
            name = stage_of(block) if block else _innermost(module, stages) or module.split(".")[0]
        groups.setdefault(f"{by}:{name}", []).append(info)
    return groups


def stage_of(block: str) -> str:
    """The stage of a block: `layers.0` of `layers.0.blocks.1`, `layer2` of `layer2.0`, `blocks` of `blocks.3`."""
    parent = block.rpartition(".")[0] or block
    outer, _, last = parent.rpartition(".")
    return outer if outer and last == "blocks" else parent


def _innermost(module: str, containers: Collection[str]) -> str:
    """The longest of `containers` that holds `module`; empty where none does."""
    return max((name for name in containers if module == name or module.startswith(f"{name}.")), key=len, default="")
