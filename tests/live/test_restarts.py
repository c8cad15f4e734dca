"""Restarts of the machine: a clean one is gone over without comparing anything, any other compares, and says why."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from mobility_agent import restarts
from mobility_agent.core.resync_cause import ResyncCause
from mobility_agent.core.tracking_choice import WantedSource
from mobility_agent.disk_reader import LocalDisk, identify
from mobility_agent.errors import DiskNotSupported, ResyncNeeded
from mobility_agent.protection import ProtectedDisk, Protection, write_protection
from mobility_agent.settings import AgentSettings
from mobility_agent.tracking import restart
from mobility_agent.tracking.kernel_tracker import remove_pins
from mobility_agent.tracking.restart import marker_name
from mobility_agent.tracking.selection import SourceSelection
from mobility_agent.tracking.witnesses import read_witnesses
from protocol.vocabulary import DiskId
from runtime.local_directory import LocalDirectory
from tests.deploy.needed_tools import not_here
from tests.live.block_devices import bpf_file_system, mounted, need_root, run
from tests.live.restarted import BLOCK, SIZE_BYTES, Agent, Machine, change, resync, resync_after_an_unclean_stop
from tests.live.tracked import DISK, MIB


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    need_root()
    # why: a machine for tests may hide its first process; on no other may anything be hidden
    users = restart.open_for_writing
    hidden = "process 1 cannot be looked at"
    monkeypatch.setattr(restart, "open_for_writing", lambda device: tuple(set(users(device)) - {hidden}))
    with bpf_file_system(tmp_path / "bpf") as pins:
        made = Machine(tmp_path, pins)
        made.plug_in()
        try:
            run("mkfs.ext4", "-q", "-F", made.device)
            made.restart()
            yield made
        finally:
            made.unplug()


@pytest.fixture
def agent(machine: Machine) -> Iterator[Agent]:
    """Whose disk, an ext4, was changed after its first round."""
    agent = Agent(machine)
    try:
        agent.round_or_resync()
        change(agent, "before")
        yield agent
    finally:
        with contextlib.suppress(OSError):
            agent.close()


def write(device: Path, offset: int, data: bytes) -> None:
    descriptor = os.open(device, os.O_WRONLY | os.O_SYNC)
    try:
        os.pwrite(descriptor, data, offset)
    finally:
        os.close(descriptor)


def stop(agent: Agent) -> None:
    agent.close()


def changed_bytes(agent: Agent) -> int:
    return BLOCK * len(agent.differing_blocks(BLOCK))


def expect_resync(agent: Agent, cause: ResyncCause) -> None:
    epoch = agent.epoch
    resync(agent, cause)
    assert agent.epoch == epoch + 1


def restart_machine(agent: Agent, *, refused: ResyncCause | None = None) -> None:
    """In order, with a marker, or with the cause of there being none."""
    stop(agent)
    assert agent.machine.note_stop() is refused
    agent.machine.restart()


def test_after_a_clean_stop_tracking_goes_on_and_nothing_is_compared(agent: Agent) -> None:
    machine = agent.machine
    agent.round()
    change(agent, "unsent")
    with mounted(agent.device, machine.place / "mnt", "-o", "discard") as place:
        (place / "before").unlink()
    unsent = changed_bytes(agent)
    assert unsent >= 2 * MIB, "written and discarded"
    restart_machine(agent)
    machine.begin_tracking()
    change(agent, "after")
    agent.open()
    told = agent.round()
    assert agent.epoch == 1, "no resynchronization"
    assert agent.differing_blocks() == [], "nothing is lost, neither of before nor of after the restart"
    assert told.read_bytes < SIZE_BYTES // 4


def test_several_clean_restarts_carry_what_was_not_sent(agent: Agent) -> None:
    """No agent runs meanwhile."""
    machine = agent.machine
    stop(agent)
    for number in range(3):
        assert machine.note_stop() is None
        machine.restart()
        machine.begin_tracking()
        change(agent, f"boot {number}")
    agent.open()
    agent.round()
    assert agent.epoch == 1
    assert agent.differing_blocks() == []


def test_an_unclean_stop_sends_only_what_differs(agent: Agent) -> None:
    machine = agent.machine
    stop(agent)
    machine.restart()
    agent.open()
    expect_resync(agent, ResyncCause.NO_CLEAN_STOP)


def test_what_an_unclean_stop_costs_is_told() -> None:
    need_root()
    told = resync_after_an_unclean_stop()
    assert told["read"] == told["disk"]
    assert 0 < told["changed"] <= told["sent"] < told["disk"] // 4


def test_a_marker_is_believed_once(agent: Agent) -> None:
    """A crash after a clean restart: the marker of before it is gone."""
    machine = agent.machine
    restart_machine(agent)
    machine.begin_tracking()
    assert not (machine.state / marker_name(DISK)).exists(), "gone before anything was written"
    change(agent, "lost")
    machine.restart()
    agent.open()
    expect_resync(agent, ResyncCause.NO_CLEAN_STOP)


def test_a_start_that_ends_before_it_judged_leaves_nothing_to_believe(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = agent.machine
    restart_machine(agent)

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("judge_start", "read_witnesses"):
        with monkeypatch.context() as patched:
            patched.setattr(restart, name, end)
            with pytest.raises(KeyboardInterrupt):
                machine.begin_tracking()
    agent.open()
    expect_resync(agent, ResyncCause.NO_CLEAN_STOP)


def test_a_cause_outlives_an_agent_that_ends_before_the_new_epoch(agent: Agent) -> None:
    machine = agent.machine
    stop(agent)
    machine.note_stop()
    machine.restart(lambda device: write(device, 1024 + 48, b"\xff\xff"))
    for _ in range(2):
        agent.open()
        with pytest.raises(ResyncNeeded, match="changed_while_down"):
            agent.round()
        stop(agent)
    agent.open()
    expect_resync(agent, ResyncCause.CHANGED_WHILE_DOWN)


@contextlib.contextmanager
def in_passing(device: Path) -> Iterator[Path]:
    """Mounted for a moment."""
    with tempfile.TemporaryDirectory() as place, mounted(device, Path(place)) as mount:
        yield mount


def mount_and_write(device: Path) -> None:
    with in_passing(device) as place:
        (place / "elsewhere").write_bytes(os.urandom(BLOCK))


def test_another_system_that_mounted_the_disk_meanwhile_is_noticed(agent: Agent) -> None:
    machine = agent.machine
    stop(agent)
    assert machine.note_stop() is None
    machine.restart(mount_and_write)
    machine.begin_tracking()
    agent.open()
    expect_resync(agent, ResyncCause.CHANGED_WHILE_DOWN)


def test_a_disk_that_was_restored_meanwhile_is_noticed(agent: Agent) -> None:
    machine = agent.machine
    older = (machine.place / "disk.img").read_bytes()
    change(agent, "newer")
    agent.round()
    stop(agent)
    assert machine.note_stop() is None
    machine.restart(lambda device: write(device, 0, older))
    agent.open()
    expect_resync(agent, ResyncCause.CHANGED_WHILE_DOWN)


def test_a_disk_that_is_mounted_before_tracking_begins_is_compared(agent: Agent) -> None:
    machine = agent.machine
    restart_machine(agent)
    with mounted(machine.device, machine.place / "mnt"):
        agent.open()
        with pytest.raises(ResyncNeeded, match="written_before_tracking"):
            agent.round()
        agent.enter_epoch()
        agent.round()
    agent.round()
    assert agent.differing_blocks() == []


def test_a_disk_that_is_mounted_without_any_write_is_compared_as_well(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    restart_machine(agent)
    monkeypatch.setattr(restart, "writable_mounts_and_swap", lambda device: ("mounted at /srv",))
    agent.open()
    expect_resync(agent, ResyncCause.IN_USE_BEFORE_TRACKING)


def test_a_disk_whose_writes_are_not_counted_is_compared(agent: Agent) -> None:
    machine = agent.machine
    restart_machine(agent)
    switch = Path("/sys/block") / machine.device.name / "queue/iostats"
    switch.write_text("0")
    agent.open()
    expect_resync(agent, ResyncCause.WRITTEN_BEFORE_TRACKING)


def test_a_marker_of_this_very_boot_is_not_believed(agent: Agent) -> None:
    """The package was removed and installed again while the machine went on."""
    machine = agent.machine
    stop(agent)
    assert machine.note_stop() is None
    boot_id = machine.boot_id
    machine.restart()
    machine.boot_id = boot_id
    agent.open()
    expect_resync(agent, ResyncCause.MARKER_OF_THIS_BOOT)


def test_a_marker_of_another_disk_is_not_believed(agent: Agent) -> None:
    machine = agent.machine
    stop(agent)
    assert machine.note_stop() is None
    machine.restart(lambda device: write(device, 1024 + 104, os.urandom(16)))
    agent.open()
    expect_resync(agent, ResyncCause.MARKER_OF_ANOTHER_DISK)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:100] + bytes(len(data) - 100)])
def test_a_torn_marker_is_not_believed(agent: Agent, damage: Callable[[bytes], bytes]) -> None:
    machine = agent.machine
    stop(agent)
    assert machine.note_stop() is None
    marker = machine.state / marker_name(DISK)
    marker.write_bytes(damage(marker.read_bytes()))
    machine.restart()
    agent.open()
    expect_resync(agent, ResyncCause.MARKER_DAMAGED)


@contextlib.contextmanager
def opened(device: Path) -> Iterator[None]:
    """By another process, for writing."""
    with subprocess.Popen(["sh", "-c", f"exec 9<>{device}; echo; exec cat"], stdin=-1, stdout=-1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdout.readline()
            yield
        finally:
            process.stdin.close()


@contextlib.contextmanager
def written_meanwhile(device: Path) -> Iterator[None]:
    """While its marks are read."""
    read = restart.read_witnesses

    def read_and_write(source: LocalDisk) -> bytes | None:
        write(device, 40 * MIB, os.urandom(BLOCK))
        return read(source)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(restart, "read_witnesses", read_and_write)
        yield


@pytest.mark.parametrize(
    ("using", "cause"),
    [
        (in_passing, ResyncCause.IN_USE_AT_STOP),
        (opened, ResyncCause.IN_USE_AT_STOP),
        (written_meanwhile, ResyncCause.RESTLESS_AT_STOP),
    ],
    ids=["mounted", "open", "written to"],
)
def test_a_disk_that_is_in_use_at_the_stop_is_compared_afterwards(
    agent: Agent, using: Callable[[Path], contextlib.AbstractContextManager[object]], cause: ResyncCause
) -> None:
    machine = agent.machine
    stop(agent)
    with using(machine.device):
        assert machine.note_stop() is cause
    machine.restart()
    machine.begin_tracking()
    agent.open()
    expect_resync(agent, cause)


@pytest.mark.parametrize("contents", ["nothing", "swap", "a volume group"])
def test_a_disk_that_would_not_show_who_writes_to_it_is_compared(agent: Agent, contents: str) -> None:
    machine = agent.machine
    run("wipefs", "--all", "--quiet", machine.device)
    if contents == "swap":
        run("mkswap", machine.device)
    elif contents == "a volume group":
        write(machine.device, 512, b"LABELONE" + bytes(16) + b"LVM2 001")
    agent.round()
    restart_machine(agent, refused=ResyncCause.UNWITNESSED_CONTENTS)
    machine.begin_tracking()
    agent.open()
    expect_resync(agent, ResyncCause.UNWITNESSED_CONTENTS)


def test_a_stop_after_track_was_lost_tells_its_cause(agent: Agent) -> None:
    machine = agent.machine
    agent.source._tracked.lose(ResyncCause.WRITES_MISSED)
    restart_machine(agent, refused=ResyncCause.WRITES_MISSED)
    machine.begin_tracking()
    agent.open()
    expect_resync(agent, ResyncCause.WRITES_MISSED)


def test_a_disk_that_is_not_tracked_gets_no_marker(agent: Agent) -> None:
    machine = agent.machine
    stop(agent)
    remove_pins(machine._pins)
    assert machine.note_stop() is ResyncCause.NO_CLEAN_STOP
    assert not (machine.state / marker_name(DISK)).exists()


@pytest.mark.parametrize("kind", ["ext2", "ext3", "ext4", "xfs", "btrfs"])
def test_the_witnesses_change_with_whatever_a_mount_changes(tmp_path: Path, kind: str) -> None:
    """And not without: what they are digests of is all that another system cannot leave as it was."""
    need_root()
    if not any(Path(folder, f"mkfs.{kind}").exists() for folder in ("/sbin", "/usr/sbin")):
        not_here(f"mkfs.{kind} is not installed")
    backing = tmp_path / "disk.img"
    backing.touch()
    os.truncate(backing, 320 * MIB)
    device = Path(run("losetup", "--direct-io=on", "--find", "--show", backing))
    try:
        run(f"mkfs.{kind}", "-q", *(["-F"] if kind.startswith("ext") else ["-f"]), device)
        with mounted(device, tmp_path / "mnt") as place:
            (place / "file").write_bytes(os.urandom(MIB))
        seen = {both(device, backing)}
        for options in ("ro", "rw", "rw,noatime"):
            with mounted(device, tmp_path / "mnt", "-o", options) as place:
                (place / "file").read_bytes()
            seen.add(both(device, backing))
        with mounted(device, tmp_path / "mnt", "-o", "noatime") as place, open(place / "file", "r+b") as file:
            file.write(os.urandom(BLOCK))
        seen.add(both(device, backing))
        assert len({contents for contents, _ in seen}) > 1
        assert len({witnesses for _, witnesses in seen}) == len({contents for contents, _ in seen}) == len(seen)
    finally:
        run("losetup", "--detach", device)


def both(device: Path, backing: Path) -> tuple[bytes, bytes | None]:
    """(digest of all that the device holds, its witnesses)"""
    disk = LocalDisk(str(device), expected=None)
    try:
        return blake3(backing.read_bytes()).digest(), read_witnesses(disk)
    finally:
        disk.close()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Installed:
    """What the units of a machine run."""

    machine: Machine
    settings: AgentSettings

    def begin_tracking(self) -> None:
        restarts.begin_tracking(self.settings, read_boot_id=lambda: self.machine.boot_id)

    def note_stop(self) -> None:
        restarts.note_stop(self.settings, read_boot_id=lambda: self.machine.boot_id)

    def protect(self, *paths: Path) -> None:
        """As one disk: its path is stable on a real machine, and another loop device here."""
        entries = []
        for path, disk in zip(paths, (DISK, DiskId("e" * 32)), strict=False):
            entries.append(ProtectedDisk(path=str(path), identity=identify(str(self.machine.device), None), disk=disk))
        write_protection(LocalDirectory(self.machine.state), Protection(disks=tuple(entries)))


@pytest.fixture
def installed(machine: Machine) -> Installed:
    settings = AgentSettings(state_directory=machine.state, tracking_directory=machine._pins.parent)
    machine._pins = settings.pin_directory
    return Installed(machine=machine, settings=settings)


def test_the_units_of_a_machine_take_its_disk_over_a_restart(installed: Installed) -> None:
    machine = installed.machine
    agent = Agent(machine)
    agent.round_or_resync()
    change(agent, "unsent")
    stop(agent)
    installed.protect(machine.device)
    installed.note_stop()
    machine.restart()
    installed.protect(machine.device)
    installed.begin_tracking()
    assert not (machine.state / marker_name(DISK)).exists()
    change(agent, "after")
    agent.open()
    told = agent.round()
    assert agent.epoch == 1
    assert told.read_bytes < SIZE_BYTES // 4
    assert agent.differing_blocks() == []
    agent.close()


def test_a_disk_that_is_missing_at_a_start_keeps_no_marker_and_keeps_nobody_waiting_for_long(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = installed.machine
    agent = Agent(machine)
    agent.round_or_resync()
    stop(agent)
    installed.protect(machine.device)
    installed.note_stop()
    marker = machine.state / marker_name(DISK)
    assert marker.exists()
    machine.restart()
    (machine.state / marker_name(DiskId("e" * 32))).write_bytes(marker.read_bytes())
    marker.rename(marker.with_name("kept"))
    monkeypatch.setattr(restarts, "APPEAR_SECONDS_MAX", 0.2)
    installed.protect(machine.device, Path("/dev/farpoint-missing"))
    installed.begin_tracking()
    assert not list(machine.state.glob("*.marker"))
    installed.protect(Path("/dev/farpoint-missing"), machine.device)
    marker.with_name("kept").rename(marker)
    installed.note_stop()
    assert not list(machine.state.glob("*.marker")), "neither of the disk that is gone nor of the one that is untracked"


def test_an_agent_that_may_not_track_takes_the_marker_away(installed: Installed) -> None:
    machine = installed.machine
    agent = Agent(machine)
    agent.round_or_resync()
    stop(agent)
    installed.protect(machine.device)
    for wanted in (WantedSource.SCAN, WantedSource.BITMAP):
        installed.note_stop()
        assert (machine.state / marker_name(DISK)).exists()
        elsewhere = machine.place / "no-bpf" if wanted is WantedSource.BITMAP else machine._pins
        selection = SourceSelection(wanted, elsewhere)
        with contextlib.suppress(DiskNotSupported), contextlib.closing(machine.open_disk()) as disk:
            selection.open(
                DISK, str(machine.device), disk, directory=LocalDirectory(machine.state), draw_random=os.urandom
            ).close()
        assert not (machine.state / marker_name(DISK)).exists()
        Agent(machine).close()


FIRST_PARTITION, SECOND_PARTITION, PARTITION_BYTES = 2 * MIB, 34 * MIB, 24 * MIB


def partitioned(device: Path) -> None:
    """With an ext4 in each of two partitions."""
    entries = b"".join(
        struct.pack("<4xB3xII", 0x83, first // 512, PARTITION_BYTES // 512)
        for first in (FIRST_PARTITION, SECOND_PARTITION)
    )
    write(device, 0, bytes(440) + b"disk\0\0" + entries + bytes(32) + b"\x55\xaa" + bytes(MIB - 512))
    for first in (FIRST_PARTITION, SECOND_PARTITION):
        run("mkfs.ext4", "-q", "-F", "-E", f"offset={first}", device, f"{PARTITION_BYTES // 1024}k")


def write_in_partition(device: Path, first: int) -> None:
    with (
        tempfile.TemporaryDirectory() as place,
        mounted(device, Path(place), "-o", f"loop,offset={first},sizelimit={PARTITION_BYTES}") as mount,
    ):
        (mount / os.urandom(4).hex()).write_bytes(os.urandom(MIB))


def test_a_partitioned_disk_goes_over_a_restart_and_each_partition_is_a_witness(machine: Machine) -> None:
    partitioned(machine.device)
    agent = Agent(machine)
    agent.round_or_resync()
    write_in_partition(machine.device, SECOND_PARTITION)
    agent.close()
    assert machine.note_stop() is None
    machine.restart()
    machine.begin_tracking()
    write_in_partition(machine.device, FIRST_PARTITION)
    agent.open()
    agent.round()
    assert agent.epoch == 1
    assert agent.differing_blocks() == []
    agent.close()
    assert machine.note_stop() is None
    machine.restart(lambda device: write_in_partition(device, SECOND_PARTITION))
    agent.open()
    expect_resync(agent, ResyncCause.CHANGED_WHILE_DOWN)
    agent.close()
