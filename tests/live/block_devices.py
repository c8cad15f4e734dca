"""Block devices and BPF file systems for a moment, for whoever is root: all is undone, also after a failure.

Pins live in a BPF file system of their own, so that unmounting it ends every program and frees every map of a test.
"""

from __future__ import annotations

import os
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.deploy.needed_tools import not_here


def need_root() -> None:
    if os.geteuid() != 0:
        not_here("live tracking needs root, for BPF programs, loop devices and mounts")
    if not Path("/sys/kernel/btf/vmlinux").exists():
        not_here("live tracking needs a kernel that describes its types (/sys/kernel/btf/vmlinux)")


def run(*command: object) -> str:
    """What the command says; raises CalledProcessError with its errors shown."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stderr.strip()}"
    return done.stdout.strip()


@contextmanager
def bpf_file_system(at: Path) -> Iterator[Path]:
    """A directory below a fresh one; it does not exist yet."""
    need_root()
    at.mkdir(parents=True)
    run("mount", "-t", "bpf", "bpffs", at)
    try:
        yield at / "farpoint"
    finally:
        run("umount", "--lazy", at)
        at.rmdir()


@contextmanager
def loop_device(backing: Path, *, size_bytes: int, partitions: bool = False, is_direct: bool = False) -> Iterator[Path]:
    """is_direct: past the page cache of its backing file, so that many reads and writes are under way at once."""
    need_root()
    backing.touch()
    os.truncate(backing, size_bytes)
    options = ["--partscan"] if partitions else []
    options += ["--direct-io=on"] if is_direct else []
    device = run("losetup", *options, "--find", "--show", backing)
    try:
        yield Path(device)
    finally:
        if partitions:
            subprocess.run(["partx", "--delete", device], check=False, capture_output=True)
        run("losetup", "--detach", device)
        backing.unlink(missing_ok=True)


FIRST_PARTITION_BYTES = 2 * 2**20


def make_partitions(device: Path, size_bytes: int) -> Path:
    """Two of a disk that was opened with partitions: a small one, and what is left, which is returned."""
    second = 2 * FIRST_PARTITION_BYTES
    entries = b"".join(
        struct.pack("<4xB3xII", 0x83, first // 512, length // 512)
        for first, length in ((FIRST_PARTITION_BYTES, FIRST_PARTITION_BYTES), (second, size_bytes - second))
    )
    with open(device, "r+b") as file:
        file.seek(446)
        file.write(entries + bytes(32) + b"\x55\xaa")
        os.fsync(file.fileno())
    subprocess.run(["partx", "--add", device], check=False, capture_output=True)  # the kernel may know them already
    return Path(f"{device}p2")


@contextmanager
def zram_device(*, size_bytes: int) -> Iterator[Path]:
    """A device whose driver takes bios, not requests."""
    need_root()
    control = Path("/sys/class/zram-control")
    if not control.is_dir():
        not_here("this kernel has no zram")
    number = int((control / "hot_add").read_text())
    try:
        (Path("/sys/block") / f"zram{number}" / "disksize").write_text(str(size_bytes))
        yield Path(f"/dev/zram{number}")
    finally:
        deadline = time.monotonic() + 10
        while True:
            try:
                (control / "hot_remove").write_text(str(number))
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise


@contextmanager
def slow_writes(backing: Path, name: str, *, writes_per_second: int) -> Iterator[Path]:
    """A control group; what its processes write to the disk that holds `backing` is held up on its way, also through a
    loop device, whose other users go on undisturbed. The file that takes their process identifiers."""
    place = Path("/sys/fs/cgroup/blkio") / name
    limit = place / "blkio.throttle.write_iops_device"
    device = os.stat(backing.parent).st_dev
    if not place.parent.is_dir():
        not_here("this machine has no control group for block devices (blkio)")
    place.mkdir()
    try:
        limit.write_text(f"{os.major(device)}:{os.minor(device)} {writes_per_second}")
        yield place / "cgroup.procs"
    finally:
        place.rmdir()


@contextmanager
def mounted(device: Path, at: Path, *options: str) -> Iterator[Path]:
    at.mkdir(exist_ok=True)
    run("mount", *options, device, at)
    try:
        yield at
    finally:
        run("umount", at)
