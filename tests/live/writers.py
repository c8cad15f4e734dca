"""Those who write to a live disk while it is tracked: a file system at work, and a raw device written in every way.

Each is a process of its own, `python -m tests.live.writers KIND PATH SEED`, and ends at its standard input's end.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BLOCK = 4096
BLKDISCARD = 0x1277
BLKZEROOUT = 0x127F
BLKGETSIZE64 = 0x80081272
FITRIM = 0xC0185879


@contextmanager
def writing(kind: str, path: Path, seed: int, *, group: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """For the length of the block; fails if the writer failed. group: the control group's file that it joins."""
    writer = subprocess.Popen(
        [sys.executable, "-m", "tests.live.writers", kind, str(path), str(seed)], stdin=subprocess.PIPE
    )
    assert writer.stdin is not None
    if group is not None:
        group.write_text(str(writer.pid))
    try:
        yield writer
    finally:
        writer.stdin.close()
        try:
            code = writer.wait(60)
        except subprocess.TimeoutExpired:
            writer.kill()
            raise
    assert code == 0


FIO_ENGINES = ("libaio", "io_uring", "mmap", "psync")
FIO_SECONDS_MAX = 300
FIO_FILE_BYTES = 4 * 2**20
FIO_WRITES_PER_SECOND = 200


@contextmanager
def fio_writing(place: Path, seed: int, *, at: Path) -> Iterator[None]:
    """fio writes randomly for the length of the block: in a directory to a file, else to the device; with an engine
    that goes by the seed. at: a directory for its own files."""
    engine = FIO_ENGINES[seed % len(FIO_ENGINES)]
    target = place / f"fio-{seed}" if place.is_dir() else place
    size = [f"--size={FIO_FILE_BYTES}"] if place.is_dir() else []
    command = [
        *("fio", "--name=hunt", f"--filename={target}", "--rw=randwrite", "--bsrange=4k-64k", f"--ioengine={engine}"),
        *(f"--direct={int(engine != 'mmap')}", "--iodepth=16", f"--randseed={seed}", "--norandommap", "--fsync=50"),
        # why: a block that is written again soon after it was lost is not lost any more.
        f"--rate_iops={FIO_WRITES_PER_SECOND}",
        # why: a write past the page cache to pages that are dirty in it leaves an EIO to whoever flushes.
        *("--continue_on_error=all", "--time_based", f"--runtime={FIO_SECONDS_MAX}", "--eta=never", *size),
    ]
    with open(at / f"fio-{seed}.out", "w+", encoding="utf-8") as told:
        writer = subprocess.Popen(command, stdout=told, stderr=subprocess.STDOUT, cwd=at)
        try:
            yield
            assert writer.poll() is None, f"fio has ended: {Path(told.name).read_text()}"
        finally:
            writer.send_signal(signal.SIGINT)
            try:
                writer.wait(60)
            except subprocess.TimeoutExpired:
                writer.kill()
                raise


def write_raw(path: Path, draw: random.Random) -> None:
    """One act on a raw device: past the page cache, through it, through memory, a discard, zeroes."""
    with open(path, "r+b", buffering=0) as device:
        buffer = bytearray(8)
        fcntl.ioctl(device, BLKGETSIZE64, buffer)
        size = int.from_bytes(buffer, "little")
        length = BLOCK * draw.choice([1, 1, 1, 2, 5, 16, 64, 200])
        # why: most acts hit the same few blocks again and again, while they are read and drained.
        reach = size if draw.random() < 0.3 else min(size, 4 * 2**20)
        offset = draw.randrange(0, (reach - length) // BLOCK + 1) * BLOCK
        act = draw.choices(["direct", "buffered", "memory", "discard", "zeroes"], [10, 4, 2, 1, 1])[0]
        if act in ("discard", "zeroes"):
            request = BLKDISCARD if act == "discard" else BLKZEROOUT
            fcntl.ioctl(device, request, struct.pack("<QQ", offset, length))
        elif act == "buffered":
            os.pwrite(device.fileno(), draw.randbytes(length), offset)
        elif act == "memory":
            with mmap.mmap(device.fileno(), length, offset=offset) as view:
                view[:] = draw.randbytes(length)
                try:
                    view.flush()
                except OSError as error:
                    # why: a write past the page cache to pages that are dirty in it leaves this to whoever flushes.
                    if error.errno != errno.EIO:
                        raise
        else:
            _write_direct(path, offset, draw.randbytes(length))


def _write_direct(path: Path, offset: int, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, len(data)) as aligned:
            aligned[:] = data
            os.pwritev(descriptor, [aligned], offset)
    finally:
        os.close(descriptor)


def work_on_files(place: Path, draw: random.Random) -> None:
    """One act in a file system: make, rename, cut, remove, map, synchronize, write past the page cache, give back."""
    names = [place / f"file-{number}" for number in range(40)]
    path = draw.choice(names)
    act = draw.choice(["make", "make", "rename", "cut", "remove", "map", "synchronize", "direct", "trim"])
    if act == "trim":
        trim(place)
    elif act == "direct":
        path.write_bytes(bytes(BLOCK))
        _write_direct(path, draw.randrange(20) * BLOCK, draw.randbytes(draw.choice([1, 3]) * BLOCK))
    elif act == "make":
        path.write_bytes(draw.randbytes(draw.choice([100, 5_000, 60_000, 300_000])))
    elif act == "synchronize":
        descriptor = os.open(place, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        os.sync() if draw.random() < 0.2 else None
    elif path.exists():
        if act == "rename":
            path.rename(draw.choice(names))
        elif act == "cut":
            os.truncate(path, draw.randrange(100_000))
        elif act == "remove":
            path.unlink()
        elif path.stat().st_size:
            with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as view:
                at = draw.randrange(len(view))
                view[at : at + 50] = bytes(len(view[at : at + 50]))
                os.fsync(file.fileno())


def trim(place: Path) -> None:
    """Gives back to the device what the file system does not use."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, FITRIM, struct.pack("<QQQ", 0, 2**64 - 1, 0))
    finally:
        os.close(descriptor)


def write_few_blocks(path: Path, draw: random.Random) -> None:
    """Small writes past the page cache, to few places: on a slow device most of them are under way at any time."""
    _write_direct(path, draw.randrange(64) * BLOCK, draw.randbytes(BLOCK))


ACTS = {"raw": write_raw, "files": work_on_files, "slow": write_few_blocks}


def main() -> None:
    act, path, draw = ACTS[sys.argv[1]], Path(sys.argv[2]), random.Random(int(sys.argv[3]))
    if path.is_dir():
        path = path / f"writer-{sys.argv[3]}"  # why: one that renames what another removes would stumble
        path.mkdir(exist_ok=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        try:
            act(path, draw)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            # why: btrfs writes nothing in place, and has no room left when it is full.
            for file in sorted(path.iterdir())[::2]:
                file.unlink()


if __name__ == "__main__":
    main()
