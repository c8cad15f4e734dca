"""The maps of one disk that the tracing programs follow, as the agent shares them with the kernel.

- A block that was marked is in a map in use, in a retired map, or pending, until the agent takes it out of what is
  pending; never in none of them, whoever is killed when. Everything is pinned.
- What is retired goes into `pending` (and, if marked at submission, into `unaudited`) before it is cleared.
- Only the kernel writes to a map in use, and only the agent to the others.
"""

from __future__ import annotations

import enum
import mmap
import os
import struct
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

import numpy

from mobility_agent.core.resync_cause import NAME_BYTES_MAX, ResyncCause
from mobility_agent.core.write_audit import AuditBase, AuditReading
from mobility_agent.tracking import bpf_calls
from mobility_agent.tracking.abilities import block_device_directory
from mobility_agent.tracking.block_bits import Bits, BlockLayout, bits_like, join_bits, marked_words

CHUNK_BYTES: Final = 4096
CHUNK_BLOCKS: Final = 8 * CHUNK_BYTES
QUIET_POLL_SECONDS: Final = 0.001
_COUNTERS: Final = struct.Struct("<14Q")
_BUCKETS: Final = 8192
_CHANGE: Final = numpy.dtype([("sector", "<u8"), ("bytes", "<u4"), ("flight", "<u4")])
_BUCKET: Final = numpy.dtype([("bios", "<u8", 8), ("changes", _CHANGE, 8)])
_SECTORS_WRITTEN: Final = 6
_SECTORS_DISCARDED: Final = 13
"""Fields of /sys/block/X/stat."""


class Marks(enum.IntEnum):
    """The kinds of maps in use, in the order in which they are swapped; the number is the programs' own."""

    COMPLETION = 0
    SUBMISSION = 1
    DISCARDED = 2
    """What was discarded, at submission and at completion, and nothing else; the other two hold no discards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """What the programs counted, in the order of their structure."""

    submitted_sectors: int
    completed_sectors: int
    begun_even: int
    begun_odd: int
    ended_even: int
    ended_odd: int
    pass_through: int
    beyond_end: int
    untracked: int
    foreign: int
    never_completed: int
    failed: int
    discards: int
    zeroings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeInFlight:
    """As the programs know of it; `bio` is where the kernel has it in memory."""

    bio: int
    sector: int
    bytes: int
    flight: int
    """Twice the disk's slot, and the parity of its generation."""


@dataclass(slots=True, kw_only=True)
class Facts:
    """What outlives the agent about one followed disk; integers, but for the last."""

    device: int
    disk_sequence: int
    size_bytes: int
    block_bytes: int
    slot: int
    completed_ahead: int = 0
    submitted_ahead: int = 0
    missed_submissions: int = 0
    pass_through: int = 0
    beyond_end: int = 0
    never_completed: int = 0
    is_unsettled: int = 1
    """What was marked at submission since the last clean audit may have been read too early: it is read again."""
    resync_cause: str = ""
    """Why track of the disk was lost, until a new epoch was entered for it: everything is pending meanwhile."""

    @property
    def audit_base(self) -> AuditBase:
        return AuditBase(
            completed_ahead=self.completed_ahead,
            submitted_ahead=self.submitted_ahead,
            missed_submissions=self.missed_submissions,
        )

    @audit_base.setter
    def audit_base(self, base: AuditBase) -> None:
        self.completed_ahead = base.completed_ahead
        self.submitted_ahead = base.submitted_ahead
        self.missed_submissions = base.missed_submissions


_FACTS: Final = struct.Struct(f"<8s{len(fields(Facts)) - 1}q{NAME_BYTES_MAX}s")
_FACTS_MAGIC: Final = b"FPTRACK4"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramMaps:
    """Descriptors of what all followed disks share."""

    marks_in_use: int
    in_flight: int
    disk_counters: int
    submission_program: int


class FollowedDisk:
    """Calls block shortly; one thread at a time. Errors: OSError."""

    def __init__(self, directory: Path, programs: ProgramMaps, facts: Facts, *, is_new: bool) -> None:
        """directory: where its maps are pinned; is_new: they are made there."""
        self.facts = facts
        self.layout = BlockLayout(size_bytes=facts.size_bytes, block_bytes=facts.block_bytes)
        self._programs = programs
        self._maps: dict[str, _SharedMap] = {}
        self._forgiven: frozenset[ChangeInFlight] = frozenset()
        self._written_last: Bits | None = None
        """What was written in the generation before the one in use; None: perhaps everything."""
        self.unread: Bits
        """After swap(): the pending blocks of which all that is known is that they were discarded."""
        chunks = -(-self.layout.windows * self.layout.window_blocks // CHUNK_BLOCKS) + 1
        names = [_name(kind, parity) for kind in Marks for parity in (0, 1)] + ["pending", "unaudited"]
        try:
            for name in names:
                self._maps[name] = _SharedMap(directory / name, chunks=chunks, is_new=is_new)
            self._maps["facts"] = _SharedMap(directory / "facts", chunks=1, is_new=is_new)
            self.unread = bits_like(self.pending)
            if is_new:
                self._maps[_name(Marks.SUBMISSION, 1)].header[0] = 1
                self.write_facts()
        except BaseException:
            self.close()
            raise

    @staticmethod
    def read_facts(directory: Path) -> Facts | None:
        """None when the maps there are no disk's, or of another version."""
        try:
            shared = _SharedMap(directory / "facts", chunks=1, is_new=False)
        except (OSError, ValueError):
            return None
        try:
            magic, *values, cause = _FACTS.unpack_from(shared.memory)
        finally:
            shared.close()
        if magic != _FACTS_MAGIC:
            return None
        values.append(cause.rstrip(b"\0").decode("ascii"))
        return Facts(**dict(zip((field.name for field in fields(Facts)), values, strict=True)))

    @property
    def pending(self) -> Bits:
        """Marked, and not yet in the ledger."""
        return self._maps["pending"].bits

    @property
    def unaudited(self) -> Bits:
        """Marked at submission by the retired generations since all was last known to be well."""
        return self._maps["unaudited"].bits

    def in_use(self, kind: Marks) -> Bits:
        """For looking only."""
        return self._maps[_name(kind, self._parity_in_use(kind))].bits

    def write_facts(self) -> None:
        *values, cause = (getattr(self.facts, field.name) for field in fields(Facts))
        _FACTS.pack_into(self._maps["facts"].memory, 0, _FACTS_MAGIC, *values, cause.encode("ascii"))

    def lose(self, cause: ResyncCause) -> None:
        """Track of the disk is lost: everything is pending, and the cause is kept until a new epoch is entered."""
        # why: marked before the cause is kept: whoever is killed in between has nothing that is not pending
        self.layout.mark_all(self.pending)
        self.facts.resync_cause = cause
        self.write_facts()

    def take_up(self, marks: bytes) -> None:
        """Tracking goes on from these marks, which all_marks() of such a disk gave when it ended."""
        # why: whoever is killed in between has everything pending, and no cause to compare it in a new epoch
        self.facts.resync_cause = ""
        self.write_facts()
        self.pending[:] = numpy.frombuffer(marks, numpy.uint8)

    def all_maps(self) -> list[Bits]:
        """What is marked in none of them is in the ledger, and was not read too early."""
        in_use_or_retired = (self._maps[_name(kind, parity)].bits for kind in Marks for parity in (0, 1))
        return [self.pending, self.unaudited, *in_use_or_retired]

    def all_marks(self) -> bytes:
        """All that was marked and is not in the ledger yet, or may have been read too early."""
        found = bits_like(self.pending)
        for bits in self.all_maps():
            join_bits(found, bits)
        return found.tobytes()

    def unplaced_changes(self, now: Counters) -> ResyncCause | None:
        """Whether something changed since it was last asked that nobody knows the place of."""
        if now.pass_through > self.facts.pass_through:
            return ResyncCause.COMMAND_PAST_BLOCK_LAYER
        return ResyncCause.WRITE_BEHIND_END if now.beyond_end > self.facts.beyond_end else None

    def put_in_use(self) -> None:
        """The maps that were in use before, or the first ones, for programs that know nothing of them yet."""
        for kind in Marks:
            self._use(kind, self._parity_in_use(kind))

    def adopt_retired(self) -> None:
        """Takes up what a predecessor may have retired and not yet put into what is pending."""
        for kind in Marks:
            self._retire(kind, 1 - self._parity_in_use(kind))

    def swap(self) -> int:
        """Puts the other maps into use; all that was marked up to now is pending on return. Returns the parity of the
        generation that ended: its changes may still be in flight."""
        ended = self._parity_in_use(Marks.SUBMISSION)
        written = bits_like(self.pending)
        for kind in Marks:
            parity = self._parity_in_use(kind)
            self._use(kind, 1 - parity)
            if kind is Marks.DISCARDED:
                self.unread = self._only_discarded(self._maps[_name(kind, parity)].bits)
            else:
                join_bits(written, self._maps[_name(kind, parity)].bits)
            self._retire(kind, parity)
        self._written_last = written
        return ended

    def is_quiet(self, parity: int) -> bool:
        """Whether every change of the generations of this parity, none of which is in use, has completed."""
        # why: the ends are counted first: what begins meanwhile is a part of a change that has not ended.
        ended, begun = self.counters(), self.counters()
        left = begun.begun_odd - ended.ended_odd if parity else begun.begun_even - ended.ended_even
        if left and self._forgiven:
            self._forgiven &= self._all_in_flight()
            left -= sum(change.flight % 2 == parity for change in self._forgiven)
        return left == 0

    def wait_until_quiet(self, parity: int, *, seconds_max: float) -> bool:
        """Whether it became so in time."""
        deadline = time.monotonic() + seconds_max
        while not self.is_quiet(parity):
            if time.monotonic() >= deadline:
                return False
            time.sleep(QUIET_POLL_SECONDS)
        return True

    def wait_for_older(self, *, seconds_max: float) -> bool:
        """Before swap(): whether all generations before the one in use became quiet in time. After it, what of them is
        still in flight cannot be told from the changes of the generation that begins: they share its parity."""
        return self.wait_until_quiet(1 - self._parity_in_use(Marks.SUBMISSION), seconds_max=seconds_max)

    def changes_in_flight(self) -> frozenset[ChangeInFlight]:
        """As of about now, but for those that were forgiven."""
        return self._all_in_flight() - self._forgiven

    def forgive(self, change: ChangeInFlight) -> None:
        """It has ended without being seen: nobody waits for it any more."""
        self._forgiven |= {change}

    def _all_in_flight(self) -> frozenset[ChangeInFlight]:
        with mmap.mmap(
            self._programs.in_flight, _BUCKETS * _BUCKET.itemsize, mmap.MAP_SHARED, mmap.PROT_READ
        ) as memory:
            buckets = numpy.frombuffer(memory, _BUCKET).copy()
        bios, changes = buckets["bios"].reshape(-1), buckets["changes"].reshape(-1)
        at = numpy.flatnonzero((bios != 0) & (changes["flight"] >> 1 == self.facts.slot))
        found = zip(bios[at].tolist(), changes[at].tolist(), strict=True)
        return frozenset(ChangeInFlight(bio=bio, sector=one[0], bytes=one[1], flight=one[2]) for bio, one in found)

    def counters(self) -> Counters:
        key = struct.pack("<I", self.facts.slot)
        width = _COUNTERS.size
        value = bpf_calls.lookup(self._programs.disk_counters, key, value_bytes=width * possible_processors()) or b""
        sums = numpy.frombuffer(value, "<u8").reshape(-1, width // 8).sum(axis=0)
        return Counters(**{field.name: int(sums[index]) for index, field in enumerate(fields(Counters))})

    def read_audit(self) -> AuditReading:
        """The kernel's count first, the programs' second."""
        kernel_sectors = self._kernel_sectors()
        counters = self.counters()
        return AuditReading(
            kernel_sectors=kernel_sectors,
            completed_sectors=counters.completed_sectors,
            submitted_sectors=counters.submitted_sectors,
            missed_submissions=bpf_calls.recursion_misses(self._programs.submission_program),
        )

    def kernel_in_flight(self) -> int:
        """Writes under way, as the kernel counts them."""
        return int((self._sysfs / "inflight").read_text(encoding="ascii").split()[1])

    def close(self) -> None:
        maps, self._maps = self._maps, {}
        for shared in maps.values():
            shared.close()

    @property
    def _sysfs(self) -> Path:
        return block_device_directory(self.facts.device)

    def _kernel_sectors(self) -> int:
        found = (self._sysfs / "stat").read_text(encoding="ascii").split()
        return int(found[_SECTORS_WRITTEN]) + int(found[_SECTORS_DISCARDED])

    def _parity_in_use(self, kind: Marks) -> int:
        value = bpf_calls.lookup(self._programs.marks_in_use, self._place(kind), value_bytes=4)
        if value is None:
            return 0
        return int(struct.unpack("<I", value)[0] == self._maps[_name(kind, 1)].identifier)

    def _use(self, kind: Marks, parity: int) -> None:
        descriptor = self._maps[_name(kind, parity)].descriptor
        bpf_calls.update(self._programs.marks_in_use, self._place(kind), struct.pack("<I", descriptor))

    def _only_discarded(self, discarded: Bits) -> Bits:
        """Of what was discarded in the generation that ended, whose other marks are pending: what was neither pending
        nor written in it or the one before.

        A write that was under way at the same time as the discard may lie in that one. What was written earlier had
        completed before the discard was submitted.
        """
        found = bits_like(discarded)
        if self._written_last is not None:
            marked = marked_words(discarded)
            others = self.pending, self.unaudited, self._written_last
            left = discarded.view("<u8")[marked]
            for other in others:
                left &= ~other.view("<u8")[marked]
            found.view("<u8")[marked] = left
        return found

    def _retire(self, kind: Marks, parity: int) -> None:
        bits = self._maps[_name(kind, parity)].bits
        join_bits(self.pending, bits)
        if kind is not Marks.COMPLETION:
            join_bits(self.unaudited, bits)
        bits.view("<u8")[marked_words(bits)] = 0

    def _place(self, kind: Marks) -> bytes:
        return struct.pack("<I", len(Marks) * self.facts.slot + kind)


class _SharedMap:
    """A pinned map in this process's memory; chunk 0 is its header."""

    def __init__(self, path: Path, *, chunks: int, is_new: bool) -> None:
        size = chunks * CHUNK_BYTES
        if is_new:
            self.descriptor = bpf_calls.create_map(
                bpf_calls.MapKind.ARRAY,
                name="farpoint",
                key_bytes=4,
                value_bytes=CHUNK_BYTES,
                entries=chunks,
                flags=bpf_calls.MAP_MMAPABLE | bpf_calls.MAP_INNER,
            )
        else:
            self.descriptor = bpf_calls.get_pinned(str(path))
        try:
            if is_new:
                bpf_calls.pin(self.descriptor, str(path))
            self.identifier = bpf_calls.map_identifier(self.descriptor)
            self.memory = mmap.mmap(self.descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except BaseException:
            os.close(self.descriptor)
            raise
        self._bytes: Bits | None = numpy.frombuffer(self.memory, numpy.uint8)

    @property
    def bits(self) -> Bits:
        assert self._bytes is not None
        return self._bytes[CHUNK_BYTES:]

    @property
    def header(self) -> Bits:
        assert self._bytes is not None
        return self._bytes[:CHUNK_BYTES]

    def close(self) -> None:
        # why: the mapping itself goes with the last array that looks into it; a round may still hold one.
        self._bytes = None
        os.close(self.descriptor)


def _name(kind: Marks, parity: int) -> str:
    return f"{kind.name.lower()}_{parity}"


def possible_processors() -> int:
    """As many values a map per processor has."""
    last = Path("/sys/devices/system/cpu/possible").read_text(encoding="ascii").strip().split(",")[-1]
    return int(last.split("-")[-1]) + 1
