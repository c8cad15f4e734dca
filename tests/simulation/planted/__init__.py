"""Defects that the simulation must find: each is planted at a named seam of the product, in this process only.

A seam that has moved is an error, not a simulation that quietly finds nothing: `plant` refuses a missing attribute, and
`seam_calls` tells whether the defect was ever reached.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import storage.segment
from mobility_agent.core.dirty_map import DirtyMap, SentRecord
from mobility_agent.core.extent_set import ExtentSet
from process_server.cache_files import CacheFiles

seam_calls: Counter[str] = Counter()
"""How often each planted defect was reached."""


class SeamMoved(Exception):
    """The product changed: say here where the defect is to be planted now."""


class _LateSynchronize:
    """A file whose synchronize returns at once and happens when the next one is asked for."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._is_due = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, offset_bytes: int, buffers: Any) -> None:
        if self._is_due:
            self._file.synchronize()
        self._file.write(offset_bytes, buffers)

    def synchronize(self) -> None:
        seam_calls["acknowledge-before-sync"] += 1
        self._is_due = True


def _plant_acknowledge_before_sync() -> None:
    """The cache says that a batch is durable before it is synchronized."""
    append = _seam(CacheFiles, "append")

    def append_without_waiting(self: Any, records: Any) -> Any:
        if not hasattr(self, "_active"):
            raise SeamMoved("CacheFiles._active")
        if self._active is not None and not isinstance(self._active, _LateSynchronize):
            self._active = _LateSynchronize(self._active)
        return append(self, records)

    CacheFiles.append = append_without_waiting  # type: ignore[method-assign]


def _plant_clear_before_acknowledge() -> None:
    """The agent forgets what it sent as soon as it has sent it."""
    sent = _seam(DirtyMap, "sent")

    def send_and_forget(self: DirtyMap, sequence: int, extents: ExtentSet) -> SentRecord:
        seam_calls["clear-before-acknowledge"] += 1
        record: SentRecord = sent(self, sequence, extents)
        self.committed(sequence)
        return SentRecord(
            first_sequence=record.first_sequence, last_sequence=record.last_sequence, extents=ExtentSet.of()
        )

    DirtyMap.sent = send_and_forget  # type: ignore[method-assign]


def _plant_no_trailer_check() -> None:
    """Readers believe every trailer, whoever signed it."""
    _seam(storage.segment, "Ed25519PublicKey")

    class Believer:
        @staticmethod
        def from_public_bytes(data: bytes) -> Believer:
            return Believer()

        def verify(self, signature: bytes, data: bytes) -> None:
            seam_calls["no-trailer-check"] += 1

    storage.segment.Ed25519PublicKey = Believer  # type: ignore[misc, assignment]


PLANTED_FAULTS: Final[dict[str, Callable[[], None]]] = {
    "acknowledge-before-sync": _plant_acknowledge_before_sync,
    "clear-before-acknowledge": _plant_clear_before_acknowledge,
    "no-trailer-check": _plant_no_trailer_check,
}


def plant(name: str) -> None:
    """For the rest of this process. Raises SeamMoved."""
    PLANTED_FAULTS[name]()


def _seam(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError as error:
        raise SeamMoved(f"{owner!r} has no {name} any more") from error
