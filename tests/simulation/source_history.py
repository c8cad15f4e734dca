"""The oracle: every write ever made to a simulated source disk, so that any image can be dated exactly.

A *version* is the number of writes since the disk was made; version 0 is its first image. Each version has a
fingerprint, the exclusive or of a keyed blake3 of every block with its number, kept up incrementally; equal
fingerprints mean equal images.
"""

from __future__ import annotations

import bisect
from typing import Final

import blake3
import numpy

ORACLE_BLOCK_BYTES: Final = 4096


class SourceHistory:
    """Holds the present image and, for each version, its instant (virtual nanoseconds) and fingerprint."""

    def __init__(self, image: bytes, instant_ns: int) -> None:
        if len(image) % ORACLE_BLOCK_BYTES:
            raise ValueError("the image must be whole blocks")
        self.image = bytearray(image)
        self._block_prints = [
            _block_print(index, image[index * ORACLE_BLOCK_BYTES : (index + 1) * ORACLE_BLOCK_BYTES])
            for index in range(len(image) // ORACLE_BLOCK_BYTES)
        ]
        present = 0
        for block_print in self._block_prints:
            present ^= block_print
        self._instants_ns = [instant_ns]
        self._fingerprints = [present]
        self._versions: dict[int, list[int]] = {present: [0]}
        self._block_versions: list[list[tuple[int, int]]] = [[(0, block_print)] for block_print in self._block_prints]
        """By block: (version since which it holds this, its print)."""

    @property
    def version(self) -> int:
        return len(self._fingerprints) - 1

    def write(self, offset_bytes: int, data: bytes, instant_ns: int) -> None:
        """One write of the source, whole and at one instant. Writing what is there already is a version too."""
        end = offset_bytes + len(data)
        if end > len(self.image):
            raise ValueError("the write is beyond the disk's end")
        self.image[offset_bytes:end] = data
        present = self._fingerprints[-1]
        for index in range(offset_bytes // ORACLE_BLOCK_BYTES, -(-end // ORACLE_BLOCK_BYTES)):
            block = self.image[index * ORACLE_BLOCK_BYTES : (index + 1) * ORACLE_BLOCK_BYTES]
            block_print = _block_print(index, bytes(block))
            present ^= self._block_prints[index] ^ block_print
            self._block_prints[index] = block_print
            self._block_versions[index].append((self.version + 1, block_print))
        self._instants_ns.append(instant_ns)
        self._fingerprints.append(present)
        self._versions.setdefault(present, []).append(self.version)

    def versions_of(self, image: bytes) -> list[int]:
        """Every version whose image this is, in ascending order; empty if the source never looked like this."""
        if len(image) != len(self.image):
            return []
        fingerprint = self._fingerprints[-1]
        blocks, present = (
            numpy.frombuffer(data, dtype=numpy.uint64).reshape(-1, ORACLE_BLOCK_BYTES // 8)
            for data in (image, self.image)
        )
        for index in numpy.flatnonzero((blocks != present).any(axis=1)).tolist():
            fingerprint ^= self._block_prints[index] ^ _block_print(index, blocks[index].tobytes())
        return self._versions.get(fingerprint, [])

    def has_block_older_than(self, image: bytes, version: int) -> bool:
        """Whether a block of the image is as the source had it before `version` and never since."""
        for index, versions in enumerate(self._block_versions):
            block = image[index * ORACLE_BLOCK_BYTES : (index + 1) * ORACLE_BLOCK_BYTES]
            found = _block_print(index, block)
            held_at = next(print_ for since, print_ in reversed(versions) if since <= version)
            later = {print_ for since, print_ in versions if since > version}
            if found != held_at and found not in later and any(print_ == found for _, print_ in versions):
                return True
        return False

    def version_at(self, instant_ns: int) -> int:
        """The version that the disk showed at an instant (writes at exactly that instant included); -1 before the
        first.
        """
        return bisect.bisect_right(self._instants_ns, instant_ns) - 1

    def instant_ns_of(self, version: int) -> int:
        return self._instants_ns[version]


def _block_print(index: int, block: bytes) -> int:
    return int.from_bytes(blake3.blake3(index.to_bytes(8, "little") + block).digest(16), "little")
