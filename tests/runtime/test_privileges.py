"""Root in a service's directory becomes that service's user, for good; nobody else changes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

NOBODY = 65534
CODE = """
import os, sys
from pathlib import Path
from runtime.privileges import become_owner_of
become_owner_of(Path(sys.argv[1]))
print(*os.getresuid(), *os.getresgid(), *os.getgroups())
"""


def becomes(directory: Path) -> list[int]:
    """Users, groups and supplementary groups of a process that was root before."""
    command = [sys.executable, "-c", CODE, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: only root can become another user")


def test_root_becomes_the_owner_for_good(tmp_path: Path) -> None:
    os.chown(tmp_path, NOBODY, NOBODY)
    assert becomes(tmp_path) == [NOBODY] * 7


def test_root_stays_root_in_its_own_directory(tmp_path: Path) -> None:
    assert becomes(tmp_path)[:6] == [0] * 6
