"""The maps of one disk that the tracing programs follow, as the agent shares them with the kernel.

- A block that was marked is in a map in use, in a retired map, or pending, until the agent takes it out of what is
  pending; never in none of them, whoever is killed when. Everything is pinned.
- Completions are marked by block, submissions and discards by area. What is retired goes into `pending` (or, if marked
  at submission, into `unaudited`) before it is cleared.
- Only the kernel writes to a map in use, and only the agent to the others. One that is free has no mark, but for those
  that an agent left there that ended while it retired it.
"""

from __future__ import annotations

import enum
import mmap
import os
import struct
import time
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

import numpy

from mobility_agent.core.resync_cause import NAME_BYTES_MAX, ResyncCause
from mobility_agent.core.write_audit import AuditBase, AuditReading
from mobility_agent.tracking import bpf_calls
from mobility_agent.tracking.abilities import block_device_directory
from mobility_agent.tracking.block_bits import (
    Bits,
    BlockLayout,
    bits_like,
    join_areas,
    join_bits,
    join_within,
    leave_areas,
    marked_words,
)

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
    """The kinds of maps in use; the number is the programs' own."""

    COMPLETION = 0
    """By block; the other two by area."""
    SUBMISSION = 1
    DISCARDED = 2
    """Areas that were discarded as a whole, at submission and at completion, and nothing else; the other two hold none
    of that."""


SWAP_ORDER: Final = (Marks.COMPLETION, Marks.DISCARDED, Marks.SUBMISSION)
"""A generation ends when the map of submissions is swapped. What completed or was discarded before was submitted
before; a discard that is submitted in between belongs to the next round, to which it matters that it was one."""


MapsInUse = dict[Marks, str]
"""By name."""


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
    """As the programs know of it."""

    bio: int
    """What tells it from others, with its disk and generation."""
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
    area_bytes: int
    slot: int
    completed_ahead: int = 0
    submitted_ahead: int = 0
    missed_submissions: int = 0
    pass_through: int = 0
    beyond_end: int = 0
    never_completed: int = 0
    untracked: int = 0
    is_unsettled: int = 1
    """What is unaudited may have been read too early: it is read again."""
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
_FACTS_MAGIC: Final = b"FPTRACK5"


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
        self.areas = BlockLayout(size_bytes=facts.size_bytes, block_bytes=facts.area_bytes)
        self._programs = programs
        self._maps: dict[str, _SharedMap] = {}
        self._forgiven: frozenset[ChangeInFlight] = frozenset()
        self._is_settled = False
        self.unread: Bits
        """After swap(): the pending areas of which all that is known is that they were discarded."""
        try:
            for name, layout in _map_layouts(self.layout, self.areas).items():
                chunks = -(-layout.windows * layout.window_blocks // CHUNK_BLOCKS) + 1
                self._maps[name] = _SharedMap(directory / name, chunks=chunks, is_new=is_new)
            self._maps["facts"] = _SharedMap(directory / "facts", chunks=1, is_new=is_new)
            self.unread = bits_like(self.unaudited)
            if is_new:
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
        """Areas. What was submitted or discarded in the generation that ended last, and if not all was well then in
        those before it as well, back to when it was."""
        return self._maps["unaudited"].bits

    @property
    def blocks_per_area(self) -> int:
        return self.areas.block_bytes // self.layout.block_bytes

    def in_use(self, kind: Marks) -> Bits:
        """For looking only."""
        return self._in_use(kind).bits

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

    def all_maps(self) -> list[tuple[BlockLayout, Bits]]:
        """What is marked in none of them is in the ledger, and was not read too early."""
        layouts = _map_layouts(self.layout, self.areas)
        if not self.facts.is_unsettled:
            del layouts["unaudited"]
        return [(layout, self._maps[name].bits) for name, layout in layouts.items()]

    def all_marks(self) -> bytes:
        """All blocks that were marked and are not in the ledger yet, or may have been read too early."""
        found = bits_like(self.pending)
        for layout, bits in self.all_maps():
            join_areas(found, bits, layout.block_bytes // self.layout.block_bytes)
        self.layout.cut(found)
        return found.tobytes()

    def unplaced_changes(self, now: Counters) -> ResyncCause | None:
        """Whether something changed since it was last asked that nobody knows the place of."""
        if now.pass_through > self.facts.pass_through:
            return ResyncCause.COMMAND_PAST_BLOCK_LAYER
        return ResyncCause.WRITE_BEHIND_END if now.beyond_end > self.facts.beyond_end else None

    def maps_in_use(self, marks_in_use: int | None = None) -> MapsInUse:
        """Where the programs mark, or those that this map of theirs is of; empty if they do not follow the disk."""
        found: MapsInUse = {}
        for kind in Marks:
            value = bpf_calls.lookup(marks_in_use or self._programs.marks_in_use, self._place(kind), value_bytes=4)
            identifier = None if value is None else struct.unpack("<I", value)[0]
            for name, shared in self._maps.items():
                if shared.identifier == identifier:
                    found[kind] = name
        return found

    def put_in_use(self, before: MapsInUse | None = None) -> None:
        """Lets the programs mark where they mark already; else where others do; else in the first maps."""
        used = (before or {}) | self.maps_in_use()
        for kind in Marks:
            name = used.setdefault(kind, self._free(kind, used.values()))
            self._use(kind, self._maps[name])

    def adopt_retired(self) -> None:
        """Takes up what a predecessor may have retired and not yet put into what is pending."""
        used = self.maps_in_use().values()
        for name, layout in _map_layouts(self.layout, self.areas).items():
            if name not in used and name not in ("pending", "unaudited"):
                bits = self._maps[name].bits
                # why: of which kind it was is not known: the worse is taken for what it was
                join_areas(self.pending, bits, layout.block_bytes // self.layout.block_bytes)
                if layout == self.areas:
                    join_bits(self.unaudited, bits)
                _clear(bits)
        self.layout.cut(self.pending)

    def swap(self) -> int:
        """Puts other maps into use; all that completed up to now is pending on return, and all that was discarded.
        Returns the parity of the generation that ended: its changes may still be in flight."""
        discarded, ended = bits_like(self.unaudited), 0
        for kind in SWAP_ORDER:
            retired, free = self._in_use(kind), self._maps[self._free(kind, self.maps_in_use().values())]
            if kind is Marks.SUBMISSION:
                free.parity = 1 - retired.parity
            self._use(kind, free)
            if kind is Marks.COMPLETION:
                join_bits(self.pending, retired.bits)
            elif kind is Marks.DISCARDED:
                join_bits(discarded, retired.bits)
                self._take_discarded(discarded)
            else:
                ended = retired.parity
                self._end_generation(retired.bits, discarded)
            _clear(retired.bits)
        return ended

    def take_late(self) -> None:
        """Once the generation that ended is quiet: what of it completed only after the swap is pending too."""
        join_within(self.pending, self.in_use(Marks.COMPLETION), self.unaudited, self.blocks_per_area)

    def read_again(self) -> None:
        """What is unaudited is pending again."""
        self._make_pending(self.unaudited)

    def suspect_generation(self) -> None:
        """What was submitted or discarded in the generation in use is unaudited, too."""
        for kind in (Marks.SUBMISSION, Marks.DISCARDED):
            join_bits(self.unaudited, self.in_use(kind))

    def settle(self) -> None:
        """All that was submitted up to the last swap was read after it had completed."""
        self.facts.is_unsettled = 0
        self._is_settled = True

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
        return self.wait_until_quiet(1 - self._in_use(Marks.SUBMISSION).parity, seconds_max=seconds_max)

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

    def read_audit(self, *, is_base: bool = False) -> AuditReading:
        """The kernel's count first, the programs' second. For a base the other way round: what completes in between may
        hide a miss until the next base, and is never told as one."""
        before = self._kernel_sectors()
        counters = self.counters()
        return AuditReading(
            kernel_sectors=self._kernel_sectors() if is_base else before,
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

    def _in_use(self, kind: Marks) -> _SharedMap:
        return self._maps[self.maps_in_use()[kind]]

    def _free(self, kind: Marks, used: Collection[str]) -> str:
        """The first map for such marks that is not used."""
        wanted = self.layout if kind is Marks.COMPLETION else self.areas
        layouts = _map_layouts(self.layout, self.areas)
        return next(name for name, one in layouts.items() if one == wanted and name[-1].isdigit() and name not in used)

    def _use(self, kind: Marks, shared: _SharedMap) -> None:
        bpf_calls.update(self._programs.marks_in_use, self._place(kind), struct.pack("<I", shared.descriptor))

    def _make_pending(self, areas: Bits) -> None:
        join_areas(self.pending, areas, self.blocks_per_area)
        self.layout.cut(self.pending)

    def _take_discarded(self, discarded: Bits) -> None:
        """Makes pending what was discarded in the generation that is about to end, and keeps in `unread` where nothing
        else was pending, nor written in the generation before. What this one wrote is not known yet."""
        # why: a write that was under way at the same time as a discard may lie in this generation or the one before.
        # What was written earlier had completed before the discard was submitted.
        self.unread = bits_like(discarded)
        join_bits(self.unread, discarded)
        _leave(self.unread, self.unaudited)
        leave_areas(self.unread, self.pending, self.blocks_per_area)
        self._make_pending(discarded)
        join_bits(self.unaudited, discarded)

    def _end_generation(self, submitted: Bits, discarded: Bits) -> None:
        """What it submitted is unaudited; and no more what was before it, if that is known to be well."""
        _leave(self.unread, submitted)
        if self._is_settled:
            self.unaudited[:] = submitted
            join_bits(self.unaudited, discarded)
        else:
            join_bits(self.unaudited, submitted)
        self._is_settled = False

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
    def parity(self) -> int:
        """Of the generation whose submissions are marked in it, as the programs read it."""
        assert self._bytes is not None
        return int(self._bytes[0]) & 1

    @parity.setter
    def parity(self, parity: int) -> None:
        assert self._bytes is not None
        self._bytes[0] = parity

    def close(self) -> None:
        # why: the mapping itself goes with the last array that looks into it; a round may still hold one.
        self._bytes = None
        os.close(self.descriptor)


def _leave(bits: Bits, others: Bits) -> None:
    """Takes out of `bits` what is marked in `others`."""
    marked = marked_words(bits)
    bits.view("<u8")[marked] &= ~others.view("<u8")[marked]


def _clear(bits: Bits) -> None:
    bits.view("<u8")[marked_words(bits)] = 0


def _map_layouts(blocks: BlockLayout, areas: BlockLayout) -> dict[str, BlockLayout]:
    """What is marked in each map. Those with a number take turns at being marked in: one of each layout is free."""
    by_area = ("areas_0", "areas_1", "areas_2")
    by_block = ("blocks_0",) if areas == blocks else ("blocks_0", "blocks_1")
    return dict.fromkeys((*by_block, "pending"), blocks) | dict.fromkeys((*by_area, "unaudited"), areas)


def possible_processors() -> int:
    """As many values a map per processor has."""
    last = Path("/sys/devices/system/cpu/possible").read_text(encoding="ascii").strip().split(",")[-1]
    return int(last.split("-")[-1]) + 1
