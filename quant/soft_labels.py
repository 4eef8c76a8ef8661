"""The stored soft labels of a teacher: many random crops of each image in one file, memory-mapped.

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
import mmap
import os
import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from io import FileIO
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import torch
from torch import Tensor

from quant.choices import Compression
from quant.errors import InputError
from quant.label_compression import expand, kept_counts

LARGEST_SIDE = 2**15 - 1
"""Pixels of an image's width and height that a box can tell."""
_VERSION = 2
_START = b'{"format": "qvw-soft-labels", "version": '
_VERSION_START = _START + str(_VERSION).encode() + b", "
_DIGEST, _FINGERPRINT = hashlib.sha256().digest_size, struct.Struct("<I")
_MAKE = "`qvw soft-labels TEACHER --data D --out FILE` makes one"


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
        values, indices = kept_counts(self.compression, self.top_k, self.classes)
        return struct.Struct(f"<{values}e{indices}{'H' if self.classes <= 2**16 else 'I'}4H")

    @property
    def line(self) -> bytes:
        """The file's first line."""
        fields = json.dumps(asdict(self)).encode()
        return _VERSION_START + fields[1:] + b"\n"

    def end_of(self, record: int) -> int:
        """Where the crops before number `record` of all end: bytes from the file's start."""
        fingerprints = -(-record // self.crops)
        return len(self.line) + fingerprints * _FINGERPRINT.size + record * self.record.size


def _header_of(line: bytes) -> SoftLabelHeader:
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


class SoftLabels:
    """The soft labels of a file; any crop is read without reading others.

    The whole file is checked once, where it is opened; a copy for a worker process opens it anew, unchecked. Raises
    InputError for what is no such file, and for one that is cut short or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path, start = path, _start_of(path)
        if not start.startswith(_START):
            raise InputError(f"{path} is no file of soft labels: {_MAKE}.")
        if not _VERSION_START.startswith(start):
            raise InputError(_other_version(path))
        self._map()
        digest = hashlib.sha256()
        content = memoryview(self._bytes)[:-_DIGEST]
        for begin in range(0, len(content), 2**26):  # in parts, so that an interrupt need not wait for the whole
            digest.update(content[begin : begin + 2**26])
        content.release()
        self.sha256 = self._bytes[-_DIGEST:].hex()  # of the content: the file's identity
        if digest.hexdigest() != self.sha256:
            raise self._damaged("the file's end is not the checksum of what is before it")
        self._read_header()

    def _damaged(self, why: str) -> InputError:
        return InputError(
            f"The soft labels {self.path} are cut short or damaged: {why}. Fetch the file again, or make it anew with "
            "`qvw soft-labels ... --overwrite`."
        )

    def _map(self) -> None:
        with self.path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _read_header(self) -> None:
        self._start = self._bytes.find(b"\n") + 1
        try:
            self.header = _header_of(self._bytes[: self._start])
            self._record = self.header.record
        except (ValueError, struct.error) as error:
            raise self._damaged("its first line is no header of soft labels") from error
        self._image = _FINGERPRINT.size + self.header.crops * self._record.size
        if len(self._bytes) != self._start + self.header.images * self._image + _DIGEST:
            raise self._damaged("it has not as many bytes as the images and crops of its header take")

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "sha256": self.sha256}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()
        self._read_header()

    def fingerprint(self, image: int) -> int:
        """What the pixels of the image came to when it was cropped."""
        return _FINGERPRINT.unpack_from(self._bytes, self._start + self._within(image, 0) * self._image)[0]

    def crop(self, image: int, crop: int) -> StoredCrop:
        """One crop of an image, both counted from 0."""
        place = self._within(image, crop) * self._image + _FINGERPRINT.size + crop * self._record.size
        *kept, top, left, height, width = self._record.unpack_from(self._bytes, self._start + place)
        values, _ = kept_counts(self.header.compression, self.header.top_k, self.header.classes)
        box = Crop(top, left, height, width >> 1, bool(width & 1))
        return StoredCrop(box, tuple(kept[:values]), tuple(kept[values:]))

    def _within(self, image: int, crop: int) -> int:
        if not (0 <= image < self.header.images and 0 <= crop < self.header.crops):
            raise IndexError(f"no crop {crop} of image {image}: {self.header.crops} of {self.header.images} images.")
        return image

    def distributions(self, stored: Sequence[StoredCrop]) -> Tensor:
        """The teacher's probabilities, (crops, classes) float32, each row with the sum 1."""
        kept = torch.tensor([crop.kept for crop in stored], dtype=torch.float32)
        indices = torch.tensor([crop.classes for crop in stored], dtype=torch.long)
        return expand(kept, indices, compression=self.header.compression, classes=self.header.classes)


class SoftLabelWriter:
    """Makes a file batch by batch in FILE.partial, each on the disk when `append` returns; `finish` makes it FILE.

    `done` are the crops that are there already: where an earlier writer was stopped this one goes on. The last batch is
    then made once more: a power cut may have spoilt it. Raises InputError where FILE.partial is of another header.
    """

    def __init__(self, path: Path, header: SoftLabelHeader) -> None:
        self.path, self.header, self._record = path, header, header.record
        partial_of(path).touch()
        self._file = partial_of(path).open("r+b", buffering=0)  # a buffer would try once more when the file is closed
        try:
            self._refuse_other()
            present = self._file.seek(0, os.SEEK_END)
            starts = range(0, header.records, header.batch_size)
            whole = bisect_right(starts, present, key=header.end_of) - 1  # batches, the last of all not counted
            self.done = max(0, whole - 1) * header.batch_size
            self._file.truncate(header.end_of(self.done))
            self._file.seek(0)
            _put(self._file, header.line)
            self._file.seek(0, os.SEEK_END)
        except BaseException:
            self.close()
            raise

    def append(self, fingerprints: Sequence[int], crops: Sequence[Crop], kept: Tensor, classes: Tensor) -> None:
        """Add crops with the fingerprints of their images, and what `compress` keeps of the teacher's answers."""
        content = bytearray()
        for number, (fingerprint, crop, values, indices) in enumerate(
            zip(fingerprints, crops, kept.tolist(), classes.tolist(), strict=True), start=self.done
        ):
            if number % self.header.crops == 0:
                content += _FINGERPRINT.pack(fingerprint)
            box = (crop.top, crop.left, crop.height, 2 * crop.width + crop.flip)
            content += self._record.pack(*values, *indices, *box)
        _put(self._file, content)
        self.done += len(crops)

    def finish(self) -> None:
        """Add the checksum and put the file in its place, on the disk."""
        if self.done != self.header.records:
            raise ValueError(f"{self.done} crops were added, `header` says {self.header.records}.")
        self._file.seek(0)
        digest = hashlib.file_digest(self._file, "sha256").digest()
        self._file.seek(0, os.SEEK_END)
        _put(self._file, digest)
        self.close()
        partial_of(self.path).replace(self.path)
        descriptor = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # the rename, too, outlasts a power cut
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Let go of the file, finished or not."""
        self._file.close()

    def _refuse_other(self) -> None:
        line = self._file.readline(2**16)
        if self.header.line.startswith(line):
            return
        if line.startswith(_START) and not line.startswith(_VERSION_START):
            raise InputError(_other_version(partial_of(self.path)))
        try:
            changes = f" ({header_changes(_header_of(line), self.header)})"
        except ValueError:
            changes = ""
        raise InputError(
            f"{partial_of(self.path)} was begun with other inputs{changes}. Run that command again to go on with it, "
            "choose another --out, or start anew with --overwrite."
        )


def is_soft_labels(path: Path) -> bool:
    """Whether the file begins as soft labels do, damaged or not; InputError where it cannot be read."""
    return _start_of(path).startswith(_START)


def _start_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(_START) + 2)
    except OSError as error:
        raise InputError(f"The soft labels {path} cannot be read: {error.strerror}. {_MAKE}.") from error


def _other_version(path: Path) -> str:
    what = f"{path} was made by another version, or is damaged: soft labels have format {_VERSION} here"
    return f"{what}. Make it anew with `qvw soft-labels ... --overwrite`."


def partial_of(path: Path) -> Path:
    """The file in which soft labels grow until they are complete."""
    return path.with_name(f"{path.name}.partial")


def header_changes(old: SoftLabelHeader, new: SoftLabelHeader) -> str:
    """The entries that differ, as `key: old -> new`, hashes in words."""
    before, after = asdict(old), asdict(new)
    words = {"teacher_sha256": "other weights of the teacher", "data_sha256": "other images"}
    changed = [key for key in before if before[key] != after[key]]
    return ", ".join(words.get(key, f"{key}: {before[key]} -> {after[key]}") for key in changed)


def _put(file: FileIO, content: bytes | bytearray) -> None:
    """Write all of it, on the disk when this returns."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]
    os.fsync(file.fileno())
