"""Wakes the long polls of those whose orders may have changed; whoever is woken looks for itself.

Nobody misses a change: a waiter subscribes before it looks. A member holds a bounded number of polls, of which the
newest count: those of a program that was killed are not noticed to be gone until they have waited long enough.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

WAITERS_PER_MEMBER_MAX: Final = 4


class Waiter:
    """One long poll: it looks again whenever `changed` was set, and ends once it was displaced by newer ones."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.is_displaced = False


class Announcements:
    """By a member's identifier. Used within one event loop."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[Waiter]] = {}
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    @property
    def waiting(self) -> int:
        """How many long polls are held."""
        return sum(map(len, self._waiting.values()))

    @contextmanager
    def subscribe(self, identifier: str) -> Iterator[Waiter]:
        """`changed` is set by each announcement; the waiter clears it before it looks again."""
        waiters = self._waiting.setdefault(identifier, [])
        while len(waiters) >= WAITERS_PER_MEMBER_MAX:
            oldest = waiters.pop(0)
            oldest.is_displaced = True
            oldest.changed.set()
        waiter = Waiter()
        waiters.append(waiter)
        try:
            yield waiter
        finally:
            if not waiter.is_displaced:
                waiters.remove(waiter)
            if not waiters and self._waiting.get(identifier) is waiters:
                del self._waiting[identifier]

    def announce(self, identifiers: Iterable[str]) -> None:
        for identifier in identifiers:
            for waiter in self._waiting.get(identifier, ()):
                waiter.changed.set()

    def announce_to_all(self) -> None:
        self.announce(list(self._waiting))

    def close(self) -> None:
        """Ends all waiting, now and later: the server stops."""
        self._is_closed = True
        self.announce_to_all()
