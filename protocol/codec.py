"""Message headers to bytes and back: one msgpack array `[type number, field…]` per message, one encoding per message.

Invariants: whatever decodes, encodes to the very same bytes; nothing outside the named limits is ever allocated; every
failure to decode is a MalformedInput (LimitExceeded where a limit was passed), a fault of the peer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgpack  # type: ignore[import-untyped]

from protocol.errors import InvalidValue, LimitExceeded, MalformedInput
from protocol.messages import (
    TEXT_LENGTH_MAX,
    CloseDisk,
    Credit,
    DiskOpened,
    Frame,
    Goodbye,
    Hello,
    Message,
    OpenDisk,
    Positions,
    Refusal,
    Tick,
    Welcome,
)
from protocol.vocabulary import Bookmark, ChangeSetEnd, Compression, Consistency, check_identifier

HEADER_BYTES_MAX: Final = 4096
"""Two text fields of TEXT_LENGTH_MAX and a handful of integers fit one and a half times."""

ARRAY_LENGTH_MAX: Final = 16
IDENTIFIER_BYTES: Final = 16

CONSISTENCY_NUMBERS: Final = {
    Consistency.UNSETTLED: 0,
    Consistency.CRASH: 1,
    Consistency.FILE_SYSTEM: 2,
    Consistency.APPLICATION: 3,
}
_CONSISTENCIES: Final = {number: consistency for consistency, number in CONSISTENCY_NUMBERS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """How one field travels. decode raises MalformedInput (or lets the value's own InvalidValue through)."""

    encode: Callable[[Any], object]
    decode: Callable[[object, str], Any]


def _malformed(what: str, reason: str) -> MalformedInput:
    return MalformedInput(what=what, reason=reason)


def _same(value: object) -> object:
    return value


def _integer(value: object, what: str) -> int:
    if type(value) is not int:
        raise _malformed(what, "must be an integer")
    return value


def _boolean(value: object, what: str) -> bool:
    if type(value) is not bool:
        raise _malformed(what, "must be a boolean")
    return value


def _text(value: object, what: str) -> str:
    if type(value) is not str:
        raise _malformed(what, "must be text")
    return value


def _identifier(value: object, what: str) -> str:
    if type(value) is not bytes or len(value) != IDENTIFIER_BYTES:
        raise _malformed(what, f"must be {IDENTIFIER_BYTES} bytes")
    return value.hex()


def _encode_identifier(value: str) -> bytes:
    return bytes.fromhex(check_identifier(value, "identifier"))


def _compression(value: object, what: str) -> Compression:
    number = _integer(value, what)
    if number not in Compression.__members__.values():
        raise _malformed(what, f"unknown compression {number}")
    return Compression(number)


def _array(value: object, what: str, length: int) -> tuple[object, ...]:
    if type(value) is not tuple or len(value) != length:
        raise _malformed(what, f"must be an array of {length}")
    return value


def _encode_end(end: ChangeSetEnd) -> object:
    bookmark = end.bookmark
    marked = None if bookmark is None else (_encode_identifier(bookmark.point), bookmark.instant_ns)
    return (CONSISTENCY_NUMBERS[end.consistency], end.copy_in_cursor_bytes, marked)


def _end(value: object, what: str) -> ChangeSetEnd:
    number, cursor, marked = _array(value, what, 3)
    consistency = _CONSISTENCIES.get(_integer(number, "consistency"))
    if consistency is None:
        raise _malformed("consistency", f"unknown number {number}")
    bookmark = None
    if marked is not None:
        point, instant = _array(marked, "bookmark", 2)
        bookmark = Bookmark(point=_identifier(point, "point"), instant_ns=_integer(instant, "instant_ns"))  # type: ignore[arg-type]
    return ChangeSetEnd(
        consistency=consistency,
        copy_in_cursor_bytes=None if cursor is None else _integer(cursor, "copy_in_cursor_bytes"),
        bookmark=bookmark,
    )


def _optional(kind: _Kind) -> _Kind:
    return _Kind(
        encode=lambda value: None if value is None else kind.encode(value),
        decode=lambda value, what: None if value is None else kind.decode(value, what),
    )


_INTEGER = _Kind(encode=_same, decode=_integer)
_BOOLEAN = _Kind(encode=_same, decode=_boolean)
_TEXT = _Kind(encode=_same, decode=_text)
_IDENTIFIER = _Kind(encode=_encode_identifier, decode=_identifier)
_COMPRESSION = _Kind(encode=int, decode=_compression)
_END = _Kind(encode=_encode_end, decode=_end)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """A message type's number and its fields in the order of the array."""

    number: int
    message: Callable[..., Message]
    fields: tuple[tuple[str, _Kind], ...]


def _layout(number: int, message: Callable[..., Message], **fields: _Kind) -> _Layout:
    return _Layout(number=number, message=message, fields=tuple(fields.items()))


_LAYOUTS: Final = (
    _layout(1, Hello, wire_version_min=_INTEGER, wire_version_max=_INTEGER, agent_version=_TEXT, boot_id=_TEXT),
    _layout(2, Welcome, wire_version=_INTEGER, process_server=_TEXT, idle_seconds_max=_INTEGER),
    _layout(
        3,
        OpenDisk,
        channel=_INTEGER,
        disk=_IDENTIFIER,
        epoch=_INTEGER,
        acknowledged_sequence=_INTEGER,
        wants_new_epoch=_BOOLEAN,
    ),
    _layout(
        4,
        DiskOpened,
        channel=_INTEGER,
        epoch=_INTEGER,
        parent_epoch=_INTEGER,
        parent_sequence=_INTEGER,
        durable_sequence=_INTEGER,
        committed_sequence=_INTEGER,
        copy_in_cursor_bytes=_optional(_INTEGER),
    ),
    _layout(
        5,
        Frame,
        channel=_INTEGER,
        epoch=_INTEGER,
        sequence=_INTEGER,
        frame_number=_INTEGER,
        extent_count=_INTEGER,
        raw_bytes=_INTEGER,
        payload_bytes=_INTEGER,
        compression=_COMPRESSION,
        end=_optional(_END),
    ),
    _layout(6, Positions, channel=_INTEGER, epoch=_INTEGER, durable_sequence=_INTEGER, committed_sequence=_INTEGER),
    _layout(7, Credit, total_bytes=_INTEGER),
    _layout(8, Tick, instant_ns=_optional(_INTEGER)),
    _layout(9, CloseDisk, channel=_INTEGER, code=_TEXT, detail=_TEXT, is_retryable=_BOOLEAN),
    _layout(10, Refusal, code=_TEXT, detail=_TEXT, is_retryable=_BOOLEAN),
    _layout(11, Goodbye, reason=_TEXT),
)
_BY_NUMBER: Final = {layout.number: layout for layout in _LAYOUTS}
_BY_MESSAGE: Final = {layout.message: layout for layout in _LAYOUTS}


def encode_header(message: Message) -> bytes:
    """The header of `message`: at most HEADER_BYTES_MAX bytes, the only encoding that decode_header() takes."""
    layout = _BY_MESSAGE[type(message)]
    values = [layout.number, *(kind.encode(getattr(message, name)) for name, kind in layout.fields)]
    encoded: bytes = msgpack.packb(values, use_bin_type=True)
    return encoded


def decode_header(data: bytes | bytearray | memoryview) -> Message:
    """The message of exactly these bytes. Raises MalformedInput, LimitExceeded."""
    if len(data) > HEADER_BYTES_MAX:
        raise LimitExceeded(what="header length", value=len(data), limit=HEADER_BYTES_MAX)
    values = _unpack(data)
    layout = _BY_NUMBER.get(_integer(values[0], "message type"))
    if layout is None:
        raise _malformed("message", f"unknown type {values[0]}")
    name = layout.message.__name__
    if len(values) != len(layout.fields) + 1:
        raise _malformed(name, f"has {len(values) - 1} fields, not {len(layout.fields)}")
    try:
        message = layout.message(
            **{
                field: kind.decode(value, f"{name}.{field}")
                for (field, kind), value in zip(layout.fields, values[1:], strict=True)
            }
        )
    except InvalidValue as error:
        raise _malformed(name, str(error)) from error
    if encode_header(message) != data:
        raise _malformed(name, "not in canonical form")
    return message


def _unpack(data: bytes | bytearray | memoryview) -> tuple[object, ...]:
    try:
        values = msgpack.unpackb(
            data,
            raw=False,
            use_list=False,
            strict_map_key=True,
            max_str_len=TEXT_LENGTH_MAX,
            max_bin_len=IDENTIFIER_BYTES,
            max_array_len=ARRAY_LENGTH_MAX,
            max_map_len=0,
            max_ext_len=0,
        )
    # why: msgpack tells every kind of bad input by a ValueError or an UnpackException, and nothing else by either
    except (ValueError, msgpack.UnpackException) as error:
        raise _malformed("header", str(error) or type(error).__name__) from error
    if type(values) is not tuple or not values:
        raise _malformed("header", "must be an array that starts with the message type")
    return values
