"""One connection to one process server, shared by the machine's disks, and made anew with growing pauses.

One task writes: control messages first, then frames in turn within the credit. A disk's trouble closes its channel,
never the connection; a lost connection ends its own task group and nothing else.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import structlog
from typing_extensions import Buffer

from mobility_agent.ports import Connect, DrawRandom
from protocol.control import ProcessServerAddress
from protocol.errors import (
    ConnectionLost,
    DeadlineExceeded,
    NotPermitted,
    PeerFault,
    RefusedByPeer,
    ReplicationError,
)
from protocol.framing import body_bytes_of
from protocol.messages import (
    WIRE_VERSION,
    CloseDisk,
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
from protocol.session import AgentSession
from protocol.transport.channel import Channel
from protocol.vocabulary import DiskId
from runtime.clock import Clock

GREETING_SECONDS_MAX: Final = 10.0
OPEN_SECONDS_MAX: Final = 60.0
CHANNEL_MAX: Final = 65535
STABLE_SECONDS: Final = 60.0
"""A connection that lived so long starts the pauses from the shortest again."""

log = structlog.get_logger(__name__)


class DiskListener(Protocol):
    """What a connection tells the owner of an open channel. Calls do not block."""

    def positions(self, message: Positions) -> None: ...

    def closed(self, error: RefusedByPeer) -> None: ...


class ConnectionListener(Protocol):
    """What an uplink tells every disk that is attached to it. Calls do not block."""

    def connected(self, connection: Connection) -> None: ...

    def disconnected(self, connection: Connection) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """Pauses between attempts, and how long a connection may make no progress."""

    reconnect_seconds_min: float
    reconnect_seconds_max: float
    progress_seconds_max: float


@dataclass(slots=True, kw_only=True)
class _Outgoing:
    message: Message
    body: Sequence[Buffer]
    done: asyncio.Future[None]
    release: Callable[[], None]


class Connection:
    """A greeted connection. Its run() ends when the connection does."""

    def __init__(self, channel: Channel, session: AgentSession, *, clock: Clock, idle_seconds_max: float) -> None:
        self.last_tick_ns: int | None = None
        self.started_seconds = clock.monotonic_seconds()
        self._channel = channel
        self._session = session
        self._clock = clock
        self._idle_seconds_max = idle_seconds_max
        self._control: deque[_Outgoing] = deque()
        self._frames: deque[_Outgoing] = deque()
        self._wake = asyncio.Event()
        self._next_channel = 0
        self._openings: dict[int, asyncio.Future[DiskOpened]] = {}
        self._listeners: dict[int, DiskListener] = {}
        self._sent_sequence: dict[int, int] = {}
        self._durable_sequence: dict[int, int] = {}
        self._progress_seconds = self.started_seconds
        self._ended: ReplicationError | None = None
        self._tick_heard = asyncio.Event()

    @property
    def certificate_serial(self) -> str:
        return self._channel.certificate_serial

    async def open_disk(
        self, disk: DiskId, listener: DiskListener, *, standing: tuple[int, int], anew: bool
    ) -> DiskOpened:
        """Asks where the disk's history stands. standing: (epoch, acknowledged sequence). Raises RefusedByPeer,
        DeadlineExceeded, ConnectionLost."""
        number = self._next_channel
        if number > CHANNEL_MAX:
            self.say_goodbye("this connection's channel numbers are used up")
            raise ConnectionLost(peer=self._channel.peer.uri, reason="its channel numbers are used up")
        self._next_channel += 1
        opening: asyncio.Future[DiskOpened] = asyncio.get_running_loop().create_future()
        # why: the connection may end while the request still waits to be sent; then nobody awaits the answer.
        opening.add_done_callback(_retrieve)
        self._openings[number] = opening
        self._listeners[number] = listener
        epoch, acknowledged = standing
        opened = False
        try:
            await self._post(
                OpenDisk(
                    channel=number,
                    disk=disk,
                    epoch=epoch,
                    acknowledged_sequence=acknowledged,
                    wants_new_epoch=anew,
                )
            )
            async with asyncio.timeout(OPEN_SECONDS_MAX):
                answer = await opening
            opened = True
        except TimeoutError as error:
            raise DeadlineExceeded(what=f"opening disk {disk}", seconds=OPEN_SECONDS_MAX) from error
        finally:
            self._openings.pop(number, None)
            if not opened:
                self.close_disk(number, code="withdrawn", detail="the agent no longer waits for it")
        return answer

    @property
    def is_out_of_credit(self) -> bool:
        """Whether a frame waits for more credit: the process server takes no more just now."""
        return bool(self._frames) and body_bytes_of(self._frames[0].message) > self._session.credit_bytes_available

    async def wait_for_tick(self, seconds_max: float) -> None:
        """Until the server's clock was heard on this connection, or the time is up."""
        try:
            async with asyncio.timeout(seconds_max):
                await self._tick_heard.wait()
        except TimeoutError:
            return

    async def send_frame(self, frame: Frame, body: Sequence[Buffer], release: Callable[[], None]) -> None:
        """Returns when the frame is on its way; waits for credit. release() is called when its buffers are free again,
        also when this is cancelled. Raises ConnectionLost."""
        await self._post(frame, body, release)

    def close_disk(self, channel: int, *, code: str, detail: str) -> None:
        """No more frames of this channel. Does nothing for a channel that is closed already."""
        if self._listeners.pop(channel, None) is None or self._ended is not None:
            return
        self._sent_sequence.pop(channel, None)
        self._durable_sequence.pop(channel, None)
        message = CloseDisk(channel=channel, code=code, detail=detail[:1024], is_retryable=True)
        self._enqueue(message, (), _nothing)

    def say_goodbye(self, reason: str) -> None:
        """Ends the connection in order, after what is queued before it."""
        if self._ended is None:
            self._enqueue(Goodbye(reason=reason), (), _nothing)

    async def run(self, *, progress_seconds_max: float) -> None:
        """Until the connection ends; always raises why."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._receive())
                group.create_task(self._send())
                group.create_task(self._keep_alive(progress_seconds_max))
        finally:
            self._end(ConnectionLost(peer=self._channel.peer.uri, reason="the connection ended"))

    def _end(self, error: ReplicationError) -> None:
        self._ended = error
        for waiting in [*self._control, *self._frames]:
            waiting.release()
            if not waiting.done.done():
                waiting.done.set_exception(error)
        self._control.clear()
        self._frames.clear()
        for opening in self._openings.values():
            if not opening.done():
                opening.set_exception(error)

    async def _post(
        self, message: Message, body: Sequence[Buffer] = (), release: Callable[[], None] | None = None
    ) -> None:
        await self._enqueue(message, body, release or _nothing)

    def _enqueue(self, message: Message, body: Sequence[Buffer], release: Callable[[], None]) -> asyncio.Future[None]:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.add_done_callback(_retrieve)
        if self._ended is not None:
            release()
            done.set_exception(self._ended)
            return done
        lane = self._frames if isinstance(message, Frame) else self._control
        lane.append(_Outgoing(message=message, body=body, done=done, release=release))
        self._wake.set()
        return done

    async def _send(self) -> None:
        while True:
            outgoing = self._pick()
            if outgoing is None:
                self._wake.clear()
                await self._wake.wait()
                continue
            try:
                if outgoing.done.cancelled():
                    continue
                self._session.check_send(outgoing.message)
                await self._channel.send(outgoing.message, outgoing.body)
            finally:
                outgoing.release()
                self._settle(outgoing)
            if isinstance(outgoing.message, Goodbye):
                raise ConnectionLost(peer=self._channel.peer.uri, reason="the agent said goodbye")

    def _settle(self, outgoing: _Outgoing) -> None:
        message = outgoing.message
        if isinstance(message, Frame) and message.is_last and message.channel in self._listeners:
            if not self._is_unacknowledged():
                self._progress_seconds = self._clock.monotonic_seconds()
            self._sent_sequence[message.channel] = message.sequence
        if not outgoing.done.done():
            outgoing.done.set_result(None)

    def _pick(self) -> _Outgoing | None:
        """The next to be written: control first, then the frame whose turn it is, if the credit covers it."""
        if self._control:
            return self._control.popleft()
        while self._frames and self._frames[0].done.cancelled():
            self._frames.popleft().release()
        if self._frames and not self.is_out_of_credit:
            return self._frames.popleft()
        return None

    async def _receive(self) -> None:
        while True:
            try:
                received = await self._channel.receive()
                try:
                    message = self._session.receive(received.message)
                finally:
                    received.release()
            except PeerFault as fault:
                await self._channel.send(Refusal.from_error(fault))
                raise
            if message is not None:
                self._take(message)

    def _take(self, message: Message) -> None:
        match message:
            case Tick():
                if message.instant_ns is not None:
                    self.last_tick_ns = message.instant_ns
                    self._tick_heard.set()
            case Positions():
                self._take_positions(message)
            case DiskOpened():
                opening = self._openings.get(message.channel)
                if opening is not None and not opening.done():
                    self._durable_sequence[message.channel] = message.durable_sequence
                    opening.set_result(message)
            case CloseDisk():
                self._take_close(message)
            case Refusal():
                raise _refused(message)
            case Goodbye():
                raise ConnectionLost(peer=self._channel.peer.uri, reason=f"it said goodbye: {message.reason}")
        self._wake.set()

    def _take_positions(self, message: Positions) -> None:
        if message.durable_sequence > self._durable_sequence.get(message.channel, 0):
            self._durable_sequence[message.channel] = message.durable_sequence
            self._progress_seconds = self._clock.monotonic_seconds()
        listener = self._listeners.get(message.channel)
        if listener is not None:
            listener.positions(message)

    def _take_close(self, message: CloseDisk) -> None:
        error = _refused(message)
        opening = self._openings.get(message.channel)
        listener = self._listeners.pop(message.channel, None)
        self._sent_sequence.pop(message.channel, None)
        if opening is not None and not opening.done():
            opening.set_exception(error)
        elif listener is not None:
            listener.closed(error)

    def _is_unacknowledged(self) -> bool:
        return any(
            sequence > self._durable_sequence.get(channel, 0) for channel, sequence in self._sent_sequence.items()
        )

    async def _keep_alive(self, progress_seconds_max: float) -> None:
        while True:
            await asyncio.sleep(self._idle_seconds_max / 3)
            self._enqueue(Tick(instant_ns=None), (), _nothing)
            silent = self._clock.monotonic_seconds() - self._progress_seconds
            if self._is_unacknowledged() and silent > progress_seconds_max:
                raise DeadlineExceeded(what="an acknowledgement", seconds=progress_seconds_max)


class Uplink:
    """Keeps a connection to one process server while anybody is attached."""

    def __init__(
        self,
        address: ProcessServerAddress,
        *,
        connect: Connect,
        clock: Clock,
        draw_random: DrawRandom,
        limits: ConnectionLimits,
        agent_version: str,
        boot_id: str,
        is_revoked: Callable[[str], bool],
    ) -> None:
        self.address = address
        self.connection: Connection | None = None
        self.last_error: ReplicationError | None = None
        self._connect = connect
        self._clock = clock
        self._draw_random = draw_random
        self._limits = limits
        self._hello = Hello(
            wire_version_min=WIRE_VERSION, wire_version_max=WIRE_VERSION, agent_version=agent_version, boot_id=boot_id
        )
        self._is_revoked = is_revoked
        self._attached: list[ConnectionListener] = []
        self._is_stopping = False

    def attach(self, listener: ConnectionListener) -> None:
        self._attached.append(listener)
        if self.connection is not None:
            listener.connected(self.connection)

    def detach(self, listener: ConnectionListener) -> None:
        self._attached.remove(listener)
        if self.connection is not None:
            listener.disconnected(self.connection)

    def is_attached(self, listener: ConnectionListener) -> bool:
        return listener in self._attached

    def check_revocation(self) -> None:
        """A newer revocation list holds for the live connection too."""
        if self.connection is not None and self._is_revoked(self.connection.certificate_serial):
            self.connection.say_goodbye("the process server's certificate was revoked")

    def stop(self) -> None:
        """run() returns after a goodbye."""
        self._is_stopping = True
        if self.connection is not None:
            self.connection.say_goodbye("the agent stops")

    async def run(self) -> None:
        """Until stop() or cancellation."""
        pause = self._limits.reconnect_seconds_min
        while not self._is_stopping:
            began = self._clock.monotonic_seconds()
            try:
                await self._converse()
            except* (ReplicationError, OSError) as group:
                self._failed(group)
            if self._is_stopping:
                return
            if self._clock.monotonic_seconds() - began > STABLE_SECONDS:
                pause = self._limits.reconnect_seconds_min
            await asyncio.sleep(pause * self._jitter())
            pause = min(2 * pause, self._limits.reconnect_seconds_max)

    async def _converse(self) -> None:
        """One connection from its making to its end."""
        channel = await self._connect(self.address)
        try:
            connection = await self._greet(channel)
            self.connection, self.last_error = connection, None
            for listener in list(self._attached):
                listener.connected(connection)
            log.info("connected", process_server=self.address.process_server)
            try:
                await connection.run(progress_seconds_max=self._limits.progress_seconds_max)
            finally:
                self.connection = None
                for listener in list(self._attached):
                    listener.disconnected(connection)
        finally:
            await channel.close()

    async def _greet(self, channel: Channel) -> Connection:
        if self._is_revoked(channel.certificate_serial):
            raise NotPermitted(subject=channel.peer.uri, reason="its certificate was revoked")
        if channel.peer.identifier != self.address.process_server:
            raise NotPermitted(
                subject=channel.peer.uri, reason=f"{self.address.process_server} was expected at this address"
            )
        session = AgentSession()
        session.check_send(self._hello)
        try:
            async with asyncio.timeout(GREETING_SECONDS_MAX):
                try:
                    await channel.send(self._hello)
                except ConnectionLost:
                    # why: who refuses us at once may have closed already; the reason is still there to be read.
                    pass
                received = await channel.receive()
        except TimeoutError as error:
            raise DeadlineExceeded(what="the process server's welcome", seconds=GREETING_SECONDS_MAX) from error
        try:
            message = session.receive(received.message)
        finally:
            received.release()
        if isinstance(message, Refusal):
            raise _refused(message)
        if not isinstance(message, Welcome):
            raise ConnectionLost(peer=channel.peer.uri, reason="it ended instead of a welcome")
        channel.set_idle_seconds_max(message.idle_seconds_max)
        return Connection(channel, session, clock=self._clock, idle_seconds_max=message.idle_seconds_max)

    def _failed(self, group: BaseExceptionGroup[ReplicationError | OSError]) -> None:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        if not isinstance(first, ReplicationError):
            first = ConnectionLost(peer=f"{self.address.host}:{self.address.port}", reason=str(first))
        self.last_error = first
        if not self._is_stopping:
            log.warning("connection ended", process_server=self.address.process_server, error=str(first))

    def _jitter(self) -> float:
        """0.5 to 1.5, so that a site's agents do not come back all at once."""
        return 0.5 + int.from_bytes(self._draw_random(2), "little") / 65536


def _refused(message: CloseDisk | Refusal) -> RefusedByPeer:
    return RefusedByPeer(peer_code=message.code, detail=message.detail, retryable=message.is_retryable)


def _nothing() -> None:
    """Nothing to give back."""


def _retrieve(done: asyncio.Future[Any]) -> None:
    """Whoever posted may not wait any more; the error is the connection's and is reported there."""
    if not done.cancelled():
        done.exception()
