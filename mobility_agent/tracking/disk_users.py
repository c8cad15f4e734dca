"""Who can write to a disk just now: file systems and swap on it or on what lies on it, and open files. Changes nothing.

What cannot be looked at counts as a user. Calls block shortly. Errors: OSError.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mobility_agent.consistency.mount_table import freeze_plan, read_block_devices
from protocol.vocabulary import DiskId

_PROCESSES: Final = Path("/proc")
_ANY_DISK: Final = DiskId("")


def writable_mounts_and_swap(device: int) -> tuple[str, ...]:
    """device: st_rdev of a whole disk."""
    systems = freeze_plan({_ANY_DISK: device}).file_systems
    upper = _upper(device)
    swaps = [name for _, name, is_swap in upper if is_swap]
    return tuple(f"mounted at {system.path}" for system in systems) + tuple(f"swap on {name}" for name in swaps)


def open_for_writing(device: int) -> tuple[str, ...]:
    """Processes that have the disk, a partition of it or a device above it open for writing. Needs CAP_SYS_PTRACE to
    look at all of them."""
    numbers = {number for number, _, _ in _upper(device)}
    return tuple(
        found
        for process in sorted(_PROCESSES.iterdir())
        if process.name.isdigit() and int(process.name) != os.getpid()
        for found in _opened_by(process, numbers)
    )


def _opened_by(process: Path, numbers: set[str]) -> Iterator[str]:
    try:
        for descriptor in (process / "fd").iterdir():
            try:
                found = descriptor.stat()
                is_wanted = stat.S_ISBLK(found.st_mode) and _number(found.st_rdev) in numbers
                if is_wanted and _is_writable(process / "fdinfo" / descriptor.name):
                    yield f"open in process {process.name}"
            except FileNotFoundError:
                continue  # why: it was closed meanwhile
    except PermissionError:
        yield f"process {process.name} cannot be looked at"
    except (FileNotFoundError, ProcessLookupError):
        return  # why: it ended meanwhile


def _is_writable(information: Path) -> bool:
    for line in information.read_text(encoding="ascii").splitlines():
        if line.startswith("flags:"):
            return int(line.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY
    return True


def _upper(device: int) -> list[tuple[str, str, bool]]:
    """(number, name, whether it is swap) of the disk and of all that lies on it."""
    devices = read_block_devices(())
    found = {_number(device)}
    while more := {each.number for each in devices if found & set(each.lower)} - found:
        found |= more
    return [(each.number, each.name, each.is_swap) for each in devices if each.number in found]


def _number(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"
