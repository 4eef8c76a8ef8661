"""The stored soft labels of a teacher, memory-mapped: any crop is read without reading others.

The file's layout is in `quant.soft_label_format`.
"""

import hashlib
import mmap
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.errors import InputError
from quant.label_compression import expand, kept_counts
from quant.soft_label_format import (
    DIGEST,
    FINGERPRINT,
    MAKE_ONE,
    START,
    VERSION_START,
    Crop,
    StoredCrop,
    header_of,
    other_version,
    start_of,
)


class SoftLabels:
    """The soft labels of a file; any crop is read without reading others.

    The whole file is checked once, where it is opened; a copy for a worker process opens it again, unchecked. Raises
    InputError for what is no such file, and for one that is cut short or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path, start = path, start_of(path)
        if not start.startswith(START):
            raise InputError(f"{path} is no file of soft labels: {MAKE_ONE}.")
        if not VERSION_START.startswith(start):
            raise InputError(other_version(path))
        self._map()
        digest = hashlib.sha256()
        content = memoryview(self._bytes)[:-DIGEST]
        for begin in range(0, len(content), 2**26):  # in parts, so that an interrupt need not wait for the whole
            digest.update(content[begin : begin + 2**26])
        content.release()
        self.sha256 = self._bytes[-DIGEST:].hex()  # of the content: the file's identity
        if digest.hexdigest() != self.sha256:
            raise self._damaged("the file's end is not the checksum of what is before it")
        self._read_header()

    def _damaged(self, why: str) -> InputError:
        return InputError(
            f"The soft labels {self.path} are cut short or damaged: {why}. Fetch the file again, or make "
            "the soft labels again."
        )

    def _map(self) -> None:
        with self.path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _read_header(self) -> None:
        self._start = self._bytes.find(b"\n") + 1
        try:
            self.header = header_of(self._bytes[: self._start])
            self._record = self.header.record
        except (ValueError, struct.error) as error:
            raise self._damaged("its first line is no header of soft labels") from error
        self._image = FINGERPRINT.size + self.header.crops * self._record.size
        if len(self._bytes) != self._start + self.header.images * self._image + DIGEST:
            raise self._damaged("it has not as many bytes as the images and crops of its header take")

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "sha256": self.sha256}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()
        self._read_header()

    def fingerprint(self, image: int) -> int:
        """What the pixels of the image came to when it was cropped."""
        return FINGERPRINT.unpack_from(self._bytes, self._start + self._within(image, 0) * self._image)[0]

    def crop(self, image: int, crop: int) -> StoredCrop:
        """One crop of an image, both counted from 0."""
        place = self._within(image, crop) * self._image + FINGERPRINT.size + crop * self._record.size
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


def is_soft_labels(path: Path) -> bool:
    """Whether the file begins as soft labels do, damaged or not; InputError where it cannot be read."""
    return start_of(path).startswith(START)
