"""The executable half of storage/backends/object_store.py: what every `ObjectStore` does. Subclass it with a `store`
fixture.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress

import pytest

from protocol.errors import InvalidValue
from storage.backends.object_store import ObjectInfo, ObjectStore
from storage.errors import ObjectExists, ObjectNotFound

HOSTILE_NAMES = [
    "", "/", "/etc/passwd", "a//b", "a/", "../outside", "a/../../outside", "a/./b", ".", "..", ".hidden", "a/.hidden",
    "a\\b", "a\0b", "a\nb", "a b", "a%2e%2e", "a?b", "a#b", "a*", "ä", "a.", "a/b.", "x" * 201, "x/" * 500 + "x",
]  # fmt: skip


async def listed(store: ObjectStore, prefix: str = "", *, after: str = "") -> list[ObjectInfo]:
    return [info async for info in store.list(prefix, after=after)]


async def names(store: ObjectStore, prefix: str = "", *, after: str = "") -> list[str]:
    return [info.name for info in await listed(store, prefix, after=after)]


class ObjectStoreContract:
    """The suite. Test classes inherit it and define the fixture `store`: an empty ObjectStore."""

    async def test_a_created_object_reads_back(self, store: ObjectStore) -> None:
        await store.create("vaults/a/vault.json", [b"{}"])
        assert await store.read("vaults/a/vault.json") == b"{}"

    async def test_an_empty_object_is_an_object(self, store: ObjectStore) -> None:
        await store.create("none", [])
        await store.create("empty", [b"", bytearray()])
        for name in ("none", "empty"):
            assert await store.read(name) == b""
            assert await store.read(name, first_byte=-5) == b""
            assert await store.read(name, first_byte=3, end_byte=7) == b""
            assert (await store.info(name)).size_bytes == 0
        assert await names(store) == ["empty", "none"]

    async def test_many_parts_of_every_kind_are_joined_in_order(self, store: ObjectStore) -> None:
        random = os.urandom(3_000_000)
        parts = [bytes([number % 251]) * (number % 900) for number in range(3000)]
        parts += [memoryview(random)[:1_000_001], bytearray(random[1_000_001:2_500_000]), random[2_500_000:]]
        await store.create("many", parts)
        assert await store.read("many") == b"".join(parts)

    @pytest.mark.parametrize("size_bytes", [1, 4095, 4096, 4097, 2**18 - 1, 2**18, 2**20, 2**20 + 1, 3 * 2**20 - 5])
    async def test_an_object_has_exactly_its_size(self, store: ObjectStore, size_bytes: int) -> None:
        data = os.urandom(size_bytes)
        await store.create("sized", [data])
        assert (await store.info("sized")).size_bytes == size_bytes
        assert await store.read("sized") == data

    async def test_a_large_object_reads_back(self, store: ObjectStore) -> None:
        parts = [os.urandom(2**20) for _ in range(40)]
        await store.create("large", parts)
        assert await store.read("large") == b"".join(parts)
        assert await store.read("large", first_byte=-10) == parts[-1][-10:]

    @pytest.mark.parametrize(
        ("first_byte", "end_byte", "expected"),
        [
            (0, None, b"0123456789"),
            (0, 0, b""),
            (0, 4, b"0123"),
            (3, 4, b"3"),
            (3, None, b"3456789"),
            (3, 100, b"3456789"),
            (5, 3, b""),
            (9, 10, b"9"),
            (10, None, b""),
            (100, None, b""),
            (100, 200, b""),
            (-1, None, b"9"),
            (-4, None, b"6789"),
            (-10, None, b"0123456789"),
            (-100, None, b"0123456789"),
            (-4, 8, b"67"),
            (-4, 3, b""),
        ],
    )
    async def test_a_range_is_half_open_and_cut_at_the_end(
        self, store: ObjectStore, first_byte: int, end_byte: int | None, expected: bytes
    ) -> None:
        await store.create("digits", [b"0123456789"])
        assert await store.read("digits", first_byte=first_byte, end_byte=end_byte) == expected

    async def test_a_name_that_is_taken_stays_as_it_is(self, store: ObjectStore) -> None:
        await store.create("a/b", [b"first"])
        with pytest.raises(ObjectExists) as caught:
            await store.create("a/b", [b"second, and longer"])
        assert caught.value.name == "a/b"
        assert await store.read("a/b") == b"first"
        assert await names(store) == ["a/b"]

    async def test_one_of_many_concurrent_creators_wins(self, store: ObjectStore) -> None:
        bodies = [bytes([number]) * 300_000 for number in range(8)]
        outcomes = await asyncio.gather(*(store.create("contended", [body]) for body in bodies), return_exceptions=True)
        winners = [number for number, outcome in enumerate(outcomes) if outcome is None]
        assert len(winners) == 1
        assert all(isinstance(outcome, ObjectExists) for outcome in outcomes if outcome is not None)
        assert await store.read("contended") == bodies[winners[0]]

    async def test_what_is_not_there_is_not_found(self, store: ObjectStore) -> None:
        await store.create("a/b", [b"x"])
        for name in ("missing", "a", "a/b/c", "a/c"):
            with pytest.raises(ObjectNotFound):
                await store.read(name)
            with pytest.raises(ObjectNotFound):
                await store.read(name, first_byte=-4)
            with pytest.raises(ObjectNotFound):
                await store.read(name, first_byte=4, end_byte=4)
            with pytest.raises(ObjectNotFound):
                await store.info(name)

    async def test_a_listing_is_in_byte_order_of_whole_names(self, store: ObjectStore) -> None:
        created = ["a/1", "a/2", "a-b/1", "a.b", "a0", "aB/x", "ab/x", "b", "a/10", "Z/z/z", "Z-/z", "a/1x/deep/er"]
        for name in created:
            await store.create(name, [name.encode()])
        infos = await listed(store)
        assert [info.name for info in infos] == sorted(created)
        assert [info.size_bytes for info in infos] == [len(name) for name in sorted(created)]

    @pytest.mark.parametrize(
        ("prefix", "after", "expected"),
        [
            ("disks/", "", ["disks/a/1.seg", "disks/a/2.seg", "disks/ab/1.seg", "disks/b/1.seg"]),
            ("disks/a", "", ["disks/a/1.seg", "disks/a/2.seg", "disks/ab/1.seg"]),
            ("disks/a/", "", ["disks/a/1.seg", "disks/a/2.seg"]),
            ("disks/a/1", "", ["disks/a/1.seg"]),
            ("disks/a/1.seg", "", ["disks/a/1.seg"]),
            ("disks/a/", "disks/a/1.seg", ["disks/a/2.seg"]),
            ("disks/a/", "disks/a/1", ["disks/a/1.seg", "disks/a/2.seg"]),
            ("disks/", "disks/a/2.seg", ["disks/ab/1.seg", "disks/b/1.seg"]),
            ("disks/", "disks/a", ["disks/a/1.seg", "disks/a/2.seg", "disks/ab/1.seg", "disks/b/1.seg"]),
            ("disks/", "disks/a~", ["disks/b/1.seg"]),
            ("disks/", "z", []),
            ("missing/", "", []),
            ("disks/a/1.seg/", "", []),
            ("", "disks/b/1.seg", ["points/1"]),
        ],
    )
    async def test_a_listing_keeps_to_its_prefix_and_begins_behind_after(
        self, store: ObjectStore, prefix: str, after: str, expected: list[str]
    ) -> None:
        for name in ("disks/a/1.seg", "disks/a/2.seg", "disks/ab/1.seg", "disks/b/1.seg", "points/1"):
            await store.create(name, [b"x"])
        assert await names(store, prefix, after=after) == expected

    async def test_an_empty_store_lists_nothing(self, store: ObjectStore) -> None:
        assert await names(store) == []

    async def test_information_is_the_same_in_a_listing_and_by_name(self, store: ObjectStore) -> None:
        await store.create("a/b", [b"12345"])
        info = await store.info("a/b")
        assert (info.name, info.size_bytes) == ("a/b", 5)
        assert info.modified_ns > 1_600_000_000 * 10**9
        assert await listed(store) == [info]

    async def test_a_deleted_object_is_gone_and_deleting_it_again_is_no_error(self, store: ObjectStore) -> None:
        await store.create("a/b", [b"x"])
        await store.delete("a/b")
        await store.delete("a/b")
        await store.delete("never/there")
        assert await names(store) == []
        with pytest.raises(ObjectNotFound):
            await store.read("a/b")

    async def test_a_deleted_name_can_be_created_again(self, store: ObjectStore) -> None:
        await store.create("a/b", [b"first"])
        await store.delete("a/b")
        await store.create("a/b", [b"second"])
        assert await store.read("a/b") == b"second"

    async def test_a_cancelled_creation_leaves_the_whole_object_or_nothing(self, store: ObjectStore) -> None:
        for attempt in range(12):
            buffer = bytearray(os.urandom(2**20) * 4)
            expected = bytes(buffer)
            name = f"cancelled/{attempt}"
            creation = asyncio.ensure_future(store.create(name, [buffer]))
            for _ in range(attempt):
                await asyncio.sleep(0.001)
            creation.cancel()
            outcomes = await asyncio.gather(creation, return_exceptions=True)
            assert outcomes == [None] or isinstance(outcomes[0], asyncio.CancelledError)
            # the buffer is the caller's again, and what he does with it must not show in the object
            buffer[:] = bytes(len(buffer))
            try:
                found = await store.read(name)
            except ObjectNotFound:
                with suppress(ObjectExists):  # a request that was on its way when it was cancelled
                    await store.create(name, [expected])
                found = await store.read(name)
            assert found == expected

    @pytest.mark.parametrize("name", HOSTILE_NAMES)
    async def test_a_hostile_name_is_refused_by_every_call(self, store: ObjectStore, name: str) -> None:
        with pytest.raises(InvalidValue):
            await store.create(name, [b"x"])
        with pytest.raises(InvalidValue):
            await store.read(name)
        with pytest.raises(InvalidValue):
            await store.info(name)
        with pytest.raises(InvalidValue):
            await store.delete(name)

    @pytest.mark.parametrize("prefix", ["/", "/etc/", "../", "a/../", "../../etc/pass", "a//"])
    async def test_a_hostile_prefix_is_refused(self, store: ObjectStore, prefix: str) -> None:
        with pytest.raises(InvalidValue):
            await names(store, prefix)

    async def test_the_url_names_the_store(self, store: ObjectStore) -> None:
        assert "://" in store.url
