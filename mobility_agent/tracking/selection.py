"""Gives each disk the best change source that machine, disk and operator allow. Implements Tracking.

Losing the better source demotes to the scan, never to nothing, unless the operator says that nothing less will do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import structlog

from mobility_agent.core.tracking_choice import MachineAbilities, SourceChoice, WantedSource, choose_source
from mobility_agent.disk_reader import LocalDisk
from mobility_agent.errors import DiskNotSupported
from mobility_agent.ports import DrawRandom, SourceDisk
from mobility_agent.tracking.abilities import disk_abilities, machine_abilities
from mobility_agent.tracking.bitmap import BitmapSource
from mobility_agent.tracking.change_source import ChangeSource
from mobility_agent.tracking.kernel_tracker import KernelTracker, remove_pins
from mobility_agent.tracking.restart import Restarts, marker_name, this_boot
from mobility_agent.tracking.scan import ScanSource
from protocol.vocabulary import DiskId
from runtime.directory import DurableDirectory

log = structlog.get_logger(__name__)


class SourceSelection:
    """For all disks of one agent. Calls block; they may come from several threads."""

    def __init__(
        self, wanted: WantedSource, pin_directory: Path, *, read_boot_id: Callable[[], bytes] = this_boot
    ) -> None:
        """pin_directory: in a BPF file system, this agent's alone."""
        self._wanted = wanted
        self._read_boot_id = read_boot_id
        self._directory = pin_directory
        self._tracker = KernelTracker(pin_directory)

    def choose(self, source: SourceDisk) -> SourceChoice:
        """The verdict for an open disk, without doing anything."""
        device = source.device if isinstance(source, LocalDisk) else None
        return choose_source(self._wanted, self._machine(), disk_abilities(device))

    def open(
        self, disk: DiskId, path: str, source: SourceDisk, *, directory: DurableDirectory, draw_random: DrawRandom
    ) -> ChangeSource:
        choice = self.choose(source)
        reason, is_refused = choice.reason, choice.is_refused
        if choice.source == "bitmap":
            try:
                return self._open_bitmap(disk, source, directory, draw_random)
            except OSError as error:
                reason, is_refused = f"tracking could not begin: {error}", self._wanted is WantedSource.BITMAP
        # why: what is written from now on is marked nowhere
        directory.remove(marker_name(disk))
        if is_refused:
            raise DiskNotSupported(path=path, reason=f"it cannot be tracked, as wanted: {reason}")
        try:
            self.forget(disk)
        except DiskNotSupported as error:
            # why: pins that cannot be removed do no harm: if they are ever taken up again, all that was written since
            # is marked in them, or they are found to be broken.
            log.warning("disk", disk=disk, path=path, error=str(error))
        return ScanSource(disk=disk, source=source, directory=directory, draw_random=draw_random, reason=reason)

    def forget(self, disk: DiskId) -> None:
        if not os.path.isdir(self._directory):
            return
        try:
            if self._wanted is WantedSource.SCAN:
                # why: no disk is tracked any more, and to open the tracker would begin to trace
                remove_pins(self._directory)
                return
            self._tracker.open()
            self._tracker.unfollow(disk)
        except OSError as error:
            raise DiskNotSupported(path=disk, reason=f"its tracking cannot be ended: {error}") from error

    def begin(self, disk: DiskId, source: LocalDisk, *, directory: DurableDirectory) -> None:
        """Tracks the disk from now on, for an agent that opens it later. Raises OSError, DiskFault."""
        if self.choose(source).source != "bitmap":
            directory.remove(marker_name(disk))
            return
        self._tracker.open()
        self._restarts(directory).follow(self._tracker, disk, source).close()

    def note_stop(self, disk: DiskId, source: LocalDisk, *, directory: DurableDirectory) -> None:
        """For the very end of a shutdown (Restarts.note_stop). Raises OSError, DiskFault."""
        directory.remove(marker_name(disk))
        # why: nothing is to be attached now that was not before
        if self.choose(source).source == "bitmap" and (self._directory / "disks" / disk).is_dir():
            self._tracker.open()
            self._restarts(directory).note_stop(self._tracker, disk, source)

    def close(self) -> None:
        """Tracking goes on without this process."""
        self._tracker.close()

    def _restarts(self, directory: DurableDirectory) -> Restarts:
        return Restarts(directory=directory, boot_id=self._read_boot_id())

    def _machine(self) -> MachineAbilities:
        return machine_abilities(self._directory)

    def _open_bitmap(
        self, disk: DiskId, source: SourceDisk, directory: DurableDirectory, draw_random: DrawRandom
    ) -> BitmapSource:
        assert isinstance(source, LocalDisk)
        self._tracker.open()
        restarts = self._restarts(directory)
        return BitmapSource(
            disk=disk,
            source=source,
            directory=directory,
            draw_random=draw_random,
            follow=lambda: restarts.follow(self._tracker, disk, source),
        )
