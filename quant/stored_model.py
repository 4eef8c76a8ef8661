"""What the packed file of a network takes for any plan, to the byte, from names and shapes: no torch is needed."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from quant.bit_plan import PlannedSite
from quant.errors import InputError
from quant.packed_layout import FORMAT, GRANULARITIES, PackedLayout, PackedSite, file_size
from quant.site import Site

if TYPE_CHECKING:
    from quant.network import Network

_PLACES = ("scores", "softmaxes", "values", "values_first")


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A parameter or buffer of the state dict, with its safetensors type."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    buffer: bool = False


@dataclass(frozen=True, kw_only=True)
class StoredSite:
    """What a plan may quantize: (axis, groups) of each granularity, 0 groups where it has none.

    Of a weight `stored` is the name of its tensor, `parameter` that in its module, `shared` module, parameter and
    `called` of the other modules that have it.
    """

    module: str
    tensor: str
    numel: int
    groups: tuple[tuple[int, int], ...]
    called: bool = True
    rows: tuple[int, int] | None = None
    parameter: str = "weight"
    stored: str = ""
    shared: tuple[tuple[str, str, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A floating-point network as `save_packed` would store it once it is planned.

    `attention` has the form of each module that its planned tensors open, `opened_by` which modules besides open it.
    """

    tensors: tuple[StoredTensor, ...]
    sites: tuple[StoredSite, ...]
    attention: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    opened_by: Mapping[str, str] = field(default_factory=dict)

    def size(self, plan: Iterable[PlannedSite]) -> int:
        """Bytes of the packed file with a plan; without one those of a safetensors file of the float network.

        Raises InputError for a site that the network has not.
        """
        planned = {one.site: one for one in plan}
        unknown = planned.keys() - {Site(stored.module, stored.tensor) for stored in self.sites}
        if unknown:
            raise InputError(f"the network has no site {min(unknown)} to be quantized: the plan is of another one.")
        covered: dict[str, int] = {}
        tensors: list[tuple[str, str, tuple[int, ...]]] = []
        layout = self._layout(planned)
        shapes = {x.name: x.shape for x in self.tensors}
        for site in layout.sites:
            named = f"{site.module}:{site.tensor}"
            tensors.append((f"scale/{named}", "F32", (site.groups,)))
            if site.offset:
                tensors.append((f"offset/{named}", "F32", (site.groups,)))
        for stored in self.sites:
            one = planned.get(Site(stored.module, stored.tensor))
            if one is None or not stored.stored:
                continue
            tensors.append((f"codes/{one.site}", "U8", ((stored.numel * one.bit_width + 7) // 8,)))
            count = shapes[stored.stored][0] if stored.rows is None else stored.rows[1] - stored.rows[0]
            covered[stored.stored] = covered.get(stored.stored, 0) + count
        for x in self.tensors:
            rows = x.shape[0] - covered[x.name] if x.name in covered else None
            if rows != 0:
                part = "buffer" if x.buffer else "parameter"
                name = f"{part}/{x.name}" if planned else x.name
                tensors.append((name, x.dtype, x.shape if rows is None else (rows, *x.shape[1:])))
        return file_size(tensors, {FORMAT: layout.text()} if planned else {})

    def _layout(self, planned: Mapping[Site, PlannedSite]) -> PackedLayout:
        sites: list[PackedSite] = []
        shared: list[list[Any]] = []
        opened: dict[str, Sequence[Any]] = {}
        for stored in self.sites:
            one = planned.get(Site(stored.module, stored.tensor))
            if one is None:
                continue
            axis, groups = stored.groups[GRANULARITIES.index(one.granularity)]
            shared += [[len(sites), *use] for use in stored.shared]
            sites.append(
                PackedSite(
                    module=stored.module, tensor=stored.tensor, bit_width=one.bit_width, granularity=one.granularity,
                    signed=one.signed, offset=one.offset, axis=axis, groups=groups,
                    elements=max(1, stored.numel // groups), rows=stored.rows, parameter=stored.parameter,
                    called=stored.called,
                )
            )  # fmt: skip
            inside = stored.module if one.site.is_attention else self.opened_by.get(stored.module)
            if inside is not None:
                opened[inside] = self.attention[inside]
        return PackedLayout(sites=tuple(sites), attention=opened, shared=shared)

    @property
    def parameters(self) -> int:
        """How many parameters the network has, a shared one counted once."""
        return sum(math.prod(x.shape) for x in self.tensors if not x.buffer)

    def to_json(self) -> str:
        """The text of a file; `from_json` reads it."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "StoredModel":
        """The network of such a text; ValueError, TypeError or LookupError where it is none."""
        content = json.loads(text)
        sites = [
            {
                **site, "groups": tuple(map(tuple, site["groups"])), "shared": tuple(map(tuple, site["shared"])),
                "rows": None if site["rows"] is None else tuple(site["rows"]),
            }
            for site in content["sites"]
        ]  # fmt: skip
        return cls(
            tensors=tuple(StoredTensor(**{**x, "shape": tuple(x["shape"])}) for x in content["tensors"]),
            sites=tuple(StoredSite(**site) for site in sites),
            attention=dict(content["attention"]), opened_by=dict(content["opened_by"]),
        )  # fmt: skip

    @classmethod
    def of(cls, net: "Network") -> "StoredModel":
        """That of a network that was traced."""
        model, trace = net.model, net.trace
        names = {id(p): name for name, p in model.named_parameters()}
        saved = set(model.state_dict())
        held: list[tuple[str, Any, bool]] = [(name, p, False) for name, p in model.named_parameters()]
        held += [(name, buffer, True) for name, buffer in model.named_buffers() if name in saved]
        place = {name: i for i, (name, _) in enumerate(model.named_modules())}

        def called(name: str) -> bool:
            return name not in trace.in_proj and name not in trace.functional

        sites = []
        for info in net.infos:
            if not info.quantizable:
                continue
            name, groups = info.site.module, ((0, 1), (info.channel_axis, info.channels), (info.head_axis, info.heads))
            if not info.site.is_weight:
                inside = info.site.is_attention
                sites.append(
                    StoredSite(
                        module=name, tensor=info.site.tensor, numel=info.numel, groups=groups,
                        called=inside or called(name),
                    )
                )  # fmt: skip
                continue
            weight = model.get_submodule(name)._parameters[info.parameter]
            uses = []
            for user in info.shared_with:
                own = next(key for key, p in model.get_submodule(user)._parameters.items() if p is weight)
                uses.append((user, own, int(called(user))))
            sites.append(
                StoredSite(
                    module=name, tensor=info.site.tensor, numel=info.numel, groups=groups, called=called(name),
                    rows=info.rows, parameter=info.parameter, stored=names[id(weight)], shared=tuple(uses),
                )
            )  # fmt: skip
        sites.sort(key=lambda site: (place[site.module], not site.stored, site.rows or (0, 0), site.tensor != "input"))
        forms = {
            name: [int(form.fused), *(sorted(getattr(form, part)) for part in _PLACES)]
            for name, form in trace.attention.items()
        }
        around = {n: a for a in trace.in_proj if a in forms for n in (a, f"{a}.out_proj")}
        return cls(
            tensors=tuple(
                StoredTensor(name=name, dtype=_safetensors_type(x), shape=tuple(x.shape), buffer=buffer)
                for name, x, buffer in held
            ),
            sites=tuple(sites), attention=forms, opened_by=around,
        )  # fmt: skip


def _safetensors_type(x: Any) -> str:
    kind = {"complex": "C", "float": "F", "bfloat": "BF", "int": "I", "uint": "U", "bool": "BOOL"}
    name = str(x.dtype).removeprefix("torch.")
    word = name.rstrip("0123456789")
    return kind.get(word, word.upper()) + name.removeprefix(word)
