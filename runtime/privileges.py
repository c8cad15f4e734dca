"""Root acts for a service as that service's user: what the service shall read later must be its own."""

from __future__ import annotations

import os
from pathlib import Path


def become_owner_of(directory: Path) -> None:
    """As root, goes on for good as the user and group that own the directory; nothing happens for anybody else.

    Call it when everything is read that only root can read. Raises OSError if the directory is not there.
    """
    owner = directory.stat()
    if os.geteuid() or not owner.st_uid:
        return
    os.setgroups([owner.st_gid])
    os.setgid(owner.st_gid)
    os.setuid(owner.st_uid)
