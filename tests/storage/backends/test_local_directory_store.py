"""The local directory passes the store contract; its order of system calls, its faults, and its leftovers are as it
says.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage.backends import local_directory
from storage.backends.local_directory import UNFINISHED_DIRECTORY, LocalDirectoryStore
from storage.errors import (
    ObjectExists,
    ObjectNotFound,
    ObjectUnreadable,
    StoreFault,
    StoreFull,
    StoreMissing,
    StoreNotPermitted,
    StoreUnavailable,
)
from tests.storage.backends.object_store_contract import ObjectStoreContract, names


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    path.mkdir()
    return path


@pytest.fixture
async def store(root: Path) -> AsyncIterator[LocalDirectoryStore]:
    with ThreadPoolExecutor(8) as executor:
        yield LocalDirectoryStore(root, executor=executor)


class TestLocalDirectoryKeepsTheContract(ObjectStoreContract):
    pass


class TestLocalDirectoryWithoutDirectIoKeepsTheContract(ObjectStoreContract):
    @pytest.fixture(autouse=True)
    def without_direct_io(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = os.open

        def refuse_direct(path: str, flags: int, *arguments: int, **options: int) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "no direct I/O")
            return real(path, flags, *arguments, **options)

        monkeypatch.setattr(os, "open", refuse_direct)


def files_under(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


async def test_a_store_that_is_missing_is_named_with_its_url(tmp_path: Path) -> None:
    with pytest.raises(StoreMissing) as caught:
        LocalDirectoryStore(tmp_path / "missing")
    assert str(tmp_path / "missing") in str(caught.value)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreMissing):
        LocalDirectoryStore(tmp_path / "file")


async def test_a_store_can_be_made_with_its_parents(tmp_path: Path) -> None:
    store = LocalDirectoryStore(tmp_path / "one" / "two", create=True)
    await store.create("a", [b"x"])
    assert stat.S_IMODE((tmp_path / "one" / "two").stat().st_mode) == 0o700


async def test_a_store_that_vanishes_is_missing_not_empty(store: LocalDirectoryStore, root: Path) -> None:
    await store.create("a/b", [b"x"])
    root.rename(root.with_name("elsewhere"))
    for call in (
        lambda: store.read("a/b"),
        lambda: store.info("a/b"),
        lambda: store.delete("a/b"),
        lambda: store.create("a/c", [b"x"]),
        lambda: names(store),
    ):
        with pytest.raises(StoreMissing):
            await call()
    root.with_name("elsewhere").rename(root)
    await store.create("a/c", [b"x"])
    assert await names(store) == ["a/b", "a/c"]


async def test_another_directory_in_its_place_is_not_the_store(store: LocalDirectoryStore, root: Path) -> None:
    """So looks a mount point whose file system is gone."""
    await store.create("a/b", [b"x"])
    root.rename(root.with_name("elsewhere"))
    root.mkdir()
    for call in (
        lambda: store.read("a/b"),
        lambda: store.info("a/b"),
        lambda: store.delete("a/b"),
        lambda: store.create("a/c", [b"x"]),
        lambda: names(store),
    ):
        with pytest.raises(StoreUnavailable, match="has taken its place"):
            await call()
    assert not list(root.iterdir())
    root.rmdir()
    root.with_name("elsewhere").rename(root)
    await store.create("a/c", [b"x"])
    assert await names(store) == ["a/b", "a/c"]


@pytest.mark.parametrize(
    ("number", "fault", "is_retryable"),
    [
        (errno.ENOSPC, StoreFull, True),
        (errno.EDQUOT, StoreFull, True),
        (errno.EROFS, StoreNotPermitted, False),
        (errno.EACCES, StoreNotPermitted, False),
        (errno.EIO, StoreUnavailable, True),
        (errno.ESTALE, StoreUnavailable, True),
        (errno.EFBIG, StoreFault, False),
    ],
)
@pytest.mark.parametrize("call", ["pwritev", "fsync", "link"])
async def test_a_failing_system_call_is_a_typed_fault_and_leaves_nothing(
    store: LocalDirectoryStore,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    number: int,
    fault: type[StoreFault],
    is_retryable: bool,
) -> None:
    await store.create("before", [b"x"])

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(StoreFault) as caught:
            await store.create("a/b", [b"x" * 300_000])
    assert type(caught.value) is fault
    assert caught.value.is_retryable is is_retryable
    assert files_under(root) == ["before"]
    await store.create("a/b", [b"whole"])
    assert await store.read("a/b") == b"whole"


async def test_a_name_that_could_not_be_made_durable_is_taken_back(
    store: LocalDirectoryStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.create("a/before", [b"x"])

    def fail(path: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(local_directory, "synchronize_directory", fail)
        with pytest.raises(StoreUnavailable):
            await store.create("a/b", [b"x"])
    assert files_under(root) == ["a/before"]


async def test_everything_is_durable_before_a_creation_returns(
    root: Path, store: LocalDirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.create("warm", [b""])
    calls: list[str] = []

    def record(module: object, name: str, tell: Callable[..., str]) -> None:
        real = getattr(module, name)

        def call(*arguments: object, **options: object) -> object:
            result = real(*arguments, **options)
            calls.append(tell(*arguments))
            return result

        monkeypatch.setattr(module, name, call)

    def relative(path: object) -> str:
        return "/" + str(Path(str(path)).relative_to(root)).removeprefix(".")

    record(local_directory, "write_new_file", lambda path, parts: "write and synchronize file")
    record(local_directory, "synchronize_directory", lambda path: f"synchronize {relative(path)}")
    record(os, "link", lambda source, target: f"link {relative(target)}")
    await store.create("a/b/c", [b"x"])
    assert calls == [
        "write and synchronize file",
        "synchronize /",
        "synchronize /a",
        "link /a/b/c",
        "synchronize /a/b",
    ]
    calls.clear()
    await store.create("a/b/d", [b"x"])
    assert calls == ["write and synchronize file", "link /a/b/d", "synchronize /a/b"]
    calls.clear()
    with pytest.raises(ObjectExists):
        await store.create("a/b/d", [b"x"])
    assert calls == ["write and synchronize file", "synchronize /a/b"]


async def test_a_directory_that_another_process_made_is_made_durable_too(
    root: Path, store: LocalDirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "a" / "b").mkdir(parents=True)
    synchronized: list[Path] = []
    monkeypatch.setattr(local_directory, "synchronize_directory", lambda path: synchronized.append(Path(path)))
    await store.create("a/b/c", [b"x"])
    assert synchronized == [root, root / "a", root / "a" / "b"]


async def test_the_contents_are_synchronized_at_their_exact_size_before_the_name_appears(
    store: LocalDirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.create("warm", [b""])
    calls: list[str] = []
    for name in ("pwritev", "ftruncate", "fsync", "link"):
        real = getattr(os, name)

        def call(*arguments: object, real: Callable[..., object] = real, name: str = name, **options: object) -> object:
            calls.append(name)
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, call)
    await store.create("large", [os.urandom(2**20 + 5)])
    assert calls == ["pwritev", "pwritev", "ftruncate", "fsync", "link", "fsync"]


async def test_unfinished_files_of_a_crash_are_swept_when_old(root: Path) -> None:
    unfinished = root / UNFINISHED_DIRECTORY
    unfinished.mkdir()
    for name, age_seconds in (("old.part", 7200), ("young.part", 60)):
        (unfinished / name).write_bytes(b"torn")
        os.utime(unfinished / name, (time.time() - age_seconds,) * 2)
    store = LocalDirectoryStore(root)
    assert await names(store) == []
    assert files_under(root) == [f"{UNFINISHED_DIRECTORY}/old.part", f"{UNFINISHED_DIRECTORY}/young.part"]
    await store.create("a", [b"x"])
    assert files_under(root) == [f"{UNFINISHED_DIRECTORY}/young.part", "a"]


async def test_a_reader_never_writes_to_the_store(root: Path, store: LocalDirectoryStore) -> None:
    (root / "a").write_bytes(b"x")
    before = root.stat().st_mtime_ns
    assert await names(store) == ["a"]
    assert await store.read("a") == b"x"
    assert root.stat().st_mtime_ns == before
    assert os.listdir(root) == ["a"]


async def test_a_bad_place_of_the_medium_is_told_with_the_objects_name(
    store: LocalDirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.create("a/b", [b"data"])

    def fail(*_: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(ObjectUnreadable, match="a/b cannot be read: Input/output error") as caught:
        await store.read("a/b")
    assert caught.value.is_retryable


async def test_what_is_not_an_object_is_neither_listed_nor_read(root: Path, store: LocalDirectoryStore) -> None:
    await store.create("a/b", [b"x"])
    (root / "lost+found").mkdir(mode=0o000)
    (root / ".snapshot").mkdir()
    (root / "link").symlink_to(root / "a" / "b")
    (root / "linked").symlink_to(root / "a")
    os.mkfifo(root / "pipe")
    assert await names(store) == ["a/b"]
    for name in ("link", "pipe", "a"):
        with pytest.raises(ObjectNotFound):
            await store.read(name)


async def test_an_object_cannot_take_a_directorys_name_nor_lie_below_an_object(store: LocalDirectoryStore) -> None:
    await store.create("a/b", [b"x"])
    with pytest.raises(StoreFault) as caught:
        await store.create("a", [b"x"])
    assert type(caught.value) is StoreFault
    with pytest.raises(StoreFault) as caught:
        await store.create("a/b/c", [b"x"])
    assert type(caught.value) is StoreFault


async def test_a_listing_of_many_objects_comes_in_order_and_whole(root: Path, store: LocalDirectoryStore) -> None:
    expected = []
    for epoch in range(3):
        (root / f"disk/{epoch:08}").mkdir(parents=True)
        for ordinal in range(1200):
            expected.append(f"disk/{epoch:08}/{ordinal:012}.seg")
            (root / expected[-1]).write_bytes(b"")
    assert await names(store, "disk/") == expected
    assert await names(store, "disk/", after=expected[2000]) == expected[2001:]


async def test_a_listing_reads_only_the_directories_it_needs(
    root: Path, store: LocalDirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/1/x", "a/2/x", "b/1/x", "b/2/x", "c/1/x"):
        await store.create(name, [b""])
    visited: list[str] = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (visited.append(str(Path(path).relative_to(root))), real(path))[1])
    assert await names(store, "", after="b/1/x") == ["b/2/x", "c/1/x"]
    assert visited == [".", "b", "b/1", "b/2", "c", "c/1"]
    visited.clear()
    listing = store.list("")
    assert (await anext(listing)).name == "a/1/x"
    assert visited == [".", "a", "a/1"]


async def test_a_cancelled_creation_waits_for_the_thread_that_reads_the_buffers(
    store: LocalDirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_go_on = threading.Event(), threading.Event()
    real = local_directory.write_new_file

    def slow(path: Path, parts: list[bytes]) -> None:
        begun.set()
        assert may_go_on.wait(30)
        real(path, parts)

    await store.create("warm", [b""])
    monkeypatch.setattr(local_directory, "write_new_file", slow)
    buffer = bytearray(b"x" * 1000)
    async with asyncio.TaskGroup() as group:
        creation = group.create_task(store.create("a", [buffer]))
        await asyncio.get_running_loop().run_in_executor(None, begun.wait)
        for _ in range(2):
            creation.cancel()
            assert not (await asyncio.wait([creation], timeout=0.01))[0]
        may_go_on.set()
        await asyncio.wait([creation])
    assert creation.cancelled()
    buffer[:] = b"y" * 1000
    assert await store.read("a") == b"x" * 1000


async def test_files_are_for_their_owner_only(root: Path, store: LocalDirectoryStore) -> None:
    await store.create("a/b", [b"x" * 2**20])
    assert stat.S_IMODE((root / "a" / "b").stat().st_mode) == 0o600
    assert stat.S_IMODE((root / "a").stat().st_mode) == 0o700


async def test_a_large_object_is_written_past_the_page_cache_where_it_can(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: list[int] = []
    real = os.open
    monkeypatch.setattr(
        os, "open", lambda path, flag, *rest, **options: (flags.append(flag), real(path, flag, *rest, **options))[1]
    )
    store = LocalDirectoryStore(root)
    await store.create("large", [b"x" * 2**20])
    assert any(flag & os.O_DIRECT for flag in flags)
