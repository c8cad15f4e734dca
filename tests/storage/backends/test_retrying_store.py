"""The retrying store: passing faults are hidden, others come through at once, and an unknown outcome is never tried
again.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from storage.backends.local_directory import LocalDirectoryStore
from storage.backends.object_store import ObjectInfo
from storage.backends.retrying import RetryingStore, RetryPolicy
from storage.errors import (
    ObjectExists,
    ObjectNotFound,
    StoreFault,
    StoreFull,
    StoreMissing,
    StoreNotPermitted,
    StoreOutcomeUnknown,
    StoreUnavailable,
)
from tests.storage.backends.object_store_contract import ObjectStoreContract, names

AT_ONCE = RetryPolicy(attempts_max=4, first_pause_seconds=0, pause_seconds_max=0, jitter_seconds=0)


def fault(kind: type[StoreFault]) -> StoreFault:
    return kind(url="file:///store", name="a", reason="injected")


class FaultyStore(LocalDirectoryStore):
    """A real store that first raises the given faults, one a call; a listing raises its own in the middle."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.faults: list[type[StoreFault]] = []
        self.calls = 0

    def _fail_if_due(self) -> None:
        self.calls += 1
        if self.faults:
            raise fault(self.faults.pop(0))

    async def create(self, name: str, parts: Sequence[object]) -> None:
        self._fail_if_due()
        await super().create(name, parts)  # type: ignore[arg-type]

    async def read(self, name: str, *, first_byte: int = 0, end_byte: int | None = None) -> bytes:
        self._fail_if_due()
        return await super().read(name, first_byte=first_byte, end_byte=end_byte)

    async def info(self, name: str) -> ObjectInfo:
        self._fail_if_due()
        return await super().info(name)

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        count = 0
        async for found in super().list(prefix, after=after):
            yield found
            count += 1
            if count == 2:
                self._fail_if_due()

    async def delete(self, name: str) -> None:
        self._fail_if_due()
        await super().delete(name)


@pytest.fixture
def faulty(tmp_path: Path) -> FaultyStore:
    return FaultyStore(tmp_path)


@pytest.fixture
def store(faulty: FaultyStore) -> RetryingStore:
    return RetryingStore(faulty, AT_ONCE)


class TestRetryingStoreKeepsTheContract(ObjectStoreContract):
    pass


async def test_passing_faults_are_hidden(store: RetryingStore, faulty: FaultyStore) -> None:
    for call in (
        lambda: store.create("a", [b"x"]),
        lambda: store.read("a"),
        lambda: store.info("a"),
        lambda: store.delete("a"),
    ):
        faulty.faults = [StoreUnavailable] * 3
        await call()
        assert faulty.faults == []


async def test_a_fault_that_does_not_pass_comes_through_after_the_last_attempt(
    store: RetryingStore, faulty: FaultyStore
) -> None:
    faulty.faults = [StoreUnavailable] * 100
    with pytest.raises(StoreUnavailable):
        await store.read("a")
    assert faulty.calls == 4


@pytest.mark.parametrize("kind", [StoreFault, StoreMissing, StoreNotPermitted, StoreFull, ObjectExists, ObjectNotFound])
async def test_other_faults_come_through_at_once(
    store: RetryingStore, faulty: FaultyStore, kind: type[StoreFault]
) -> None:
    for call in (lambda: store.create("a", [b"x"]), lambda: store.read("a"), lambda: store.delete("a")):
        faulty.faults, faulty.calls = [kind], 0
        with pytest.raises(kind):
            await call()
        assert faulty.calls == 1


async def test_a_creation_with_unknown_outcome_is_not_tried_again(store: RetryingStore, faulty: FaultyStore) -> None:
    faulty.faults = [StoreUnavailable, StoreOutcomeUnknown]
    with pytest.raises(StoreOutcomeUnknown):
        await store.create("a", [b"x"])
    assert faulty.calls == 2


async def test_a_listing_that_breaks_off_goes_on_behind_its_last_object(
    store: RetryingStore, faulty: FaultyStore
) -> None:
    expected = [f"a/{number}" for number in range(9)]
    for name in expected:
        await store.create(name, [b""])
    faulty.faults = [StoreUnavailable] * 4
    assert await names(store, "a/") == expected
    assert faulty.faults == []


class BusyStore(LocalDirectoryStore):
    """A real store that is busy for the first calls, and says how long."""

    asked_seconds = 0.0
    calls = 0

    async def info(self, name: str) -> ObjectInfo:
        self.calls += 1
        if self.calls < 3:
            raise StoreUnavailable(url=self.url, reason="busy", retry_after_seconds=self.asked_seconds)
        return await super().info(name)


@pytest.mark.parametrize(("asked_seconds", "waits"), [(0.3, True), (0.0, False), (0.001, False)])
async def test_a_busy_store_gets_the_pause_that_it_asks_for(tmp_path: Path, asked_seconds: float, waits: bool) -> None:
    busy = BusyStore(tmp_path)
    await busy.create("a", [b"x"])
    busy.asked_seconds = asked_seconds
    policy = RetryPolicy(first_pause_seconds=0.001, pause_seconds_max=0.001, jitter_seconds=0)
    started = time.monotonic()
    await RetryingStore(busy, policy).info("a")
    assert busy.calls == 3
    assert (time.monotonic() - started >= 2 * 0.3) == waits
