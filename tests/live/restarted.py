"""A machine with one disk that is restarted as often as wanted, and the agent on it.

A restart is simulated: the pins go, the loop device goes and another one comes, whose counts begin at zero, and the
kernel gets another name for its run.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from mobility_agent.core.resync_cause import ResyncCause
from mobility_agent.disk_reader import LocalDisk
from mobility_agent.errors import ResyncNeeded
from mobility_agent.tracking.followed_disk import FollowedDisk
from mobility_agent.tracking.kernel_tracker import KernelTracker, remove_pins
from mobility_agent.tracking.restart import Restarts
from protocol.vocabulary import DIGEST_BLOCK_BYTES
from runtime.local_directory import LocalDirectory
from tests.live.block_devices import bpf_file_system, mounted, run
from tests.live.tracked import DISK, MIB, Told, TrackedDisk

BLOCK = 4096
SIZE_BYTES = 64 * MIB
LOOP_CONTROL_ADD, LOOP_CONTROL_REMOVE = 0x4C80, 0x4C81
"""Of linux/loop.h."""
FIRST_NUMBER = 700
"""Of loop devices that nobody else makes."""
_numbers = itertools.count(FIRST_NUMBER + os.getpid() % 1000 * 100)


class Machine:
    """One disk, the agent's state, and as many runs of a machine as wanted."""

    def __init__(self, place: Path, pins: Path) -> None:
        self.place = place
        self.state = place / "state"
        self.device = Path("/dev/loop-none")
        self.boot_id = os.urandom(16)
        self._pins = pins
        self._number = 0
        self._backing = place / "disk.img"
        self._backing.touch()
        os.truncate(self._backing, SIZE_BYTES)

    def plug_in(self) -> None:
        """A device that has never been written to, as far as the kernel knows."""
        self._number = next(_numbers)
        _control(LOOP_CONTROL_ADD, self._number)
        self.device = Path(f"/dev/loop{self._number}")
        run("losetup", self.device, self._backing)

    def unplug(self) -> None:
        run("losetup", "--detach", self.device)
        deadline = time.monotonic() + 10
        while True:
            try:
                _control(LOOP_CONTROL_REMOVE, self._number)
                return
            except OSError:
                # why: it is let go of when its last user has closed it
                if time.monotonic() > deadline:
                    raise

    def restart(self, meanwhile: Callable[[Path], object] | None = None) -> None:
        """meanwhile: what another system does to the device while this one is down."""
        remove_pins(self._pins)
        self.unplug()
        if meanwhile is not None:
            self.plug_in()
            meanwhile(self.device)
            self.unplug()
        self.boot_id = os.urandom(16)
        self.plug_in()

    def open_disk(self) -> LocalDisk:
        return LocalDisk(str(self.device), expected=None)

    @property
    def restarts(self) -> Restarts:
        return Restarts(directory=LocalDirectory(self.state), boot_id=self.boot_id)

    def note_stop(self) -> ResyncCause | None:
        """As the last unit of a shutdown does it."""
        tracker, disk = KernelTracker(self._pins), self.open_disk()
        tracker.open()
        try:
            return self.restarts.note_stop(tracker, DISK, disk)
        finally:
            disk.close()
            tracker.close()

    def begin_tracking(self) -> None:
        """As the first unit of a boot does it."""
        tracker, disk = KernelTracker(self._pins), self.open_disk()
        tracker.open()
        try:
            self.restarts.follow(tracker, DISK, disk).close()
        finally:
            disk.close()
            tracker.close()


class Agent(TrackedDisk):
    """An agent that takes tracking over restarts."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        super().__init__(machine.device, machine.state, machine._pins)

    def open(self) -> None:
        self.device = self.machine.device
        super().open()

    def follow(self) -> FollowedDisk:
        return self.machine.restarts.follow(self.tracker, DISK, self.disk)


def _control(command: int, number: int) -> None:
    descriptor = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, command, number)
    finally:
        os.close(descriptor)


def change(agent: Agent, name: str) -> None:
    """A new file of a MiB in the disk's file system."""
    with mounted(agent.machine.device, agent.machine.place / "mnt") as place:
        (place / name).write_bytes(os.urandom(MIB))


def resync(agent: Agent, cause: ResyncCause) -> Told:
    """The round after the cause was told: everything is compared in a new epoch, and only what differs is sent, or is
    not known to be the same, because only a part of it was sent."""
    digests = agent.source._known.digests
    differing = {offset // DIGEST_BLOCK_BYTES for offset in agent.differing_blocks(BLOCK)}
    differing |= {block for block, digest in enumerate(digests.known(0, digests.block_count)) if digest is None}
    told_cause = None
    try:
        agent.round()
    except ResyncNeeded as error:
        told_cause = error.fields["cause"]
    assert told_cause == cause
    agent.enter_epoch()
    told = agent.round()
    assert told.read_bytes == SIZE_BYTES
    assert told.sent_bytes <= DIGEST_BLOCK_BYTES * len(differing)
    assert agent.differing_blocks() == []
    return told


def resync_after_an_unclean_stop() -> dict[str, int]:
    """What one costs: bytes of the disk, that were changed unseen, read, and sent."""
    with tempfile.TemporaryDirectory() as place, bpf_file_system(Path(place) / "bpf") as pins:
        machine = Machine(Path(place), pins)
        machine.plug_in()
        try:
            run("mkfs.ext4", "-q", "-F", machine.device)
            machine.restart()
            agent = Agent(machine)
            agent.round_or_resync()
            agent.close()
            machine.restart(lambda device: change(agent, "unseen"))
            agent.open()
            changed = BLOCK * len(agent.differing_blocks(BLOCK))
            told = resync(agent, ResyncCause.NO_CLEAN_STOP)
            agent.close()
            return {"disk": SIZE_BYTES, "changed": changed, "read": told.read_bytes, "sent": told.sent_bytes}
        finally:
            machine.unplug()
