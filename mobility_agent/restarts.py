"""What is done for the protected disks at both ends of a boot: track them before they are mounted, and note their
marks after they were unmounted.

One disk's error never keeps the others from it, and none keeps the machine from starting or stopping: a disk for which
it fails is compared as a whole by the agent.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from typing import Final

import structlog

from mobility_agent.disk_reader import LocalDisk
from mobility_agent.errors import DiskFault, DiskVanished
from mobility_agent.program import LOCK_FILE
from mobility_agent.protection import ProtectedDisk, read_protection
from mobility_agent.settings import AgentSettings
from mobility_agent.tracking.restart import marker_name, this_boot
from mobility_agent.tracking.selection import SourceSelection
from protocol.vocabulary import DiskId
from runtime.directory import DurableDirectory
from runtime.local_directory import LocalDirectory
from runtime.locks import exclusive_lock

APPEAR_SECONDS_MAX: Final = 10.0
"""So long the mounts of a boot may wait for protected disks that the kernel has not found yet, all together."""
APPEAR_POLL_SECONDS: Final = 0.05

log = structlog.get_logger(__name__)

ForDisk = Callable[[SourceSelection, DiskId, LocalDisk, DurableDirectory], None]


def begin_tracking(settings: AgentSettings, *, read_boot_id: Callable[[], bytes] = this_boot) -> None:
    """Early in a boot. Blocks. Raises StateLocked while an agent runs, AgentStateDamaged."""
    _for_each(
        settings,
        read_boot_id,
        lambda selection, disk, source, directory: selection.begin(disk, source, directory=directory),
        appear_seconds_max=APPEAR_SECONDS_MAX,
    )


def note_stop(settings: AgentSettings, *, read_boot_id: Callable[[], bytes] = this_boot) -> None:
    """As the last in a shutdown. Blocks. Raises StateLocked while an agent runs, AgentStateDamaged."""
    _for_each(
        settings,
        read_boot_id,
        lambda selection, disk, source, directory: selection.note_stop(disk, source, directory=directory),
        appear_seconds_max=0.0,
    )


def _for_each(
    settings: AgentSettings, read_boot_id: Callable[[], bytes], act: ForDisk, *, appear_seconds_max: float
) -> None:
    if not settings.state_directory.is_dir():
        return
    deadline = time.monotonic() + appear_seconds_max
    with (
        exclusive_lock(settings.state_directory / LOCK_FILE),
        closing(SourceSelection(settings.tracking, settings.pin_directory, read_boot_id=read_boot_id)) as selection,
    ):
        directory = LocalDirectory(settings.state_directory)
        for entry in read_protection(directory).disks:
            if entry.disk is None or entry.release is not None:
                continue
            try:
                with closing(_open(entry, deadline)) as source:
                    act(selection, entry.disk, source, directory)
            except (DiskFault, OSError) as error:
                log.warning("disk", disk=entry.disk, path=entry.path, error=str(error))
                # why: what becomes of the disk from now on is marked nowhere
                directory.remove(marker_name(entry.disk))


def _open(entry: ProtectedDisk, deadline: float) -> LocalDisk:
    while True:
        try:
            return LocalDisk(entry.path, expected=entry.identity)
        except DiskVanished:
            if time.monotonic() >= deadline:
                raise
        time.sleep(APPEAR_POLL_SECONDS)
