"""Keeps a program's memory, which holds keys and the contents of disks, from everybody but root.

The units' LimitCORE=0 does not do it alone: a core dump that the kernel pipes to a handler is not bound by it
(core(5)), and another program of the same user may read memory through ptrace(2) or /proc.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Final

_PR_SET_DUMPABLE: Final = 4
"""<linux/prctl.h>. Lasts until the process executes another program."""


def forbid_memory_dumps() -> None:
    """From here on this process dumps no core, and only root can trace it or read its memory. Nothing but Linux has it;
    elsewhere nothing happens. Raises OSError."""
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
