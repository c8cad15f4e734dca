"""What is kept of a disk's tracking over a restart of the machine, and whether to believe it afterwards.

At the very end of a shutdown the marks go into the marker, or why they cannot. At the next start it is taken away
before anything relies on it, so it is believed at most once. It is believed only if nothing wrote to the disk between
the two: not in the rest of that shutdown, not while the machine was down, not in this boot before tracking began. One
doubt is enough to compare everything; `TABLES` say in which order the doubts are named. Clocks play no part.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from blake3 import blake3

from mobility_agent.core.resync_cause import NAME_BYTES_MAX, ResyncCause
from protocol.errors import InvalidValue
from protocol.vocabulary import DISK_SIZE_BYTES_MAX, DiskId

FORMAT: Final = 1
DIGEST_BYTES: Final = 32
BOOT_BYTES: Final = 16
SPARE_MARK_BYTES_MAX: Final = 2 * 4096
"""Maps are made of whole pages: so much longer than the disk's blocks ask for may they be."""
_MAGIC: Final = b"FPMARKER"
_HEADER: Final = struct.Struct(f"<8sI16sQI{BOOT_BYTES}s{DIGEST_BYTES}s{DIGEST_BYTES}s{NAME_BYTES_MAX}sQ")
_COMPRESSION_LEVEL: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """How one disk was left when the machine stopped."""

    disk: DiskId
    size_bytes: int
    block_bytes: int
    """Of disk, per bit of the marks."""
    boot_id: bytes
    """The kernel's name for the run that ended."""
    identity: bytes
    """Digest of all by which the disk is known."""
    witnesses: bytes
    """Digest of the places that show whether another system wrote to the disk; zeroes if the stop was not clean."""
    refused: ResyncCause | None
    """Why the stop was not clean; None if it was."""
    marks: bytes
    """What was marked and had not been sent; empty if the stop was not clean."""


Found: TypeAlias = Marker | ResyncCause
"""A marker, or why there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopFacts:
    """Of one disk, when nothing of the system is left that could write to it."""

    track_lost: ResyncCause | None
    """Track of it had been lost already, and no new epoch was entered since."""
    users: tuple[str, ...]
    """What could still write to it: file systems that are mounted, swap, devices above it, open files."""
    is_quiet: bool
    """Nothing was in flight and the programs had seen all that the kernel counted, before and after the marks were
    read."""
    is_witnessed: bool
    """Whatever lies on it shows when another system writes to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartFacts:
    """Of one disk, looked at after the programs began to mark for it."""

    disk: DiskId
    size_bytes: int
    block_bytes: int
    mark_bytes: int
    """The length of its marks."""
    boot_id: bytes
    identity: bytes
    witnesses: bytes | None
    """None: something on it shows nothing."""
    users: tuple[str, ...]
    """What can write to it already."""
    sectors_written: int
    """Written and discarded since the machine started, as the kernel counts them."""
    writes_in_flight: int
    counts_io: bool
    """The kernel counts at all (queue/iostats)."""


_AT_STOP: Final[tuple[tuple[Callable[[StopFacts], bool], ResyncCause], ...]] = (
    (lambda facts: not facts.is_witnessed, ResyncCause.UNWITNESSED_CONTENTS),
    (lambda facts: bool(facts.users), ResyncCause.IN_USE_AT_STOP),
    (lambda facts: not facts.is_quiet, ResyncCause.RESTLESS_AT_STOP),
)
_AT_START: Final[tuple[tuple[Callable[[Marker, StartFacts], bool], ResyncCause], ...]] = (
    (lambda marker, facts: marker.boot_id == facts.boot_id, ResyncCause.MARKER_OF_THIS_BOOT),
    (
        lambda marker, facts: _disk_of(marker, len(marker.marks)) != _disk_of(facts, facts.mark_bytes),
        ResyncCause.MARKER_OF_ANOTHER_DISK,
    ),
    (
        lambda _, facts: bool(not facts.counts_io or facts.sectors_written or facts.writes_in_flight),
        ResyncCause.WRITTEN_BEFORE_TRACKING,
    ),
    (lambda _, facts: bool(facts.users), ResyncCause.IN_USE_BEFORE_TRACKING),
    (lambda marker, facts: marker.witnesses != facts.witnesses, ResyncCause.CHANGED_WHILE_DOWN),
)


def judge_stop(facts: StopFacts) -> ResyncCause | None:
    """Why the stop is not clean; None if it is."""
    if facts.track_lost is not None:
        return facts.track_lost
    return next((cause for is_met, cause in _AT_STOP if is_met(facts)), None)


def judge_start(found: Found, facts: StartFacts) -> ResyncCause | None:
    """Why everything is to be compared; None if what the marker has is all that the history lacks."""
    if isinstance(found, ResyncCause):
        return found
    if found.refused is not None:
        return found.refused
    return next((cause for is_met, cause in _AT_START if is_met(found, facts)), None)


def encode_marker(marker: Marker) -> bytes:
    header = _HEADER.pack(
        _MAGIC,
        FORMAT,
        bytes.fromhex(marker.disk),
        marker.size_bytes,
        marker.block_bytes,
        marker.boot_id,
        marker.identity,
        marker.witnesses,
        (marker.refused or "").encode("ascii"),
        len(marker.marks),
    )
    body = header + zlib.compress(marker.marks, _COMPRESSION_LEVEL)
    return body + blake3(body).digest(DIGEST_BYTES)


def decode_marker(data: bytes | None) -> Found:
    """data: of the file; None if there is none."""
    if data is None:
        return ResyncCause.NO_CLEAN_STOP
    try:
        return _decode(data)
    except (InvalidValue, ValueError, zlib.error):
        return ResyncCause.MARKER_DAMAGED


def _decode(data: bytes) -> Marker:
    body, check = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    if len(body) < _HEADER.size or blake3(body).digest(DIGEST_BYTES) != check:
        raise InvalidValue(what="marker", value=len(data), rule="it is whole, and its check fits")
    magic, version, disk, size, block, boot, identity, witnesses, refused, length = _HEADER.unpack_from(body)
    if magic != _MAGIC or version != FORMAT:
        raise InvalidValue(what="marker", value=version, rule=f"its format is {FORMAT}")
    if not block or size > DISK_SIZE_BYTES_MAX or length > size // block // 8 + SPARE_MARK_BYTES_MAX:
        raise InvalidValue(what="marks", value=length, rule="they are no more than the disk has blocks")
    marks = zlib.decompressobj().decompress(body[_HEADER.size :], length + 1)
    if len(marks) != length:
        raise InvalidValue(what="marks", value=len(marks), rule=f"they have {length} bytes")
    cause = refused.rstrip(b"\0").decode("ascii")
    return Marker(
        disk=DiskId(disk.hex()),
        size_bytes=size,
        block_bytes=block,
        boot_id=boot,
        identity=identity,
        witnesses=witnesses,
        refused=ResyncCause(cause) if cause else None,
        marks=marks,
    )


def _disk_of(found: Marker | StartFacts, mark_bytes: int) -> tuple[DiskId, int, int, bytes, int]:
    return found.disk, found.size_bytes, found.block_bytes, found.identity, mark_bytes
