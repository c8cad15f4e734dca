"""Disks to protect: image files of partly random content, with a memory of what was in them and when.

Invariant: a change happens with the file open for writing from its first byte to its last, so that nothing between two
versions can ever be proved still; a version's digest is taken before the next change begins.
"""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

MEBIBYTE = 2**20
CHANGE_BYTES_MIN = 512
CHANGE_BYTES_MAX = 128 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """What the disk held from `since_ns` (by this machine's clock) until the next version began to be written."""

    digest: str
    since_ns: int


class SourceDisk:
    """An image file: a third random bytes, a third compressible ones, the rest zeroes and holes."""

    def __init__(self, path: Path, *, size_bytes: int, seed: int) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self.versions: list[Version] = []
        self._random = random.Random(seed)
        with open(path, "xb") as file:
            file.truncate(size_bytes)
            for first in range(0, size_bytes, MEBIBYTE):
                kind = (first // MEBIBYTE) % 3
                if kind < 2:
                    os.pwrite(
                        file.fileno(), self._content(min(MEBIBYTE, size_bytes - first), is_random=kind == 0), first
                    )
        self._remember()

    @property
    def digest(self) -> str:
        """Of the newest version."""
        return self.versions[-1].digest

    @property
    def changed_ns(self) -> int:
        return self.versions[-1].since_ns

    def change(self, *, writes: int = 24) -> Version:
        """Writes here and there: random bytes, text, zeroes, in pieces that begin and end anywhere."""
        with open(self.path, "r+b") as file:
            for _ in range(writes):
                length = self._random.randint(CHANGE_BYTES_MIN, min(CHANGE_BYTES_MAX, self.size_bytes))
                offset = self._random.randint(0, self.size_bytes - length)
                data = (
                    bytes(length) if self._random.random() < 0.2 else self._content(length, is_random=length % 2 == 0)
                )
                os.pwrite(file.fileno(), data, offset)
        return self._remember()

    def _content(self, length: int, *, is_random: bool) -> bytes:
        if is_random:
            return self._random.randbytes(length)
        text = b"%016x is what stands here, " % self._random.getrandbits(64)
        return (text * (length // len(text) + 1))[:length]

    def _remember(self) -> Version:
        self.versions.append(Version(digest=digest_of(self.path), since_ns=time.time_ns()))
        return self.versions[-1]


def digest_of(path: Path) -> str:
    """As `farpoint recover` states it."""
    hasher = blake3()
    hasher.update_mmap(path)
    return hasher.hexdigest()


def are_equal(one: Path, other: Path) -> bool:
    """Byte for byte."""
    with open(one, "rb") as first, open(other, "rb") as second:
        while True:
            data = first.read(MEBIBYTE)
            if data != second.read(MEBIBYTE):
                return False
            if not data:
                return True
