"""Packed codes against bits written one by one, and networks that answer the same from them."""

import copy
from itertools import cycle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from analysis.cost import cost_table
from analysis.planning import accounting
from quant.bit_plan import PlannedSite
from quant.choices import ALLOWED_BIT_WIDTHS
from quant.errors import InputError
from quant.insertion import attach_quantizers_, latent_weights
from quant.layers import quantize_layer_
from quant.network import Network
from quant.pack import PARTS, load_packed_, pack, pack_bits, unpack_bits
from quant.quantizer import LSQQuantizer, Quantizer
from quant.scheme import QuantScheme, axis_and_groups, default_granularity
from quant.site import Site
from tests.test_sensitivity import IMAGES, model_of

IMAGES = IMAGES[:4]
NETWORKS = ("resnet", "vit", "swin")


def bits_of(data: bytes) -> str:
    """The bits of a stream, the least significant of each byte first."""
    return "".join(f"{byte:08b}"[::-1] for byte in data)


def packed_by_hand(indices, bit_width):
    """Each index as text, its least significant bit first, and eight characters a byte."""
    text = "".join(f"{index:0{bit_width}b}"[::-1] for index in indices)
    text += "0" * (-len(text) % 8)
    return [int(text[i : i + 8][::-1], 2) for i in range(0, len(text), 8)]


@given(st.data(), st.sampled_from(ALLOWED_BIT_WIDTHS))
def test_codes_come_back_from_their_bits(data, bit_width):
    """The bytes are those of bits written one by one, ceil(numel * bits / 8) of them; unpacking gives every index."""
    indices = data.draw(st.lists(st.integers(0, 2**bit_width - 1), max_size=40))
    packed = pack_bits(torch.tensor(indices, dtype=torch.int32), bit_width)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == packed_by_hand(indices, bit_width)
    assert len(packed) == (len(indices) * bit_width + 7) // 8
    assert unpack_bits(packed, bit_width, len(indices)).tolist() == indices


@pytest.mark.parametrize("bit_width", ALLOWED_BIT_WIDTHS)
def test_many_codes_of_any_shape_come_back(bit_width):
    """A tensor that is not contiguous is packed in row-major order; all values that the bits hold occur."""
    indices = torch.arange(2**bit_width, dtype=torch.int32).repeat(3)[:-1].view(-1, 1).expand(-1, 5).T
    packed = pack_bits(indices, bit_width)
    assert torch.equal(packed, pack_bits(indices.clone(), bit_width))
    assert torch.equal(unpack_bits(packed, bit_width, indices.numel()).view(indices.shape), indices)


@pytest.mark.parametrize("indices", [[0, 8], [-1, 0]])
def test_an_index_outside_the_bits_is_refused(indices):
    """It would spill into its neighbour."""
    with pytest.raises(ValueError, match="3 bits hold 0 to"):
        pack_bits(torch.tensor(indices), 3)


@pytest.mark.parametrize("packed", [torch.zeros(3, dtype=torch.uint8), torch.zeros(4, dtype=torch.int32)])
def test_bytes_of_another_number_of_codes_are_refused(packed):
    """Ten codes of 3 bits are 4 bytes."""
    with pytest.raises(ValueError, match=r"10 codes of 3 bits are 4 bytes \(uint8\)"):
        unpack_bits(packed, 3, 10)


def schemes_of(model, infos, widths, *, odd):
    """A scheme for every site that can be quantized, widths in turn; `odd` mixes signs and offsets, weights' too."""
    kinds = cycle([(True, False), (False, False), (False, True)])
    schemes = {}
    for info, bits in zip((info for info in infos if info.quantizable), cycle(widths)):
        signed, offset = next(kinds) if odd else (info.site.tensor != "attention", info.site.tensor == "input")
        granularity = default_granularity(info, model.get_submodule(info.site.module))
        schemes[info.site] = QuantScheme(bit_width=bits, signed=signed, offset=offset, granularity=granularity)
    return schemes


def prepared(name, schemes_for, images=IMAGES):
    """A network prepared for schemes, all its scales still 1; its sites and schemes."""
    model = model_of(name) if isinstance(name, str) else name
    net = Network(model, images[:1])
    infos, sites, schemes = net.infos, net.by_site, schemes_for(model, net.infos)
    quantizers = {}
    for site, scheme in schemes.items():
        axis, groups = axis_and_groups(sites[site], scheme.granularity)
        offset = torch.zeros(groups) if scheme.offset else None
        quantizers[site] = Quantizer(scheme=scheme, scale=torch.ones(groups), offset=offset, axis=axis, groups=groups)
    attach_quantizers_(net, quantizers)
    return model, infos, schemes


@torch.no_grad()
def trained_(model):
    """As after a training: scales, offsets, statistics and weights of no special values, codes over the whole range."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, LSQQuantizer):
            levels = module.scheme.quant_max - module.scheme.quant_min
            module.scale.copy_((0.5 + torch.rand(module.scale.shape, generator=generator)) * 2 / levels)
            if module.offset is not None:
                module.offset.copy_(torch.randn(module.offset.shape, generator=generator) / 10 - 1)
        elif isinstance(module, nn.BatchNorm2d):
            module.running_var.mul_(1 + torch.rand(module.running_var.shape, generator=generator))
    for latent, _ in latent_weights(model).values():
        latent.copy_(torch.randn(latent.shape, generator=generator))


@torch.no_grad()
def scrambled_(model):
    """A network of the same architecture that has learned something else."""
    for x in model.state_dict().values():
        if x.is_floating_point():
            x.copy_(torch.rand_like(x) + 0.1)


MIXTURES = {
    **{f"{bits} bit": (("vit",), (bits,), False) for bits in ALLOWED_BIT_WIDTHS},
    "mixed": (NETWORKS, (4, 2, 7, 3, 1, 8, 5, 16, 6), False),
    "signs and offsets mixed": (NETWORKS, (3, 1, 8, 5, 2, 6, 16), True),
}
CASES = [(network, label) for label, (networks, _, _) in MIXTURES.items() for network in networks]


@pytest.mark.parametrize(("network", "label"), CASES)
def test_a_network_answers_the_same_from_its_codes(network, label):
    """Loaded into a network of other weights the logits are those before, bit for bit; the accounting is the plan's.

    Codes, scales, offsets and parameters outside the plan take exactly `size_bytes`.
    """
    _, widths, odd = MIXTURES[label]
    model, infos, schemes = prepared(network, lambda m, i: schemes_of(m, i, widths, odd=odd))
    trained_(model)
    tensors = pack(model)
    other, _, _ = prepared(network, lambda m, i: schemes_of(m, i, widths, odd=odd))
    scrambled_(other)
    with torch.no_grad():
        expected = model(IMAGES)
        assert not torch.allclose(other(IMAGES), expected)
        load_packed_(other, tensors)
        assert torch.equal(other(IMAGES), expected)
    again = pack(other)
    assert all(torch.equal(again[name], x) for name, x in tensors.items())

    held = {part: sum(x.nbytes for name, x in tensors.items() if name.startswith(f"{part}/")) for part in PARTS}
    planned = [PlannedSite.of(site, scheme) for site, scheme in schemes.items()]
    parameters = sum(p.numel() for p in model_of(network).parameters())
    totals = accounting.totals(planned, cost_table(infos), parameters)
    assert sum(held.values()) - held["buffer"] == totals.size_bytes
    assert (held["buffer"] > 0) == (network == "resnet")


@pytest.mark.parametrize("odd", [False, True])
def test_the_bytes_say_what_the_weight_is(odd):
    """Read bit by bit, scale * code + offset is the weight that the network multiplies with, at every bit-width."""
    model, infos, schemes = prepared("vit", lambda m, i: schemes_of(m, i, ALLOWED_BIT_WIDTHS, odd=odd))
    trained_(model)
    tensors = pack(model)
    weights = [info for info in infos if info.site in schemes and info.site.is_weight]
    assert {schemes[info.site].bit_width for info in weights} >= {1, 2, 3, 5, 7, 8, 16} or odd
    for info in weights:
        scheme, groups = schemes[info.site], len(tensors[f"scale/{info.site}"])
        text = bits_of(bytes(tensors[f"codes/{info.site}"].tolist()))
        b = scheme.bit_width
        indices = [int(text[i * b : (i + 1) * b][::-1], 2) for i in range(info.numel)]
        smallest = -(2 ** (b - 1)) if scheme.signed else 0
        codes = [2 * i - 1 if scheme.signed and b == 1 else i + smallest for i in indices]
        codes = torch.tensor(codes, dtype=torch.float64)
        scale, offset = (tensors.get(f"{part}/{info.site}", torch.zeros(groups)) for part in ("scale", "offset"))
        if scheme.granularity == "per_head" and info.head_axis == 1:  # columns of the projection
            scale, offset = (
                x.repeat_interleave(info.shape[1] // groups).repeat(info.shape[0]) for x in (scale, offset)
            )
        else:
            scale, offset = (x.repeat_interleave(info.numel // groups) for x in (scale, offset))
        weight = model.get_submodule(info.site.module).weight.detach()
        weight = weight if info.rows is None else weight[slice(*info.rows)]
        values = (scale.double() * codes + offset.double()).view(info.shape)
        torch.testing.assert_close(weight.double(), values, rtol=1e-6, atol=1e-6)


def only(site, bits=3):
    """A plan of one site alone."""
    return lambda model, infos: {site: QuantScheme(bit_width=bits, signed=True)}


def test_rows_that_no_plan_names_stay_in_floating_point():
    """Of a fused weight with one planned part the others are kept as they are, the planned rows as codes alone."""
    site = Site("blocks.0.attn.qkv", "weight.key")
    model, _, _ = prepared("vit", only(site))
    trained_(model)
    tensors = pack(model)
    latent = model.blocks[0].attn.qkv._parameters["weight"].detach()
    kept = torch.cat((latent[:32], latent[64:]))
    assert torch.equal(tensors["parameter/blocks.0.attn.qkv.weight"], kept)
    assert tensors[f"codes/{site}"].shape == (32 * 32 * 3 // 8,)
    other, _, _ = prepared("vit", only(site))
    scrambled_(other)
    load_packed_(other, tensors)
    with torch.no_grad():
        assert torch.equal(other(IMAGES), model(IMAGES))


class Tied(nn.Module):
    """Two layers of one weight, of which the one that runs later is no site."""

    def __init__(self, names):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 32)
        for name in names:
            self.add_module(name, nn.Linear(8, 8))
        self.later.weight = self.first.weight

    def forward(self, x):
        """Both, one after the other."""
        return self.later(self.first(self.stem(x).flatten(1)).relu())


@pytest.mark.parametrize("names", [("first", "later"), ("later", "first")])
def test_a_weight_that_another_layer_shares_is_packed_once(names):
    """It is quantized in both, so its codes stand for both."""
    torch.manual_seed(0)
    model, _, _ = prepared(Tied(names), only(Site("first", "weight")))
    trained_(model)
    tensors = pack(model)
    assert [name for name in tensors if name.endswith((":weight", ".weight"))] == [
        "codes/first:weight", "scale/first:weight", "parameter/stem.weight"
    ]  # fmt: skip
    other, _, _ = prepared(Tied(names), only(Site("first", "weight")))
    scrambled_(other)
    load_packed_(other, tensors)
    with torch.no_grad():
        assert torch.equal(other(IMAGES), model(IMAGES))


def test_a_loaded_network_can_be_trained_on():
    """The floor of its scales is that of a network that starts there, so that the next step does not lift them."""
    site = Site("head", "weight")
    model, _, _ = prepared("vit", only(site))
    model.head.weight_quantizers["weight"].scale.data.fill_(1e-5)
    other, _, _ = prepared("vit", only(site))
    load_packed_(other, pack(model))
    quantizer = other.head.weight_quantizers["weight"]
    quantizer.clamp_scale_()
    assert quantizer.scale.item() == pytest.approx(1e-5)
    assert quantizer.initial_scale == pytest.approx(1e-5)


def test_a_float_network_is_not_packed():
    """There is nothing to pack."""
    with pytest.raises(InputError, match="in floating point: there is nothing to pack"):
        pack(model_of("vit"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("bits", "signed", "offset"), [(16, True, 0.0), (8, False, 5.0), (16, False, 5.0), (1, True, 9.0)]
)
def test_a_weight_of_any_type_comes_back(dtype, bits, signed, offset):
    """Half of it clipped, on a grid finer than its type where that is coarse: what is multiplied with is the same."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64).to(dtype) for _ in range(2)]
    scheme = QuantScheme(bit_width=bits, signed=signed, offset=True, granularity="per_channel")
    for layer in layers:
        start = Quantizer(scheme=scheme, scale=(0.5 + torch.rand(64)) * 0.1 / 2**bits, offset=torch.full((64,), offset),
                          axis=0, groups=64)  # fmt: skip
        quantize_layer_(layer, {"weight": (None, LSQQuantizer(start, elements_per_scale=1))}, None)
        with torch.no_grad():
            layer._parameters["weight"].add_(offset)
    assert not torch.equal(layers[0].weight, layers[1].weight)
    load_packed_(layers[1], pack(layers[0]))
    assert torch.equal(layers[0].weight, layers[1].weight)


WRONG = {
    "other bits": (lambda t: t | {"codes/head:weight": t["codes/head:weight"][:-1]},
                   r"^mine is of another network or plan: codes/head:weight is 119 bytes, expected 120 bytes \(1 of"),
    "a tensor missing": (lambda t: {name: x for name, x in t.items() if name != "scale/head:weight"},
                         r"scale/head:weight is absent, expected float32 \(1,\)"),
    "a tensor more": (lambda t: t | {"scale/head:input": torch.ones(1)}, r"head:input is float32 \(1,\), expected abs"),
    "another shape": (lambda t: t | {"parameter/norm.bias": torch.ones(8)}, r"32 \(8,\), expected float32 \(32,\)"),
    "another type": (lambda t: t | {"parameter/norm.bias": torch.ones(32).double()}, "norm.bias is float64"),
    "a scale of 0": (lambda t: t | {"scale/head:weight": torch.zeros(1)}, "is not finite and above 0 everywhere"),
    "a scale of NaN": (lambda t: t | {"scale/head:weight": torch.tensor([torch.nan])}, "is not finite and above 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_tensors_of_another_network_or_plan_change_nothing(case):
    """One message with the first difference; the network is as it was."""
    model, _, _ = prepared("vit", only(Site("head", "weight")))
    change, message = WRONG[case]
    tensors, before = change(pack(model)), copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message):
        load_packed_(model, tensors, source="mine")
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
