"""Holding real file systems frozen: nothing of them is written meanwhile, and somebody thaws whatever happens."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from mobility_agent.consistency.freeze_process import FREEZE, THAW
from mobility_agent.consistency.freezer import (
    RECORD_FILE,
    FreezeProcess,
    Freezer,
    thaw_before_start,
    thaw_what_was_left,
)
from mobility_agent.consistency.mount_table import freeze_plan
from mobility_agent.core.freeze_plan import FileSystem, FreezePlan
from mobility_agent.errors import FreezeFailed
from mobility_agent.program import LOCK_FILE
from protocol.vocabulary import DiskId
from runtime.local_directory import LocalDirectory
from runtime.locks import exclusive_lock
from tests.live.block_devices import loop_device, mounted, run

DISK = DiskId("d" * 32)
MIB = 2**20
BOOT = "boot"
LONG_SECONDS = 60.0
"""Nobody waits for it."""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A mounted ext4; thawed at the end, whatever a test did to it."""
    with loop_device(tmp_path / "disk.img", size_bytes=32 * MIB) as device:
        run("mkfs.ext4", "-q", "-F", device)
        with mounted(device, tmp_path / "mnt") as at:
            try:
                yield at
            finally:
                thaw(at)


@pytest.fixture
async def freezer(tmp_path: Path) -> AsyncIterator[Freezer]:
    with ThreadPoolExecutor(1) as executor:
        yield Freezer(
            directory=LocalDirectory(tmp_path / "state"), path=tmp_path / "state", boot_id=BOOT, executor=executor
        )


def plan_of(place: Path) -> FreezePlan:
    """As if the disk below the mounted device were protected."""
    return freeze_plan({DISK: os.stat(place).st_dev})


def system_of(place: Path) -> FileSystem:
    (system,) = plan_of(place).file_systems
    return system


def is_frozen(place: Path) -> bool:
    descriptor = os.open(place, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, FREEZE, 0)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return True
    else:
        fcntl.ioctl(descriptor, THAW, 0)
        return False
    finally:
        os.close(descriptor)


def thaw(place: Path) -> bool:
    """Whether it was frozen."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, THAW, 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    finally:
        os.close(descriptor)
    return True


@contextmanager
def blocked_writer(file: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that writes to the file once, and ends then."""
    writer = subprocess.Popen([sys.executable, "-c", f"open({str(file)!r}, 'wb').write(b'x')"])
    try:
        yield writer
    finally:
        assert writer.wait(LONG_SECONDS) == 0


async def test_nothing_is_written_between_freeze_and_thaw(freezer: Freezer, place: Path) -> None:
    file = place / "file"
    async with freezer.process([system_of(place)], seconds_max=LONG_SECONDS) as process:
        await process.synchronize()
        assert await process.freeze(LONG_SECONDS) == {}
        assert is_frozen(place)
        with blocked_writer(file) as writer:
            with pytest.raises(subprocess.TimeoutExpired):
                writer.wait(0.2)
            assert not file.exists()
            ended = await process.thaw()
    assert file.exists()
    assert (ended.cause, ended.lost) == ("told", {})
    assert 0.2 <= ended.seconds < LONG_SECONDS
    assert not (place.parent / "state" / RECORD_FILE).exists()


async def test_it_is_thawed_when_the_time_is_up(freezer: Freezer, place: Path) -> None:
    async with freezer.process([system_of(place)], seconds_max=0.2) as process:
        await process.freeze(0.2)
        with blocked_writer(place / "file"):
            pass
        ended = await process.thaw()
    assert ended.cause == "deadline"
    assert ended.seconds >= 0.2


async def test_a_file_system_that_is_mounted_in_two_places_is_frozen_once(freezer: Freezer, place: Path) -> None:
    again = place.parent / "again"
    again.mkdir()
    run("mount", "--bind", place, again)
    try:
        async with freezer.process([system_of(place)], seconds_max=LONG_SECONDS) as process:
            assert await process.freeze(LONG_SECONDS) == {}
            assert is_frozen(again)
            assert (await process.thaw()).lost == {}
    finally:
        run("umount", again)


async def test_what_somebody_else_has_frozen_stays_frozen(freezer: Freezer, place: Path) -> None:
    run("fsfreeze", "--freeze", place)
    async with freezer.process([system_of(place)], seconds_max=LONG_SECONDS) as process:
        with pytest.raises(FreezeFailed, match="busy"):
            await process.freeze(LONG_SECONDS)
    assert thaw(place)


async def test_what_somebody_else_thaws_is_told(freezer: Freezer, place: Path) -> None:
    async with freezer.process([system_of(place)], seconds_max=LONG_SECONDS) as process:
        await process.freeze(LONG_SECONDS)
        assert thaw(place)
        ended = await process.thaw()
    assert ended.lost == {str(place): "somebody else thawed it"}


async def test_what_something_else_is_mounted_over_is_told_and_not_frozen(freezer: Freezer, place: Path) -> None:
    system = system_of(place)
    run("mount", "-t", "tmpfs", "none", place)
    try:
        async with freezer.process([system], seconds_max=LONG_SECONDS) as process:
            assert await process.freeze(LONG_SECONDS) == {str(place): "something else is mounted over it"}
            assert (await process.thaw()).lost == {}
    finally:
        run("umount", place)
    assert not is_frozen(place)


async def test_the_agent_thaws_when_the_process_was_killed(freezer: Freezer, place: Path) -> None:
    async with freezer.process([system_of(place)], seconds_max=LONG_SECONDS) as process:
        await process.freeze(LONG_SECONDS)
        process_of(process).kill()
        with pytest.raises(FreezeFailed, match="ended"):
            await process.thaw()
    assert not is_frozen(place)


def process_of(process: FreezeProcess) -> asyncio.subprocess.Process:
    return process._process


AGENT = """
import asyncio, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from mobility_agent.consistency.freezer import Freezer
from runtime.local_directory import LocalDirectory
from runtime.locks import exclusive_lock
from tests.live.test_freezing import BOOT, system_of

async def main(place, state, seconds):
    freezer = Freezer(directory=LocalDirectory(state), path=state, boot_id=BOOT, executor=ThreadPoolExecutor(1))
    async with freezer.process([system_of(place)], seconds_max=seconds) as process:
        await process.freeze(seconds)
        print(process._process.pid, flush=True)
        await asyncio.sleep(3600)

asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])))
"""


@contextmanager
def freezing_agent(place: Path, *, seconds_max: float) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that holds the file system frozen, and the number of the one that froze it."""
    command = [sys.executable, "-c", AGENT, str(place), str(place.parent / "state"), str(seconds_max)]
    agent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert agent.stdout is not None
    try:
        yield agent, int(agent.stdout.readline())
    finally:
        agent.kill()
        agent.wait()
        agent.stdout.close()


def test_a_killed_agent_leaves_nothing_frozen(place: Path) -> None:
    with freezing_agent(place, seconds_max=LONG_SECONDS) as (agent, freezing):
        assert is_frozen(place)
        agent.kill()
        with blocked_writer(place / "file"):
            pass
        assert wait_for_end(freezing)
    assert not (place.parent / "state" / RECORD_FILE).exists()


def test_a_stopped_agent_leaves_nothing_frozen_for_long(place: Path) -> None:
    with freezing_agent(place, seconds_max=1.0) as (agent, _):
        agent.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        with blocked_writer(place / "file"):
            pass
        # why some more: a busy machine takes its time to run whoever thaws
        assert time.monotonic() - began < 1.0 + LONG_SECONDS / 6
        assert not is_frozen(place)


@pytest.mark.parametrize("boot", [BOOT, "an earlier boot"])
def test_the_next_start_thaws_what_a_killed_agent_and_process_left_frozen(place: Path, boot: str) -> None:
    """After a restart of the machine nothing is frozen, and the record means nothing."""
    directory = LocalDirectory(place.parent / "state")
    with freezing_agent(place, seconds_max=LONG_SECONDS) as (agent, freezing):
        agent.send_signal(signal.SIGSTOP)
        os.kill(freezing, signal.SIGKILL)
        agent.kill()
        agent.wait()
    assert is_frozen(place)
    assert thaw_what_was_left(directory, boot) == ([str(place)] if boot == BOOT else [])
    assert is_frozen(place) is (boot != BOOT)
    assert thaw_what_was_left(directory, BOOT) == []


def test_an_agent_whose_state_is_on_what_was_left_frozen_starts(place: Path) -> None:
    """Nothing there can be written before it is thawed."""
    state = place / "state"
    with exclusive_lock(state / LOCK_FILE):
        pass
    (place.parent / "state").symlink_to(state)
    with freezing_agent(place, seconds_max=LONG_SECONDS) as (agent, freezing):
        agent.send_signal(signal.SIGSTOP)
        os.kill(freezing, signal.SIGKILL)
        agent.kill()
        agent.wait()
    assert is_frozen(place)
    assert thaw_before_start(state, LOCK_FILE, BOOT) == [str(place)]
    with exclusive_lock(state / LOCK_FILE):
        assert thaw_before_start(state, LOCK_FILE, BOOT) == [], "one that runs thaws by itself"


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGTERM, signal.SIGALRM, signal.SIGRTMIN])
def test_what_freezes_heeds_no_signal_but_thaws(place: Path, number: int) -> None:
    """systemd's watchdog sends SIGABRT to all of a service."""
    with freezing_agent(place, seconds_max=LONG_SECONDS) as (agent, freezing):
        os.kill(freezing, number)
        assert is_frozen(place)
        agent.kill()
        assert wait_for_end(freezing)
    assert not is_frozen(place)


def wait_for_end(process: int) -> bool:
    deadline = time.monotonic() + LONG_SECONDS
    while time.monotonic() < deadline:
        if not Path(f"/proc/{process}").exists():
            return True
        os.sched_yield()
    return False


def test_a_file_system_on_a_file_of_another_is_frozen_before_it(place: Path) -> None:
    with loop_device(place / "inner.img", size_bytes=8 * MIB) as device:
        run("mkfs.ext4", "-q", "-F", device)
        with mounted(device, place.parent / "inner") as inner:
            plan = plan_of(place)
            assert [system.path for system in plan.file_systems] == [str(inner), str(place)]
            assert plan.to_probe == {DISK: ()}
            only_inner = plan_of(inner)
            assert [system.path for system in only_inner.file_systems] == [str(inner)]


def test_what_nothing_known_lies_on_is_to_be_probed(tmp_path: Path) -> None:
    with loop_device(tmp_path / "disk.img", size_bytes=8 * MIB) as device:
        plan = freeze_plan({DISK: os.stat(device).st_rdev})
        assert plan.file_systems == ()
        assert plan.to_probe == {DISK: (device.name,)}


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
async def test_each_kind_of_file_system_is_frozen(tmp_path: Path, freezer: Freezer, kind: str) -> None:
    with loop_device(tmp_path / "kind.img", size_bytes=320 * MIB) as device:
        run(f"mkfs.{kind}", "-q", device)
        with mounted(device, tmp_path / "kind") as at:
            plan = freeze_plan({DISK: os.stat(device).st_rdev})
            assert [system.path for system in plan.file_systems] == [str(at)]
            async with freezer.process(plan.file_systems, seconds_max=LONG_SECONDS) as process:
                assert await process.freeze(LONG_SECONDS) == {}
                assert is_frozen(at)
                assert (await process.thaw()).lost == {}
