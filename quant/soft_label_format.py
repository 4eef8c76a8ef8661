"""The file of the soft labels of a teacher: its layout, its header and what a crop in it is.

    a line of JSON                       the header: all that fixes the content; `head -1 FILE` shows it
    for each image                       in the order of the list of images
        fingerprint      4 bytes         of the image's pixels, as the one who crops computes it
        for each crop
            kept            float16      of the probabilities, as `quant.label_compression` keeps them
            classes         uint16       theirs; uint32 where there are more than 65,536
            box             4 x uint16   top, left, height, 2 * width + flip, in pixels of the image
    SHA-256              32 bytes        of all that is before it

All little-endian. At K = 5 a crop takes 28 bytes, and its share of the fingerprint. A height of 0 marks an image that
could not be read. Fast knowledge distillation: Shen and Xing, ECCV 2022, arXiv:2112.01528.
"""

import hashlib
import json
import math
import struct
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from quant.choices import Compression
from quant.errors import InputError

LARGEST_SIDE = 2**15 - 1
"""Pixels of an image's width and height that a box can tell."""
_VERSION = 2
START = b'{"format": "qvw-soft-labels", "version": '
VERSION_START = START + str(_VERSION).encode() + b", "
DIGEST, FINGERPRINT = hashlib.sha256().digest_size, struct.Struct("<I")
MAKE_ONE = "a SoftLabelWriter makes one"


class Crop(NamedTuple):
    """A view of an image: a box in its pixels, to be resized to the network's input, then mirrored if `flip`."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


UNREADABLE = Crop(0, 0, 0, 0, False)
"""The crop of an image that could not be read."""


class StoredCrop(NamedTuple):
    """A crop with what is kept of the teacher's answer to it."""

    crop: Crop
    kept: tuple[float, ...]
    classes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SoftLabelHeader:
    """All that fixes the content of a file of soft labels."""

    images: int
    crops: int  # of each image
    classes: int
    compression: Compression
    top_k: int  # of the marginal compressions, else 0
    temperature: float  # the teacher's logits are divided by it
    teacher: str  # its short name
    teacher_sha256: str  # of its weights
    split: str
    data_sha256: str  # of the list of images, with their labels
    skip_broken: bool
    input_size: tuple[int, ...]  # channels, height, width
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    scale: tuple[float, ...]  # smallest and largest share of the image's area that a crop has
    ratio: tuple[float, ...]  # smallest and largest width over height of a crop, before it is resized
    flip: float  # probability
    seed: int  # of the crops
    batch_size: int  # crops of one forward pass: it moves the last digits of the logits
    device: str  # so does this: cpu, cuda, ...

    @property
    def records(self) -> int:
        """How many crops the file holds."""
        return self.images * self.crops

    @property
    def record(self) -> struct.Struct:
        """The bytes of one crop."""
        from quant.label_compression import kept_counts  # here: it brings torch, which the header does not need

        values, indices = kept_counts(self.compression, self.top_k, self.classes)
        return struct.Struct(f"<{values}e{indices}{'H' if self.classes <= 2**16 else 'I'}4H")

    @property
    def line(self) -> bytes:
        """The file's first line."""
        fields = json.dumps(asdict(self)).encode()
        return VERSION_START + fields[1:] + b"\n"

    def end_of(self, record: int) -> int:
        """Where the crops before number `record` of all end: bytes from the file's start."""
        fingerprints = -(-record // self.crops)
        return len(self.line) + fingerprints * FINGERPRINT.size + record * self.record.size


def header_of(line: bytes) -> SoftLabelHeader:
    """The header that a file's first line holds; ValueError where it is none."""
    try:
        told: dict[str, Any] = {k: tuple(x) if isinstance(x, list) else x for k, x in json.loads(line).items()}
        del told["format"], told["version"]
        header = SoftLabelHeader(**told)
        wrong = [field.name for field in fields(header) if not _is(told[field.name], field.type)]
    except (TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"no header: {error}") from error
    if wrong:
        raise ValueError(f"no header: {wrong[0]} is {told[wrong[0]]!r}")
    return header


def _is(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is what an entry of the header is to be; NaN and infinities are no numbers here."""
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is(x, get_args(kind)[0]) for x in value)
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    return type(value) in (int, float) and math.isfinite(value) if kind is float else type(value) is kind


def header_changes(old: SoftLabelHeader, new: SoftLabelHeader) -> str:
    """The entries that differ, as `key: old -> new`, hashes in words."""
    before, after = asdict(old), asdict(new)
    words = {"teacher_sha256": "other weights of the teacher", "data_sha256": "other images"}
    changed = [key for key in before if before[key] != after[key]]
    return ", ".join(words.get(key, f"{key}: {before[key]} -> {after[key]}") for key in changed)


def start_of(path: Path) -> bytes:
    """The first bytes of a file, enough to tell its format and version; InputError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(START) + 2)
    except OSError as error:
        raise InputError(f"The soft labels {path} cannot be read: {error.strerror}. {MAKE_ONE}.") from error


def other_version(path: Path) -> str:
    """What to say of a file of another version."""
    what = f"{path} was made by another version, or is damaged: soft labels have format {_VERSION} here"
    return f"{what}. Make the soft labels again."
