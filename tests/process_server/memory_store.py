"""An object store in memory that can be away, refuse, lose replies, and hold uploads back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from typing_extensions import Buffer

from storage.backends.object_store import ObjectInfo
from storage.errors import ObjectExists, ObjectNotFound, StoreFault, StoreOutcomeUnknown, StoreUnavailable


class MemoryStore:
    """`objects` is what is stored. is_away: nothing works. loses_replies: creates work and say that nobody knows."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.is_away = False
        self.loses_replies = False
        self.refuses: Callable[[str], StoreFault | None] = lambda name: None
        self.create_attempts: list[str] = []

    @property
    def url(self) -> str:
        return "memory:"

    async def create(self, name: str, parts: Sequence[Buffer]) -> None:
        self.create_attempts.append(name)
        await asyncio.sleep(0)
        self._check()
        fault = self.refuses(name)
        if fault is not None:
            raise fault
        if name in self.objects:
            raise ObjectExists(url=self.url, name=name)
        self.objects[name] = b"".join(bytes(memoryview(part).cast("B")) for part in parts)
        if self.loses_replies:
            raise StoreOutcomeUnknown(url=self.url, reason="the reply was lost")

    async def read(self, name: str, *, first_byte: int = 0, end_byte: int | None = None) -> bytes:
        self._check()
        if name not in self.objects:
            raise ObjectNotFound(url=self.url, name=name)
        data = self.objects[name]
        return data[first_byte:] if first_byte < 0 else data[first_byte:end_byte]

    async def info(self, name: str) -> ObjectInfo:
        return ObjectInfo(name=name, size_bytes=len(await self.read(name)), modified_ns=0)

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        self._check()
        for name in sorted(self.objects):
            if name.startswith(prefix) and name > after:
                yield ObjectInfo(name=name, size_bytes=len(self.objects[name]), modified_ns=0)

    async def delete(self, name: str) -> None:
        self.objects.pop(name, None)

    async def close(self) -> None:
        return

    def _check(self) -> None:
        if self.is_away:
            raise StoreUnavailable(url=self.url, reason="away")
