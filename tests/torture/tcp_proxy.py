"""Stands between two programs and treats their bytes badly: cuts at any byte, trickles, half-open connections.

It knows nothing of what it passes on: TLS goes through unopened. It runs in a thread of its own; `behave` may be called
from any other.
Invariants: bytes are never changed, reordered or invented; what is `FREEZE`d is passed on once it thaws.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
import struct
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

CHUNK_BYTES: Final = 64 * 1024
TRICKLE_SECONDS: Final = 0.05
"""Between two pieces of a trickle."""
FROZEN_POLL_SECONDS: Final = 0.05
_RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER: a close sends a reset."""


class Treatment(enum.Enum):
    PASS = "pass"
    CUT = "cut"
    """Both connections are reset after `after_bytes` more in the direction; each new connection again."""
    TRICKLE = "trickle"
    """A few bytes at a time."""
    FREEZE = "freeze"
    """Nothing passes; connections stay open, and new ones are accepted and hear nothing."""
    FORGET_SERVER = "forget server"
    """The client's connections are reset; the server is never told, not even later."""
    FORGET_CLIENT = "forget client"
    """The same the other way round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """What happens to all connections until the next one."""

    treatment: Treatment = Treatment.PASS
    upward: bool = True
    """Which direction is cut: client to server, or back."""
    after_bytes: int = 0
    """Of CUT."""
    piece_bytes: int = 1
    """Of TRICKLE."""

    def __str__(self) -> str:
        way = "to the server" if self.upward else "to the client"
        if self.treatment is Treatment.CUT:
            return f"cut after {self.after_bytes} bytes {way}"
        if self.treatment is Treatment.TRICKLE:
            return f"trickle of {self.piece_bytes} bytes"
        return str(self.treatment.value)


class _Connection:
    """One client's connection and the one made for it."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.writers = {True: server, False: client}
        """By whether it leads upward."""
        self.passed_bytes = {True: 0, False: 0}
        self.is_forgotten = False
        """One side is gone, and the other is not told: what it sends is read and comes to nothing."""

    def reset(self, *, client: bool = True, server: bool = True) -> None:
        for is_asked, writer in ((client, self.writers[False]), (server, self.writers[True])):
            if is_asked:
                raw = writer.get_extra_info("socket")
                with contextlib.suppress(OSError):
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                writer.transport.abort()


class TcpProxy:
    """A context: listens from its first moment to its last."""

    def __init__(self, *, host: str, port: int, server: tuple[str, int]) -> None:
        self.cut_count = 0
        self._address = (host, port)
        self._server = server
        self._behaviour = Behaviour()
        self._connections: set[_Connection] = set()
        self._loop = asyncio.new_event_loop()
        self._is_over = asyncio.Event()
        self._is_ready = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"proxy-{port}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._is_ready.wait()
        if self._error is not None:
            raise self._error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._is_over.set)
        self._thread.join()

    @property
    def connection_count(self) -> int:
        return len(self._connections)

    def behave(self, behaviour: Behaviour) -> None:
        """From the next byte on."""
        self._loop.call_soon_threadsafe(self._apply, behaviour)

    def _apply(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour
        for connection in tuple(self._connections):
            connection.passed_bytes = {True: 0, False: 0}
            if behaviour.treatment in (Treatment.FORGET_SERVER, Treatment.FORGET_CLIENT):
                connection.is_forgotten = True
                forgets_server = behaviour.treatment is Treatment.FORGET_SERVER
                connection.reset(client=forgets_server, server=not forgets_server)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:  # why: the caller's thread raises it
            self._error = error
        finally:
            self._is_ready.set()
            self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._accept, *self._address, limit=CHUNK_BYTES)
        self._is_ready.set()
        await self._is_over.wait()
        server.close()
        for connection in tuple(self._connections):
            connection.reset()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server_reader, server_writer = await asyncio.open_connection(*self._server, limit=CHUNK_BYTES)
        except OSError:
            writer.transport.abort()
            return
        connection = _Connection(writer, server_writer)
        self._connections.add(connection)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(connection, reader, upward=True))
                group.create_task(self._pump(connection, server_reader, upward=False))
        except* OSError:
            pass
        finally:
            self._connections.discard(connection)
            connection.reset()

    async def _pump(self, connection: _Connection, reader: asyncio.StreamReader, *, upward: bool) -> None:
        try:
            while data := await reader.read(CHUNK_BYTES):
                await self._pass_on(connection, memoryview(data), upward=upward)
            if not connection.is_forgotten:
                connection.writers[upward].write_eof()
        except OSError:
            if not connection.is_forgotten:
                raise

    async def _pass_on(self, connection: _Connection, view: memoryview, *, upward: bool) -> None:
        while view and not connection.is_forgotten:
            piece = await self._piece(connection, view, upward=upward)
            connection.writers[upward].write(piece)
            await connection.writers[upward].drain()
            connection.passed_bytes[upward] += len(piece)
            view = view[len(piece) :]

    async def _piece(self, connection: _Connection, view: memoryview, *, upward: bool) -> memoryview:
        """The bytes that may pass now. Raises ConnectionResetError where the behaviour cuts."""
        while self._behaviour.treatment is Treatment.FREEZE:
            await asyncio.sleep(FROZEN_POLL_SECONDS)
        now = self._behaviour
        if now.treatment is Treatment.TRICKLE:
            await asyncio.sleep(TRICKLE_SECONDS)
            return view[: now.piece_bytes]
        if now.treatment is Treatment.CUT and now.upward is upward:
            room = now.after_bytes - connection.passed_bytes[upward]
            if room <= 0:
                self.cut_count += 1
                connection.reset()
                raise ConnectionResetError
            return view[:room]
        return view
