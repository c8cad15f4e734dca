"""What is not exactly one message in its one encoding is refused, whatever it is."""

from __future__ import annotations

import random
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.codec import CONSISTENCY_NUMBERS, HEADER_BYTES_MAX, decode_header, encode_header
from protocol.errors import InvalidValue, LimitExceeded, MalformedInput, NoGrant, PeerFault
from protocol.messages import TEXT_LENGTH_MAX, CloseDisk, Goodbye, Hello, Refusal, Tick
from protocol.vocabulary import Consistency
from tests.vectors.make_wire import messages

MESSAGES = list(messages().values())
HEADERS = [encode_header(message) for message in MESSAGES]
FRAME = [5, 0, 1, 1, 0, 0, 0, 0, 0, None]


def refused(*values: Any) -> MalformedInput:
    with pytest.raises(MalformedInput) as caught:
        decode_header(msgpack.packb(list(values)))
    assert isinstance(caught.value, PeerFault)
    return caught.value


def test_no_message_is_longer_than_the_header_limit() -> None:
    longest = Refusal(code="x" * TEXT_LENGTH_MAX, detail="x" * TEXT_LENGTH_MAX, is_retryable=True)
    assert len(encode_header(longest)) <= HEADER_BYTES_MAX


@pytest.mark.parametrize("header", HEADERS)
def test_every_truncation_of_a_header_is_refused(header: bytes) -> None:
    for length in range(len(header)):
        with pytest.raises(MalformedInput):
            decode_header(header[:length])


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_with_more_behind_it_is_refused(header: bytes) -> None:
    for more in (b"\x00", b"\xc0", header):
        with pytest.raises(MalformedInput):
            decode_header(header + more)


@pytest.mark.parametrize("header", HEADERS)
def test_a_flipped_bit_is_refused_or_is_another_message_in_canonical_form(header: bytes) -> None:
    draw = random.Random(header)
    places = range(len(header) * 8) if len(header) < 100 else draw.sample(range(len(header) * 8), 400)
    for place in places:
        flipped = bytearray(header)
        flipped[place // 8] ^= 1 << place % 8
        try:
            message = decode_header(bytes(flipped))
        except MalformedInput:
            continue
        assert encode_header(message) == flipped


@given(st.binary(max_size=64))
def test_any_bytes_are_a_canonical_message_or_malformed(data: bytes) -> None:
    try:
        message = decode_header(data)
    except MalformedInput:
        return
    assert encode_header(message) == data


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=20),
    lambda values: st.lists(values, max_size=4),
    max_leaves=12,
)


@given(st.integers(1, 11), st.lists(_VALUES, max_size=10))
def test_any_well_formed_array_is_a_canonical_message_or_malformed(number: int, values: list[Any]) -> None:
    data = msgpack.packb([number, *values])
    try:
        message = decode_header(data)
    except MalformedInput:
        return
    assert encode_header(message) == data


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_one_field_too_few_or_too_many_is_refused(message: Any) -> None:
    values = msgpack.unpackb(encode_header(message))
    assert "fields" in str(refused(*values[:-1]))
    assert "fields" in str(refused(*values, None))


@pytest.mark.parametrize("number", [0, 12, -1, 2**63])
def test_an_unknown_message_type_is_refused(number: int) -> None:
    assert "unknown type" in str(refused(number))


@pytest.mark.parametrize("number", [True, None, "5", 5.0, [5]])
def test_a_message_type_that_is_no_integer_is_refused(number: Any) -> None:
    refused(number, *FRAME[1:])


def test_a_header_that_is_no_array_is_refused() -> None:
    for value in (5, None, "text", b"", []):
        with pytest.raises(MalformedInput):
            decode_header(msgpack.packb(value))


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (1, -1),
        (1, 65536),
        (1, True),
        (1, 1.0),
        (1, "0"),
        (2, 0),
        (2, 2**32),
        (3, 0),
        (3, 2**63),
        (4, 65536),
        (5, 4097),
        (6, 2**20 + 1),
        (7, 2**20 + 1),
        (8, 2),
        (8, None),
        (8, False),
        (9, 1),
        (9, [4, None, None]),
        (9, [True, None, None]),
        (9, [1, None]),
        (9, [1, -1, None]),
        (9, [1, None, [b"short", 1]]),
        (9, [1, None, ["0" * 32, 1]]),
        (9, [1, None, [bytes(16), -1]]),
        (9, [0, None, [bytes(16), 1]]),
        (9, [1, 4096, None]),
    ],
)
def test_a_frame_with_one_wrong_field_is_refused(index: int, value: Any) -> None:
    decode_header(msgpack.packb(FRAME))
    values = list(FRAME)
    values[index] = value
    refused(*values)


def test_a_longer_encoding_of_the_same_values_is_refused() -> None:
    canonical = msgpack.packb(FRAME)
    longer = {
        "integer in two bytes": canonical[:2] + b"\xcc\x00" + canonical[3:],
        "integer in five bytes": canonical[:2] + b"\xce\x00\x00\x00\x00" + canonical[3:],
        "signed integer": canonical[:2] + b"\xd0\x00" + canonical[3:],
        "array in three bytes": b"\xdc\x00\x0a" + canonical[1:],
    }
    for data in longer.values():
        with pytest.raises(MalformedInput, match="canonical"):
            decode_header(data)
    with pytest.raises(MalformedInput, match="canonical"):
        decode_header(b"\x92\x0b\xd9\x01a")


def test_text_that_is_not_utf_8_is_refused() -> None:
    for text in (b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"a\x00"):
        with pytest.raises(MalformedInput):
            decode_header(b"\x92\x0b" + bytes([0xA0 | len(text)]) + text)


def test_text_beyond_its_limit_is_refused_and_at_its_limit_is_taken() -> None:
    assert decode_header(encode_header(Goodbye(reason="x" * TEXT_LENGTH_MAX))) == Goodbye(reason="x" * TEXT_LENGTH_MAX)
    refused(11, "x" * (TEXT_LENGTH_MAX + 1))
    refused(11, "ü" * (TEXT_LENGTH_MAX // 2 + 1))


@pytest.mark.parametrize(
    "bomb",
    [
        b"\x91" * 4000 + b"\xc0",
        b"\x92\x0b" + b"\x91" * 2000 + b"\xc0",
        b"\xdd\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x00",
        b"\x92\x08\xd6\xff\x00\x00\x00\x00",
        b"\x92\x08\xc7\x00\x05",
        b"\x92\x08\x81\xa1a\x01",
        b"\x92\x08\x80",
        b"\x9f" * 16,
        b"\xc1",
        b"",
    ],
    ids=lambda bomb: bomb[:8].hex(),
)
def test_depth_size_maps_and_extension_types_are_refused_without_being_built(bomb: bytes) -> None:
    with pytest.raises(MalformedInput):
        decode_header(bomb)


def test_more_bytes_than_a_header_has_are_refused_unread() -> None:
    with pytest.raises(LimitExceeded):
        decode_header(bytes(HEADER_BYTES_MAX + 1))


def test_every_consistency_has_its_number_in_rising_order_of_promise() -> None:
    assert list(CONSISTENCY_NUMBERS) == list(Consistency)
    assert list(CONSISTENCY_NUMBERS.values()) == list(range(len(Consistency)))


@pytest.mark.parametrize("text", ["x" * (TEXT_LENGTH_MAX + 1), "\ud800", "a\0b", 5])
def test_text_that_could_not_travel_makes_no_message(text: Any) -> None:
    with pytest.raises(InvalidValue):
        Goodbye(reason=text)


def test_a_hello_whose_versions_are_turned_round_makes_no_message() -> None:
    with pytest.raises(InvalidValue):
        Hello(wire_version_min=2, wire_version_max=1, agent_version="", boot_id="")
    refused(1, 2, 1, "", "")


def test_an_agents_tick_and_a_servers_tick_differ_in_the_instant() -> None:
    assert decode_header(b"\x92\x08\xc0") == Tick(instant_ns=None)
    assert decode_header(b"\x92\x08\x00") == Tick(instant_ns=0)


def test_an_error_becomes_a_refusal_that_fits_and_back() -> None:
    error = NoGrant(disk="ü" * 5000 + "\ud800\0")
    refusal = Refusal.from_error(error)
    assert decode_header(encode_header(refusal)) == refusal
    assert (refusal.code, refusal.is_retryable) == ("no-grant", True)
    assert refusal.to_error().fields["peer_code"] == "no-grant"
    closing = CloseDisk.from_error(7, error)
    assert decode_header(encode_header(closing)) == closing
    assert closing.to_error().fields["retryable"] is True
