"""An in-memory ObjectStore: latency, outages, retryable failures, replies lost after the object was created, and lists
that do not show the newest objects.

Objects are created whole, at one instant between call and return, and never change. The objects outlive every
process: they are a `StoreContents`; a `SimulatedStore` is one process's connection to them.
"""

from __future__ import annotations

import asyncio
import bisect
import random
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

from typing_extensions import Buffer

from storage.backends.object_store import ObjectInfo, check_object_name, clamp_range
from storage.errors import ObjectExists, ObjectNotFound, StoreOutcomeUnknown, StoreUnavailable
from tests.simulation.clock import true_now_ns
from tests.simulation.process import ProcessKilled, SimulatedProcess

LATENCY_SECONDS_MAX: Final = 0.05
LATE_SECONDS_MAX: Final = 5.0
URL: Final = "memory://simulation"


class StoreContents:
    """What the store holds. `on_create(name)` is called at the instant an object becomes visible."""

    def __init__(self, loop: asyncio.AbstractEventLoop, draw: random.Random) -> None:
        self.loop = loop
        self.draw = draw
        self.objects: dict[str, bytes] = {}
        self.modified_ns: dict[str, int] = {}
        self.sorted_names: list[str] = []
        self.is_down = False
        self.failure_probability = 0.0
        self.lost_reply_probability = 0.0
        self.stale_seconds = 0.0
        """Lists do not show what was created so recently."""
        self.on_create: Callable[[str], None] = lambda name: None
        self.on_delete: Callable[[str], None] = lambda name: None
        self.on_fault: Callable[[str, str], None] = lambda kind, name: None

    def heal(self) -> None:
        self.is_down = False
        self.failure_probability = self.lost_reply_probability = self.stale_seconds = 0.0

    def put(self, name: str, data: bytes) -> None:
        if name in self.objects:
            raise ObjectExists(url=URL, reason="exists", name=name)
        self.objects[name] = data
        self.modified_ns[name] = true_now_ns(self.loop)
        bisect.insort(self.sorted_names, name)
        self.on_create(name)

    def land(self, name: str, data: bytes, delay_seconds: float) -> None:
        """A create whose sender is gone arrives: at once, or after the delay."""
        if delay_seconds:
            self.loop.call_later(delay_seconds, self.land, name, data, 0.0)
        elif name not in self.objects and not self.is_down:
            self.on_fault("store-late-create", name)
            self.put(name, data)

    def remove(self, name: str) -> None:
        if self.objects.pop(name, None) is not None:
            self.sorted_names.remove(name)
            self.on_delete(name)
            del self.modified_ns[name]


class SimulatedStore:
    """One process's ObjectStore."""

    def __init__(
        self, contents: StoreContents, process: SimulatedProcess, *, latency_seconds_max: float = LATENCY_SECONDS_MAX
    ) -> None:
        self._contents = contents
        self._process = process
        self._latency_seconds_max = latency_seconds_max

    @property
    def url(self) -> str:
        return URL

    async def create(self, name: str, parts: Sequence[Buffer]) -> None:
        contents = self._contents
        data = b"".join(bytes(part) for part in parts)
        try:
            await self._travel("create", name)
        except (asyncio.CancelledError, ProcessKilled):
            # why: the request may be on its way already; a dead sender's may arrive even later
            if contents.draw.random() < 0.5:
                delay = 0.0 if self._process.is_alive else contents.draw.random() * LATE_SECONDS_MAX
                contents.land(name, data, delay)
            raise
        contents.put(name, data)
        if contents.draw.random() < contents.lost_reply_probability:
            contents.on_fault("store-lost-reply", name)
            await self._delay()
            raise StoreOutcomeUnknown(url=URL, reason="the reply was lost", name=name)
        await self._delay()

    async def read(self, name: str, *, first_byte: int = 0, end_byte: int | None = None) -> bytes:
        await self._travel("read", name)
        data = self._object(name)
        first, end = clamp_range(len(data), first_byte, end_byte)
        return data[first:end]

    async def info(self, name: str) -> ObjectInfo:
        await self._travel("info", name)
        return self._info(name)

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        if prefix:
            check_object_name(f"{prefix}x")
        await self._travel("list", prefix, is_prefix=True)
        names = self._contents.sorted_names
        first = max(bisect.bisect_left(names, prefix), bisect.bisect_right(names, after))
        found = []
        newest_ns = true_now_ns(self._contents.loop) - round(self._contents.stale_seconds * 1e9)
        for name in names[first:]:
            if not name.startswith(prefix):
                break
            if self._contents.modified_ns[name] <= newest_ns:
                found.append(self._info(name))
        for info in found:
            yield info

    async def delete(self, name: str) -> None:
        await self._travel("delete", name)
        self._contents.remove(name)

    async def close(self) -> None:
        return

    def _object(self, name: str) -> bytes:
        try:
            return self._contents.objects[name]
        except KeyError:
            raise ObjectNotFound(url=URL, reason="no such object", name=name) from None

    def _info(self, name: str) -> ObjectInfo:
        data = self._object(name)
        return ObjectInfo(name=name, size_bytes=len(data), modified_ns=self._contents.modified_ns[name])

    async def _travel(self, what: str, name: str, *, is_prefix: bool = False) -> None:
        self._process.check_alive()
        if not is_prefix:
            check_object_name(name)
        await self._delay()
        contents = self._contents
        if contents.is_down or contents.draw.random() < contents.failure_probability:
            contents.on_fault("store-failure", f"{what} {name}")
            raise StoreUnavailable(url=URL, reason=f"simulated: {what} failed", name=name)

    async def _delay(self) -> None:
        await asyncio.sleep(self._contents.draw.random() ** 3 * self._latency_seconds_max)
        self._process.check_alive()
