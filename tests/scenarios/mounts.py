"""Loop devices and small file systems, for a moment and only as root; elsewhere the test is skipped and says why."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def run_as_root(*command: object) -> str:
    """Skips the test where this machine does not let us."""
    if os.geteuid() != 0:
        pytest.skip("mounts and loop devices need root")
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this machine cannot {' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def loop_device(backing: Path, *, size_bytes: int) -> Iterator[Path]:
    """A block device of that size."""
    with open(backing, "xb") as file:
        file.truncate(size_bytes)
    device = run_as_root("losetup", "--find", "--show", backing)
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@contextmanager
def mounted(source: object, at: Path, *options: object) -> Iterator[None]:
    """`mount OPTIONS SOURCE AT` for the length of the block."""
    at.mkdir(exist_ok=True)
    run_as_root("mount", *options, source, at)
    try:
        yield
    finally:
        # why: lazily, because a program that was killed a moment ago may still be on its way out of it
        subprocess.run(["umount", "--lazy", str(at)], check=True)


def remount(at: Path, options: str) -> None:
    run_as_root("mount", "-o", f"remount,{options}", at)
