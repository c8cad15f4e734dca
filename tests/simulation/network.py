"""Byte pipes between simulated hosts: latency, half-delivered data, cuts at any byte, silence, late arrivals.

A connection is two asyncio transports; the product's own protocols (classic or buffered) sit on both ends unchanged.
Bytes arrive in order and once, in pieces of any size. A cut loses whatever was still under way behind some byte, and
each end hears of it at an instant of its own; a silent connection delivers nothing any more and tells nobody, as a
dropped route does, in both directions or in one; a half-open one is over at one end only; a late one delivers what was
under way when its sender has long given it up; a slow one delivers a few bytes at a time.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from typing_extensions import Buffer

from tests.simulation.process import RUNNING_PROCESS, SimulatedProcess

LATENCY_SECONDS_MAX: Final = 0.02
HIGH_WATER_BYTES: Final = 65536
LOW_WATER_BYTES: Final = 16384
SPLIT_PROBABILITY: Final = 0.25
LATE_RETRY_SECONDS: Final = 0.05
SLOW_LATENCY_SECONDS_MAX: Final = 2.0
SLOW_BYTES_PER_DELIVERY: Final = 16384


class SimulatedTransport(asyncio.Transport):
    """One end. What is written becomes the other end's input after the connection's latency."""

    def __init__(self, loop: asyncio.AbstractEventLoop, draw: random.Random, process: SimulatedProcess) -> None:
        super().__init__()
        self._loop = loop
        self._draw = draw
        self.process = process
        self.latency_seconds = 0.0
        self.other: SimulatedTransport | None = None
        self._protocol: asyncio.BaseProtocol | None = None
        self._under_way: deque[bytes] = deque()
        self._under_way_bytes = 0
        self._is_delivering = False
        self._is_closing = False
        self._is_lost = False
        self._is_reading_paused = False
        self._is_writing_paused = False
        self._is_eof_sent = False
        self.is_silent = False
        """Nothing that this end sent is delivered any more."""
        self.bytes_until_cut: int | None = None
        """The connection breaks behind so many bytes more of what this end sends."""
        self.bytes_per_delivery_max: int | None = None
        self.bytes_delivered = 0

    # what the protocols call

    def write(self, data: Buffer) -> None:
        if self._is_closing or self._is_lost or not self.process.is_alive:
            return
        piece = bytes(data)
        if not piece:
            return
        if len(piece) > 1 and self._draw.random() < SPLIT_PROBABILITY:
            split = self._draw.randrange(1, len(piece))
            self._under_way.append(piece[:split])
            piece = piece[split:]
        self._under_way.append(piece)
        self._under_way_bytes += len(data)  # type: ignore[arg-type]
        if self._under_way_bytes > HIGH_WATER_BYTES and not self._is_writing_paused:
            self._is_writing_paused = True
            self._protocol.pause_writing()  # type: ignore[union-attr]
        self._schedule_delivery()

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(bytes(data) for data in list_of_data))

    def can_write_eof(self) -> bool:
        return False

    def close(self) -> None:
        """What was written before is still delivered, then the other end reads the end of the stream."""
        if self._is_closing:
            return
        self._is_closing = True
        if not self._under_way:
            self._finish_closing()

    def abort(self) -> None:
        self.cut(None)

    def is_closing(self) -> bool:
        return self._is_closing

    def pause_reading(self) -> None:
        self._is_reading_paused = True

    def resume_reading(self) -> None:
        self._is_reading_paused = False
        if self.other is not None:
            self.other._schedule_delivery()

    def is_reading(self) -> bool:
        return not self._is_reading_paused and not self._is_closing

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return self._under_way_bytes

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return LOW_WATER_BYTES, HIGH_WATER_BYTES

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        assert self._protocol is not None
        return self._protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    # what the network does

    def cut(self, error: Exception | None) -> None:
        """This end is gone at once; what it had sent arrives up to some byte; the other end hears of it later, or not
        at all.
        """
        other = self.other
        self.lose(error)
        if other is not None and not other._is_lost and not self.is_silent:
            reset = ConnectionResetError("simulated: reset by peer")
            other._call_later(self._draw.random() * LATENCY_SECONDS_MAX, other.lose, reset)

    def lose(self, error: Exception | None) -> None:
        """Drops what is under way and tells the protocol, once."""
        if self._is_lost:
            return
        self._is_lost = True
        self._is_closing = True
        self._under_way.clear()
        self._under_way_bytes = 0
        if self._protocol is not None and self.process.is_alive:
            self._call_soon(self._protocol.connection_lost, error)

    def give_up_and_arrive_late(self, seconds: float) -> None:
        """This end is over for its program; what it had sent is delivered so much later, then the other end is reset.

        The connection has to be silent, so that something is under way.
        """
        other = self.other
        assert other is not None
        pieces = list(self._under_way)
        self.lose(ConnectionResetError("simulated: given up"))
        other._call_later(seconds, other._receive_late, pieces)

    def start(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol
        protocol.connection_made(self)

    def _receive_late(self, pieces: list[bytes]) -> None:
        while pieces and not self._is_lost and not self._is_reading_paused and self.process.is_alive:
            pieces[0] = pieces[0][self._feed(pieces[0]) :]
            if not pieces[0]:
                del pieces[0]
        if pieces and not self._is_lost and self.process.is_alive:
            self._call_later(LATE_RETRY_SECONDS, self._receive_late, pieces)
        else:
            self.lose(ConnectionResetError("simulated: reset by peer"))

    def _schedule_delivery(self) -> None:
        if self._is_delivering or not self._under_way or self._is_lost:
            return
        assert self.other is not None
        if self.other._is_reading_paused or self.is_silent:
            return
        self._is_delivering = True
        jitter = self._draw.random() * 0.1 * self.latency_seconds
        self.other._call_later(self.latency_seconds + jitter, self._deliver)

    def _deliver(self) -> None:
        self._is_delivering = False
        other = self.other
        assert other is not None
        if self._is_lost or other._is_lost or self.is_silent or not other.process.is_alive:
            return
        # why: a protocol may pause reading, or close, in the middle of a burst
        room = self.bytes_per_delivery_max or self._under_way_bytes
        while self._under_way and room > 0 and not other._is_reading_paused and not other._is_lost:
            piece = self._under_way.popleft()
            taken = other._feed(piece[: room if self.bytes_until_cut is None else min(room, self.bytes_until_cut)])
            room -= taken
            if self.bytes_until_cut is not None:
                self.bytes_until_cut -= taken
                if self.bytes_until_cut <= 0:
                    self.cut(ConnectionResetError("simulated: cut"))
                    return
            self._under_way_bytes -= taken
            self.bytes_delivered += taken
            if taken < len(piece) and not self._is_lost:
                self._under_way.appendleft(piece[taken:])
        if self._is_lost:
            return
        if self._is_writing_paused and self._under_way_bytes < LOW_WATER_BYTES and self.process.is_alive:
            self._is_writing_paused = False
            self._call_soon(self._protocol.resume_writing)  # type: ignore[union-attr]
        if self._is_closing and not self._under_way:
            self._finish_closing()
        else:
            self._schedule_delivery()

    def _feed(self, piece: bytes) -> int:
        """Hands bytes to the protocol until it pauses; returns how many it took. What a closing end gets is dropped."""
        if self._is_closing:
            return len(piece)
        protocol = self._protocol
        if not isinstance(protocol, asyncio.BufferedProtocol):
            protocol.data_received(piece)  # type: ignore[union-attr]
            return len(piece)
        view = memoryview(piece)
        while view and not self._is_reading_paused and not self._is_closing:
            buffer = memoryview(protocol.get_buffer(len(view)))
            count = min(len(buffer), len(view))
            buffer[:count] = view[:count]
            view = view[count:]
            protocol.buffer_updated(count)
        return len(piece) if self._is_closing else len(piece) - len(view)

    def _finish_closing(self) -> None:
        if self._is_lost:
            return
        other = self.other
        self.lose(None)
        if other is not None and not other._is_lost and not self.is_silent:
            other._call_later(self._draw.random() * LATENCY_SECONDS_MAX, other._receive_end)

    def _receive_end(self) -> None:
        if self._is_lost or not self.process.is_alive:
            return
        assert self._protocol is not None
        self._protocol.eof_received()  # type: ignore[attr-defined]
        self.close()

    def _call_soon(self, callback: Callable[..., Any], *args: Any) -> None:
        token = RUNNING_PROCESS.set(self.process)
        try:
            self._loop.call_soon(callback, *args)
        finally:
            RUNNING_PROCESS.reset(token)

    def _call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> None:
        token = RUNNING_PROCESS.set(self.process)
        try:
            self._loop.call_later(delay, callback, *args)
        finally:
            RUNNING_PROCESS.reset(token)


class Connection:
    """Both ends of one connection; [0] is the client's."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, draw: random.Random, client: SimulatedProcess, server: SimulatedProcess
    ) -> None:
        self.ends = (SimulatedTransport(loop, draw, client), SimulatedTransport(loop, draw, server))
        self.ends[0].other, self.ends[1].other = self.ends[1], self.ends[0]
        latency = draw.random() ** 2 * LATENCY_SECONDS_MAX
        for end in self.ends:
            end.latency_seconds = latency

    @property
    def is_open(self) -> bool:
        return not (self.ends[0]._is_lost and self.ends[1]._is_lost)

    def cut(self, draw: random.Random) -> None:
        """Both ends lose it, one after the other; what is under way is lost behind some byte."""
        first = draw.choice(self.ends)
        first.cut(ConnectionResetError("simulated: cut"))

    def cut_behind(self, size_bytes: int, draw: random.Random) -> None:
        """It breaks when one of the ends has sent so many bytes more."""
        draw.choice(self.ends).bytes_until_cut = size_bytes

    def fall_silent(self) -> None:
        """Nothing is delivered any more, and nobody is told."""
        for end in self.ends:
            end.is_silent = True

    def fall_silent_one_way(self, draw: random.Random) -> None:
        """One end is heard, and hears nothing."""
        draw.choice(self.ends).is_silent = True

    def open_half(self, draw: random.Random) -> None:
        """One end is over, the other is not told."""
        draw.choice(self.ends).lose(ConnectionResetError("simulated: half-open"))

    def slow_down(self, latency_seconds: float) -> None:
        for end in self.ends:
            end.latency_seconds = latency_seconds
            end.bytes_per_delivery_max = SLOW_BYTES_PER_DELIVERY

    def heal(self) -> None:
        for end in self.ends:
            end.latency_seconds = min(end.latency_seconds, LATENCY_SECONDS_MAX)
            end.bytes_per_delivery_max = None
            end.bytes_until_cut = None

    def process_died(self, process: SimulatedProcess) -> None:
        """The dead process's kernel closes its sockets: the peer reads a reset (or, by draw elsewhere, silence)."""
        for end in self.ends:
            if end.process is process and not end._is_lost:
                end.cut(None)


class Network:
    """All connections; refuses new ones while `is_down`, breaks the first of them while there are `phantoms`, and slows
    them down while `slow_latency_seconds` says so."""

    def __init__(self, loop: asyncio.AbstractEventLoop, draw: random.Random) -> None:
        self._loop = loop
        self._draw = draw
        self.connections: list[Connection] = []
        self.is_down = False
        self.phantoms = 0
        """So many connections more are made, and their client is told that they are not."""
        self.slow_latency_seconds = 0.0

    def heal(self) -> None:
        """From now on all is well, for the connections that are still there too; silent ones stay silent."""
        self.is_down = False
        self.phantoms = 0
        self.slow_latency_seconds = 0.0
        for connection in self.open_connections():
            connection.heal()

    def connect(self, client: SimulatedProcess, server: SimulatedProcess) -> Connection:
        """Raises ConnectionRefusedError when the network is down or the server dead."""
        client.check_alive()
        if self.is_down or not server.is_alive:
            raise ConnectionRefusedError("simulated: connection refused")
        self.connections = [connection for connection in self.connections if connection.is_open]
        connection = Connection(self._loop, self._draw, client, server)
        self.connections.append(connection)
        if self.slow_latency_seconds:
            connection.slow_down(self.slow_latency_seconds)
        return connection

    def open_connections(self) -> list[Connection]:
        return [connection for connection in self.connections if connection.is_open]
