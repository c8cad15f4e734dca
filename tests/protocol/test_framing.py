"""Messages come out of the stream whatever pieces it arrives in, and nothing is read into a wrong place."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.codec import HEADER_BYTES_MAX, encode_header
from protocol.errors import LimitExceeded, MalformedInput
from protocol.framing import (
    BODY_BYTES_MAX,
    PREFIX_BYTES,
    Assembled,
    BodyWanted,
    FrameReader,
    body_bytes_of,
    encode_start,
)
from protocol.messages import Frame, Goodbye, Message, Tick
from protocol.vocabulary import FRAME_EXTENTS_MAX, FRAME_RAW_BYTES_MAX, Compression
from tests.vectors.make_wire import messages


def frame(payload_bytes: int = 5, extent_count: int = 1) -> Frame:
    return Frame(
        channel=1,
        epoch=1,
        sequence=1,
        frame_number=0,
        extent_count=extent_count,
        raw_bytes=payload_bytes,
        payload_bytes=payload_bytes,
        compression=Compression.NONE,
        end=None,
    )


def encode(message: Message, fill: int = 0) -> bytes:
    return encode_start(message) + bytes((fill + index) % 256 for index in range(body_bytes_of(message)))


def read_all(reader: FrameReader, data: bytes, sizes: list[int]) -> list[tuple[Message, bytes]]:
    """Feeds `data` in pieces of `sizes`, then the rest, as a transport does: into get_buffer(), as much as fits."""
    found: list[tuple[Message, bytes]] = []
    position = 0
    for size in [*sizes, len(data)]:
        piece = memoryview(data)[position : position + size]
        position += len(piece)
        while piece:
            buffer = reader.get_buffer()
            assert buffer
            count = min(len(buffer), len(piece))
            buffer[:count] = piece[:count]
            piece = piece[count:]
            event = reader.buffer_updated(count)
            if isinstance(event, BodyWanted):
                reader.provide_body(memoryview(bytearray(event.body_bytes + 100)))
            elif isinstance(event, Assembled):
                found.append((event.message, bytes(event.body)))
    return found


def test_every_split_in_two_gives_the_same_messages() -> None:
    sent = [Tick(instant_ns=1), frame(), Goodbye(reason="stopping"), frame(0, 0), frame(0, 3)]
    data = b"".join(encode(message, index) for index, message in enumerate(sent))
    whole = read_all(FrameReader(), data, [])
    assert [message for message, _ in whole] == sent
    for split in range(len(data) + 1):
        assert read_all(FrameReader(), data, [split]) == whole


def test_a_byte_at_a_time_gives_the_same_messages() -> None:
    sent = [message for message in messages().values() if body_bytes_of(message) < 1000]
    data = b"".join(encode(message, index) for index, message in enumerate(sent))
    reader = FrameReader()
    assert [message for message, _ in read_all(reader, data, [1] * len(data))] == sent
    assert reader.is_between_messages


@given(
    st.lists(st.sampled_from([Tick(instant_ns=None), frame(), frame(900, 2), frame(0, 0), Goodbye(reason="x" * 300)])),
    st.lists(st.integers(1, 400), max_size=60),
)
def test_any_split_of_any_stream_gives_the_same_messages(sent: list[Message], sizes: list[int]) -> None:
    data = b"".join(encode(message, index) for index, message in enumerate(sent))
    expected = [(message, encode(message, index)[len(encode_start(message)) :]) for index, message in enumerate(sent)]
    assert read_all(FrameReader(), data, sizes) == expected


def test_the_longest_body_that_a_frame_can_state_is_the_limit() -> None:
    longest = frame(FRAME_RAW_BYTES_MAX, FRAME_EXTENTS_MAX)
    assert body_bytes_of(longest) == BODY_BYTES_MAX
    assert [message for message, _ in read_all(FrameReader(), encode(longest), [])] == [longest]


def test_a_body_lies_in_the_buffer_that_was_provided_and_is_just_as_long() -> None:
    reader = FrameReader()
    start = encode_start(frame(5))
    for count in (PREFIX_BYTES, len(start) - PREFIX_BYTES):
        reader.get_buffer()[:count] = start[:count]
        start = start[count:]
        event = reader.buffer_updated(count)
    assert event == BodyWanted(message=frame(5), body_bytes=21)
    backing = bytearray(100)
    reader.provide_body(memoryview(backing))
    assert len(reader.get_buffer()) == 21
    reader.get_buffer()[:] = b"b" * 21
    assembled = reader.buffer_updated(21)
    assert isinstance(assembled, Assembled)
    assert backing == b"b" * 21 + bytes(79)
    assert assembled.body.obj is backing


@pytest.mark.parametrize(
    ("prefix", "error"),
    [
        (struct.pack("<II", HEADER_BYTES_MAX + 1, 0), LimitExceeded),
        (struct.pack("<II", 2**32 - 1, 0), LimitExceeded),
        (struct.pack("<II", 10, BODY_BYTES_MAX + 1), LimitExceeded),
        (struct.pack("<II", 10, 2**32 - 1), LimitExceeded),
        (struct.pack("<II", 0, 0), MalformedInput),
        (struct.pack(">II", 10, 0), LimitExceeded),
        (b"GET / HT", LimitExceeded),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01", LimitExceeded),
    ],
)
def test_lengths_beyond_the_limits_are_refused_before_anything_is_allocated(
    prefix: bytes, error: type[Exception]
) -> None:
    with pytest.raises(error):
        read_all(FrameReader(), prefix, [])


def test_a_body_behind_anything_but_a_frame_is_refused_before_a_buffer_is_asked_for() -> None:
    header = encode_header(Goodbye(reason="x"))
    with pytest.raises(MalformedInput, match="body"):
        read_all(FrameReader(), struct.pack("<II", len(header), 1) + header + b"x", [])


@pytest.mark.parametrize("difference", [-1, 1, -21])
def test_a_body_of_another_length_than_the_frame_states_is_refused(difference: int) -> None:
    header = encode_header(frame(5))
    with pytest.raises(MalformedInput, match="body of"):
        read_all(FrameReader(), struct.pack("<II", len(header), 21 + difference) + header, [])


def test_a_side_that_gets_no_frames_refuses_a_body_at_the_prefix() -> None:
    with pytest.raises(LimitExceeded, match="body length"):
        read_all(FrameReader(body_bytes_max=0), encode(frame()), [])


def test_nothing_can_be_read_while_a_body_buffer_is_wanted() -> None:
    reader = FrameReader()
    start = encode_start(frame(5))
    for count in (PREFIX_BYTES, len(start) - PREFIX_BYTES):
        reader.get_buffer()[:count] = start[:count]
        start = start[count:]
        reader.buffer_updated(count)
    assert reader.is_body_wanted
    with pytest.raises(RuntimeError):
        reader.get_buffer()
    with pytest.raises(RuntimeError, match="fit"):
        reader.provide_body(memoryview(bytearray(20)))
    reader.provide_body(memoryview(bytearray(21)))
    assert not reader.is_body_wanted
    with pytest.raises(RuntimeError):
        reader.provide_body(memoryview(bytearray(21)))


def test_a_stream_may_end_only_between_messages() -> None:
    data = encode(frame())
    for length in range(1, len(data)):
        reader = FrameReader()
        read_all(reader, data[:length], [])
        assert not reader.is_between_messages
    reader = FrameReader()
    read_all(reader, data, [])
    assert reader.is_between_messages
