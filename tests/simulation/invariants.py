"""What must always hold (DESIGN §11), checked at the transition where it could first be broken.

1   Acknowledged(epoch, n) ⇒ change sets ≤ n survive: no later welcome, closing segment or drained history falls below
    it, unless the cache itself was lost or the disk moved to another process server. Where the grants lead around an
    epoch, because the disk came back by another one, the store holds all of it before it is left.
2   Nothing dirty is forgotten: no point is missing a change from before its round (stream.py names it).
3   A settled point equals the source at one instant, inside its window: not before the instant that it states, not
    after it was marked (recovered_point).
6   Change sets are stored once, in order, without a gap; what is said to be committed is in the store; what is
    recovered is what was sent.
7   Only granted epochs are extended, by whom they were granted to, and only behind a closing segment; an epoch is
    never closed below what was stated as committed, and nothing behind its closing segment is stated as committed.
8   Nobody deletes.
9   Tampered storage is refused or recovers an image that the source had (recovering.py).
10  The newest point is never an older one while the record of a newer one is left (recovering.py).
11  A point is stated only when all that it needs is in the store; its instant is never newer than what it holds; the
    RPO that is shown is never better than that.
13  The cache stays within its limit; when faults end the backlog drains (healing.py).
14  Replication goes on without the configuration server (healing.py).
15  What is stored anywhere shows no contents and no data key (secrecy.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy
from blake3 import blake3
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from typing_extensions import Buffer

from config_server.core.server_clock import DRIFT_PER_MILLE_MAX, JUMP_TOLERANCE_NS
from protocol.messages import CloseDisk, DiskOpened, Frame, Message, OpenDisk, Positions, Refusal
from protocol.operator_messages import Rpo
from protocol.vocabulary import DiskId
from storage.frame_record import HEAD_DTYPE
from storage.object_names import SegmentName, parse
from storage.segment import TRAILER_BYTES, Trailer, parse_header, parse_trailer
from tests.simulation.clock import true_now_ns
from tests.simulation.control import LedgerPoint, RegisteredDisk, RegisteredProcessServer
from tests.simulation.stream import SentStream, name_fault

if TYPE_CHECKING:
    from tests.simulation.world import World

CLOCK_TOLERANCE_NS: Final = 2 * JUMP_TOLERANCE_NS
"""A clock that is set by less than the core calls a jump may make an instant wrong by that, each way."""
BEHIND_THE_CLOSING: Final = "7-nothing-behind-the-closing-segment"
SIGNATURE_DOMAIN: Final = b"farpoint segment signature 1\0"
"""SEGMENT_FORMAT.md, once more."""


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
        self.opened: set[tuple[DiskId, int]] = set()
        self.stored: dict[tuple[DiskId, int], StoredEpoch] = {}
        self._successors: dict[tuple[DiskId, int], int] = {}
        """By closed epoch: the one that its closing segment names."""
        self.stream = SentStream()
        self.drawn_by_process_servers: list[bytes] = []
        self._claimed_ns: dict[str, int] = {}
        """By point: content of this true instant was said to be recoverable from it."""
        self._doubtful: set[str] = set()
        """Points marked by a clock that had been set, which nobody could know (docs/decisions/0006)."""

    def new_connection(self) -> ConnectionView:
        return ConnectionView(self._world, self)

    def cache_was_lost(self, process_server: RegisteredProcessServer) -> None:
        """All that it ever acknowledged; one that is still under way to the agent, or follows soon, as well."""
        for disk, record in self._world.server.disks.items():
            self.lost.update(
                (disk, epoch)
                for epoch, signed in record.grants.items()
                if signed.grant.process_server == process_server.process_server and epoch <= self._newest_sent(disk)
            )

    def _may_be_lost(self, disk: DiskId, epoch: int) -> bool:
        """Whether the cache that held it was lost, or has latent errors: one in an early batch of a log file takes with
        it what is written behind it later."""
        owner = self._world.server.disks[disk].grants[epoch].grant.process_server
        host = next(one for one in self._world.process_servers if one.member.process_server == owner)
        return (disk, epoch) in self.lost or host.cache.has_latent_errors

    def _newest_sent(self, disk: DiskId) -> int:
        return max((epoch for sent_disk, epoch in self.opened if sent_disk == disk), default=0)

    def acknowledge(self, disk: DiskId, epoch: int, durable: int, committed: int) -> None:
        """The agent was told these positions."""
        key = (disk, epoch)
        if durable < self.acknowledged.get(key, 0) and not self._may_be_lost(disk, epoch):
            self._violate(
                "1-acknowledged-survives", f"epoch {epoch}: {durable} after {self.acknowledged[key]} was acknowledged"
            )
        self.acknowledged[key] = max(durable, self.acknowledged.get(key, 0))
        epoch_stored = self.stored.get(key, StoredEpoch())
        stored = epoch_stored.committed_sequence()
        if committed > stored:
            is_behind = epoch_stored.closing_ordinal is not None
            self._violate(
                BEHIND_THE_CLOSING if is_behind else "6-committed-is-stored",
                f"epoch {epoch}: {committed} stated, {stored} in the store",
            )
        self.committed[key] = max(committed, self.committed.get(key, 0))

    def epoch_continues(self, disk: DiskId, epoch: int, parent_epoch: int, parent_sequence: int) -> None:
        """A welcome said where an epoch continues its parent."""
        self.opened.add((disk, epoch))
        self.stream.continues(disk, epoch, (parent_epoch, parent_sequence))
        for key, acknowledged in self.acknowledged.items():
            is_before = key[0] == disk and parent_epoch <= key[1] < epoch
            if is_before and not self._may_be_lost(*key) and not self._has_moved(disk, key[1], epoch):
                survives = parent_sequence if key[1] == parent_epoch else 0
                if self._has_moved(disk, parent_epoch, epoch):
                    survives = self.stored.get(key, StoredEpoch()).committed_sequence()
                if survives < acknowledged:
                    self._violate(
                        "1-acknowledged-survives",
                        f"epoch {epoch} continues {parent_epoch}:{parent_sequence}, "
                        f"but {key[1]}:{acknowledged} was acknowledged",
                    )

    def _has_moved(self, disk: DiskId, one_epoch: int, other_epoch: int) -> bool:
        """Whether two epochs were granted to different process servers: the old one keeps what it has, the new one
        begins at what is committed."""
        grants = self._world.server.disks[disk].grants
        owners = {grants[epoch].grant.process_server for epoch in range(one_epoch, other_epoch + 1) if epoch in grants}
        return len(owners) > 1

    def object_created(self, name: str) -> None:
        """An object became visible in the store."""
        parsed = parse(name)
        if not isinstance(parsed, SegmentName):
            return
        data = self._world.store.objects[name]
        trailer = parse_trailer(data[-TRAILER_BYTES:], name=name, object_bytes=len(data))
        key = (parsed.disk, parsed.epoch)
        epoch = self.stored.setdefault(key, StoredEpoch())
        record = self._world.server.disks.get(parsed.disk)
        if record is None or parsed.epoch not in record.grants:
            self._violate("7-granted-epochs-only", f"{name} extends an epoch that was never granted")
            return
        self._check_grant(name, parsed, record, data, trailer)
        if trailer.is_closing:
            epoch.closing_ordinal = parsed.ordinal
            self._check_closing(key, epoch)
            return
        heads = numpy.frombuffer(data, dtype=HEAD_DTYPE, count=trailer.frame_count, offset=trailer.index_offset)
        sequences = heads["sequence"]
        epoch.segments[parsed.ordinal] = (int(sequences[0]), int(sequences[-1]))
        self._check_order(name, epoch, parsed.ordinal, sequences)

    def _check_grant(self, text: str, name: SegmentName, record: RegisteredDisk, data: bytes, trailer: Trailer) -> None:
        """A segment is its granted process server's, and stands behind the closing segment of its epoch's parent; a
        closing one is the successor's."""
        carried = parse_header(data[: trailer.header_bytes], name=text).opening.signed_grant
        held = next((one.grant for one in record.grants.values() if one.signed == carried), None)
        extended = None if held is None else held.parent_epoch if trailer.is_closing else held.epoch
        if held is None or extended != name.epoch or not is_signed(trailer, held.process_server_key):
            self._violate("7-granted-epochs-only", f"{text} is not by whom its epoch was granted to")
            return
        if trailer.is_closing:
            self._successors[name.disk, name.epoch] = held.epoch
        elif held.parent_epoch and self._successors.get((name.disk, held.parent_epoch)) != held.epoch:
            self._violate("7-closed-before-continued", f"{text}: epoch {held.parent_epoch} is not closed for it")

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
        epoch = self.stored.get((committed.disk, committed.epoch), StoredEpoch())
        stored = epoch.committed_sequence()
        if committed.sequence > stored:
            is_behind = epoch.closing_ordinal is not None
            self._violate(
                BEHIND_THE_CLOSING if is_behind else "11-stated-is-recoverable",
                f"point at {committed.epoch}:{committed.sequence} stated, {stored} in the store",
            )

    def point_marked(self, disk: DiskId, epoch: int, point: str) -> None:
        """An agent marks a point in its stream."""
        server = self._world.server
        heard_ns = server.heard_ns.get(server.disks[disk].grants[epoch].grant.process_server, 0)
        if server.clock.was_set_unheard(heard_ns, true_now_ns(self._world.loop)):
            self._doubtful.add(point)

    def rpo_shown(self, point: LedgerPoint, rpo: Rpo) -> None:
        """An operator is told that the newest point is so old."""
        if rpo.age_seconds is not None and point.committed.point not in self._doubtful:
            clock = self._world.server.clock
            now_ns, age_ns = true_now_ns(self._world.loop), round(rpo.age_seconds * 1e9)
            drift_ns = 0 if clock.was_right_until(now_ns) else age_ns * DRIFT_PER_MILLE_MAX // 1000
            instant_ns = now_ns - age_ns - drift_ns - clock.hidden_ns
            name = point.committed.point
            self._claimed_ns[name] = max(instant_ns, self._claimed_ns.get(name, 0))

    def recovered_point(self, point: LedgerPoint, image: bytes) -> None:
        """A recovered image: the source must have looked exactly so at an instant of the point's window."""
        committed = point.committed
        disk = self._world.disk_of(committed.disk)
        versions = disk.history.versions_of(image)
        what = f"{committed.epoch}:{committed.sequence}"
        marked_ns = self.stream.marked_ns[committed.point]
        round_began = disk.history.version_at(max(ns for ns in disk.round_begins_ns if ns <= marked_ns))
        if not any(version >= round_began for version in versions):
            reference = self.stream.image_at(
                committed.disk, committed.epoch, committed.sequence, size_bytes=disk.size_bytes
            )
            invariant = name_fault(image, reference, disk.history, round_began=round_began)
            self._violate(invariant, f"point {what} is version {versions}, its round began at version {round_began}")
            return
        oldest, newest = disk.history.version_at(committed.instant_ns), disk.history.version_at(marked_ns)
        # why: an instant of a clock that was set is compared with nothing but by the RPO, which knows of it
        is_true = self._world.server.clock.was_right_until(marked_ns)
        if is_true and not any(oldest <= version <= newest for version in versions):
            self._violate("11-instant-is-honest", f"point {what} is version {versions}, its window {oldest}..{newest}")
        claimed_ns = self._claimed_ns.get(committed.point, 0)
        if disk.history.version_at(claimed_ns - (0 if is_true else CLOCK_TOLERANCE_NS)) > max(versions):
            self._violate("11-rpo-is-honest", f"point {what} is version {versions} and was shown as newer")

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
            disk = self._disks[message.channel]
            if message.end is not None and message.end.bookmark is not None:
                self._invariants.point_marked(disk, message.epoch, message.end.bookmark.point)
            data = self._invariants.stream.sent(disk, message, body, now_ns=true_now_ns(self._world.loop))
            digest = blake3(data).digest(8)
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


def is_signed(trailer: Trailer, public_key: bytes) -> bool:
    """By itself, without the product's own check, which may be the one that is broken."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(
            trailer.signature, SIGNATURE_DOMAIN + trailer.trailer_hash
        )
    except InvalidSignature:
        return False
    return True
