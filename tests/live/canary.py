"""A busy file system that tells afterwards whether a copy of it is of one instant: work of all kinds, and two counters
that are written and synchronized in turn.

Run as `python -m tests.live.canary PLACE LEDGER SEED`: it writes until its standard input ends. LEDGER, elsewhere,
holds the newest count that was acknowledged, in place.
"""

from __future__ import annotations

import mmap
import os
import random
import select
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

COUNT = struct.Struct("<Q")
COUNTER_BYTES = 24 * 2**20
"""Of each counter's file; one is at its begin and one at its end, so that they lie far from each other."""
COUNTERS = {"first": 0, "second": COUNTER_BYTES - COUNT.size}
FILES = 40
FILE_BYTES_MAX = 200_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a copy of the file system holds."""

    first: int
    second: int

    def fault(self, *, acknowledged_before: int, acknowledged_after: int) -> str:
        """Why they cannot be of one instant between the two acknowledgements; empty if they can."""
        if not self.second <= self.first <= self.second + 1:
            return f"the counters are {self.first} and {self.second}: they were written one after the other"
        if self.second < acknowledged_before:
            return f"{acknowledged_before} had been acknowledged before, and {self.second} is there"
        if self.second > acknowledged_after + 1:
            return f"{self.second} is there, and only {acknowledged_after} had been acknowledged after it"
        return ""


class Canary:
    """The writer, seen from outside."""

    def __init__(self, ledger: Path) -> None:
        self._ledger = ledger

    @property
    def acknowledged(self) -> int:
        return int(COUNT.unpack(self._ledger.read_bytes())[0])


@contextmanager
def busy(place: Path, ledger: Path, *, seed: int) -> Iterator[Canary]:
    """For the length of the block; fails if the writer failed."""
    ledger.write_bytes(COUNT.pack(0))
    command = [sys.executable, "-m", "tests.live.canary", str(place), str(ledger), str(seed)]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert writer.stdin is not None
    try:
        yield Canary(ledger)
    finally:
        writer.stdin.close()
        assert writer.wait(60) == 0


def read_counts(place: Path) -> Counts:
    """Of a copy that is mounted here."""
    return Counts(**{name: _count(place / name, at) for name, at in COUNTERS.items()})


def _count(path: Path, at: int) -> int:
    """Nothing was ever acknowledged where nothing is."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        data = os.pread(file.fileno(), COUNT.size, at)
    return int(COUNT.unpack(data)[0]) if len(data) == COUNT.size else 0


def _write(place: Path, ledger: Path, draw: random.Random) -> None:
    counters = [(os.open(place / name, os.O_RDWR | os.O_CREAT, 0o600), at) for name, at in COUNTERS.items()]
    for descriptor, _ in counters:
        os.posix_fallocate(descriptor, 0, COUNTER_BYTES)
    told = os.open(ledger, os.O_RDWR)
    count = 0
    while not select.select([0], [], [], 0)[0]:
        count += 1
        for descriptor, at in counters:
            os.pwrite(descriptor, COUNT.pack(count), at)
            os.fsync(descriptor)
        os.pwrite(told, COUNT.pack(count), 0)
        _work(place, draw)


def _work(place: Path, draw: random.Random) -> None:
    """One act of a file system's life."""
    path = place / f"file-{draw.randrange(FILES)}"
    act = draw.choice(["write", "write", "append", "rename", "remove", "truncate", "memory", "directory"])
    if act == "write":
        path.write_bytes(draw.randbytes(draw.randrange(1, FILE_BYTES_MAX)))
    elif act == "append":
        with path.open("ab") as file:
            file.write(draw.randbytes(draw.randrange(1, 5000)))
    elif act == "directory":
        (place / f"directory-{draw.randrange(FILES)}").mkdir(exist_ok=True)
    elif not path.exists():
        return
    elif act == "rename":
        path.rename(place / f"file-{draw.randrange(FILES)}")
    elif act == "remove":
        path.unlink()
    elif act == "truncate":
        os.truncate(path, draw.randrange(FILE_BYTES_MAX))
    elif path.stat().st_size:
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            view[: min(len(view), 4096)] = draw.randbytes(min(len(view), 4096))


if __name__ == "__main__":
    _write(Path(sys.argv[1]), Path(sys.argv[2]), random.Random(int(sys.argv[3])))
