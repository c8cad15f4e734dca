"""A simulated source disk: a workload writes to it whenever it likes, the agent reads it, and the oracle remembers
everything.

A proof of stillness is broken by any write that begins while it is held. As with a file lease, such a write may land
at once or wait until the holder has noticed; so what is read under a broken proof may be any mixture.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from typing_extensions import Buffer

from mobility_agent.errors import DiskReplaced, DiskUnreadable, DiskVanished, NotProvedStill
from protocol.control import DiskIdentity, DiskKind
from protocol.vocabulary import DIGEST_BLOCK_BYTES
from tests.simulation.clock import true_now_ns
from tests.simulation.process import SimulatedProcess
from tests.simulation.source_history import SourceHistory

SECTOR_BYTES: Final = 512
LEASE_BREAK_SECONDS: Final = 2.0
ZEROES: Final = bytes(DIGEST_BLOCK_BYTES)
SECRETS_MAX: Final = 2
SECRET_BYTES: Final = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What the source does: bursts of writes with pauses between them. Seconds are means."""

    pause_seconds: float
    writes_per_burst_max: int
    write_gap_seconds: float
    write_bytes_max: int
    zero_share: float
    random_share: float
    """Of what is not zeroes: incompressible."""


class SimulatedDisk:
    """The device itself, which outlives every agent. `on_write(version)` is told of every write."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, draw: random.Random, *, path: str, serial: str, size_bytes: int
    ) -> None:
        self.loop = loop
        self.draw = draw
        self.path = path
        self.history = SourceHistory(_first_image(draw, size_bytes), true_now_ns(loop))
        self.identity = DiskIdentity(
            kind=DiskKind.BLOCK_DEVICE, size_bytes=size_bytes, logical_sector_bytes=SECTOR_BYTES, serial=serial
        )
        self.proofs: list[SimulatedProof] = []
        self.stillness_refusal_probability = 0.0
        self.read_failure_probability = 0.0
        self.round_begins_ns: list[int] = []
        """When anybody asked for a proof of stillness: when a round began."""
        self.secrets: list[bytes] = []
        """Samples of what was written that nobody but the machine and the vault's key may ever see."""
        self.on_write: Callable[[int, int, int], None] = lambda version, offset, length: None

    @property
    def size_bytes(self) -> int:
        return self.identity.size_bytes

    def heal(self) -> None:
        self.read_failure_probability = 0.0
        self.stillness_refusal_probability = 0.0

    async def write(self, offset_bytes: int, data: bytes) -> None:
        """One write of the workload, whole, at one instant: at once or, like a lease breaker, when the holder has
        noticed.
        """
        held = [proof for proof in self.proofs if not proof.is_ended]
        for proof in held:
            proof.is_broken = True
        if held and self.draw.random() < 0.5:
            deadline = self.loop.time() + LEASE_BREAK_SECONDS
            while any(not proof.is_noticed for proof in held) and self.loop.time() < deadline:
                await asyncio.sleep(0.01)
            # why: the writer had been waiting, so whoever began a proof meanwhile loses it as well
            for proof in self.proofs:
                proof.is_broken = True
        self.proofs = [proof for proof in self.proofs if not proof.is_ended]
        self.history.write(offset_bytes, data, true_now_ns(self.loop))
        self.on_write(self.history.version, offset_bytes, len(data))

    async def run_workload(self, workload: Workload) -> None:
        """Writes until cancelled."""
        while True:
            await asyncio.sleep(self.draw.expovariate(1 / workload.pause_seconds))
            hot_offset = self.draw.randrange(self.size_bytes)
            for _ in range(self.draw.randrange(1, workload.writes_per_burst_max + 1)):
                await self._write_something(workload, hot_offset)
                await asyncio.sleep(self.draw.expovariate(1 / workload.write_gap_seconds))

    async def _write_something(self, workload: Workload, hot_offset: int) -> None:
        sectors = self.draw.randrange(1, workload.write_bytes_max // SECTOR_BYTES + 1)
        length = sectors * SECTOR_BYTES
        around = hot_offset if self.draw.random() < 0.5 else self.draw.randrange(self.size_bytes)
        offset = min(around // SECTOR_BYTES * SECTOR_BYTES, self.size_bytes - length)
        if self.draw.random() < workload.zero_share:
            data = bytes(length)
        elif self.draw.random() >= workload.random_share:
            data = self.draw.randbytes(64) * (length // 64)
        else:
            data = self.draw.randbytes(length)
            if len(self.secrets) < SECRETS_MAX:
                self.secrets.append(data[:SECRET_BYTES])
        await self.write(offset, data)


class SimulatedProof:
    """mobility_agent.ports.StillnessProof."""

    def __init__(self) -> None:
        self.is_broken = False
        self.is_ended = False
        self.is_noticed = False

    def holds(self) -> bool:
        if self.is_broken:
            self.is_noticed = True
        return not self.is_broken

    def end(self) -> bool:
        self.is_ended = True
        self.is_noticed = True
        return not self.is_broken


class SimulatedSource:
    """mobility_agent.ports.SourceDisk: one agent's opening of a disk. Leases fall when the process dies."""

    def __init__(self, disk: SimulatedDisk, process: SimulatedProcess) -> None:
        self._disk = disk
        self._process = process
        self._proofs: list[SimulatedProof] = []

    @property
    def size_bytes(self) -> int:
        return self._disk.size_bytes

    @property
    def sector_bytes(self) -> int:
        return SECTOR_BYTES

    @property
    def identity(self) -> DiskIdentity:
        return self._disk.identity

    def check(self) -> None:
        self._process.check_alive()

    def read_into(self, offset_bytes: int, buffer: Buffer) -> None:
        self._process.check_alive()
        if self._disk.draw.random() < self._disk.read_failure_probability:
            raise DiskUnreadable(path=self._disk.path, offset_bytes=offset_bytes, reason="simulated medium error")
        target = memoryview(buffer).cast("B")
        if offset_bytes + len(target) > self.size_bytes:
            raise DiskUnreadable(path=self._disk.path, offset_bytes=offset_bytes, reason="read beyond the end")
        target[:] = memoryview(self._disk.history.image)[offset_bytes : offset_bytes + len(target)]

    def data_ranges(self, first_bytes: int, end_bytes: int) -> Iterator[tuple[int, int]]:
        self._process.check_alive()
        image = self._disk.history.image
        ranges: list[tuple[int, int]] = []
        for first in range(first_bytes, end_bytes, DIGEST_BLOCK_BYTES):
            end = min(first + DIGEST_BLOCK_BYTES, end_bytes)
            if image[first:end] != ZEROES[: end - first]:
                if ranges and ranges[-1][1] == first:
                    ranges[-1] = (ranges[-1][0], end)
                else:
                    ranges.append((first, end))
        return iter(ranges)

    def begin_stillness(self) -> SimulatedProof:
        self._process.check_alive()
        self._disk.round_begins_ns.append(true_now_ns(self._disk.loop))
        if self._disk.draw.random() < self._disk.stillness_refusal_probability:
            raise NotProvedStill(reason="simulated: a writer has it open")
        proof = SimulatedProof()
        self._disk.proofs.append(proof)
        self._proofs.append(proof)
        return proof

    def close(self) -> None:
        self.release_leases()

    def release_leases(self) -> None:
        for proof in self._proofs:
            proof.end()


class SimulatedSources:
    """mobility_agent.ports.OpenSource for one process."""

    def __init__(self, disks: list[SimulatedDisk], process: SimulatedProcess) -> None:
        self._disks = {disk.path: disk for disk in disks}
        self._process = process
        self._opened: list[SimulatedSource] = []

    def __call__(self, path: str, expected: DiskIdentity | None) -> SimulatedSource:
        self._process.check_alive()
        disk = self._disks.get(path)
        if disk is None:
            raise DiskVanished(path=path, reason="simulated: nothing there")
        if expected is not None and expected != disk.identity:
            raise DiskReplaced(path=path, expected=expected, found=disk.identity)
        source = SimulatedSource(disk, self._process)
        self._opened.append(source)
        return source

    def release_leases(self) -> None:
        """The process died: the kernel drops its leases."""
        for source in self._opened:
            source.release_leases()


def _first_image(draw: random.Random, size_bytes: int) -> bytes:
    """Runs of zeroes, of compressible and of incompressible blocks."""
    pieces = []
    for _ in range(size_bytes // DIGEST_BLOCK_BYTES):
        kind = draw.random()
        if kind < 0.4:
            pieces.append(bytes(DIGEST_BLOCK_BYTES))
        elif kind < 0.8:
            pieces.append(draw.randbytes(256) * (DIGEST_BLOCK_BYTES // 256))
        else:
            pieces.append(draw.randbytes(DIGEST_BLOCK_BYTES))
    return b"".join(pieces)
