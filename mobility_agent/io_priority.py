"""The priority of a thread's reads and writes in the kernel's I/O schedulers (ioprio_set(2)): bfq and mq-deadline heed
it, `none` does not."""

from __future__ import annotations

import ctypes
import enum
import os
import threading
from typing import Final

_SYSTEM_CALLS: Final = {"x86_64": 251, "aarch64": 30}
_THIS_THREAD: Final = (1, 0)
"""IOPRIO_WHO_PROCESS, of the caller."""
_CLASS_SHIFT: Final = 13
_BEST_EFFORT, _IDLE = 2, 3
_library = ctypes.CDLL(None, use_errno=True)
_of_thread = threading.local()


class IoPriority(enum.StrEnum):
    """What others' reads and writes go before."""

    NORMAL = "normal"
    LOW = "low"
    """Those of all who have set nothing."""
    IDLE = "idle"
    """Everybody's: on a busy disk nothing is read for long."""


_VALUES: Final = {
    IoPriority.NORMAL: _BEST_EFFORT << _CLASS_SHIFT | 4,
    IoPriority.LOW: _BEST_EFFORT << _CLASS_SHIFT | 7,
    IoPriority.IDLE: _IDLE << _CLASS_SHIFT,
}


def set_io_priority(priority: IoPriority) -> None:
    """Of the calling thread; quick where it has it already. No effect where the kernel refuses, or has no such call."""
    if getattr(_of_thread, "priority", IoPriority.NORMAL) is priority:
        return
    number = _SYSTEM_CALLS.get(os.uname().machine)
    if number is not None:
        # why: refused by a seccomp filter at worst, and then reads are as those of others
        _library.syscall(number, *_THIS_THREAD, _VALUES[priority])
    _of_thread.priority = priority
