"""`ByteChannel`: messages over any ordered byte transport; over TLS in production, over memory in the simulation.

It is an asyncio.BufferedProtocol that speaks to the transport below it by no more than `ByteTransport`, so that
anything with those calls will do. Invariants: a message is sent whole or the connection is given up; received
messages wait in a bounded queue, beyond it reading stops; every body lies in a pooled buffer until its receiver
releases it; whatever ends the connection reaches receive() and send() as one typed error, after the messages that
arrived before it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from typing_extensions import Buffer

from protocol.errors import ConnectionLost, DeadlineExceeded, LimitExceeded, ReplicationError
from protocol.framing import Assembled, BodyWanted, FrameReader, body_bytes_of, encode_start
from protocol.messages import Message
from protocol.transport.buffers import BufferLease, BufferPool
from protocol.vocabulary import PeerIdentity

FIRST_MESSAGE_SECONDS_MAX: Final = 10.0
"""From the made connection to the peer's first whole message: hello or welcome. Nobody occupies a connection without
one."""
IDLE_SECONDS_DEFAULT: Final = 60.0
"""No byte for so long ends the connection; the welcome replaces it, see set_idle_seconds_max()."""
MESSAGE_SECONDS_MAX: Final = 300.0
"""A message that has begun is complete by then: a body of 1.1 MB at 30 kbit/s."""
CLOSE_SECONDS_MAX: Final = 5.0
"""How long close() waits for what was sent to leave and for the peer to agree."""

QUEUED_MESSAGES_MAX: Final = 64
QUEUED_BODIES_MAX: Final = 2
"""Received and not yet taken by receive(); one more is under way in the reader. Bounds what one connection holds of
the pool."""

JOINED_BYTES_MAX: Final = 16384
"""Small parts are joined up to one TLS record; anything longer is written from where it lies."""
DISCARDED_BYTES: Final = 65536
WRITE_BYTES_MAX: Final = 65536
"""The longest single write, so that the peer's backpressure is felt within a body."""


class ByteTransport(Protocol):
    """What a ByteChannel needs below it; asyncio's transports fit.

    The transport calls connection_made, then get_buffer → buffer_updated in turns, never get_buffer after
    pause_reading() until resume_reading(); pause_writing / resume_writing when its buffer is above / below its water
    marks; eof_received at most once; connection_lost exactly once, after close() too. write() must have taken the
    bytes on return: the caller reuses them.
    """

    def write(self, data: bytes | bytearray | memoryview, /) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def close(self) -> None:
        """Orderly: what was written still leaves."""
        ...

    def abort(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """One message. `body` stays as it is until release(), which whoever takes the message calls exactly when done
    with it."""

    message: Message
    body: memoryview
    lease: BufferLease | None = None

    def release(self) -> None:
        """Gives the body's buffer back; on the event loop's thread. No error without a body, or when called again."""
        if self.lease is not None:
            self.lease.release()


class ByteChannel(asyncio.BufferedProtocol):
    """One end of a connection as a `Channel`. Make it, then let the transport call connection_made(transport).

    peer, certificate_serial: who is at the other end, as the transport's maker verified it. pool: where bodies go;
    None for a side that gets no frames. Deadlines run on the loop's clock.
    """

    def __init__(
        self,
        *,
        peer: PeerIdentity,
        pool: BufferPool | None = None,
        certificate_serial: str = "",
        first_message_seconds_max: float = FIRST_MESSAGE_SECONDS_MAX,
        idle_seconds_max: float = IDLE_SECONDS_DEFAULT,
    ) -> None:
        self._peer = peer
        self._certificate_serial = certificate_serial
        self._pool = pool
        self._reader = FrameReader() if pool is not None else FrameReader(body_bytes_max=0)
        self._lease: BufferLease | None = None
        self._transport: ByteTransport | None = None
        self._loop = asyncio.get_running_loop()

        self._queue: deque[Received] = deque()
        self._queued_bodies = 0
        self._end: ReplicationError | None = None
        self._receiving_end: ReplicationError | None = None
        self._arrival: asyncio.Future[None] | None = None
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self._is_reading_paused = False

        self._send_lock = asyncio.Lock()
        self._is_writing_paused = False
        self._writable: asyncio.Future[None] | None = None

        self._first_message_seconds_max = first_message_seconds_max
        self._idle_seconds_max = idle_seconds_max
        self._timer: asyncio.TimerHandle | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._last_arrival = 0.0
        self._message_began: float | None = None
        self._is_first_message_due = True

    # Channel

    @property
    def peer(self) -> PeerIdentity:
        return self._peer

    @property
    def certificate_serial(self) -> str:
        return self._certificate_serial

    def set_idle_seconds_max(self, seconds: float) -> None:
        self._idle_seconds_max = seconds
        self._arm_timer()

    def give_up_after(self, seconds: float, error: ReplicationError) -> None:
        """Ends the connection with `error` then, whatever it is doing."""
        if self._end is None:
            self._expiry = self._loop.call_later(max(0.0, seconds), self._give_up, error)

    async def send(self, message: Message, body: Sequence[Buffer] = ()) -> None:
        parts = [memoryview(part).cast("B") for part in body]
        body_bytes = sum(len(part) for part in parts)
        if body_bytes != body_bytes_of(message):
            raise ValueError(f"a body of {body_bytes} bytes for a message that states {body_bytes_of(message)}")
        async with self._send_lock:
            await self._wait_until_writable()
            start = bytearray(encode_start(message))
            while parts and len(start) + len(parts[0]) <= JOINED_BYTES_MAX:
                start += parts.pop(0)
            try:
                self._write(start)
                for part in parts:
                    for offset in range(0, len(part), WRITE_BYTES_MAX):
                        await self._wait_until_writable()
                        self._write(part[offset : offset + WRITE_BYTES_MAX])
            except asyncio.CancelledError:
                # why: half a message is out; nothing that follows it could be understood
                self._give_up(ConnectionLost(peer=self._peer.uri, reason="cancelled in the middle of a message"))
                raise
            await self._wait_until_writable()

    async def receive(self) -> Received:
        if self._arrival is not None:
            raise RuntimeError("receive() is called by one task at a time")
        while not self._queue:
            if self._receiving_end is not None:
                raise self._receiving_end
            self._arrival = self._loop.create_future()
            try:
                await self._arrival
            finally:
                self._arrival = None
        received = self._queue.popleft()
        if received.lease is not None:
            self._queued_bodies -= 1
        self._resume_reading_if_due()
        return received

    async def close(self) -> None:
        self._finish(ConnectionLost(peer=self._peer.uri, reason="closed on this side"))
        self._drop_queue()
        if self._transport is None or self._closed.done():
            return
        self._transport.close()
        try:
            async with asyncio.timeout(CLOSE_SECONDS_MAX):
                await asyncio.shield(self._closed)
        except TimeoutError:
            self._transport.abort()
        except asyncio.CancelledError:
            self._transport.abort()
            raise

    def abort(self) -> None:
        self._give_up(ConnectionLost(peer=self._peer.uri, reason="aborted on this side"))
        self._drop_queue()

    # what the transport calls

    def connection_made(self, transport: ByteTransport) -> None:  # type: ignore[override]
        self._transport = transport
        self._last_arrival = self._loop.time()
        self._message_began = self._last_arrival
        self._arm_timer()

    def get_buffer(self, sizehint: int) -> memoryview:
        # why: after the end the reader's buffer may be somebody else's already
        return self._reader.get_buffer() if self._receiving_end is None else memoryview(bytearray(DISCARDED_BYTES))

    def buffer_updated(self, nbytes: int) -> None:
        self._last_arrival = self._loop.time()
        if self._message_began is None:
            self._message_began = self._last_arrival
        if self._receiving_end is not None:
            return
        try:
            event = self._reader.buffer_updated(nbytes)
            if isinstance(event, BodyWanted):
                self._provide_body(event)
            elif isinstance(event, Assembled):
                self._deliver(event)
        except ReplicationError as error:
            self._pause_reading()
            self._stop_receiving(error)

    def pause_writing(self) -> None:
        self._is_writing_paused = True

    def resume_writing(self) -> None:
        self._is_writing_paused = False
        self._wake_writer()

    def eof_received(self) -> bool:
        self._finish(ConnectionLost(peer=self._peer.uri, reason=self._describe_end("closed by the peer")))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if isinstance(exc, ReplicationError):
            self._finish(exc)
        else:
            reason = self._describe_end(str(exc) if exc is not None else "closed")
            self._finish(ConnectionLost(peer=self._peer.uri, reason=reason))
        if not self._closed.done():
            self._closed.set_result(None)

    # receiving

    def _provide_body(self, wanted: BodyWanted) -> None:
        if self._pool is None or wanted.body_bytes > self._pool.bytes_each:
            limit = 0 if self._pool is None else self._pool.bytes_each
            raise LimitExceeded(what="body length", value=wanted.body_bytes, limit=limit)
        lease = self._pool.take()
        if lease is None:
            self._pause_reading()
            self._pool.wait(self._take_lease)
        else:
            self._use_lease(lease)

    def _take_lease(self, lease: BufferLease) -> None:
        self._use_lease(lease)
        self._resume_reading_if_due()

    def _use_lease(self, lease: BufferLease) -> None:
        self._lease = lease
        self._reader.provide_body(lease.view)

    def _deliver(self, assembled: Assembled) -> None:
        self._message_began = None
        if self._is_first_message_due:
            self._is_first_message_due = False
            self._arm_timer()
        lease, self._lease = self._lease, None
        self._queue.append(Received(message=assembled.message, body=assembled.body, lease=lease))
        if lease is not None:
            self._queued_bodies += 1
        if len(self._queue) >= QUEUED_MESSAGES_MAX or self._queued_bodies >= QUEUED_BODIES_MAX:
            self._pause_reading()
        self._wake_receiver()

    def _pause_reading(self) -> None:
        if not self._is_reading_paused and self._transport is not None:
            self._is_reading_paused = True
            self._transport.pause_reading()

    def _resume_reading_if_due(self) -> None:
        is_full = len(self._queue) >= QUEUED_MESSAGES_MAX or self._queued_bodies >= QUEUED_BODIES_MAX
        if not self._is_reading_paused or is_full or self._receiving_end is not None or self._reader.is_body_wanted:
            return
        self._is_reading_paused = False
        self._last_arrival = self._loop.time()
        if self._message_began is not None:
            self._message_began = self._last_arrival
        if self._transport is not None:
            self._transport.resume_reading()

    def _wake_receiver(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    def _drop_queue(self) -> None:
        while self._queue:
            self._queue.popleft().release()
        self._queued_bodies = 0

    # sending

    def _write(self, data: bytearray | memoryview) -> None:
        if self._end is not None:
            raise self._end
        assert self._transport is not None
        self._transport.write(data)

    async def _wait_until_writable(self) -> None:
        """Returns when the transport takes more. Raises what ended the connection, DeadlineExceeded if the peer takes
        nothing."""
        while self._end is None and self._is_writing_paused:
            self._writable = self._loop.create_future()
            left_before = self._bytes_waiting()
            try:
                async with asyncio.timeout(self._idle_seconds_max):
                    await self._writable
            except TimeoutError:
                if self._bytes_waiting() >= left_before:
                    self._give_up(DeadlineExceeded(what="the peer's reading", seconds=self._idle_seconds_max))
            finally:
                self._writable = None
        if self._end is not None:
            raise self._end

    def _bytes_waiting(self) -> int:
        size = getattr(self._transport, "get_write_buffer_size", None)
        return int(size()) if size is not None else 0

    def _wake_writer(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)

    # the end

    def _describe_end(self, reason: str) -> str:
        return reason if self._reader.is_between_messages else f"{reason} in the middle of a message"

    def _give_up(self, error: ReplicationError) -> None:
        self._finish(error)
        if self._transport is not None:
            self._transport.abort()

    def _finish(self, error: ReplicationError) -> None:
        """From here on nothing is read or written; the first reason stays."""
        if self._end is not None:
            return
        self._end = error
        if self._expiry is not None:
            self._expiry.cancel()
        self._stop_receiving(error)
        self._wake_writer()

    def _stop_receiving(self, error: ReplicationError) -> None:
        """What arrived before is still delivered, then `error`. Sending may go on: the peer is owed the reason."""
        if self._receiving_end is not None:
            return
        self._receiving_end = error
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._pool is not None:
            self._pool.stop_waiting(self._take_lease)
        if self._lease is not None:
            self._lease.release()
            self._lease = None
        self._wake_receiver()

    # deadlines

    def _arm_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if self._receiving_end is None and self._transport is not None:
            self._timer = self._loop.call_at(self._next_deadline()[0], self._check_deadlines)

    def _next_deadline(self) -> tuple[float, str, float]:
        """When, what, and how many seconds it was given. Time in which this side does not read counts for nobody."""
        idle = (self._last_arrival + self._idle_seconds_max, "a byte of the peer", self._idle_seconds_max)
        if self._is_first_message_due:
            limit = self._first_message_seconds_max
            return ((self._message_began or 0.0) + limit, "the peer's first message", limit)
        if self._message_began is not None:
            return min(idle, (self._message_began + MESSAGE_SECONDS_MAX, "one message", MESSAGE_SECONDS_MAX))
        return idle

    def _check_deadlines(self) -> None:
        self._timer = None
        deadline, what, seconds = self._next_deadline()
        now = self._loop.time()
        if self._is_reading_paused:
            self._timer = self._loop.call_at(now + self._idle_seconds_max, self._check_deadlines)
        elif now < deadline:
            self._timer = self._loop.call_at(deadline, self._check_deadlines)
        else:
            self._give_up(DeadlineExceeded(what=what, seconds=seconds))
