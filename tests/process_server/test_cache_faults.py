"""Power cuts at every write and synchronize, failed writes, full file systems: what was acknowledged is still there."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from process_server.cache import READ_ATTEMPTS_MAX, Cache
from process_server.cache_log import RecordKind, cache_record
from process_server.errors import CacheFormatNotSupported
from process_server.metrics import ProcessServerMetrics
from protocol.messages import OpenDisk
from storage.errors import StoreUnavailable
from tests.process_server.faulty_directory import FaultyDirectory, PowerCutError
from tests.process_server.memory_store import MemoryStore
from tests.process_server.world import DISK, DISK_BYTES, OTHER_DISK, SMALL, ScriptedAgent, World, eventually

MEBIBYTE = 2**20
CHANGE_SETS = 8


def change_set(sequence: int) -> dict[int, bytes]:
    """Every third has two frames."""
    data = random.Random(sequence).randbytes(20_000)
    if sequence % 3:
        return {sequence * 65536: data}
    return {sequence * 65536: data, 32 * MEBIBYTE + sequence * MEBIBYTE: data * 52}


async def replicate(world: World, acknowledged: list[int], agents: list[ScriptedAgent]) -> None:
    """One run of the process server over the rest of the change sets; PowerCutError if the power goes."""
    async with world.running() as running:
        agent = await running.agent()
        agents.append(agent)
        opened = await agent.open(epoch=1 if acknowledged[0] else 0, acknowledged=acknowledged[0])
        assert opened.durable_sequence >= acknowledged[0]
        for sequence in range(opened.durable_sequence + 1, CHANGE_SETS + 1):
            await agent.send_change_set(sequence, change_set(sequence))
            await agent.until(lambda last=sequence: durable(agent) >= last or agent.is_over or running.task.done())


def durable(agent: ScriptedAgent) -> int:
    return agent.positions[1].durable_sequence if 1 in agent.positions else 0


async def run_until_power_cut(world: World, acknowledged: list[int]) -> bool:
    """True if the power went. acknowledged[0] is what the agent was told at last."""
    agents: list[ScriptedAgent] = []
    try:
        await replicate(world, acknowledged, agents)
    except BaseExceptionGroup as group:
        matched, _ = group.split(lambda error: isinstance(error, PowerCutError))
        if matched is None and not world.faulty.is_off:
            raise
    acknowledged[0] = max([acknowledged[0], *(durable(agent) for agent in agents)])
    return world.faulty.is_off


async def fresh_world(path: Path) -> World:
    path.mkdir(exist_ok=True)
    world = World(path=path)
    world.store = world.memory = MemoryStore()
    world.cache = world.faulty = FaultyDirectory()
    world.limits = dataclasses.replace(
        SMALL,
        segment_stored_bytes_due=40_000,
        segment_age_seconds_max=0.05,
        cache_file_bytes=256 * 1024,
        cache_bytes_max=16 * MEBIBYTE,
    )
    await world.begin()
    return world


async def check_image(world: World) -> None:
    expected = bytearray(DISK_BYTES)
    for sequence in range(1, CHANGE_SETS + 1):
        for offset, data in change_set(sequence).items():
            expected[offset : offset + len(data)] = data
    assert await world.image() == expected


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_power_cut_at_any_write_or_synchronize_loses_nothing_that_was_acknowledged(
    tmp_path: Path, seed: int
) -> None:
    draw = random.Random(seed)
    cuts = 0
    while True:
        world = await fresh_world(tmp_path / f"{cuts}")
        world.faulty.cut_at = cuts + 1
        acknowledged = [0]
        if not await run_until_power_cut(world, acknowledged):
            break
        cuts += 1
        world.faulty.restore_power(draw)
        assert not await run_until_power_cut(world, acknowledged)
        await check_image(world)
    assert cuts > 15


async def test_power_that_goes_again_and_again_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    world = await fresh_world(tmp_path)
    draw = random.Random(7)
    acknowledged = [0]
    for _ in range(12):
        world.faulty.cut_at = world.faulty.operations + draw.randrange(1, 12)
        await run_until_power_cut(world, acknowledged)
        world.faulty.restore_power(draw)
    assert not await run_until_power_cut(world, acknowledged)
    await check_image(world)


@pytest.mark.parametrize("operation", ["write", "synchronize"])
async def test_after_a_failed_write_or_synchronize_nothing_of_it_is_acknowledged_and_a_new_file_is_begun(
    tmp_path: Path, operation: str
) -> None:
    world = await fresh_world(tmp_path)
    failures = []

    def fail(kind: str, name: str) -> OSError | None:
        is_due = kind == operation and world.faulty.operations in (6, 7, 15, 16, 17, 18)
        if is_due:
            failures.append(name)
        return OSError(errno.EIO, "injected") if is_due else None

    world.faulty.fail = fail
    acknowledged = [0]
    assert not await run_until_power_cut(world, acknowledged)
    assert failures
    assert acknowledged[0] == CHANGE_SETS
    await check_image(world)


@pytest.mark.parametrize("operation", ["write", "synchronize"])
async def test_a_power_cut_right_after_a_failed_write_or_synchronize_loses_nothing_that_was_acknowledged(
    tmp_path: Path, operation: str
) -> None:
    draw = random.Random(3)
    for cut_at in range(7, 22):
        world = await fresh_world(tmp_path / f"{cut_at}")
        world.faulty.cut_at = cut_at
        world.faulty.fail = fails_once(world.faulty, operation, cut_at - 2)
        acknowledged = [0]
        await run_until_power_cut(world, acknowledged)
        world.faulty.fail = lambda kind, name: None
        world.faulty.restore_power(draw)
        assert not await run_until_power_cut(world, acknowledged)
        await check_image(world)


def fails_once(directory: FaultyDirectory, operation: str, first: int) -> Callable[[str, str], OSError | None]:
    """EIO at the first such operation from number `first` on."""
    failed: list[str] = []

    def fail(kind: str, name: str) -> OSError | None:
        if failed or kind != operation or directory.operations < first:
            return None
        failed.append(name)
        return OSError(errno.EIO, "injected")

    return fail


async def test_a_full_file_system_holds_acknowledgements_back_until_there_is_space(tmp_path: Path) -> None:
    world = await fresh_world(tmp_path)
    world.faulty.fail = lambda kind, name: OSError(errno.ENOSPC, "full") if kind == "create" else None
    async with world.running() as running:
        agent = await running.agent()
        await agent.send(OpenDisk(channel=1, disk=DISK, epoch=0, acknowledged_sequence=0))
        await eventually(lambda: bool(running.server.not_ready()))
        assert "full" in running.server.not_ready()[0]
        assert 1 not in agent.opened
        await eventually(lambda: running.server._cache.used_bytes == 0)
        world.faulty.fail = lambda kind, name: None
        await agent.until(lambda: 1 in agent.opened)
        for sequence in range(1, CHANGE_SETS + 1):
            await agent.send_change_set(sequence, change_set(sequence))
    await check_image(world)


async def test_acknowledged_bytes_that_rot_in_the_cache_are_never_uploaded_and_count_as_lost(tmp_path: Path) -> None:
    world = await fresh_world(tmp_path)
    async with world.running() as running:
        agent = await running.agent()
        await agent.open()
        await agent.send_change_set(1, {0: b"1" * 512})
        await agent.until_committed(1)
        world.memory.is_away = True
        await agent.send_change_set(2, change_set(2))
        await agent.until_durable(2)
        await running.server._writer.barrier()
        flip_last_frame(world.faulty)
        world.memory.is_away = False
        await agent.until(lambda: 1 in agent.closed)
        assert agent.closed[1].code == "cache-damaged"
        opened = await agent.open(2, epoch=1, acknowledged=2)
        assert (opened.epoch, opened.parent_sequence, opened.durable_sequence) == (2, 1, 0)
    history = await world.archive.history(DISK)
    assert not history.damage


@pytest.mark.parametrize("failures", [1, READ_ATTEMPTS_MAX - 1, READ_ATTEMPTS_MAX])
async def test_acknowledged_bytes_that_cannot_be_read_for_a_moment_are_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    """Found by torture: one EIO on a read of the cache ended the epoch, and the agent copied all of it again."""
    monkeypatch.setattr("process_server.cache.READ_PAUSE_SECONDS_FIRST", 0.001)
    world = await fresh_world(tmp_path)
    failed: list[str] = []

    def fail(kind: str, name: str) -> OSError | None:
        if kind != "read" or len(failed) == failures:
            return None
        failed.append(name)
        return OSError(errno.EIO, "injected")

    async with world.running() as running:
        agent = await running.agent()
        await agent.open()
        world.faulty.fail = fail
        await agent.send_change_set(1, change_set(1))
        if failures < READ_ATTEMPTS_MAX:
            await agent.until_committed(1)
            assert len(failed) == failures
        else:
            await agent.until(lambda: 1 in agent.closed)
            assert agent.closed[1].code == "cache-damaged"


async def test_a_damaged_batch_in_the_middle_of_the_segment_in_work_costs_its_disk_only(tmp_path: Path) -> None:
    """One bit in a batch's header, in a file before the newest, once ended the process server at every start."""
    world = await fresh_world(tmp_path)
    world.limits = dataclasses.replace(world.limits, segment_stored_bytes_due=8 * MEBIBYTE, segment_age_seconds_max=5.0)
    async with world.running() as running:
        agent = await running.agent()
        await agent.open()
        for sequence in range(1, 21):
            await agent.send_change_set(sequence, {sequence * 65536: random.Random(sequence).randbytes(20_000)})
            await agent.until_durable(sequence)
        await running.kill()
    oldest, _newest = world.faulty.names()
    contents = world.faulty.files[oldest].durable
    batches = [place for place in range(0, len(contents), 4096) if contents[place : place + 4] == b"FPCB"]
    contents[batches[4] + 20] ^= 1
    async with world.running() as running:
        agent = await running.agent()
        opened = await agent.open(2, epoch=1, acknowledged=20)
        assert (opened.epoch, opened.parent_sequence, opened.durable_sequence) == (2, 0, 0)


def flip_last_frame(directory: FaultyDirectory) -> None:
    """One bit in the middle of the newest frame, which is far bigger than whatever lies behind it."""
    contents = directory.files[directory.names()[-1]].durable
    contents[len(contents.rstrip(b"\0")) - 10_000] ^= 1


async def test_files_whose_segments_are_all_committed_are_removed(tmp_path: Path) -> None:
    world = await fresh_world(tmp_path)
    async with world.running() as running:
        agent = await running.agent()
        await agent.open()
        for sequence in range(1, 41):
            await agent.send_change_set(sequence, {sequence * 65536: random.Random(sequence).randbytes(40_000)})
        await agent.until_committed(40)
        await eventually(lambda: len(world.faulty.names()) <= 2)
        assert running.server._cache.used_bytes <= 2 * world.limits.cache_file_bytes


async def test_a_disk_whose_files_are_gone_from_between_others_is_whole_after_a_restart(tmp_path: Path) -> None:
    """Simulation, seed 2475: one disk's upload kept the oldest file, and every other disk's next checkpoint did not
    continue what that file said."""
    world = await fresh_world(tmp_path)
    world.grant(1, disk=OTHER_DISK)
    world.memory.refuses = lambda name: StoreUnavailable(url="memory:", reason="test") if DISK in name else None

    def numbers() -> list[int]:
        return [int(name.partition(".")[0]) for name in world.faulty.names()]

    async with world.running() as running:
        agent = await running.agent()
        await agent.open(1)
        await agent.open(2, disk=OTHER_DISK)
        await agent.send_change_set(1, change_set(1), channel=1)
        await agent.until_durable(1)
        last = 0
        while numbers()[-1] - numbers()[0] < len(numbers()) + 1:
            last += 1
            await agent.send_change_set(last, change_set(last % 7), channel=2)
            await agent.until_committed(last, channel=2)
        world.memory.is_away = True
        await agent.send_change_set(last + 1, change_set(1), channel=2)
        await agent.until_durable(last + 1, channel=2)
        await running.kill()
    world.memory.is_away = False
    async with world.running() as running:
        agent = await running.agent()
        opened = await agent.open(2, disk=OTHER_DISK, epoch=1, acknowledged=last + 1)
        assert (opened.epoch, opened.durable_sequence) == (1, last + 1)
        opened = await agent.open(1, epoch=1, acknowledged=1)
        assert (opened.epoch, opened.durable_sequence) == (1, 1)
        world.memory.refuses = lambda name: None


async def test_a_cache_of_a_later_version_is_refused_at_start(tmp_path: Path) -> None:
    world = await fresh_world(tmp_path)
    async with world.running() as running:
        agent = await running.agent()
        await agent.open()
    contents = world.faulty.files[world.faulty.names()[-1]].durable
    contents[4] = 99
    with pytest.raises(ExceptionGroup) as caught:
        async with world.running():
            pass
    assert caught.group_contains(CacheFormatNotSupported)


async def test_a_cancelled_append_ends_with_its_write_so_that_nobody_closes_the_file_under_it() -> None:
    directory = FaultyDirectory()
    loop, began, goes_on, is_held = asyncio.get_running_loop(), asyncio.Event(), threading.Event(), False

    def hold(operation: str, name: str) -> OSError | None:
        if is_held and operation == "write":
            loop.call_soon_threadsafe(began.set)
            goes_on.wait(10)
        return None

    directory.fail = hold
    record = cache_record(RecordKind.SEGMENT_COMMITTED, DISK, 1, 1)
    with ThreadPoolExecutor(2) as executor:
        cache = Cache(
            directory,
            executor,
            ProcessServerMetrics(CollectorRegistry()),
            bytes_max=SMALL.cache_bytes_max,
            file_bytes=SMALL.cache_file_bytes,
        )
        cache.start([], tuple)
        await cache.append([record], has_frames=False)
        is_held = True
        async with asyncio.TaskGroup() as group:
            appending = group.create_task(cache.append([record], has_frames=False))
            await began.wait()
            appending.cancel()
            await asyncio.sleep(0)
            assert not appending.done(), "the thread is writing"
            goes_on.set()
            await asyncio.wait([appending])
        await cache.close()
