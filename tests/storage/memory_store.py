"""An ObjectStore in memory that obeys the contract, with objects that a test may alter behind everybody's back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from typing_extensions import Buffer

from storage.backends.object_store import ObjectInfo, clamp_range
from storage.errors import ObjectExists, ObjectNotFound, StoreOutcomeUnknown


class MemoryStore:
    """lost_replies: names whose next create() is carried out but not confirmed. lost_requests: where it is not even
    carried out. unlisted: names that lists do not show."""

    def __init__(self) -> None:
        self.unlisted: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.lost_replies: set[str] = set()
        self.lost_requests: set[str] = set()
        self.bytes_read = 0

    @property
    def url(self) -> str:
        return "memory://test"

    async def create(self, name: str, parts: Sequence[Buffer]) -> None:
        if name in self.lost_requests:
            self.lost_requests.discard(name)
            raise StoreOutcomeUnknown(url=self.url, reason="the request was lost")
        if name in self.objects:
            raise ObjectExists(url=self.url, name=name)
        self.objects[name] = b"".join(bytes(part) for part in parts)
        if name in self.lost_replies:
            self.lost_replies.discard(name)
            raise StoreOutcomeUnknown(url=self.url, reason="the reply was lost")

    async def read(self, name: str, *, first_byte: int = 0, end_byte: int | None = None) -> bytes:
        data = self._object(name)
        first, end = clamp_range(len(data), first_byte, end_byte)
        self.bytes_read += end - first
        return data[first:end]

    async def info(self, name: str) -> ObjectInfo:
        return ObjectInfo(name=name, size_bytes=len(self._object(name)), modified_ns=0)

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        for name in sorted(self.objects):
            if name.startswith(prefix) and name > after and name not in self.unlisted:
                yield await self.info(name)

    async def delete(self, name: str) -> None:
        self.objects.pop(name, None)

    async def close(self) -> None:
        return None

    def flip(self, name: str, place: int) -> None:
        """Alters one byte of an object."""
        data = bytearray(self.objects[name])
        data[place] ^= 0x01
        self.objects[name] = bytes(data)

    def _object(self, name: str) -> bytes:
        if name not in self.objects:
            raise ObjectNotFound(url=self.url, name=name)
        return self.objects[name]
