"""Why a disk has to be compared with its history again, or sent again: every cause has a name.

The name is what the log, `status` and the label `cause` of the metric say; it is kept in the kernel beside the marks,
so that whoever takes over tracking knows it too. A name that was released stays.
"""

from __future__ import annotations

import enum
from typing import Final

NAME_BYTES_MAX: Final = 64


class ResyncCause(enum.StrEnum):
    """Each says what happened."""

    COMMAND_PAST_BLOCK_LAYER = "command_past_block_layer"
    """A command went to the disk that names no blocks, so that nobody knows what it changed."""
    WRITE_BEHIND_END = "write_behind_end"
    """A write went behind the end of the disk as it was when its tracking began."""
    WRITES_MISSED = "writes_missed"
    """The kernel counted writes that no tracing program saw, neither when they were submitted nor when they ended."""
    DEVICE_CHANGED = "device_changed"
    """The device was away for a moment, or its number means another disk now."""
    TRACKING_INTERRUPTED = "tracking_interrupted"
    """The tracing programs ended, or no longer marked for this disk, while the machine went on."""
    NO_CLEAN_STOP = "no_clean_stop"
    """Tracking begins, and no clean stop was noted: the machine crashed or lost power, the pins were removed, or the
    disk cannot be stopped cleanly."""
    MARKER_DAMAGED = "marker_damaged"
    """What was noted at the last stop is not whole, or of another version."""
    MARKER_OF_THIS_BOOT = "marker_of_this_boot"
    """A clean stop was noted, but the machine was not restarted since: it went on untracked."""
    MARKER_OF_ANOTHER_DISK = "marker_of_another_disk"
    """The stop that was noted was that of a disk of another size or identity."""
    IN_USE_BEFORE_TRACKING = "in_use_before_tracking"
    """After the restart the disk was mounted for writing, or swapped to, before tracking began."""
    WRITTEN_BEFORE_TRACKING = "written_before_tracking"
    """After the restart the kernel had counted writes to the disk before tracking began, or does not count them."""
    CHANGED_WHILE_DOWN = "changed_while_down"
    """A file system's superblock, or the partition table, is not what it was at the clean stop: another system wrote
    to the disk, or it was restored."""
    IN_USE_AT_STOP = "in_use_at_stop"
    """When the machine stopped the disk was still mounted, held by another device, or open for writing."""
    RESTLESS_AT_STOP = "restless_at_stop"
    """When the machine stopped writes were still under way, or the programs had not seen all of them."""
    UNWITNESSED_CONTENTS = "unwitnessed_contents"
    """The disk holds something that would not show whether another system wrote to it while the machine was down:
    no file system that is known, swap, LVM, RAID."""
    CACHE_LOST = "cache_lost"
    """The process server holds less than it had acknowledged: what is missing is read again."""
    HISTORY_UNKNOWN = "history_unknown"
    """The agent's own state does not tell what the history holds: it was lost, damaged, or is an old copy.
    Everything is sent."""
    EPOCH_FOUND = "epoch_found"
    """The process server has begun a new epoch that the agent did not ask for just now: another server took over, or an
    answer was lost."""
