"""One agent's connection: takes its messages, opens its disks, and tells it positions, credit and the time.

Invariants: only one task sends, so that the session's order is the wire's; a fault of one disk closes that channel and
no other; a fault of the connection ends its own tasks and no others; credit once granted is honoured.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import structlog

from process_server.core.backpressure import FRAME_BODY_BYTES_MAX, ConnectionCredit
from process_server.disk_history import DiskHistory, Holder
from process_server.errors import DiskStopped, ServiceStopping
from process_server.metrics import ProcessServerMetrics
from protocol.errors import DeadlineExceeded, PeerFault, ReplicationError
from protocol.framing import body_bytes_of
from protocol.messages import (
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
from protocol.session import ChannelState, ConnectionState, ProcessServerSession
from protocol.transport.channel import Channel, Received
from protocol.vocabulary import PeerIdentity

TICKS_PER_IDLE: Final = 4
"""A tick goes out so often within the idle time that the welcome states."""
TICK_SECONDS_MAX: Final = 1.0
"""Points are dated by the last tick: they can be no finer than this."""

CREDIT_STEP_BYTES: Final = 256 * 1024
"""Less is not worth a message while the agent has enough for a frame."""

_S = ChannelState
_SENDABLE: Final[Mapping[type[object], frozenset[ChannelState]]] = {
    DiskOpened: frozenset({_S.OPENING}),
    Positions: frozenset({_S.OPEN, _S.AGENT_CLOSED}),
    CloseDisk: frozenset({_S.OPENING, _S.OPEN, _S.WITHDRAWN, _S.AGENT_CLOSED}),
}
"""The states of a channel in which a message of it still makes sense; in others the two ends have moved on."""

_log = structlog.get_logger("process_server.receiver")


class Opener(Protocol):
    async def open(self, request: OpenDisk, peer: PeerIdentity, holder: Holder) -> tuple[DiskHistory, DiskOpened]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiverTools:
    """What every connection works with.

    next_credit: the total that a connection may be granted now. barrier: returns once all that was taken is durable.
    """

    opener: Opener
    metrics: ProcessServerMetrics
    identifier: str
    idle_seconds_max: int
    next_credit: Callable[[AgentConnection], int]
    instant_ns: Callable[[], int | None]
    barrier: Callable[[], Awaitable[None]]


class _ConnectionOver(Exception):
    """Ends the connection's task group; error None for an orderly end."""

    def __init__(self, error: ReplicationError | None) -> None:
        super().__init__()
        self.error = error


class AgentConnection:
    """`serve` runs it to its end. The methods after that are called on the loop and return at once."""

    def __init__(self, channel: Channel, tools: ReceiverTools) -> None:
        self._channel = channel
        self._tools = tools
        self._session = ProcessServerSession()
        self._outgoing: deque[Message] = deque()
        self._dirty: dict[int, DiskHistory] = {}
        self._wakeup = asyncio.Event()
        self._open_disks: dict[int, DiskHistory] = {}
        self._numbers: dict[DiskHistory, int] = {}
        self._ending: Goodbye | Refusal | None = None
        self._is_greeted = False
        self._is_cut = asyncio.Event()
        self.credit = ConnectionCredit()

    @property
    def certificate_serial(self) -> str:
        return self._channel.certificate_serial

    @property
    def peer_uri(self) -> str:
        return self._channel.peer.uri

    async def serve(self) -> None:
        """To its end, without raising for anything that the peer or the network did."""
        self._tools.metrics.connections.inc()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._receive(group))
                group.create_task(self._send())
                group.create_task(self._end_when_cut())
        except* _ConnectionOver as over:
            for one in over.exceptions:
                error = one.error if isinstance(one, _ConnectionOver) else None
                if error is not None:
                    self._tools.metrics.refusals.labels(error.code).inc()
                    _log.info("connection over", peer=self._channel.peer.uri, code=error.code, reason=str(error))
        finally:
            self._tools.metrics.connections.dec()
            for history in list(self._numbers):
                history.leave(self)
            self._numbers.clear()
            self._open_disks.clear()
            await self._channel.close()

    # from the process server

    def positions_changed(self, history: DiskHistory) -> None:
        number = self._numbers.get(history)
        if number is not None:
            self._dirty[number] = history
            self._wakeup.set()

    def disk_closed(self, history: DiskHistory, error: ReplicationError) -> None:
        number = self._numbers.pop(history, None)
        if number is not None:
            self._open_disks.pop(number, None)
            self._dirty.pop(number, None)
            self._close_channel(number, error)

    def credit_changed(self) -> None:
        """There may be more to grant."""
        self._wakeup.set()

    def refuse(self, error: ReplicationError) -> None:
        """Ends the connection and says why, after what was to be sent before."""
        self._ending = self._ending or Refusal.from_error(error)
        self._wakeup.set()

    def drain(self) -> None:
        """Takes no more frames; those that were taken still become durable."""
        for history in list(self._numbers):
            history.leave(self)

    def say_goodbye(self, reason: str) -> None:
        """Ends the connection in order, after a last word on where every disk stands."""
        self._dirty |= {number: history for history, number in self._numbers.items()}
        self._ending = self._ending or Goodbye(reason=reason)
        self._wakeup.set()

    def cut(self) -> None:
        """Ends the connection at once, whatever is under way on it."""
        self._is_cut.set()

    async def _end_when_cut(self) -> None:
        await self._is_cut.wait()
        raise _ConnectionOver(ServiceStopping())

    # receiving

    async def _receive(self, group: asyncio.TaskGroup) -> None:
        while True:
            try:
                received = await self._channel.receive()
            except ReplicationError as error:
                raise _ConnectionOver(error) from error
            keep = False
            try:
                message = self._session.receive(received.message)
                if message is not None:
                    keep = self._take(message, received, group)
                elif isinstance(received.message, Frame):
                    self._release_credit(body_bytes_of(received.message))
            except ReplicationError as error:
                self.refuse(error)
                return
            finally:
                if not keep:
                    received.release()

    def _take(self, message: Message, received: Received, group: asyncio.TaskGroup) -> bool:
        """True if the body is kept, to be released later."""
        match message:
            case Frame():
                return self._take_frame(message, received)
            case OpenDisk():
                group.create_task(self._open(message))
            case Hello():
                self._greet()
            case CloseDisk():
                self._take_close(message)
            case Goodbye():
                group.create_task(self._answer_goodbye())
            case Refusal():
                raise _ConnectionOver(message.to_error())
            case Tick():
                pass
        return False

    def _greet(self) -> None:
        version = self._session.wire_version
        assert version is not None
        self._channel.set_idle_seconds_max(self._tools.idle_seconds_max)
        self._queue(
            Welcome(
                wire_version=version,
                process_server=self._tools.identifier,
                idle_seconds_max=self._tools.idle_seconds_max,
            )
        )
        self._queue(Tick(instant_ns=self._tools.instant_ns()))
        self._is_greeted = True
        self._wakeup.set()

    def _take_frame(self, frame: Frame, received: Received) -> bool:
        size_bytes = body_bytes_of(frame)
        history = self._open_disks.get(frame.channel)
        if history is None or history.holder is not self:
            self._release_credit(size_bytes)
            return False
        try:
            history.take_frame(
                frame, received.body, body_free=received.release, done=lambda: self._release_credit(size_bytes)
            )
        except (PeerFault, DiskStopped) as error:
            self._release_credit(size_bytes)
            self.disk_closed(history, error)
            history.leave(self)
            return False
        return True

    def _release_credit(self, size_bytes: int) -> None:
        self.credit = ConnectionCredit(
            granted_bytes=self.credit.granted_bytes, released_bytes=self.credit.released_bytes + size_bytes
        )
        self._wakeup.set()

    def _take_close(self, message: CloseDisk) -> None:
        history = self._open_disks.pop(message.channel, None)
        if history is not None:
            self._numbers.pop(history, None)
            history.leave(self)
        self._queue(CloseDisk(channel=message.channel, code="closed", detail="", is_retryable=True))

    async def _open(self, request: OpenDisk) -> None:
        try:
            with self._tools.metrics.stages.stage("open"):
                history, opened = await self._tools.opener.open(request, self._channel.peer, self)
        except ReplicationError as error:
            _log.info("disk not opened", disk=request.disk, code=error.code, reason=str(error))
            self._close_channel(request.channel, error)
            return
        if self._ending is not None or self._session.channel_state(request.channel) is not ChannelState.OPENING:
            history.leave(self)
            return
        self._open_disks[request.channel] = history
        self._numbers[history] = request.channel
        self._queue(opened)

    async def _answer_goodbye(self) -> None:
        self.drain()
        await self._tools.barrier()
        self.say_goodbye("goodbye")

    # sending

    def _queue(self, message: Message) -> None:
        self._outgoing.append(message)
        self._wakeup.set()

    def _close_channel(self, number: int, error: ReplicationError) -> None:
        self._tools.metrics.refusals.labels(error.code).inc()
        self._queue(CloseDisk.from_error(number, error))

    async def _send(self) -> None:
        loop = asyncio.get_running_loop()
        tick_seconds = min(TICK_SECONDS_MAX, self._tools.idle_seconds_max / TICKS_PER_IDLE)
        # why: a pause that began anew at every wakeup would never end on a busy connection, and no point would be dated
        next_tick_seconds = loop.time() + tick_seconds
        while True:
            self._wakeup.clear()
            if loop.time() >= next_tick_seconds:
                next_tick_seconds = loop.time() + tick_seconds
                if self._is_greeted:
                    self._queue(Tick(instant_ns=self._tools.instant_ns()))
            if self._is_greeted:
                await self._send_what_is_due()
            if self._ending is not None:
                await self._send_ending(self._ending)
            if self._wakeup.is_set():
                continue
            try:
                async with asyncio.timeout_at(next_tick_seconds):
                    await self._wakeup.wait()
            except TimeoutError:
                continue

    async def _send_what_is_due(self) -> None:
        while self._outgoing:
            await self._write(self._outgoing.popleft())
        while self._dirty:
            number, history = self._dirty.popitem()
            positions = history.positions
            if positions is not None:
                await self._write(
                    Positions(
                        channel=number,
                        epoch=positions.epoch,
                        durable_sequence=positions.durable,
                        committed_sequence=positions.committed,
                    )
                )
        total_bytes = self._tools.next_credit(self)
        added_bytes = total_bytes - self.credit.granted_bytes
        left_bytes = self._session.credit_bytes_available
        if added_bytes >= CREDIT_STEP_BYTES or (added_bytes > 0 and left_bytes < FRAME_BODY_BYTES_MAX):
            self.credit = ConnectionCredit(granted_bytes=total_bytes, released_bytes=self.credit.released_bytes)
            await self._write(Credit(total_bytes=total_bytes))

    async def _send_ending(self, ending: Goodbye | Refusal) -> None:
        if isinstance(ending, Refusal):
            await self._write(ending)
            raise _ConnectionOver(ending.to_error())
        if self._session.state in (ConnectionState.OPEN, ConnectionState.AGENT_ENDED):
            await self._write(ending)
        raise _ConnectionOver(None)

    async def _write(self, message: Message) -> None:
        """Sends it unless its channel has moved on meanwhile."""
        states = _SENDABLE.get(type(message))
        channel = getattr(message, "channel", None)
        if states is not None and channel is not None and self._session.channel_state(channel) not in states:
            return
        try:
            self._session.check_send(message)
            async with asyncio.timeout(self._tools.idle_seconds_max):
                await self._channel.send(message)
        except TimeoutError:
            error = DeadlineExceeded(what=f"sending to {self._channel.peer.uri}", seconds=self._tools.idle_seconds_max)
            raise _ConnectionOver(error) from None
        except ReplicationError as error:
            raise _ConnectionOver(error) from error
