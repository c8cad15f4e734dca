"""What the agent's tests share: an agent on real files, a model of the servers, real threads."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mobility_agent.disk_reader import open_local_disk
from mobility_agent.ports import Tracking
from mobility_agent.service import AgentLimits, AgentService
from protocol.vocabulary import DIGEST_BLOCK_BYTES, DiskId
from runtime.clock import SystemClock
from runtime.local_directory import LocalDirectory
from tests.mobility_agent.model import ModelControl, ModelProcessServer

BLOCK = DIGEST_BLOCK_BYTES
MIB = 2**20
QUICK = AgentLimits(
    change_set_raw_bytes=2 * MIB, frame_buffers=6, reconnect_seconds_min=0.01, reconnect_seconds_max=0.05
)


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


class Bench:
    """One agent's state directory, its source image, and the servers; the agent can be run again and again."""

    def __init__(self, path: Path, executor: ThreadPoolExecutor) -> None:
        self.executor = executor
        self.directory = LocalDirectory(path / "state")
        self.image = path / "disk.img"
        self.server = ModelProcessServer()
        self.control = ModelControl()
        self.control.on_report = self.server.changed.set
        self.service: AgentService | None = None
        self.tracking: Tracking | None = None

    def write_image(self, size_bytes: int, *, seed: int = 1, zero_share: float = 0.3) -> None:
        """Random blocks, some of zeroes, some holes."""
        draw = random.Random(seed)
        with open(self.image, "wb") as file:
            file.truncate(size_bytes)
            for offset in range(0, size_bytes, BLOCK):
                length = min(BLOCK, size_bytes - offset)
                choice = draw.random()
                if choice >= zero_share:
                    os.pwrite(file.fileno(), draw.randbytes(length), offset)
                elif choice < zero_share / 2:
                    os.pwrite(file.fileno(), bytes(length), offset)

    def change(self, offset: int, data: bytes) -> None:
        with open(self.image, "r+b") as file:
            os.pwrite(file.fileno(), data, offset)

    @property
    def contents(self) -> bytes:
        return self.image.read_bytes()

    @property
    def disk(self) -> DiskId:
        return next(iter(self.server.disks))

    @property
    def recovered(self) -> bytes:
        """What the newest whole change set rebuilds."""
        return self.server.disks[self.disk].image(self.image.stat().st_size)

    @asynccontextmanager
    async def agent(self, limits: AgentLimits = QUICK) -> AsyncIterator[AgentService]:
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            self.server.serve_in(group)
            service = self.service = AgentService(
                directory=self.directory,
                open_source=open_local_disk,
                connect=self.server.connect,
                control=self.control,
                clock=SystemClock(),
                draw_random=os.urandom,
                executor=self.executor,
                limits=limits,
                tracking=self.tracking,
            )
            task = group.create_task(service.run())
            try:
                yield service
            finally:
                service.stop()
                await asyncio.wait([task])
                self.server.cut()

    async def until_points(self, count: int) -> None:
        """Until the newest epoch holds so many recovery points."""
        await self.server.until(lambda: bool(self.server.disks) and len(self.server.disks[self.disk].points()) >= count)


@pytest.fixture
def bench(tmp_path: Path, executor: ThreadPoolExecutor) -> Bench:
    return Bench(tmp_path, executor)


MakeBench = Callable[[], Bench]
