"""Retries, with growing and jittered pauses, around any object store.

Invariants: only a fault that says so is tried again; a create whose outcome is unknown never is, because its second
attempt would find the first one's object: that is for the archive to settle by comparing trailers. A busy store that
says how long to wait is not asked earlier.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import stamina
from typing_extensions import Buffer

from storage.backends.object_store import ObjectInfo, ObjectStore
from storage.errors import StoreFault, StoreFull, StoreOutcomeUnknown

_random = random.SystemRandom()


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often and how long a call is tried; pauses double from the first to the longest, each plus up to
    jitter_seconds. Where the store asks for a longer pause than that, it gets what it asks for, plus the jitter.
    """

    attempts_max: int = 5
    total_seconds_max: float = 30.0
    first_pause_seconds: float = 0.1
    pause_seconds_max: float = 5.0
    jitter_seconds: float = 0.5


def is_worth_a_retry(error: Exception) -> bool:
    """Whether the same call may do better in some seconds. A full store does not: who writes decides how long to
    wait.
    """
    return isinstance(error, StoreFault) and error.is_retryable and not isinstance(error, StoreFull)


def _is_create_worth_a_retry(error: Exception) -> bool:
    return is_worth_a_retry(error) and not isinstance(error, StoreOutcomeUnknown)


class RetryingStore:
    """An `ObjectStore` that hides the passing faults of another one. It closes the other when it is closed."""

    def __init__(self, store: ObjectStore, policy: RetryPolicy | None = None) -> None:
        self._store = store
        self._policy = policy or RetryPolicy()

    @property
    def url(self) -> str:
        return self._store.url

    async def create(self, name: str, parts: Sequence[Buffer]) -> None:
        async for attempt in self._attempts(_is_create_worth_a_retry):
            with attempt:
                await self._store.create(name, parts)

    async def read(self, name: str, *, first_byte: int = 0, end_byte: int | None = None) -> bytes:
        data = b""
        async for attempt in self._attempts(is_worth_a_retry):
            with attempt:
                data = await self._store.read(name, first_byte=first_byte, end_byte=end_byte)
        return data

    async def info(self, name: str) -> ObjectInfo:
        found: ObjectInfo | None = None
        async for attempt in self._attempts(is_worth_a_retry):
            with attempt:
                found = await self._store.info(name)
        assert found is not None
        return found

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        """Goes on behind the last object that it gave when a listing breaks off."""
        listing = self._store.list(prefix, after=after)
        while True:
            found: ObjectInfo | None = None
            async for attempt in self._attempts(is_worth_a_retry):
                with attempt:
                    if attempt.num > 1:
                        listing = self._store.list(prefix, after=after)
                    found = await anext(listing, None)
            if found is None:
                return
            after = found.name
            yield found

    async def delete(self, name: str) -> None:
        async for attempt in self._attempts(is_worth_a_retry):
            with attempt:
                await self._store.delete(name)

    async def close(self) -> None:
        await self._store.close()

    def _attempts(self, is_worth_it: Callable[[Exception], bool]) -> AsyncIterator[stamina.Attempt]:
        policy = self._policy

        def backoff(error: Exception) -> bool | float:
            if not is_worth_it(error):
                return False
            asked_seconds = error.fields.get("retry_after_seconds", 0) if isinstance(error, StoreFault) else 0
            if not isinstance(asked_seconds, float) or asked_seconds <= policy.first_pause_seconds:
                return True
            return asked_seconds + _random.uniform(0, policy.jitter_seconds)

        return aiter(
            stamina.retry_context(
                on=backoff,
                attempts=policy.attempts_max,
                timeout=policy.total_seconds_max,
                wait_initial=policy.first_pause_seconds,
                wait_max=policy.pause_seconds_max,
                wait_jitter=policy.jitter_seconds,
            )
        )
