"""Keeps the server's clock: reads the machine's clocks and remembers the spans.

A tick of a span that the database does not know is never shown.
"""

from __future__ import annotations

import asyncio
from typing import Final

import structlog

from config_server.core.server_clock import ServerClockState, observe_clock, start_clock
from config_server.database.engine import Database
from config_server.database.points import read_clock_spans, replace_clock_spans
from config_server.errors import DatabaseFault
from runtime.clock import Clock

REMEMBER_SECONDS: Final = 5.0
"""How far the stored end of the present span may be behind."""

log = structlog.get_logger(__name__)


class ServerClock:
    """Made by `open`."""

    def __init__(self, database: Database, clock: Clock, state: ServerClockState) -> None:
        self._database = database
        self._clock = clock
        self._state = state
        self._remembered_generation = 0
        self.jumps = 0
        """Since the start of the program."""

    @staticmethod
    async def open(database: Database, clock: Clock) -> ServerClock:
        """Goes on from the spans in the database."""
        async with database.reading() as connection:
            spans = await read_clock_spans(connection)
        state = start_clock(spans, clock.now_ns(), clock.monotonic_seconds())
        if spans and state.generation != spans[-1].generation:
            log.warning("clock went back over the restart", last_ns=spans[-1].last_ns, now_ns=state.tick_ns)
        server_clock = ServerClock(database, clock, state)
        await server_clock.remember()
        return server_clock

    @property
    def state(self) -> ServerClockState:
        """As of the last tick."""
        return self._state

    async def tick(self) -> ServerClockState:
        """Reads the clocks. Not to be called within a writing transaction: the beginning of a span is stored first."""
        state = observe_clock(self._state, self._clock.now_ns(), self._clock.monotonic_seconds())
        if state.generation != self._state.generation:
            self.jumps += 1
            log.warning("the clock was set", before_ns=self._state.tick_ns, now_ns=state.tick_ns)
        self._state = state
        if state.generation != self._remembered_generation:
            await self.remember()
        return state

    async def watch(self) -> None:
        """Ticks and remembers until it is cancelled."""
        while True:
            await asyncio.sleep(REMEMBER_SECONDS)
            try:
                await self.tick()
                await self.remember()
            except DatabaseFault as error:
                log.error("the clock's span is not stored", reason=str(error))

    async def remember(self) -> None:
        """Stores the spans as they are now. Raises DatabaseFault."""
        state = self._state
        async with self._database.writing() as connection:
            await replace_clock_spans(connection, state.spans)
        self._remembered_generation = max(self._remembered_generation, state.generation)
