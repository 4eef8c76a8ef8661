"""A trained, quantized network as packed integer codes with their scales, by name; and back.

Code i of a weight, in row-major order, fills the bits i b to (i + 1) b - 1 of a stream whose bit k is bit k % 8 of byte
k // 8, so that the least significant bits come first; zeros fill the last byte. What is stored is the index of the code
within the scheme's range, 0 for the smallest: of signed 4-bit codes code + 8, of binary ones 0 for -1 and 1 for 1.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from quant.errors import InputError
from quant.functional import dequantize, to_groups
from quant.insertion import latent_weights
from quant.layers import is_quantized
from quant.quantizer import MIN_SCALE_RATIO, LSQQuantizer
from quant.scheme import QuantScheme
from quant.site import Site

PARTS = ("codes", "scale", "offset", "parameter", "buffer")
"""What the tensors of `pack` are: each is named PART/NAME."""


def pack_bits(indices: Tensor, bit_width: int) -> Tensor:
    """The integers of `indices`, each in [0, 2^bit_width), as ceil(numel * bit_width / 8) bytes (uint8, 1-d).

    `bit_width`: 1 to 8, or 16. Values outside the range are a ValueError.

    >>> packed = pack_bits(torch.tensor([1, 2, 3, 0, 3]), 2)
    >>> len(packed), unpack_bits(packed, 2, 5).tolist()
    (2, [1, 2, 3, 0, 3])
    """
    flat = indices.reshape(-1)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= 2**bit_width):
        raise ValueError(f"`indices` reach from {flat.min()} to {flat.max()}; {bit_width} bits hold 0 to 2^bits - 1.")
    codes, bytes_ = _word(bit_width)
    padded = flat.new_zeros(-(-flat.numel() // codes) * codes)
    padded[: flat.numel()] = flat
    padded = padded.view(-1, codes)
    words = torch.zeros(len(padded), dtype=torch.int64, device=flat.device)
    for i in range(codes):
        words |= padded[:, i].long() << (i * bit_width)
    packed = torch.empty(len(words), bytes_, dtype=torch.uint8, device=flat.device)
    for k in range(bytes_):
        packed[:, k] = (words >> (8 * k)) & 255
    return packed.view(-1)[: packed_size(flat.numel(), bit_width)].clone()


def unpack_bits(packed: Tensor, bit_width: int, numel: int) -> Tensor:
    """The `numel` integers that `pack_bits` packed (int32, 1-d); ValueError if that is not what the bytes are."""
    if packed.dtype != torch.uint8 or packed.shape != (packed_size(numel, bit_width),):
        raise ValueError(
            f"`packed` is {packed.dtype} {tuple(packed.shape)}; {numel} codes of {bit_width} bits are "
            f"{packed_size(numel, bit_width)} bytes (uint8)."
        )
    codes, bytes_ = _word(bit_width)
    padded = packed.new_zeros(-(-numel // codes) * bytes_)
    padded[: packed.numel()] = packed
    padded = padded.view(-1, bytes_)
    words = torch.zeros(len(padded), dtype=torch.int64, device=packed.device)
    for k in range(bytes_):
        words |= padded[:, k].long() << (8 * k)
    indices = torch.empty(len(words), codes, dtype=torch.int32, device=packed.device)
    for i in range(codes):
        indices[:, i] = (words >> (i * bit_width)) & (2**bit_width - 1)
    return indices.view(-1)[:numel]


def packed_size(numel: int, bit_width: int) -> int:
    """Bytes of `numel` codes."""
    return (numel * bit_width + 7) // 8


@torch.no_grad()
def pack(model: nn.Module) -> dict[str, Tensor]:
    """All that a model prepared by `prepare_qat_` needs to answer as it does now, by name, on the CPU.

    `codes/SITE` (uint8, bit-packed) of each quantized weight; `scale/SITE` and `offset/SITE` (float32, one value a
    group) of each quantized weight and activation; `parameter/NAME` of those that no codes stand for, of a fused weight
    that is quantized in parts only the rows outside the parts; `buffer/NAME` of those that the state dict has. What
    serves training alone (latent weights, the floor of the scales) is left out. InputError if nothing is quantized.
    """
    quantizers = _quantizers(model)
    if not quantizers:
        raise InputError("the model is in floating point: there is nothing to pack. Train it with a plan.")
    tensors = {}
    for site, (latent, quantizer) in latent_weights(model).items():
        low, step = _range(quantizer.scheme)
        indices = (quantizer.codes(latent) - low) / step
        tensors[f"codes/{site}"] = pack_bits(indices.int(), quantizer.scheme.bit_width)
    for site, quantizer in quantizers.items():
        tensors[f"scale/{site}"] = quantizer.scale
        if quantizer.offset is not None:
            tensors[f"offset/{site}"] = quantizer.offset
    tensors |= {f"parameter/{name}": parameter[rows] for name, (parameter, rows) in _parameters(model).items()}
    tensors |= {f"buffer/{name}": buffer for name, buffer in _buffers(model).items()}
    return {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}


@torch.no_grad()
def load_packed_(model: nn.Module, tensors: Mapping[str, Tensor], *, source: str = "the packed model") -> None:
    """Fill a model prepared by `prepare_qat_` for the same plan with what `pack` returned; it then answers the same.

    Its latent weights become the values that the codes stand for. InputError, which names `source`, where the tensors
    are of another network or plan; the model is then left as it was.
    """
    _check_fits(model, tensors, source)
    for site, quantizer in _quantizers(model).items():
        quantizer.scale.copy_(tensors[f"scale/{site}"])
        quantizer.get_buffer("min_scale").copy_(MIN_SCALE_RATIO * quantizer.scale)
        if quantizer.offset is not None:
            quantizer.offset.copy_(tensors[f"offset/{site}"])
    for site, (latent, quantizer) in latent_weights(model).items():
        low, step = _range(quantizer.scheme)
        indices = unpack_bits(tensors[f"codes/{site}"], quantizer.scheme.bit_width, latent.numel()).to(latent.device)
        codes = to_groups(indices.view(latent.shape), quantizer.axis, quantizer.groups) * step + low
        latent.copy_(dequantize(codes.float(), quantizer.scale, quantizer.offset).view(latent.shape))
    for name, (parameter, rows) in _parameters(model).items():
        parameter[rows] = tensors[f"parameter/{name}"].to(parameter.device)
    for name, buffer in _buffers(model).items():
        buffer.copy_(tensors[f"buffer/{name}"])


def _word(bit_width: int) -> tuple[int, int]:
    """How many codes are packed together into a whole number of bytes, 8 at most, and how many bytes."""
    codes = 4 if bit_width == 16 else 8
    return codes, codes * bit_width // 8


def _range(scheme: QuantScheme) -> tuple[int, int]:
    """The smallest code, and how far codes are apart: 2 for binary ones, -1 and 1."""
    return scheme.quant_min, 2 if scheme.signed and scheme.bit_width == 1 else 1


def _quantizers(model: nn.Module) -> dict[Site, LSQQuantizer]:
    """The quantizer of every quantized site, weights first."""
    found = {site: quantizer for site, (_, quantizer) in latent_weights(model).items()}
    for name, module in model.named_modules():
        inside: Any = getattr(module, "attention_quantizers", {})
        found |= {Site(name, tensor): quantizer for tensor, quantizer in inside.items()}
        if is_quantized(module) and isinstance(module.input_quantizer, LSQQuantizer):
            found[Site(name, "input")] = module.input_quantizer
    return found


def _parameters(model: nn.Module) -> dict[str, tuple[Tensor, Any]]:
    """By name the parameters that the codes do not stand for, each with the index of its rows that they do not."""
    found: dict[str, tuple[Tensor, Any]] = {}
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, LSQQuantizer):
            continue
        rows: Any = ...
        own = name.rpartition(".")[2]
        if is_quantized(module) and parameter.ndim > 1:
            rows = _rows_outside(module, len(parameter), own)
            if not rows.any():
                continue
        found[name] = parameter, rows
    return found


def _rows_outside(module: Any, count: int, parameter: str) -> Tensor:
    """Which of the `count` rows of a quantized layer's parameter no quantizer owns."""
    outside = torch.ones(count, dtype=torch.bool)
    for tensor, rows in module.weight_rows.items():
        if module.weight_parameters.get(tensor, "weight") == parameter:
            outside[slice(*rows) if rows else slice(None)] = False
    return outside


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """By name the buffers of the state dict, but for the quantizers'."""
    saved = model.state_dict()
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if name in saved and not isinstance(model.get_submodule(name.rpartition(".")[0]), LSQQuantizer)
    }


def _check_fits(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """InputError unless the tensors have the names, shapes and types that the prepared model takes, and scales > 0."""
    expected = _expected(model)
    came = {name: (tuple(x.shape), x.dtype) for name, x in tensors.items()}
    wrong = [name for name in {**expected, **came} if expected.get(name) != came.get(name)]
    if wrong:
        kind = _shown(came.get(wrong[0]))
        raise InputError(
            f"{source} is of another network or plan: {wrong[0]} is {kind}, expected {_shown(expected.get(wrong[0]))} "
            f"({len(wrong)} of {len(expected)} tensors differ). Load it into the network that it was made from."
        )
    for name, x in tensors.items():
        if name.startswith("scale/") and not (torch.isfinite(x) & (x > 0)).all():
            raise InputError(f"{source}: {name} is not finite and above 0 everywhere. Make the file again.")


def _expected(model: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of each tensor that `pack` would return."""
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for site, (latent, quantizer) in latent_weights(model).items():
        found[f"codes/{site}"] = ((packed_size(latent.numel(), quantizer.scheme.bit_width),), torch.uint8)
    for site, quantizer in _quantizers(model).items():
        found[f"scale/{site}"] = (tuple(quantizer.scale.shape), torch.float32)
        if quantizer.offset is not None:
            found[f"offset/{site}"] = (tuple(quantizer.offset.shape), torch.float32)
    for name, (parameter, rows) in _parameters(model).items():
        count = parameter.shape if rows is ... else (int(rows.sum()), *parameter.shape[1:])
        found[f"parameter/{name}"] = (tuple(count), parameter.dtype)
    return found | {f"buffer/{name}": (tuple(x.shape), x.dtype) for name, x in _buffers(model).items()}


def _shown(what: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    if what is None:
        return "absent"
    return f"{prod(what[0])} bytes" if what[1] == torch.uint8 else f"{what[1]} {what[0]}".removeprefix("torch.")
