"""Wakes the long polls of those whose orders may have changed; whoever is woken looks for itself.

Nobody misses a change: a waiter subscribes before it looks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from protocol.control_errors import ServerUnwell

WAITERS_PER_MEMBER_MAX: Final = 4


class Announcements:
    """By a member's identifier. Used within one event loop."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    @property
    def waiting(self) -> int:
        """How many long polls are held."""
        return sum(len(events) for events in self._waiting.values())

    @contextmanager
    def subscribe(self, identifier: str) -> Iterator[asyncio.Event]:
        """The event is set by each announcement; the waiter clears it before it looks again. Raises ServerUnwell."""
        events = self._waiting.setdefault(identifier, set())
        if len(events) >= WAITERS_PER_MEMBER_MAX:
            raise ServerUnwell(reason=f"this member holds {WAITERS_PER_MEMBER_MAX} long polls already")
        event = asyncio.Event()
        events.add(event)
        try:
            yield event
        finally:
            events.discard(event)
            if not events:
                self._waiting.pop(identifier, None)

    def announce(self, identifiers: Iterable[str]) -> None:
        for identifier in identifiers:
            for event in self._waiting.get(identifier, ()):
                event.set()

    def announce_to_all(self) -> None:
        self.announce(list(self._waiting))

    def close(self) -> None:
        """Ends all waiting, now and later: the server stops."""
        self._is_closed = True
        self.announce_to_all()
