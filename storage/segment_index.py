"""A segment's index as arrays, and the rules that it obeys, checked over all frames at once.

An index that `build_index` returned is sound: its frames are whole change sets without a gap, its tables are valid, no
nonce occurs twice under one key, and every entry can be parsed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from protocol.errors import InvalidValue
from protocol.vocabulary import (
    DISK_SIZE_BYTES_MAX,
    EXTENT_LENGTH_BYTES_MAX,
    FRAME_EXTENTS_MAX,
    FRAME_RAW_BYTES_MAX,
    SEQUENCE_MAX,
    ChangeKind,
    ChangeSetEnd,
    Compression,
    Consistency,
    DiskId,
    ExtentTable,
)
from storage.frame_record import (
    CONSISTENCIES,
    FLAG_BOOKMARK,
    FLAG_CURSOR,
    FLAG_LAST,
    FRAME_MAGIC,
    FRAME_RECORD_VERSION,
    HEAD_BYTES,
    SEALED_BYTES_MAX,
    TAG_BYTES,
    FrameEntry,
    parse_head,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SegmentIndex:
    """Every frame of a segment, as arrays; a frame's number is its place in them.

    heads: HEAD_DTYPE rows. extents: all extent tables, one behind the other. The extents of frame n are
    extents[extent_starts[n]:extent_starts[n + 1]], its record the object's bytes [offsets[n], offsets[n + 1]).
    """

    heads: NDArray[numpy.void]
    extents: ExtentTable
    extent_starts: NDArray[numpy.int64]
    offsets: NDArray[numpy.int64]

    def __len__(self) -> int:
        return len(self.heads)

    def entry(self, number: int) -> FrameEntry:
        """The frame with that number in the segment."""
        head_bytes = self.heads[number : number + 1].tobytes()
        extents = self.extents[self.extent_starts[number] : self.extent_starts[number + 1]]
        return FrameEntry(head=parse_head(head_bytes), extents=extents, head_bytes=head_bytes)

    def frames_through(self, sequence: int) -> int:
        """How many frames, from the first, belong to change sets up to and including `sequence`."""
        return int(numpy.searchsorted(self.heads["sequence"], numpy.uint64(sequence), side="right"))

    def ends(self) -> list[tuple[int, ChangeSetEnd]]:
        """(sequence, what its last frame states) of every change set, in order."""
        return self._ends(self.heads["flags"] & FLAG_LAST != 0)

    def bookmarked_ends(self) -> list[tuple[int, ChangeSetEnd]]:
        """Those of the change sets that carry a bookmark."""
        return self._ends(self.heads["flags"] & FLAG_BOOKMARK != 0)

    def end_of(self, sequence: int) -> ChangeSetEnd | None:
        """What the change set `sequence`, which must be in this segment, stated."""
        return self.entry(self.frames_through(sequence) - 1).head.end

    def newest_cursor_bytes(self) -> int | None:
        """The last copy-in cursor that was stated in this segment, None if none was."""
        stated = self.heads["cursor_bytes"][self.heads["flags"] & FLAG_CURSOR != 0]
        return int(stated[-1]) if len(stated) else None

    def _ends(self, chosen: NDArray[numpy.bool_]) -> list[tuple[int, ChangeSetEnd]]:
        rows = self.heads[chosen].tobytes()
        heads = (parse_head(rows[start : start + HEAD_BYTES]) for start in range(0, len(rows), HEAD_BYTES))
        return [(head.sequence, head.end) for head in heads if head.end is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexRules:
    """What a segment's header and grant say about its frames."""

    disk: DiskId
    epoch: int
    first_sequence: int
    key_count: int
    disk_size_bytes: int = DISK_SIZE_BYTES_MAX


def build_index(
    heads: NDArray[numpy.void], extents: ExtentTable, *, header_bytes: int, rules: IndexRules
) -> SegmentIndex:
    """Raises InvalidValue, naming the rule that was broken."""
    _require(int(heads["extent_count"].sum(dtype=numpy.uint64)) == len(extents), "the extent counts must add up")
    record_bytes = HEAD_BYTES + heads["extent_count"].astype(numpy.int64) * extents.itemsize
    record_bytes += heads["sealed_bytes"]
    index = SegmentIndex(
        heads=heads,
        extents=extents,
        extent_starts=_starts(heads["extent_count"].astype(numpy.int64), first=0),
        offsets=_starts(record_bytes, first=header_bytes),
    )
    if len(heads):
        _check_heads(heads, rules)
        _check_ends(heads)
        _check_order(heads, rules)
        _check_extents(index, rules)
    return index


def _starts(lengths: NDArray[numpy.int64], *, first: int) -> NDArray[numpy.int64]:
    starts = numpy.empty(len(lengths) + 1, dtype=numpy.int64)
    starts[0] = first
    numpy.cumsum(lengths, out=starts[1:])
    starts[1:] += first
    return starts


def _check_heads(heads: NDArray[numpy.void], rules: IndexRules) -> None:
    raw_bytes, sealed_bytes, compression = heads["raw_bytes"], heads["sealed_bytes"], heads["compression"]
    _require((heads["magic"] == FRAME_MAGIC).all(), "every head must have its magic")
    _require((heads["version"] == FRAME_RECORD_VERSION).all(), "every head must be of a known version")
    _require(not heads["reserved"].any(), "reserved bytes must be zero")
    _require(int(compression.max()) <= max(Compression), "the compression must be known")
    _require(int(heads["extent_count"].max()) <= FRAME_EXTENTS_MAX, "no frame may have too many extents")
    _require(int(raw_bytes.max()) <= FRAME_RAW_BYTES_MAX, "no frame may be too large")
    _require(int(sealed_bytes.min()) >= TAG_BYTES, "every frame must have a tag")
    _require(int(sealed_bytes.max()) <= SEALED_BYTES_MAX, "no sealed frame may be too large")
    is_plain = compression == Compression.NONE
    _require((sealed_bytes == raw_bytes + TAG_BYTES)[is_plain].all(), "uncompressed frames must have their raw length")
    _require((raw_bytes > 0)[~is_plain].all(), "a frame without data must be uncompressed")
    _require(heads["disk"].tobytes() == bytes.fromhex(rules.disk) * len(heads), "every frame must be of the disk")
    _require((heads["epoch"] == rules.epoch).all(), "every frame must be of the epoch")
    _require(int(heads["key_number"].max()) < rules.key_count, "every frame's key must be in the header")
    nonces = heads["key_number"].astype(numpy.uint64) << numpy.uint64(32) | heads["nonce_number"]
    _require(len(numpy.unique(nonces)) == len(heads), "no nonce may occur twice under one key")


def _check_ends(heads: NDArray[numpy.void]) -> None:
    flags, consistency = heads["flags"], heads["consistency"]
    has_cursor, has_bookmark = flags & FLAG_CURSOR != 0, flags & FLAG_BOOKMARK != 0
    _require(not (flags & ~numpy.uint8(FLAG_LAST | FLAG_CURSOR | FLAG_BOOKMARK)).any(), "flags must be known")
    _require(int(consistency.max()) < len(CONSISTENCIES), "the consistency must be known")
    is_inner = flags & FLAG_LAST == 0
    _require(not (flags[is_inner].any() or consistency[is_inner].any()), "only a last frame states a change set's end")
    unsettled = CONSISTENCIES.index(Consistency.UNSETTLED)
    _require((consistency[has_cursor] == unsettled).all(), "a position with a copy-in pending must be unsettled")
    _require((consistency[has_bookmark] != unsettled).all(), "a bookmarked position must be settled")
    _require(not heads["cursor_bytes"][~has_cursor].any(), "an absent cursor must be zero")
    _require(int(heads["cursor_bytes"].max()) <= DISK_SIZE_BYTES_MAX, "a cursor must lie on the disk")
    _require(not heads["instant_ns"][~has_bookmark].any(), "an absent instant must be zero")
    _require(int(heads["instant_ns"].max()) < 2**63, "an instant must be in range")
    _require(not any(heads["point"][~has_bookmark].tobytes()), "an absent point must be zero")


def _check_order(heads: NDArray[numpy.void], rules: IndexRules) -> None:
    _require(int(heads["sequence"].max()) <= SEQUENCE_MAX, "sequences must be in range")
    sequences = heads["sequence"].astype(numpy.int64)
    numbers = heads["frame_number"].astype(numpy.int64)
    is_last = heads["flags"] & FLAG_LAST != 0
    _require(
        int(sequences[0]) == rules.first_sequence and not numbers[0], "the first frame must begin the first change set"
    )
    _require(bool(is_last[-1]), "the last frame must end its change set")
    steps = is_last[:-1].astype(numpy.int64)
    _require((sequences[1:] - sequences[:-1] == steps).all(), "sequences must follow each other")
    expected = numpy.where(is_last[:-1], 0, numbers[:-1] + 1)
    _require((numbers[1:] == expected).all(), "frame numbers must follow each other")


def _check_extents(index: SegmentIndex, rules: IndexRules) -> None:
    extents, starts = index.extents, index.extent_starts
    offsets, lengths, kinds = extents["offset"], extents["length"].astype(numpy.uint64), extents["kind"]
    data_ends = numpy.zeros(len(extents) + 1, dtype=numpy.int64)
    numpy.cumsum(numpy.where(kinds == ChangeKind.DATA, lengths, 0), out=data_ends[1:])
    sums = data_ends[starts[1:]] - data_ends[starts[:-1]]
    _require((sums == index.heads["raw_bytes"]).all(), "every frame's data extents must add up to its raw bytes")
    if not len(extents):
        return
    _require(int(kinds.max()) <= max(ChangeKind) and not extents["reserved"].any(), "extent kinds must be known")
    _require(
        int(lengths.min()) >= 1 and int(lengths.max()) <= EXTENT_LENGTH_BYTES_MAX, "extent lengths must be in range"
    )
    _require(int(offsets.max()) <= rules.disk_size_bytes, "extents must lie on the disk")
    ends = offsets + lengths
    _require(int(ends.max()) <= rules.disk_size_bytes, "extents must lie on the disk")
    follows = offsets[1:] >= ends[:-1]
    inner_starts = starts[1:-1]
    follows[inner_starts[(inner_starts > 0) & (inner_starts < len(extents))] - 1] = True
    _require(follows.all(), "the extents of a frame must be sorted and must not overlap")


def _require(is_kept: bool | numpy.bool_, rule: str) -> None:
    if not is_kept:
        raise InvalidValue(what="index", value="…", rule=rule)
