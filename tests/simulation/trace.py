"""What happened, in order, as one hash: equal for equal seeds, whatever the process, its hash seed or its machine.

Only values that the seed determines may enter: no addresses, no object representations, no real time.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter

import blake3


class Trace:
    """`readable` also prints every event to stderr. `counts` holds the events by kind."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, readable: bool = False) -> None:
        self._loop = loop
        self._hash = blake3.blake3()
        self._readable = readable
        self.counts: Counter[str] = Counter()

    def event(self, kind: str, *details: str | int | float | bool | None) -> None:
        """Notes one event at the present virtual instant."""
        line = f"{self._loop.time():.9f} {kind} {' '.join(map(str, details))}"
        self.counts[kind] += 1
        self._hash.update(line.encode())
        self._hash.update(b"\n")
        if self._readable:
            print(line, file=sys.stderr)

    def remark(self, line: str) -> None:
        """For the reader only: no part of the hash."""
        if self._readable:
            print(f"{self._loop.time():.9f}   {line}", file=sys.stderr)

    def digest(self) -> str:
        return self._hash.hexdigest()[:32]

    @property
    def events(self) -> int:
        return self.counts.total()
