"""This machine as the operating system describes it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from mobility_agent.reports import MachineFacts
from protocol.control import NAME_LENGTH_MAX, HostDescription


def this_machine() -> MachineFacts:
    """Blocks shortly."""
    return MachineFacts(
        boot_id=_text("/proc/sys/kernel/random/boot_id"),
        host=HostDescription(
            name=(socket.gethostname() or "machine")[:NAME_LENGTH_MAX],
            processors=os.cpu_count() or 1,
            memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            firmware="uefi" if Path("/sys/firmware/efi").is_dir() else "bios",
        ),
    )


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return ""  # a container without /proc has no boot identifier
