"""What is sealed opens to the same bytes; nothing else opens, and nothing opens beyond its bound."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings, strategies

from protocol.errors import InvalidValue, MalformedInput
from protocol.vocabulary import (
    FRAME_RAW_BYTES_MAX,
    Bookmark,
    ChangeKind,
    ChangeSetEnd,
    Compression,
    Consistency,
    Extent,
    PointId,
    extent_table,
)
from storage.errors import ObjectCorrupt
from storage.frame_record import HEAD_BYTES, TAG_BYTES, parse_frame_record
from storage.sealing import FrameCompressor, FrameOpener, SealedFrame, SegmentSealer, record_bytes_max
from storage.segment import NO_TRAILER_HASH, SegmentHeader
from tests.storage.segment_writer import SETTLED, SegmentWriter, make_grant, vault_private_key

BOMB_BYTES = 64 * 2**20


def new_sealer() -> SegmentSealer:
    return SegmentWriter(make_grant()).sealer(data_key=os.urandom(32))


def opener_of(sealer: SegmentSealer) -> FrameOpener:
    header = SegmentHeader(opening=sealer.opening, previous_trailer_hash=NO_TRAILER_HASH)
    return FrameOpener(header=header, vault_private_key=vault_private_key())


def seal(sealer: SegmentSealer, payload: bytes, *, nonce_number: int = 0, **options: Any) -> SealedFrame:
    raw_bytes = options.pop("raw_bytes", len(payload))
    extents = [Extent(offset_bytes=0, length_bytes=raw_bytes)] if raw_bytes else []
    options = {"compression": Compression.NONE, "end": SETTLED, "sequence": 1, "frame_number": 0, **options}
    return sealer.seal(
        extents=extent_table(extents), raw_bytes=raw_bytes, payload=payload, nonce_number=nonce_number, **options
    )


def opened(sealer: SegmentSealer, frame: SealedFrame) -> bytes:
    record = parse_frame_record(frame.record)
    return opener_of(sealer).open(record.entry, record.sealed)


@settings(max_examples=40, deadline=None)
@given(payload=strategies.binary(max_size=5000), level=strategies.sampled_from([None, -1, 1, 3]))
def test_what_is_sealed_opens_to_the_same_bytes(payload: bytes, level: int | None) -> None:
    sealer = new_sealer()
    assert opened(sealer, seal(sealer, payload, level=level)) == payload


def test_compressible_data_is_stored_compressed_and_other_data_as_it_is() -> None:
    sealer = new_sealer()
    small = seal(sealer, b"x" * 100_000, nonce_number=0)
    plain = seal(sealer, os.urandom(100_000), nonce_number=1)
    unpacked = seal(sealer, b"x" * 100_000, nonce_number=2, level=None)
    assert small.entry.head.compression is Compression.ZSTD
    assert len(small.record) < 1000
    for frame in (plain, unpacked):
        assert frame.entry.head.compression is Compression.NONE
        assert frame.entry.head.sealed_bytes == 100_000 + TAG_BYTES


def test_a_whole_frame_is_sealed_and_opened() -> None:
    sealer = new_sealer()
    payload = os.urandom(FRAME_RAW_BYTES_MAX)
    assert opened(sealer, seal(sealer, payload)) == payload


def test_a_frame_without_data_is_sealed_too() -> None:
    sealer = new_sealer()
    frame = seal(sealer, b"")
    assert frame.entry.head.sealed_bytes == TAG_BYTES
    assert opened(sealer, frame) == b""


def test_a_payload_that_the_agent_compressed_passes_through_unopened() -> None:
    sealer = new_sealer()
    raw = b"agent" * 10_000
    packed = zstandard.ZstdCompressor(level=3).compress(raw)
    frame = seal(sealer, packed, raw_bytes=len(raw), compression=Compression.ZSTD)
    assert frame.entry.head.sealed_bytes == len(packed) + TAG_BYTES
    assert opened(sealer, frame) == raw


def test_a_record_is_laid_into_the_callers_buffer() -> None:
    sealer = new_sealer()
    payload = os.urandom(4096)
    room = bytearray(record_bytes_max(extent_count=1, payload_bytes=4096) + 100)
    frame = seal(sealer, payload, out=room)
    assert bytes(frame.record) == bytes(room[: frame.entry.head.record_bytes])
    assert room[frame.entry.head.record_bytes :] == bytes(len(room) - frame.entry.head.record_bytes)
    assert opened(sealer, frame) == payload
    with pytest.raises(InvalidValue):
        seal(sealer, payload, nonce_number=1, out=bytearray(4096))


def test_a_nonce_is_never_used_twice() -> None:
    sealer = new_sealer()
    seal(sealer, b"first", nonce_number=5)
    with pytest.raises(InvalidValue, match="never be used twice"):
        seal(sealer, b"second", nonce_number=5)


def test_threads_that_race_for_a_nonce_get_it_once() -> None:
    sealer = new_sealer()
    barrier = threading.Barrier(8)

    def attempt(_: int) -> bool:
        barrier.wait()
        try:
            seal(sealer, b"data", nonce_number=0)
        except InvalidValue:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(attempt, range(8))) == 1


def test_threads_seal_and_open_with_contexts_of_their_own() -> None:
    sealer = new_sealer()
    payloads = [bytes([number]) * 50_000 + os.urandom(1000) for number in range(32)]
    with ThreadPoolExecutor(4) as threads:
        frames = list(threads.map(lambda pair: seal(sealer, pair[1], nonce_number=pair[0]), enumerate(payloads)))
        opener = opener_of(sealer)
        records = [parse_frame_record(frame.record) for frame in frames]
        assert list(threads.map(lambda record: opener.open(record.entry, record.sealed), records)) == payloads


def zstd_with_size(raw: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(raw)


def zstd_without_size(raw: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1, write_content_size=False).compress(raw)


def zstd_with_large_window(raw: bytes) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(window_log=24, compression_level=1)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj(size=len(raw))
    return compressor.compress(raw[:1]) + compressor.compress(raw[1:]) + compressor.flush()


@pytest.mark.parametrize(
    ("packed", "raw_bytes"),
    [
        (b"not zstd at all", 100),
        (b"", 100),
        (zstd_with_size(bytes(BOMB_BYTES)), 4096),
        (zstd_without_size(bytes(BOMB_BYTES)), 4096),
        (zstd_with_size(bytes(4095)), 4096),
        (zstd_with_large_window(bytes(BOMB_BYTES)), 4096),
    ],
    ids=["garbage", "nothing", "declared bomb", "undeclared bomb", "one byte short", "large window"],
)
def test_a_payload_that_could_never_be_opened_is_not_sealed(packed: bytes, raw_bytes: int) -> None:
    with pytest.raises(MalformedInput):
        seal(new_sealer(), packed, raw_bytes=raw_bytes, compression=Compression.ZSTD)


def test_a_payload_of_another_length_than_its_extents_is_not_sealed() -> None:
    with pytest.raises(MalformedInput):
        seal(new_sealer(), b"short", raw_bytes=100)
    with pytest.raises(InvalidValue):
        new_sealer().seal(
            sequence=1,
            frame_number=0,
            nonce_number=0,
            extents=extent_table([Extent(offset_bytes=0, length_bytes=4096)]),
            raw_bytes=5,
            payload=b"12345",
            compression=Compression.NONE,
            end=SETTLED,
        )


def sealed_behind_the_check(packed: bytes, *, raw_bytes: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """A record that a hostile holder of a data key made: the sealer's own check is out of the way."""
    sealer = new_sealer()
    with monkeypatch.context() as patched:
        patched.setattr("storage.sealing._check_zstd_header", lambda packed, raw_bytes: None)
        frame = seal(sealer, packed, raw_bytes=raw_bytes, compression=Compression.ZSTD)
    return opener_of(sealer), parse_frame_record(frame.record)


@pytest.mark.parametrize(
    ("packed", "raw_bytes"),
    [
        (zstd_with_size(bytes(BOMB_BYTES)), 4096),
        (zstd_without_size(bytes(BOMB_BYTES)), 4096),
        (zstd_with_large_window(bytes(BOMB_BYTES)), 4096),
        (zstd_with_size(bytes(4096)) + zstd_with_size(bytes(4096)), 4096),
        (zstd_with_size(bytes(4096)) + b"tail", 4096),
        (zstd_with_size(os.urandom(4096))[:-10], 4096),
        (zstd_with_size(bytes(2048)), 4096),
    ],
    ids=["declared bomb", "undeclared bomb", "large window", "two frames", "tail", "cut", "short"],
)
def test_a_sealed_bomb_does_not_go_off(packed: bytes, raw_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    opener, record = sealed_behind_the_check(packed, raw_bytes=raw_bytes, monkeypatch=monkeypatch)
    with pytest.raises(ObjectCorrupt, match="decompressed"):
        opener.open(record.entry, record.sealed)


def test_any_flipped_byte_of_a_record_is_found_without_a_key() -> None:
    sealer = new_sealer()
    data = bytes(seal(sealer, b"q" * 64, level=None).record)
    for place in range(len(data)):
        altered = bytearray(data)
        altered[place] ^= 1
        with pytest.raises(InvalidValue):
            parse_frame_record(altered)


def test_any_cut_of_a_record_is_found_without_a_key() -> None:
    data = bytes(seal(new_sealer(), b"q" * 64).record)
    for end in range(len(data)):
        with pytest.raises(InvalidValue):
            parse_frame_record(data[:end])


def test_a_record_is_found_at_the_start_of_more() -> None:
    sealer = new_sealer()
    first, second = seal(sealer, b"one"), seal(sealer, b"two", nonce_number=1, sequence=2)
    both = bytes(first.record) + bytes(second.record)
    record = parse_frame_record(both)
    following = parse_frame_record(memoryview(both)[record.entry.head.record_bytes :])
    assert record.entry.head == first.entry.head
    assert following.entry.head == second.entry.head


def test_a_head_says_all_that_the_frame_was_sealed_with() -> None:
    end = ChangeSetEnd(
        consistency=Consistency.APPLICATION, bookmark=Bookmark(point=PointId("f6" * 16), instant_ns=2**62)
    )
    frame = seal(new_sealer(), b"q" * 64, nonce_number=9, sequence=2**40, frame_number=77, end=end)
    head = parse_frame_record(frame.record).entry.head
    assert (head.sequence, head.frame_number, head.nonce_number, head.end) == (2**40, 77, 9, end)
    cursor = ChangeSetEnd(consistency=Consistency.UNSETTLED, copy_in_cursor_bytes=0)
    frame = seal(new_sealer(), b"", end=cursor)
    assert parse_frame_record(frame.record).entry.head.end == cursor
    frame = seal(new_sealer(), b"", end=None)
    assert parse_frame_record(frame.record).entry.head.end is None


@pytest.mark.parametrize(
    "change",
    [
        {"sequence": 2},
        {"frame_number": 1},
        {"nonce_number": 1},
        {"end": None},
        {"end": ChangeSetEnd(consistency=Consistency.APPLICATION)},
        {"end": ChangeSetEnd(consistency=Consistency.UNSETTLED, copy_in_cursor_bytes=5)},
    ],
    ids=str,
)
def test_a_seal_binds_what_the_head_says(change: dict[str, Any]) -> None:
    """The sealed bytes of one frame under the head of another, under the same key."""
    sealer = new_sealer()
    frame = seal(sealer, b"q" * 64, level=None)
    other = seal(SegmentWriter(make_grant()).sealer(data_key=os.urandom(32)), b"q" * 64, level=None, **change)
    with pytest.raises(ObjectCorrupt, match="seal"):
        opener_of(sealer).open(other.entry, parse_frame_record(frame.record).sealed)


def test_a_seal_binds_the_extent_table() -> None:
    sealer = new_sealer()
    frame = seal(sealer, b"")
    zeroes = extent_table([Extent(offset_bytes=0, length_bytes=512, kind=ChangeKind.ZEROES)])
    moved = sealer.seal(
        sequence=1,
        frame_number=0,
        nonce_number=1,
        extents=zeroes,
        raw_bytes=0,
        payload=b"",
        compression=Compression.NONE,
        end=SETTLED,
    )
    assert opened(sealer, moved) == b""
    record = parse_frame_record(moved.record)
    altered = type(record.entry)(
        head=record.entry.head,
        head_bytes=record.entry.head_bytes,
        extents=extent_table([Extent(offset_bytes=512, length_bytes=512, kind=ChangeKind.ZEROES)]),
    )
    with pytest.raises(ObjectCorrupt, match="seal"):
        opener_of(sealer).open(altered, record.sealed)
    assert frame.entry.head.record_bytes == HEAD_BYTES + TAG_BYTES


def test_a_frame_does_not_open_with_another_segments_key() -> None:
    sealer, other = new_sealer(), new_sealer()
    record = parse_frame_record(seal(sealer, b"secret").record)
    with pytest.raises(ObjectCorrupt):
        opener_of(other).open(record.entry, record.sealed)


def test_a_compressor_keeps_a_context_per_level() -> None:
    compressor = FrameCompressor()
    payload = b"level" * 1000
    for level in (1, 3, 1, -1):
        assert zstandard.ZstdDecompressor().decompress(compressor.compress(payload, level=level)) == payload
