"""What must always hold (DESIGN §11), checked at the transition where it could first be broken.

1   Acknowledged(epoch, n) ⇒ change sets ≤ n survive: no later welcome, closing segment or drained history falls
below it,
    unless the cache itself was lost.
2   Nothing dirty is forgotten: when faults end, every disk's newest point becomes the source as it is (world.py).
3   A settled point equals the source at one instant, inside its window: not before the instant that it states, not
after it
    was marked (recovered_point).
6   Change sets are stored once, in order, without a gap; what is said to be committed is in the store.
7   Only granted epochs are extended; an epoch is never closed below what was stated as committed.
8   Nobody deletes.
9   Tampered storage is refused or recovers an image that the source had (tampering.py).
11  A point is stated only when all that it needs is in the store; its instant is never newer than what it holds.
13  The cache stays within its limit; the backlog drains when faults end (world.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy
from blake3 import blake3
from typing_extensions import Buffer

from protocol.messages import CloseDisk, DiskOpened, Frame, Message, OpenDisk, Positions, Refusal
from protocol.vocabulary import DiskId
from storage.frame_record import HEAD_DTYPE
from storage.object_names import SegmentName, parse
from storage.segment import TRAILER_BYTES, parse_trailer
from tests.simulation.control import LedgerPoint

if TYPE_CHECKING:
    from tests.simulation.world import World


@dataclass(slots=True)
class StoredEpoch:
    """One epoch of one disk as it lies in the store: (first, last) sequence by ordinal."""

    segments: dict[int, tuple[int, int]] = field(default_factory=dict)
    closing_ordinal: int | None = None

    def committed_sequence(self) -> int:
        """The last sequence of the run of ordinals 1, 2, 3… that is there, up to the closing segment."""
        last = 0
        ordinal = 1
        while ordinal in self.segments and ordinal != self.closing_ordinal:
            last = self.segments[ordinal][1]
            ordinal += 1
        return last


class Invariants:
    """One run's watch. `violate` of the world collects what it finds."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.acknowledged: dict[tuple[DiskId, int], int] = {}
        self.committed: dict[tuple[DiskId, int], int] = {}
        self.lost: set[tuple[DiskId, int]] = set()
        """Epochs whose cache was lost: what was acknowledged in them and not committed may be missing."""
        self.stored: dict[tuple[DiskId, int], StoredEpoch] = {}
        self.sent_digests: dict[tuple[DiskId, int, int, int], set[bytes]] = {}

    def new_connection(self) -> ConnectionView:
        return ConnectionView(self._world, self)

    def cache_was_lost(self) -> None:
        # why: an acknowledgement that is still under way to the agent is lost as well
        self.lost.update(self.acknowledged)
        self.lost.update((disk, epoch) for disk, epoch, _, _ in self.sent_digests)

    def acknowledge(self, disk: DiskId, epoch: int, durable: int, committed: int) -> None:
        """The agent was told these positions."""
        key = (disk, epoch)
        if durable < self.acknowledged.get(key, 0) and key not in self.lost:
            self._violate(
                "1-acknowledged-survives", f"epoch {epoch}: {durable} after {self.acknowledged[key]} was acknowledged"
            )
        self.acknowledged[key] = max(durable, self.acknowledged.get(key, 0))
        stored = self.stored.get(key, StoredEpoch()).committed_sequence()
        if committed > stored:
            self._violate("6-committed-is-stored", f"epoch {epoch}: {committed} stated, {stored} in the store")
        self.committed[key] = max(committed, self.committed.get(key, 0))

    def epoch_continues(self, disk: DiskId, epoch: int, parent_epoch: int, parent_sequence: int) -> None:
        """A welcome said where an epoch continues its parent."""
        for key, acknowledged in self.acknowledged.items():
            if key[0] == disk and parent_epoch <= key[1] < epoch and key not in self.lost:
                survives = parent_sequence if key[1] == parent_epoch else 0
                if survives < acknowledged:
                    self._violate(
                        "1-acknowledged-survives",
                        f"epoch {epoch} continues {parent_epoch}:{parent_sequence}, "
                        f"but {key[1]}:{acknowledged} was acknowledged",
                    )

    def object_created(self, name: str) -> None:
        """An object became visible in the store."""
        parsed = parse(name)
        if not isinstance(parsed, SegmentName):
            return
        world = self._world
        data = world.store.objects[name]
        trailer = parse_trailer(data[-TRAILER_BYTES:], name=name, object_bytes=len(data))
        key = (parsed.disk, parsed.epoch)
        epoch = self.stored.setdefault(key, StoredEpoch())
        record = world.server.disks.get(parsed.disk)
        if record is None or parsed.epoch not in record.grants:
            self._violate("7-granted-epochs-only", f"{name} extends an epoch that was never granted")
        if trailer.is_closing:
            epoch.closing_ordinal = parsed.ordinal
            self._check_closing(key, epoch)
            return
        heads = numpy.frombuffer(data, dtype=HEAD_DTYPE, count=trailer.frame_count, offset=trailer.index_offset)
        sequences = heads["sequence"]
        epoch.segments[parsed.ordinal] = (int(sequences[0]), int(sequences[-1]))
        self._check_order(name, epoch, parsed.ordinal, sequences)

    def _check_order(self, name: str, epoch: StoredEpoch, ordinal: int, sequences: numpy.ndarray) -> None:
        first, last = epoch.segments[ordinal]
        before = epoch.segments.get(ordinal - 1)
        after = epoch.segments.get(ordinal + 1)
        expected = before[1] + 1 if before else (1 if ordinal == 1 else first)
        if first != expected or (after is not None and after[0] != last + 1):
            self._violate("6-once-and-in-order", f"{name} holds {first}..{last} where {expected} was due")
        if (numpy.diff(sequences) > 1).any() or (numpy.diff(sequences.astype("i8")) < 0).any():
            self._violate("6-once-and-in-order", f"{name} has a gap inside")

    def _check_closing(self, key: tuple[DiskId, int], epoch: StoredEpoch) -> None:
        """What was stated as committed stays so, whoever closes the epoch; uploads behind the closing never counted."""
        if self.committed.get(key, 0) > epoch.committed_sequence():
            self._violate(
                "7-closed-where-committed",
                f"epoch {key[1]} was closed below {self.committed[key]}, stated as committed",
            )

    def point_stated(self, point: LedgerPoint) -> None:
        """The configuration server now says that this point can be recovered."""
        committed = point.committed
        stored = self.stored.get((committed.disk, committed.epoch), StoredEpoch()).committed_sequence()
        if committed.sequence > stored:
            self._violate(
                "11-stated-is-recoverable",
                f"point at {committed.epoch}:{committed.sequence} stated, {stored} in the store",
            )
        if committed.instant_ns > point.stated_ns:
            self._violate("11-stated-is-recoverable", "a point's instant lies in the future")

    def recovered_point(self, point: LedgerPoint, image: bytes) -> None:
        """A recovered image: the source must have looked exactly so at an instant of the point's window."""
        disk = self._world.disk_of(point.committed.disk)
        versions = disk.history.versions_of(image)
        what = f"{point.committed.epoch}:{point.committed.sequence}"
        if not versions:
            self._violate("3-point-equals-source", f"the source never looked like point {what}")
            return
        oldest = disk.history.version_at(point.committed.instant_ns)
        newest = disk.history.version_at(point.stated_ns)
        if not any(oldest <= version <= newest for version in versions):
            self._violate(
                "11-instant-is-honest", f"point {what} is version {versions}, its window is {oldest}..{newest}"
            )

    def cache_grew(self, used_bytes: int) -> None:
        limit = self._world.process_server_limits.cache_bytes_max
        if used_bytes > limit:
            self._violate("13-cache-within-limit", f"the cache holds {used_bytes} bytes of {limit}")

    def deleted(self, name: str) -> None:
        self._violate("8-nothing-is-deleted", name)

    def _violate(self, invariant: str, detail: str) -> None:
        self._world.violate(invariant, detail)


class ConnectionView:
    """What one connection's agent end sends and receives."""

    def __init__(self, world: World, invariants: Invariants) -> None:
        self._world = world
        self._invariants = invariants
        self._disks: dict[int, DiskId] = {}

    def agent_sends(self, message: Message, body: Sequence[Buffer]) -> None:
        trace = self._world.trace
        if isinstance(message, OpenDisk):
            self._disks[message.channel] = message.disk
            trace.event("open-disk", message.epoch, message.acknowledged_sequence, message.wants_new_epoch)
        elif isinstance(message, Frame):
            digest = blake3(b"".join(bytes(part) for part in body)).digest(8)
            key = (self._disks[message.channel], message.epoch, message.sequence, message.frame_number)
            self._invariants.sent_digests.setdefault(key, set()).add(digest)
            end = message.end
            trace.event(
                "frame",
                message.epoch,
                message.sequence,
                message.frame_number,
                digest.hex(),
                end.consistency.value if end else None,
                end.copy_in_cursor_bytes if end else None,
                end.bookmark.point if end and end.bookmark else None,
            )
        else:
            trace.event("agent-says", type(message).__name__)

    def agent_receives(self, message: Message) -> None:
        trace = self._world.trace
        if isinstance(message, DiskOpened):
            disk = self._disks[message.channel]
            trace.event(
                "disk-opened",
                message.epoch,
                f"parent {message.parent_epoch}:{message.parent_sequence}",
                message.durable_sequence,
                message.committed_sequence,
                message.copy_in_cursor_bytes,
            )
            self._invariants.epoch_continues(disk, message.epoch, message.parent_epoch, message.parent_sequence)
            self._invariants.acknowledge(disk, message.epoch, message.durable_sequence, message.committed_sequence)
        elif isinstance(message, Positions):
            trace.event("positions", message.epoch, message.durable_sequence, message.committed_sequence)
            disk = self._disks[message.channel]
            self._invariants.acknowledge(disk, message.epoch, message.durable_sequence, message.committed_sequence)
        elif isinstance(message, CloseDisk | Refusal):
            trace.event("agent-hears", type(message).__name__, message.code, message.detail)
        else:
            trace.event("agent-hears", type(message).__name__)
