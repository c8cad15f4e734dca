"""A durable directory in memory whose power can be cut at any write or synchronize, and whose calls can fail.

What was synchronized survives; of each later write some 512-byte sectors do and some do not. A synchronize that failed
loses what was written since the last one, and a later one succeeds all the same (DESIGN §12).
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from typing_extensions import Buffer

SECTOR_BYTES = 512


class PowerCutError(Exception):
    """The machine is off."""


@dataclass
class _Contents:
    durable: bytearray
    pending: list[tuple[int, bytes]] = field(default_factory=list)

    def seen(self) -> bytearray:
        contents = bytearray(self.durable)
        for offset, data in self.pending:
            contents.extend(bytes(max(0, offset + len(data) - len(contents))))
            contents[offset : offset + len(data)] = data
        return contents


class FaultyDirectory:
    """`operations` counts whatever changes something; number `cut_at` is the one in which the power goes.

    `fail` is asked about each of them, and about reads.
    """

    def __init__(self) -> None:
        self.files: dict[str, _Contents] = {}
        self.operations = 0
        self.cut_at: int | None = None
        self.is_off = False
        self.fail: Callable[[str, str], OSError | None] = lambda operation, name: None
        self.preallocated_bytes_max = 0
        self._lock = threading.RLock()

    def restore_power(self, draw: random.Random) -> None:
        """What is left of everything that was not synchronized is drawn."""
        for contents in self.files.values():
            for offset, data in contents.pending:
                contents.durable.extend(bytes(max(0, offset + len(data) - len(contents.durable))))
                fate = draw.choice(("lost", "kept", "torn"))
                for place in range(0, len(data), SECTOR_BYTES):
                    if fate == "kept" or (fate == "torn" and draw.random() < 0.5):
                        sector = data[place : place + SECTOR_BYTES]
                        contents.durable[offset + place : offset + place + len(sector)] = sector
            contents.pending.clear()
        self.is_off, self.cut_at = False, None

    def names(self) -> list[str]:
        self.check()
        return sorted(self.files)

    def read(self, name: str) -> bytes:
        self.check()
        if name not in self.files:
            raise FileNotFoundError(name)
        return bytes(self.files[name].seen())

    def replace(self, name: str, data: bytes) -> None:
        self.step("replace", name)
        self.files[name] = _Contents(bytearray(data))

    def open(self, name: str, *, create: bool = False, preallocate_bytes: int = 0, direct: bool = False) -> FaultyFile:
        self.check()
        if create:
            self.step("create", name)
            if name in self.files:
                raise FileExistsError(name)
            self.files[name] = _Contents(bytearray(preallocate_bytes))
            total = sum(len(contents.seen()) for contents in self.files.values())
            self.preallocated_bytes_max = max(self.preallocated_bytes_max, total)
        if name not in self.files:
            raise FileNotFoundError(name)
        return FaultyFile(self, name)

    def remove(self, name: str) -> None:
        self.step("remove", name)
        self.files.pop(name, None)

    def free_bytes(self) -> int:
        return 2**40

    def check(self) -> None:
        if self.is_off:
            raise PowerCutError

    def step(self, operation: str, name: str) -> None:
        with self._lock:
            self.check()
            self.operations += 1
            if self.operations == self.cut_at:
                self.is_off = True
                raise PowerCutError
            error = self.fail(operation, name)
            if error is not None:
                raise error


class FaultyFile:
    def __init__(self, directory: FaultyDirectory, name: str) -> None:
        self._directory = directory
        self._name = name
        self._contents = directory.files[name]

    def size_bytes(self) -> int:
        return len(self._contents.seen())

    def read_into(self, offset_bytes: int, buffer: Buffer) -> int:
        self._directory.check()
        if error := self._directory.fail("read", self._name):
            raise error
        target = memoryview(buffer).cast("B")
        data = self._contents.seen()[offset_bytes : offset_bytes + len(target)]
        target[: len(data)] = data
        return len(data)

    def write(self, offset_bytes: int, buffers: Sequence[Buffer]) -> None:
        data = b"".join(bytes(memoryview(buffer).cast("B")) for buffer in buffers)
        assert offset_bytes % 4096 == 0
        assert len(data) % 4096 == 0
        if not self._directory.is_off:
            self._contents.pending.append((offset_bytes, data))
        self._directory.step("write", self._name)

    def truncate(self, size_bytes: int) -> None:
        """To less only. At once, and durable at once: nobody reads what is cut off."""
        self._directory.step("truncate", self._name)
        del self._contents.durable[size_bytes:]
        pending = self._contents.pending
        pending[:] = [(offset, data[: size_bytes - offset]) for offset, data in pending if offset < size_bytes]

    def synchronize(self) -> None:
        try:
            self._directory.step("synchronize", self._name)
        except OSError:
            self._contents.pending.clear()
            raise
        self._contents.durable = self._contents.seen()
        self._contents.pending.clear()

    def close(self) -> None:
        return
