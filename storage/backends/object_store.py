"""The contract of an object store. tests/storage/backends/object_store_contract.py is its executable half.

Objects are created whole and once, and never change. Names are ASCII, `/`-separated, relative, as `object_names`
makes them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from typing_extensions import Buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """modified_ns is the store's own clock: the only one that retention may believe."""

    name: str
    size_bytes: int
    modified_ns: int


class ObjectStore(Protocol):
    """Every method may raise a storage.errors.StoreFault, which says whether it is worth a retry.

    A cancelled or failed create() has created the whole object or nothing.
    """

    @property
    def url(self) -> str:
        """Without secrets, for logs and messages."""
        ...

    async def create(self, name: str, parts: Sequence[Buffer]) -> None:
        """Creates `name` from the parts, one behind the other; on return it is durable and visible to list and read.

        Raises ObjectExists if the name is taken (nothing is changed then). StoreOutcomeUnknown: a reply was lost, the
        object may or may not be there.
        """
        ...

    async def read(self, name: str, *, first_byte: int = 0, end_byte: int | None = None) -> bytes:
        """The bytes [first_byte, end_byte), to the object's end if end_byte is None; cut at the object's end.

        A negative first_byte counts from the end (the last -first_byte bytes, or the whole object if it is shorter).
        Raises ObjectNotFound.
        """
        ...

    async def info(self, name: str) -> ObjectInfo:
        """Raises ObjectNotFound."""
        ...

    def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        """Objects whose name starts with `prefix` and is greater than `after`, in ascending byte order of their names.

        Everything whose create() had returned before the call is there.
        """
        ...

    async def delete(self, name: str) -> None:
        """Only the fold worker's credential may. No error if it is not there."""
        ...

    async def close(self) -> None: ...
