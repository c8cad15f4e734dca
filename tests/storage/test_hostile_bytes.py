"""Whatever bytes a parser is given, it returns a value of the format or raises its own typed error, never another."""

from __future__ import annotations

from collections.abc import Callable

import msgpack  # type: ignore[import-untyped]
from hypothesis import given, settings, strategies

from protocol.errors import InvalidValue, MalformedInput
from storage.errors import FormatNotSupported, NotAVault, ObjectCorrupt, WrongRecoveryKey
from storage.frame_record import parse_frame_record, parse_head
from storage.keys import parse_recovery_key, parse_vault, serialise_recovery_key
from storage.segment import TRAILER_BYTES, encode_opening, parse_header, parse_opening, parse_trailer
from tests.storage.segment_writer import SETTLED, SegmentWriter, make_grant, new_vault

WRITTEN = SegmentWriter(make_grant()).segment([SETTLED], length_bytes=64)
RECORD = bytes(WRITTEN.frames[0].record)
OPENING = encode_opening(WRITTEN.header.opening)
TRAILER = WRITTEN.end.end[-TRAILER_BYTES:]
RECOVERY_KEY = serialise_recovery_key(new_vault().recovery_keys[0], passphrase=None)
TYPED = (InvalidValue, MalformedInput, ObjectCorrupt, FormatNotSupported, NotAVault, WrongRecoveryKey)

PARSERS: list[tuple[bytes, Callable[[bytes], object]]] = [
    (RECORD, parse_frame_record),
    (RECORD[:144], parse_head),
    (OPENING, parse_opening),
    (WRITTEN.end.header, lambda data: parse_header(data, name="n")),
    (TRAILER, lambda data: parse_trailer(data, name="n", object_bytes=len(WRITTEN.data))),
    (new_vault().vault_json, lambda data: parse_vault(data, name="n")),
    (RECOVERY_KEY, lambda data: parse_recovery_key(data, path="p", passphrase=None)),
]

VALUES = strategies.recursive(
    strategies.none()
    | strategies.booleans()
    | strategies.integers(-(2**63), 2**64 - 1)
    | strategies.binary(max_size=40)
    | strategies.text(max_size=10)
    | strategies.floats(),
    lambda inner: strategies.lists(inner, max_size=4) | strategies.dictionaries(strategies.text(), inner, max_size=2),
    max_leaves=8,
)


def check(parse: Callable[[bytes], object], data: bytes) -> None:
    try:
        parse(data)
    except TYPED:
        return


@settings(max_examples=300, deadline=None)
@given(data=strategies.data())
def test_a_mutated_text_gives_a_value_or_a_typed_error(data: strategies.DataObject) -> None:
    whole, parse = data.draw(strategies.sampled_from(PARSERS))
    altered = bytearray(whole)
    for _ in range(data.draw(strategies.integers(1, 4))):
        altered[data.draw(strategies.integers(0, len(altered) - 1))] = data.draw(strategies.integers(0, 255))
    check(parse, bytes(altered[: data.draw(strategies.integers(1, len(altered)))]))
    check(parse, bytes(altered))


@settings(max_examples=100, deadline=None)
@given(data=strategies.binary(max_size=600))
def test_random_bytes_give_a_typed_error(data: bytes) -> None:
    for _, parse in PARSERS:
        check(parse, data)


@settings(max_examples=300, deadline=None)
@given(value=VALUES, place=strategies.integers(0, 9))
def test_a_field_of_any_type_gives_a_value_or_a_typed_error(value: object, place: int) -> None:
    fields = msgpack.unpackb(OPENING)
    if place < len(fields):
        fields[place] = value
    else:
        fields.append(value)
    body = msgpack.packb(fields)
    check(parse_opening, body)
    full = msgpack.packb([*fields[:9], value if place == 9 else bytes(32)])
    prefix = WRITTEN.end.header[:12] + len(full).to_bytes(4, "little")
    check(lambda data: parse_header(data, name="n"), prefix + full)
