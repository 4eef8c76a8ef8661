"""The layout of a packed file: what its header says, and how many bytes it takes. Nothing here needs torch.

A packed file is safetensors: 8 bytes with the length of the header, the header (JSON, padded with spaces to a multiple
of 8), then the tensors. The header's metadata hold one text, that of `metadata_text`, from which a network is prepared
without a forward pass.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

FORMAT, VERSION = "qvw-packed-model", 2
GRANULARITIES = ("per_tensor", "per_channel", "per_head")
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "U8": 1,
          "I8": 1, "BOOL": 1, "C64": 8}  # fmt: skip
_ALIGNMENT = ("BOOL", "U8", "I8", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64")
_DIGEST = 64


@dataclass(frozen=True, kw_only=True)
class PackedSite:
    """How one site is quantized in a network: all that its quantizer needs but the scale.

    `rows` are those of a fused weight, `parameter` the parameter that holds a weight, `called` whether the layer is
    called or its weight used without it, `elements` how many share a scale.
    """

    module: str
    tensor: str
    bit_width: int
    granularity: str
    signed: bool
    offset: bool
    axis: int
    groups: int
    elements: int
    rows: tuple[int, int] | None = None
    parameter: str = "weight"
    called: bool = True

    def entry(self) -> list[Any]:
        """The site as the metadata have it."""
        flags = self.signed + 2 * self.offset + 4 * (not self.called)
        found: list[Any] = [self.module, self.tensor, self.bit_width, flags, GRANULARITIES.index(self.granularity),
                            self.axis, self.groups, self.elements]  # fmt: skip
        if self.rows is not None or self.parameter != "weight":
            found.append(list(self.rows or ()))
        if self.parameter != "weight":
            found.append(self.parameter)
        return found

    @classmethod
    def of(cls, entry: Sequence[Any]) -> "PackedSite":
        """The site of an entry; ValueError, TypeError or LookupError where it is none."""
        module, tensor, bit_width, flags, granularity, axis, groups, elements, *rest = entry
        rows = tuple(rest[0]) if rest and rest[0] else None
        if rows is not None and len(rows) != 2:
            raise ValueError("rows are not two numbers")
        return cls(
            module=str(module), tensor=str(tensor), bit_width=int(bit_width), granularity=GRANULARITIES[granularity],
            signed=bool(flags & 1), offset=bool(flags & 2), called=not flags & 4, axis=int(axis), groups=int(groups),
            elements=int(elements), rows=rows, parameter=rest[1] if len(rest) > 1 else "weight",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PackedLayout:
    """The quantized sites of a network, its attention modules, and weights that other modules use too.

    `attention` has the form of each attention module that is opened: fused, then places of scores, softmaxes, values
    and values_first. `shared` has module, parameter and called of each further use of a weight, by the owner's place
    in `sites`.
    """

    sites: tuple[PackedSite, ...]
    attention: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    shared: Sequence[Sequence[Any]] = ()

    def text(self, digest: str = "0" * _DIGEST) -> str:
        """The metadata; `digest` is the SHA-256 of the content, of a fixed length."""
        content: dict[str, Any] = {"version": VERSION, "sites": [site.entry() for site in self.sites]}
        if self.attention:
            content["attention"] = {name: list(form) for name, form in self.attention.items()}
        if self.shared:
            content["shared"] = [list(use) for use in self.shared]
        return json.dumps({**content, "sha256": digest}, separators=(",", ":"))


def file_size(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> int:
    """Bytes of a safetensors file with tensors of (name, dtype as safetensors writes it, shape), and the metadata.

    >>> file_size([("x", "F32", (3,))], {})
    76
    """
    ordered = sorted(tensors, key=lambda tensor: (-_ALIGNMENT.index(tensor[1]), tensor[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in ordered:
        start, end = end, end + math.prod(shape) * _BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + (length + 7) // 8 * 8 + end
