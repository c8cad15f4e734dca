"""A segment is what the granted process server signed, in its place, or it is refused by name."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from typing import Any

import numpy
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.errors import InvalidValue, MalformedInput
from protocol.signed_records import sign_grant
from protocol.vocabulary import EXTENT_DTYPE
from storage.errors import FormatNotSupported, ObjectCorrupt, VaultFault
from storage.frame_record import HEAD_BYTES, HEAD_DTYPE, FrameEntry, encode_head, parse_frame_record, parse_head
from storage.object_names import SegmentName
from storage.segment import (
    NO_TRAILER_HASH,
    TRAILER_BYTES,
    SegmentHeader,
    SegmentOpening,
    VerifiedSegment,
    closing_segment,
    encode_opening,
    finish_segment,
    parse_opening,
    parse_trailer,
    verify_segment,
)
from storage.segment_index import IndexRules, build_index
from tests.storage.segment_writer import (
    DISK,
    DISK_SIZE_BYTES,
    OTHER_DISK,
    SETTLED,
    UNSETTLED,
    VAULT,
    SegmentWriter,
    WrittenSegment,
    authority,
    bookmarked,
    make_grant,
    signing_key,
)

ROW = HEAD_DTYPE.fields
RULES = IndexRules(disk=DISK, epoch=1, first_sequence=1, key_count=1, disk_size_bytes=DISK_SIZE_BYTES)


def verify(data: bytes, name: SegmentName, key: Ed25519PrivateKey | None = None) -> VerifiedSegment:
    trailer = parse_trailer(data[-TRAILER_BYTES:], name=str(name), object_bytes=len(data))
    return verify_segment(
        name,
        header_data=data[: trailer.header_bytes],
        index_data=data[trailer.index_offset : -TRAILER_BYTES],
        trailer_data=data[-TRAILER_BYTES:],
        object_bytes=len(data),
        authority=(key or authority()).public_key(),
    )


def three_change_sets() -> WrittenSegment:
    return SegmentWriter(make_grant()).segment([UNSETTLED, SETTLED, bookmarked(9)])


def test_a_segment_comes_back_as_it_was_written() -> None:
    written = three_change_sets()
    segment = verify(written.data, written.end.name)
    assert segment.header == written.header
    assert segment.grant == make_grant()
    assert (segment.first_sequence, segment.last_sequence, segment.is_closing) == (1, 3, False)
    assert segment.index.ends() == [(1, UNSETTLED), (2, SETTLED), (3, bookmarked(9))]
    assert segment.index.bookmarked_ends() == [(3, bookmarked(9))]
    assert [segment.index.frames_through(sequence) for sequence in range(4)] == [0, 2, 4, 6]
    assert segment.index.end_of(2) == SETTLED
    for number, frame in enumerate(written.frames):
        first, end = segment.index.offsets[number : number + 2].tolist()
        assert written.data[first:end] == bytes(frame.record)
        entry = segment.index.entry(number)
        assert entry.head == frame.entry.head
        assert entry.head_bytes == frame.entry.head_bytes
        assert entry.extents.tobytes() == frame.entry.extents.tobytes()


def test_a_segment_rebuilt_from_its_records_alone_is_the_same_to_the_byte() -> None:
    written = three_change_sets()
    opening = parse_opening(encode_opening(written.header.opening))
    entries = [parse_frame_record(bytes(frame.record)).entry for frame in written.frames]
    header = SegmentHeader(opening=opening, previous_trailer_hash=NO_TRAILER_HASH)
    again = finish_segment(header, entries, signing_key(1))
    assert again == written.end


def test_any_flipped_byte_outside_the_frames_is_refused() -> None:
    written = three_change_sets()
    data = written.data
    records = range(len(written.end.header), len(data) - len(written.end.end))
    for place in range(len(data)):
        if place in records:
            continue
        altered = bytearray(data)
        altered[place] ^= 1
        with pytest.raises(VaultFault) as caught:
            verify(bytes(altered), written.end.name)
        assert caught.value.fields["name"] == str(written.end.name)


def test_any_truncated_segment_is_refused() -> None:
    written = three_change_sets()
    for end in range(len(written.data)):
        with pytest.raises(VaultFault):
            verify(written.data[:end], written.end.name)


@pytest.mark.parametrize(
    "change",
    [{"vault": "f0" * 16}, {"disk": OTHER_DISK}, {"epoch": 2}, {"ordinal": 2}],
    ids=str,
)
def test_a_segment_under_another_name_is_refused(change: dict[str, Any]) -> None:
    written = three_change_sets()
    with pytest.raises(ObjectCorrupt, match="it was written as"):
        verify(written.data, dataclasses.replace(written.end.name, **change))


def test_a_grant_that_the_authority_did_not_sign_is_refused() -> None:
    writer = SegmentWriter(make_grant())
    writer.signed_grant = sign_grant(make_grant(), Ed25519PrivateKey.generate())
    written = writer.segment()
    with pytest.raises(ObjectCorrupt, match="not signed by this vault's authority"):
        verify(written.data, written.end.name)


def test_a_trailer_that_the_granted_key_did_not_sign_is_refused() -> None:
    writer = SegmentWriter(make_grant())
    writer.key = Ed25519PrivateKey.generate()
    written = writer.segment()
    with pytest.raises(ObjectCorrupt, match="not signed by the granted key"):
        verify(written.data, written.end.name)


def test_the_right_key_under_the_grant_of_another_disk_or_epoch_is_refused() -> None:
    for grant, reason in (
        (make_grant(disk=OTHER_DISK), "another disk"),
        (dataclasses.replace(make_grant(), epoch=5), "another epoch"),
    ):
        writer = SegmentWriter(make_grant())
        writer.signed_grant = sign_grant(grant, authority())
        written = writer.segment()
        with pytest.raises(ObjectCorrupt, match=reason):
            verify(written.data, written.end.name)


def test_a_grant_of_another_machine_is_refused() -> None:
    writer = SegmentWriter(make_grant())
    writer.signed_grant = sign_grant(dataclasses.replace(make_grant(), machine="f0" * 16), authority())
    written = writer.segment()
    with pytest.raises(ObjectCorrupt, match="another disk"):
        verify(written.data, written.end.name)


def test_a_closing_segment_names_its_successor() -> None:
    writer = SegmentWriter(make_grant())
    writer.segment()
    successor = make_grant(epoch=4, parent_epoch=1)
    end = writer.closing(successor)
    segment = verify(end.header + end.end, end.name)
    assert segment.is_closing
    assert segment.grant == successor
    assert (segment.name.epoch, segment.name.ordinal) == (1, 2)
    assert (segment.first_sequence, segment.last_sequence) == (2, 1)


def test_a_closing_segment_under_the_grant_of_no_successor_is_refused() -> None:
    """The grant of an epoch that continues another one gives no right to close this one."""
    writer = SegmentWriter(make_grant(epoch=2, parent_epoch=1))
    stranger = make_grant(epoch=4, parent_epoch=3)
    end = writer.closing(dataclasses.replace(stranger, parent_epoch=2))
    forged = closing_segment(
        grant=dataclasses.replace(stranger, parent_epoch=2),
        signed_grant=sign_grant(stranger, authority()),
        ordinal=1,
        last_sequence=0,
        previous_trailer_hash=NO_TRAILER_HASH,
        signing_key=signing_key(4),
    )
    assert verify(end.header + end.end, end.name).is_closing
    with pytest.raises(ObjectCorrupt, match="another epoch"):
        verify(forged.header + forged.end, forged.name)


@pytest.mark.parametrize("place", ["header", "trailer"])
def test_a_later_format_is_told_apart(place: str) -> None:
    """Whole and honestly signed, but with a version that this program does not know."""
    written = three_change_sets()
    data = bytearray(written.data)
    if place == "trailer":
        struct.pack_into("<H", data, len(data) - TRAILER_BYTES + 8, 2)
    else:
        struct.pack_into("<H", data, 8, 2)
        data[-TRAILER_BYTES:] = resigned_trailer(bytes(data), written)
    with pytest.raises(FormatNotSupported) as caught:
        verify(bytes(data), written.end.name)
    assert (caught.value.fields["version"], caught.value.fields["supported"]) == (2, 1)


def resigned_trailer(data: bytes, written: WrittenSegment) -> bytes:
    from storage import segment as module

    hashed = data[-TRAILER_BYTES:][: module._TRAILER_HASHED_BYTES]
    header = data[: len(written.end.header)]
    index = data[len(data) - len(written.end.end) : -TRAILER_BYTES]
    trailer_hash = module._trailer_hash(hashed, header, index)
    return hashed + trailer_hash + signing_key(1).sign(module._SIGNATURE_DOMAIN + trailer_hash)


def test_a_trailer_that_states_impossible_lengths_is_refused_before_anything_is_read() -> None:
    data = bytearray(three_change_sets().data[-TRAILER_BYTES:])
    object_bytes = len(three_change_sets().data)
    for place, width in ((12, "<I"), (16, "<I"), (20, "<I"), (24, "<I"), (28, "<Q"), (36, "<Q")):
        for value in (0, 1, 2**31, 2**32 - 1):
            altered = bytearray(data)
            struct.pack_into(width, altered, place, value)
            if altered != data:
                try:
                    trailer = parse_trailer(bytes(altered), name="n", object_bytes=object_bytes)
                except ObjectCorrupt:
                    continue
                assert trailer.header_bytes + trailer.index_bytes + TRAILER_BYTES <= object_bytes


def test_a_signed_segment_with_room_between_frames_and_index_is_refused() -> None:
    written = three_change_sets()
    place = len(written.data) - len(written.end.end)
    data = bytearray(written.data[:place] + bytes(8) + written.data[place:])
    struct.pack_into("<QQ", data, len(data) - TRAILER_BYTES + 28, place + 8, len(data))
    data[-TRAILER_BYTES:] = resigned_trailer(bytes(data), written)
    with pytest.raises(ObjectCorrupt, match="do not fill the space"):
        verify(bytes(data), written.end.name)


def test_a_segment_without_frames_is_not_made_nor_a_closing_one_with_them() -> None:
    written = three_change_sets()
    with pytest.raises(InvalidValue, match="closing"):
        finish_segment(written.header, [], signing_key(1))
    opening = dataclasses.replace(written.header.opening, is_closing=True, wrapped_keys=())
    header = SegmentHeader(opening=opening, previous_trailer_hash=NO_TRAILER_HASH)
    with pytest.raises(InvalidValue, match="closing"):
        finish_segment(header, [frame.entry for frame in written.frames], signing_key(1))


def test_half_a_change_set_is_not_finished() -> None:
    written = three_change_sets()
    entries = [frame.entry for frame in written.frames]
    for wrong in (entries[:-1], entries[1:], entries[:2] + entries[4:], [*entries[:2], *entries], entries[::-1]):
        with pytest.raises(InvalidValue):
            finish_segment(written.header, wrong, signing_key(1))


def test_a_head_array_and_a_head_are_laid_out_alike() -> None:
    written = three_change_sets()
    rows = numpy.frombuffer(b"".join(frame.entry.head_bytes for frame in written.frames), dtype=HEAD_DTYPE)
    assert HEAD_DTYPE.itemsize == HEAD_BYTES
    for row, frame in zip(rows, written.frames, strict=True):
        head = frame.entry.head
        for field in ("epoch", "sequence", "frame_number", "extent_count", "raw_bytes", "sealed_bytes", "nonce_number"):
            assert int(row[field]) == getattr(head, field)
        assert row["disk"].tobytes().hex() == DISK
        assert row["sealed_digest"].tobytes() == head.sealed_digest
        assert parse_head(row.tobytes()) == head


def index_of(change: Callable[[Any, Any], None]) -> None:
    entries = [frame.entry for frame in three_change_sets().frames]
    heads = numpy.frombuffer(b"".join(entry.head_bytes for entry in entries), dtype=HEAD_DTYPE).copy()
    extents = numpy.concatenate([entry.extents for entry in entries]).copy()
    change(heads, extents)
    build_index(heads, extents, header_bytes=100, rules=RULES)


def set_head(field: str, value: Any, row: int = 0) -> Callable[[Any, Any], None]:
    def change(heads: Any, extents: Any) -> None:
        heads[field][row] = value

    return change


def set_extent(field: str, value: Any, row: int = 0) -> Callable[[Any, Any], None]:
    def change(heads: Any, extents: Any) -> None:
        extents[field][row] = value

    return change


def overlap(heads: Any, extents: Any) -> None:
    extents["offset"][2] = extents["offset"][1]


def test_an_index_as_it_was_written_keeps_all_rules() -> None:
    index_of(lambda heads, extents: None)


@pytest.mark.parametrize(
    "change",
    [
        set_head("magic", b"XXXX"),
        set_head("version", 2),
        set_head("flags", 8),
        set_head("flags", 1),
        set_head("flags", 0, row=5),
        set_head("compression", 2),
        set_head("compression", 1, row=1),
        set_head("consistency", 4, row=1),
        set_head("consistency", 1, row=0),
        set_head("consistency", 0, row=5),
        set_head("reserved", 1),
        set_head("epoch", 2),
        set_head("sequence", 2),
        set_head("sequence", 2**63),
        set_head("frame_number", 1),
        set_head("frame_number", 5, row=1),
        set_head("extent_count", 2),
        set_head("extent_count", 5000),
        set_head("raw_bytes", 1),
        set_head("raw_bytes", 2**21),
        set_head("sealed_bytes", 15),
        set_head("sealed_bytes", 2**21),
        set_head("disk", numpy.void(bytes(16))),
        set_head("cursor_bytes", 1),
        set_head("flags", 3, row=3),
        set_head("point", numpy.void(b"p" * 16)),
        set_head("instant_ns", 1),
        set_head("instant_ns", 2**63, row=5),
        set_head("key_number", 1),
        set_head("nonce_number", 1),
        set_extent("kind", 3, row=1),
        set_extent("kind", 1, row=0),
        set_extent("reserved", 1),
        set_extent("length", 0, row=1),
        set_extent("length", 4097, row=0),
        set_extent("length", 2**31 + 1, row=1),
        set_extent("offset", DISK_SIZE_BYTES),
        set_extent("offset", 2**64 - 1),
        overlap,
    ],
)
def test_an_index_that_breaks_a_rule_is_refused(change: Callable[[Any, Any], None]) -> None:
    with pytest.raises(InvalidValue):
        index_of(change)


def test_extents_of_different_frames_may_overlap_but_not_those_of_one() -> None:
    """The last extent of a frame and the first of the next are in no order; empty tables in between change nothing."""
    entries = [frame.entry for frame in three_change_sets().frames]
    empty = dataclasses.replace(entries[1].head, extent_count=0, frame_number=1, nonce_number=50, end=None)
    third = dataclasses.replace(entries[1].head, frame_number=2, nonce_number=51)
    none = numpy.zeros(0, dtype=EXTENT_DTYPE)
    mixed = [
        entries[0],
        FrameEntry(head=empty, extents=none, head_bytes=encode_head(empty, b"")),
        FrameEntry(head=third, extents=entries[1].extents, head_bytes=encode_head(third, entries[1].extents.tobytes())),
        *entries[2:],
    ]
    heads = numpy.frombuffer(b"".join(entry.head_bytes for entry in mixed), dtype=HEAD_DTYPE)
    extents = numpy.concatenate([entry.extents for entry in mixed])
    index = build_index(heads, extents, header_bytes=0, rules=RULES)
    assert [len(index.entry(number).extents) for number in range(len(index))] == [1, 0, 2, 1, 2, 1, 2]


@pytest.mark.parametrize("data", [b"", b"\xc0", b"\x90", b"\x99" + b"\xc0" * 9, b"\x99" + b"\xc4\x00" * 9, b"\xc1"])
def test_what_is_no_opening_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedInput):
        parse_opening(data)


def test_an_opening_is_for_one_segment_of_the_vault() -> None:
    opening = three_change_sets().header.opening
    assert opening.name == SegmentName(vault=VAULT, disk=DISK, epoch=1, ordinal=1)
    fields = {name: getattr(opening, name) for name in SegmentOpening.__slots__}
    for change in ({"ordinal": 0}, {"first_sequence": 0}, {"wrapped_keys": (b"short",)}, {"signed_grant": b""}):
        with pytest.raises(InvalidValue):
            SegmentOpening(**{**fields, **change})
