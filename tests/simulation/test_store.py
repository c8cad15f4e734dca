"""The simulated store passes the suite that every store passes, and its faults are those of real ones."""

import asyncio
import random

import pytest
import pytest_asyncio

from storage.errors import ObjectExists, ObjectNotFound, StoreOutcomeUnknown, StoreUnavailable
from tests.simulation.loop import VirtualTimeLoop
from tests.simulation.process import ProcessKilled, SimulatedProcess
from tests.simulation.store import SimulatedStore, StoreContents
from tests.storage.backends.object_store_contract import ObjectStoreContract


class TestContract(ObjectStoreContract):
    @pytest_asyncio.fixture
    async def store(self):
        contents = StoreContents(asyncio.get_running_loop(), random.Random(1))
        return SimulatedStore(contents, SimulatedProcess("test"), latency_seconds_max=0.001)


def simulate(main, seed=1):
    loop = VirtualTimeLoop(seed=seed)
    contents = StoreContents(loop, random.Random(seed))
    process = SimulatedProcess("test")
    try:
        return loop.run_until_complete(main(contents, SimulatedStore(contents, process), process))
    finally:
        loop.close()


def test_an_outage_is_retryable_and_creates_nothing():
    async def main(contents, store, process):
        contents.is_down = True
        with pytest.raises(StoreUnavailable) as caught:
            await store.create("a", [b"x"])
        assert caught.value.is_retryable
        contents.is_down = False
        with pytest.raises(ObjectNotFound):
            await store.read("a")

    simulate(main)


def test_a_lost_reply_leaves_the_object_there():
    async def main(contents, store, process):
        contents.lost_reply_probability = 1.0
        with pytest.raises(StoreOutcomeUnknown):
            await store.create("a", [b"x"])
        assert await store.read("a") == b"x"
        with pytest.raises(ObjectExists):
            await store.create("a", [b"y"])

    simulate(main)


def test_what_a_dead_process_had_sent_may_still_arrive():
    async def main(contents, store, process):
        async with asyncio.TaskGroup() as group:
            task = group.create_task(store.create("a", [b"x"]))
            await asyncio.sleep(0)
            process.kill()
            task.cancel()
        await asyncio.sleep(60)
        return "a" in contents.objects

    assert {simulate(main, seed) for seed in range(20)} == {True, False}


def test_a_dead_process_can_ask_nothing():
    async def main(contents, store, process):
        process.kill()
        with pytest.raises(ProcessKilled):
            await store.read("a")

    simulate(main)


def test_a_stale_list_leaves_out_the_newest_objects_which_can_be_read_all_the_same():
    async def main(contents, store, process):
        await store.create("a", [b"old"])
        await asyncio.sleep(10)
        contents.stale_seconds = 5.0
        await store.create("b", [b"new"])
        assert [info.name async for info in store.list("")] == ["a"]
        assert await store.read("b") == b"new"
        with pytest.raises(ObjectExists):
            await store.create("b", [b"other"])
        await asyncio.sleep(6)
        assert [info.name async for info in store.list("")] == ["a", "b"]

    simulate(main)
