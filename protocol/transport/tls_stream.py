"""TLS between a raw asyncio transport and a BufferedProtocol: the protocol sees a plain transport.

asyncio's and uvloop's own TLS drop what they have received but not yet handed over when the TCP end comes with it,
unless the protocol takes it all in one buffer: a peer's last words would be lost. This layer drains first. It also
closes by half, so that the last message is not destroyed by a reset when the peer is still sending, and it reports
failures as our own errors (docs/decisions/0005).

Invariants: the application above hears connection_made once, after the handshake, and connection_lost once; decrypted
bytes go straight into its buffer; nothing is delivered between pause_reading and resume_reading; write() has
encrypted on return.
"""

from __future__ import annotations

import asyncio
import enum
import ssl
from typing import Any, Final, cast

from protocol.errors import ConnectionLost, ReplicationError
from protocol.transport.tls import tls_error

CIPHERTEXT_BYTES: Final = 262144
"""Read at once from the socket."""
WRITE_HIGH_WATER_BYTES: Final = 1048576
WRITE_LOW_WATER_BYTES: Final = 262144
"""Encrypted and not yet taken by the socket; above the first the application pauses until it fell to the second."""
LINGER_SECONDS_MAX: Final = 2.0
"""After our end was sent the peer has so long to close too; until then what it still sends is discarded."""


class _State(enum.Enum):
    HANDSHAKING = "handshaking"
    ESTABLISHED = "established"
    CLOSING = "closing"
    """Nothing more is delivered or taken; the raw connection is on its way out."""
    LOST = "lost"


class TlsStream(asyncio.BufferedProtocol):
    """Made for one raw connection. Await `established`, look at `ssl_object`, then start(application)."""

    def __init__(self, context: ssl.SSLContext, *, is_server: bool, peer: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.ssl_object: Final = context.wrap_bio(self._incoming, self._outgoing, server_side=is_server)
        self.peer = peer
        self.established: asyncio.Future[None] = self._loop.create_future()
        """Done after the handshake; otherwise its error: CertificateRefused, TlsFault or ConnectionLost."""
        self._ciphertext = memoryview(bytearray(CIPHERTEXT_BYTES))
        self._raw: asyncio.Transport | None = None
        self._application: asyncio.BufferedProtocol | None = None
        self._state = _State.HANDSHAKING
        self._is_reading_paused = False
        self._is_raw_paused = False
        self._is_raw_ended = False
        self._is_raw_lost = False
        self._error: Exception | None = None
        self._linger_timer: asyncio.TimerHandle | None = None

    def start(self, application: asyncio.BufferedProtocol) -> None:
        """Hands the established stream to `application`; what arrived meanwhile, or its end, follows at once."""
        self._application = application
        application.connection_made(self)  # type: ignore[arg-type]
        self._loop.call_soon(self._deliver)

    # what the application calls: a transport

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._state is not _State.ESTABLISHED or self._is_raw_lost:
            return
        try:
            self.ssl_object.write(data)
        except ssl.SSLError as error:
            self._fail(tls_error(error, peer=self.peer))
        else:
            self._flush()

    def get_write_buffer_size(self) -> int:
        return self._raw.get_write_buffer_size() if self._raw is not None else 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "ssl_object":
            return self.ssl_object
        return self._raw.get_extra_info(name, default) if self._raw is not None else default

    def is_closing(self) -> bool:
        return self._state in (_State.CLOSING, _State.LOST)

    def pause_reading(self) -> None:
        self._is_reading_paused = True
        self._pause_raw(True)

    def resume_reading(self) -> None:
        self._is_reading_paused = False
        self._pause_raw(False)
        self._loop.call_soon(self._deliver)

    def close(self) -> None:
        """Sends close_notify and our end, then discards what comes until the peer ends too, LINGER_SECONDS_MAX at
        most."""
        if self._state is _State.HANDSHAKING:
            self.abort()
        elif self._state is _State.ESTABLISHED and self._is_raw_lost:
            self._loop.call_soon(self._tell_lost)
        elif self._state is _State.ESTABLISHED:
            try:
                self.ssl_object.unwrap()
            except ssl.SSLError:
                pass  # why: it wants the peer's close_notify, for which lingering waits; ours is in the outgoing bytes
            self._linger()

    def abort(self) -> None:
        if self._is_raw_lost:
            self._loop.call_soon(self._tell_lost)
        elif self._raw is not None and self._state is not _State.LOST:
            self._state = _State.CLOSING
            self._raw.abort()

    # what the raw transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        raw = cast(asyncio.Transport, transport)
        self._raw = raw
        raw.set_write_buffer_limits(high=WRITE_HIGH_WATER_BYTES, low=WRITE_LOW_WATER_BYTES)
        self._shake_hands()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._ciphertext

    def buffer_updated(self, nbytes: int) -> None:
        if self._state is _State.CLOSING:
            return
        self._incoming.write(self._ciphertext[:nbytes])
        if self._state is _State.HANDSHAKING:
            self._shake_hands()
        else:
            self._deliver()

    def eof_received(self) -> bool:
        self._is_raw_ended = True
        if self._state is _State.HANDSHAKING:
            self._refuse(ConnectionLost(peer=self.peer, reason="closed during the TLS handshake"))
        if self._state is _State.ESTABLISHED:
            self._deliver()
            return True
        return False

    def pause_writing(self) -> None:
        if self._application is not None:
            self._application.pause_writing()

    def resume_writing(self) -> None:
        if self._application is not None:
            self._application.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_raw_ended = self._is_raw_lost = True
        self._error = self._error or exc
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        if self._state is _State.HANDSHAKING:
            self._refuse(ConnectionLost(peer=self.peer, reason=str(exc or "closed during the TLS handshake")))
        if self._state is _State.ESTABLISHED:
            self._deliver()
        else:
            self._tell_lost()

    # between the two

    def _shake_hands(self) -> None:
        try:
            self.ssl_object.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
        except ssl.SSLError as error:
            self._refuse(tls_error(error, peer=self.peer))
        else:
            self._flush()
            self._state = _State.ESTABLISHED
            if not self.established.done():
                self.established.set_result(None)

    def _refuse(self, error: ReplicationError) -> None:
        """The handshake failed: the alert still goes out."""
        if not self.established.done():
            self.established.set_exception(error)
            # why: who waited for it may have given up already, and then its own error is the one that counts
            self.established.exception()
        self._error = error
        self._linger()

    def _deliver(self) -> None:
        """Decrypts into the application's buffers until nothing is left or it pauses; then the end, if it was
        reached."""
        if self._state is not _State.ESTABLISHED or self._application is None:
            return
        try:
            is_ended = self._drain(self._application)
        except ssl.SSLError as error:
            self._fail(tls_error(error, peer=self.peer))
            return
        if is_ended and self._state is _State.ESTABLISHED:
            self._application.eof_received()
            if self._is_raw_lost:
                self._tell_lost()
            else:
                self.close()

    def _drain(self, application: asyncio.BufferedProtocol) -> bool:
        """Returns whether all has been delivered and nothing will follow."""
        read = self.ssl_object.read
        while not self._is_reading_paused and self._state is _State.ESTABLISHED:
            buffer = cast(memoryview, application.get_buffer(-1))
            filled, wanted, count = 0, len(buffer), 1
            # why: asking first is several times cheaper than the exception that tells that nothing is there
            while count and filled < wanted and (self._incoming.pending or self.ssl_object.pending()):
                try:
                    count = read(wanted - filled, buffer[filled:])  # type: ignore[assignment]
                except ssl.SSLWantReadError:
                    break
                except ssl.SSLZeroReturnError:
                    count = 0
                filled += count
            if filled:
                application.buffer_updated(filled)
            if not count:
                return True
            if filled < wanted:
                return self._is_raw_ended
        return False

    def _flush(self) -> None:
        if self._outgoing.pending and self._raw is not None and not self._is_raw_lost:
            self._raw.write(self._outgoing.read())

    def _pause_raw(self, is_paused: bool) -> None:
        if self._raw is None or self._is_raw_paused == is_paused or self._is_raw_ended:
            return
        self._is_raw_paused = is_paused
        if is_paused:
            self._raw.pause_reading()
        else:
            self._raw.resume_reading()

    def _linger(self) -> None:
        self._state = _State.CLOSING
        self._flush()
        if self._raw is None or self._is_raw_lost:
            return
        if self._is_raw_ended or self._raw.is_closing():
            self._raw.close()
            return
        self._pause_raw(False)
        self._linger_timer = self._loop.call_later(LINGER_SECONDS_MAX, self._raw.abort)
        try:
            self._raw.write_eof()
        except OSError:
            # why: the peer has reset the connection, and the loop has not told yet
            self._raw.abort()

    def _fail(self, error: ReplicationError) -> None:
        """The established stream is broken, or the peer refused it by an alert."""
        self._error = error
        self._flush()
        self._state = _State.CLOSING
        if self._is_raw_lost:
            self._tell_lost()
        elif self._raw is not None:
            self._raw.close()

    def _tell_lost(self) -> None:
        if self._state is not _State.LOST:
            self._state = _State.LOST
            if self._application is not None:
                self._application.connection_lost(self._error)
