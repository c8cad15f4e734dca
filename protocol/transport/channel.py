"""`Channel`: whole messages between an agent and a process server over TLS; `connect` makes one, `listen` takes them.

Invariants: a channel exists only after both certificates were verified and the peer's vault and role were found right,
and no longer than the peer's certificate is valid (an expired one is on no list of revoked certificates any more);
connections in the middle of their handshake are bounded in number and in time; a peer that is refused hears why.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

from typing_extensions import Buffer

from protocol.errors import (
    CannotListen,
    CertificateRefused,
    ConnectionLost,
    DeadlineExceeded,
    LimitExceeded,
    NotPermitted,
    PortTaken,
    ReplicationError,
)
from protocol.messages import Message, Refusal
from protocol.transport.buffers import BufferLease, BufferPool
from protocol.transport.byte_channel import ByteChannel, Received
from protocol.transport.tls import (
    IdentityContext,
    certificate_serial_of,
    check_peer,
    expiry_seconds_of,
    identity_of,
)
from protocol.transport.tls_stream import TlsStream
from protocol.vocabulary import PeerIdentity, Role

__all__ = ["BufferLease", "BufferPool", "ByteChannel", "Channel", "Listener", "Received", "connect", "listen"]

CONNECT_SECONDS_MAX: Final = 10.0
"""Name resolution and TCP."""
HANDSHAKE_SECONDS_MAX: Final = 10.0
CONNECTIONS_MAX: Final = 1024
"""Accepted at one time by one listener, handshakes included. Whoever comes then is cut at once and tries again
later."""
ACCEPT_BACKLOG: Final = 128

_log = logging.getLogger(__name__)
_now_seconds = time.time


class Channel(Protocol):
    """One end of an established connection. Errors of every method are ReplicationErrors; none is fatal to anything
    else.

    After any error close() it; it cannot be used again.
    """

    @property
    def peer(self) -> PeerIdentity:
        """From the verified certificate; the only identity there is."""
        ...

    @property
    def certificate_serial(self) -> str:
        """The peer certificate's serial number, upper-case hexadecimal, to be held against the revoked list."""
        ...

    def set_idle_seconds_max(self, seconds: float) -> None:
        """What the welcome said: that long without a byte of the peer ends the connection with DeadlineExceeded."""
        ...

    async def send(self, message: Message, body: Sequence[Buffer] = ()) -> None:
        """Writes a message and its body, whose parts follow each other; waits while the peer does not read.

        On return the buffers are the caller's again, and the message is on its way, no more. Several tasks may send;
        messages do not mix. Cancelled in the middle of a body, it gives the connection up. Raises ConnectionLost,
        DeadlineExceeded, CertificateRefused; ValueError for a body that is not as long as the message says.
        """
        ...

    async def receive(self) -> Received:
        """The next message; release() it when done with its body. One task at a time; cancelling it loses nothing.

        Raises what ended the connection, after the messages that came before: ConnectionLost, DeadlineExceeded (the
        peer was silent too long), MalformedInput (the peer may still be sent a Refusal), CertificateRefused,
        TlsFault.
        """
        ...

    async def close(self) -> None:
        """Orderly end: what was sent still arrives if the peer reads it. Received messages that nobody took are
        released."""
        ...

    def abort(self) -> None:
        """At once; nothing more is sent or received."""
        ...


async def connect(
    host: str,
    port: int,
    *,
    tls: IdentityContext,
    expected_role: Role = Role.PROCESS_SERVER,
    pool: BufferPool | None = None,
) -> Channel:
    """A channel to a process server, both certificates verified. pool: only for a side that receives frames.

    Raises ConnectionLost (nobody there; retryable), DeadlineExceeded, CertificateRefused, NotPermitted (another vault
    or role), TlsFault. TLS 1.3 lets the client finish first: a server that refuses our certificate shows itself by
    CertificateRefused from the channel's first receive().
    """
    address = f"{host}:{port}"
    loop = asyncio.get_running_loop()
    make_stream = functools.partial(TlsStream, tls, is_server=False, peer=address)
    try:
        async with asyncio.timeout(CONNECT_SECONDS_MAX):
            _, stream = await loop.create_connection(make_stream, host, port)
    except TimeoutError as error:
        raise DeadlineExceeded(what=f"connecting to {address}", seconds=CONNECT_SECONDS_MAX) from error
    except OSError as error:
        raise ConnectionLost(peer=address, reason=error.strerror or str(error)) from error
    return await _open_channel(stream, tls=tls, roles=frozenset({expected_role}), pool=pool)


async def _open_channel(
    stream: TlsStream, *, tls: IdentityContext, roles: frozenset[Role], pool: BufferPool | None
) -> Channel:
    """Waits for the handshake and checks the peer. After an error nothing of the connection is left to close."""
    try:
        async with asyncio.timeout(HANDSHAKE_SECONDS_MAX):
            await stream.established
    except TimeoutError as error:
        stream.abort()
        raise DeadlineExceeded(what=f"the handshake with {stream.peer}", seconds=HANDSHAKE_SECONDS_MAX) from error
    except asyncio.CancelledError:
        stream.abort()
        raise
    try:
        peer = identity_of(stream.ssl_object)
    except ReplicationError:
        stream.close()
        raise
    channel = ByteChannel(peer=peer, pool=pool, certificate_serial=certificate_serial_of(stream.ssl_object))
    stream.start(channel)
    try:
        check_peer(peer, own=tls.identity, expected_roles=roles)
    except NotPermitted as error:
        await _refuse(channel, error)
        raise
    expired = CertificateRefused(subject=peer.uri, reason="it expired while it was connected")
    channel.give_up_after(expiry_seconds_of(stream.ssl_object) - _now_seconds(), expired)
    return channel


async def _refuse(channel: Channel, error: ReplicationError) -> None:
    try:
        await channel.send(Refusal.from_error(error))
    except ReplicationError as failure:
        _log.info("a refused peer did not wait for the reason: %s", failure)
    finally:
        await channel.close()


class _AcceptedStream(TlsStream):
    """The server's end: tells its listener when the raw connection stands."""

    def __init__(self, listener: Listener) -> None:
        super().__init__(listener.context, is_server=True, peer="a new peer")
        self._listener = listener
        self.context = listener.context

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        address = transport.get_extra_info("peername")
        self.peer = f"{address[0]}:{address[1]}" if isinstance(address, tuple) else str(address)
        super().connection_made(transport)
        self._listener.accept(self)


class Listener:
    """An open port. Its connections belong to the task group that was given to listen() and outlive close()."""

    def __init__(
        self,
        *,
        tls: IdentityContext,
        pool: BufferPool,
        on_channel: Callable[[Channel], Awaitable[None]],
        task_group: asyncio.TaskGroup,
        expected_roles: frozenset[Role],
        on_failed: Callable[[str, ReplicationError], None],
    ) -> None:
        self.context = tls
        self.port = 0
        self._pool = pool
        self._on_channel = on_channel
        self._task_group = task_group
        self._expected_roles = expected_roles
        self._on_failed = on_failed
        self._server: asyncio.Server | None = None
        self._connections = 0

    @property
    def connections(self) -> int:
        """Accepted and not yet over, handshakes included, for metrics."""
        return self._connections

    def use_context(self, tls: IdentityContext) -> None:
        """New connections use `tls`: a renewed certificate, a newer revocation list. Live ones stay as they are."""
        self.context = tls

    async def close(self) -> None:
        """No connection is accepted any more, and the port is free."""
        if self._server is not None:
            self._server.close()
            # why: asyncio frees the port only in the loop's next round
            await asyncio.sleep(0)

    async def open(self, host: str, port: int) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(lambda: _AcceptedStream(self), host, port, backlog=ACCEPT_BACKLOG)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortTaken(host=host, port=port) from error
            raise CannotListen(host=host, port=port, reason=error.strerror or str(error)) from error
        self.port = self._server.sockets[0].getsockname()[1]

    def accept(self, stream: _AcceptedStream) -> None:
        if self._connections >= CONNECTIONS_MAX:
            stream.abort()
            self._on_failed(
                stream.peer, LimitExceeded(what="connections", value=self._connections + 1, limit=CONNECTIONS_MAX)
            )
            return
        serving = self._serve(stream)
        try:
            self._task_group.create_task(serving)
        except RuntimeError:
            # why: the service is ending, its group takes no more tasks; the agent comes back
            serving.close()
            stream.abort()
        else:
            self._connections += 1

    async def _serve(self, stream: _AcceptedStream) -> None:
        try:
            channel = await _open_channel(stream, tls=stream.context, roles=self._expected_roles, pool=self._pool)
            self._pool.join()
            try:
                await self._on_channel(channel)
            finally:
                await channel.close()
                self._pool.leave()
        except ReplicationError as error:
            self._on_failed(stream.peer, error)
        finally:
            self._connections -= 1


def _log_failure(address: str, error: ReplicationError) -> None:
    _log.warning("connection from %s ended: %s", address, error)


async def listen(
    host: str,
    port: int,
    *,
    tls: IdentityContext,
    pool: BufferPool,
    on_channel: Callable[[Channel], Awaitable[None]],
    task_group: asyncio.TaskGroup,
    expected_roles: frozenset[Role] = frozenset({Role.AGENT}),
    on_failed: Callable[[str, ReplicationError], None] = _log_failure,
) -> Listener:
    """Accepts connections on host:port (0: any free port, see Listener.port) and runs on_channel for each in
    `task_group`.

    The channel is closed when on_channel returns or raises. on_failed(address, error) hears of every handshake that
    failed, every peer that was refused, and every ReplicationError that on_channel let through; any other error is a
    defect and ends the group. Raises PortTaken, CannotListen.
    """
    listener = Listener(
        tls=tls,
        pool=pool,
        on_channel=on_channel,
        task_group=task_group,
        expected_roles=expected_roles,
        on_failed=on_failed,
    )
    await listener.open(host, port)
    return listener
