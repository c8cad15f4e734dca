"""The contract of an object store. tests/storage/backends/object_store_contract.py is its executable half.

Objects are created whole and once, and never change. Names are ASCII, `/`-separated, relative, as `object_names`
makes them.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from typing_extensions import Buffer

from protocol.errors import InvalidValue

OBJECT_NAME_BYTES_MAX: Final = 900
"""Azure Blob takes 1024, its container's prefix included."""

COMPONENT_BYTES_MAX: Final = 200
"""Of local file systems' 255."""

_COMPONENT: Final = re.compile(rf"[A-Za-z0-9_-](?:[A-Za-z0-9._-]{{0,{COMPONENT_BYTES_MAX - 2}}}[A-Za-z0-9_-])?")


def is_component(text: str) -> bool:
    """Whether `text` may stand between two slashes of an object name: no dot at either end, nothing that any store
    reads otherwise.
    """
    return _COMPONENT.fullmatch(text) is not None


def check_object_name(name: str) -> str:
    """Returns `name`. Raises InvalidValue unless it is a relative path of components that every store takes
    literally.
    """
    if len(name) > OBJECT_NAME_BYTES_MAX or not all(is_component(part) for part in name.split("/")):
        raise InvalidValue(what="object name", value=name, rule="must be a relative path of plain ASCII components")
    return name


def clamp_range(size_bytes: int, first_byte: int, end_byte: int | None) -> tuple[int, int]:
    """The half-open range that `read` means in an object of this size; first <= end <= size."""
    first = min(first_byte if first_byte >= 0 else max(0, size_bytes + first_byte), size_bytes)
    end = size_bytes if end_byte is None else min(end_byte, size_bytes)
    return first, max(first, end)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """modified_ns is the store's own clock: the only one that retention may believe."""

    name: str
    size_bytes: int
    modified_ns: int


class ObjectStore(Protocol):
    """Every method may raise a storage.errors.StoreFault, which says whether it is worth a retry.

    A cancelled or failed create() leaves the whole object or nothing; cancelled, or with its outcome unknown, it may
    also still appear afterwards.
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
