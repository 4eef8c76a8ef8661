"""Making a file of soft labels batch by batch, so that it resumes where it was stopped.

The file's layout is in `quant.soft_label_format`.
"""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

from torch import Tensor

from quant.errors import InputError
from quant.soft_label_format import (
    FINGERPRINT,
    START,
    VERSION_START,
    Crop,
    SoftLabelHeader,
    header_changes,
    header_of,
    other_version,
)


class SoftLabelWriter:
    """Makes a file batch by batch in FILE.partial, each on the disk when `append` returns; `finish` makes it FILE.

    `done` are the crops that are there already: where an earlier writer was stopped this one resumes. The last batch is
    then made once more: a power cut may have corrupted it. Raises InputError where FILE.partial is of another header.
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
                content += FINGERPRINT.pack(fingerprint)
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
        if line.startswith(START) and not line.startswith(VERSION_START):
            raise InputError(other_version(partial_of(self.path)))
        try:
            changes = f" ({header_changes(header_of(line), self.header)})"
        except ValueError:
            changes = ""
        raise InputError(
            f"{partial_of(self.path)} was begun with other inputs{changes}. Resume with those, choose another "
            "`path`, or start from scratch."
        )


def partial_of(path: Path) -> Path:
    """The file in which soft labels grow until they are complete."""
    return path.with_name(f"{path.name}.partial")


def _put(file: FileIO, content: bytes | bytearray) -> None:
    """Write all of it, on the disk when this returns."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]
    os.fsync(file.fileno())
