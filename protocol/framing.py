"""Messages in a stream of bytes: `u32 header length | u32 body length | header | body`, both lengths little-endian.

Sans-IO. Invariants: the reader says where the next bytes belong, so a transport decrypts straight into the header or
into a pooled body buffer; no buffer is asked for before the header was decoded and its body length found right; bytes
of two messages never meet in one buffer.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from protocol.codec import HEADER_BYTES_MAX, decode_header, encode_header
from protocol.errors import LimitExceeded, MalformedInput
from protocol.messages import Frame, Message
from protocol.vocabulary import EXTENT_DTYPE, FRAME_EXTENTS_MAX, FRAME_RAW_BYTES_MAX

EXTENT_ROW_BYTES: Final = EXTENT_DTYPE.itemsize
BODY_BYTES_MAX: Final = FRAME_EXTENTS_MAX * EXTENT_ROW_BYTES + FRAME_RAW_BYTES_MAX
"""The longest extent table and the longest payload. A payload never exceeds its raw length: what does not shrink goes
raw."""

_PREFIX: Final = struct.Struct("<II")
PREFIX_BYTES: Final = _PREFIX.size


def body_bytes_of(message: Message) -> int:
    """The length of the body that travels behind `message`; only frames have one."""
    if isinstance(message, Frame):
        return message.extent_count * EXTENT_ROW_BYTES + message.payload_bytes
    return 0


def encode_start(message: Message) -> bytes:
    """Everything of `message` but its body: prefix and header. The body_bytes_of(message) bytes of the body follow."""
    header = encode_header(message)
    return _PREFIX.pack(len(header), body_bytes_of(message)) + header


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyWanted:
    """The reader needs a buffer of at least body_bytes for the body of `message`: hand it to provide_body()."""

    message: Message
    body_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """A whole message. `body` is exactly the body, in the buffer that provide_body() was given; empty without one."""

    message: Message
    body: memoryview


ReadEvent = BodyWanted | Assembled
_NO_BODY: Final = memoryview(b"")


class FrameReader:
    """Turns received bytes into messages. One loop: write into get_buffer(), tell buffer_updated(), act on what it
    returns.

    After an error the reader is done: the stream has no meaning any more. body_bytes_max: 0 for a side that gets no
    frames.
    """

    def __init__(self, *, body_bytes_max: int = BODY_BYTES_MAX) -> None:
        self._body_bytes_max = body_bytes_max
        self._start = bytearray(HEADER_BYTES_MAX)
        self._start_view = memoryview(self._start)
        self._message: Message | None = None
        self._is_body_wanted = False
        self._begin(PREFIX_BYTES, is_prefix=True)

    def _begin(self, length: int, *, is_prefix: bool) -> None:
        self._is_prefix = is_prefix
        self._target = self._start_view[:length]
        self._filled = 0

    @property
    def is_body_wanted(self) -> bool:
        return self._is_body_wanted

    @property
    def is_between_messages(self) -> bool:
        """Whether the stream may end here without cutting a message."""
        return self._is_prefix and self._filled == 0

    def get_buffer(self) -> memoryview:
        """Where the next bytes go, at least one. Must not be called while a body buffer is wanted."""
        if self._is_body_wanted:
            raise RuntimeError("a body buffer is wanted; nothing can be read before provide_body()")
        return self._target[self._filled :]

    def buffer_updated(self, count: int) -> ReadEvent | None:
        """`count` bytes were written to the front of get_buffer(). Returns what they completed, if anything.

        Raises MalformedInput, LimitExceeded.
        """
        self._filled += count
        if self._filled < len(self._target):
            return None
        if self._is_prefix:
            self._read_prefix()
            return None
        if self._message is None:
            return self._read_header()
        return self._finish(self._message, self._target)

    def provide_body(self, buffer: memoryview) -> None:
        """The answer to BodyWanted: a writable buffer of at least so many bytes, untouched by others until
        Assembled."""
        if not self._is_body_wanted:
            raise RuntimeError("no body buffer is wanted")
        if len(buffer) < self._body_bytes:
            raise RuntimeError(f"a body of {self._body_bytes} bytes does not fit a buffer of {len(buffer)}")
        self._is_body_wanted = False
        self._target = buffer[: self._body_bytes]
        self._filled = 0

    def _read_prefix(self) -> None:
        header_bytes, self._body_bytes = _PREFIX.unpack(self._target)
        if header_bytes > HEADER_BYTES_MAX:
            raise LimitExceeded(what="header length", value=header_bytes, limit=HEADER_BYTES_MAX)
        if self._body_bytes > self._body_bytes_max:
            raise LimitExceeded(what="body length", value=self._body_bytes, limit=self._body_bytes_max)
        if header_bytes == 0:
            raise MalformedInput(what="message", reason="without a header")
        self._begin(header_bytes, is_prefix=False)

    def _read_header(self) -> ReadEvent:
        message = decode_header(bytes(self._target))
        expected = body_bytes_of(message)
        if self._body_bytes != expected:
            raise MalformedInput(
                what=type(message).__name__, reason=f"has a body of {self._body_bytes} bytes, not {expected}"
            )
        if expected == 0:
            return self._finish(message, _NO_BODY)
        self._message = message
        self._is_body_wanted = True
        return BodyWanted(message=message, body_bytes=expected)

    def _finish(self, message: Message, body: memoryview) -> Assembled:
        self._message = None
        self._begin(PREFIX_BYTES, is_prefix=True)
        return Assembled(message=message, body=body)
