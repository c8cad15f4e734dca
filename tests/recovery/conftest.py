"""A real block device, where one can be made."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

SIZE_BYTES = 8 * 2**20


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Path]:
    """A real block device over a file of SIZE_BYTES, full of ones; skips where none can be made."""
    backing = tmp_path / "backing"
    backing.write_bytes(b"\xff" * SIZE_BYTES)
    made = subprocess.run(["losetup", "--find", "--show", str(backing)], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no loop device can be made here: {made.stderr.strip()}")
    device = Path(made.stdout.strip())
    yield device
    subprocess.run(["losetup", "--detach", str(device)], check=True)
