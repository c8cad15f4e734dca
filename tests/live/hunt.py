"""Hunts for lost updates: a device is written to in every way while the bitmap source drains it again and again, is
killed, and goes blind; at the end of each round device and copy must be equal.

A planted fault takes one safeguard away. A hunt that does not catch it is no hunt.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

from mobility_agent.core.write_audit import AuditFinding
from mobility_agent.errors import ResyncNeeded
from mobility_agent.tracking import bitmap, block_bits, bpf_calls
from mobility_agent.tracking.bitmap_round import BitmapRound
from mobility_agent.tracking.block_bits import bits_like, join_areas
from mobility_agent.tracking.change_source import Promise
from mobility_agent.tracking.followed_disk import FollowedDisk, Marks
from tests.live.block_devices import (
    bpf_file_system,
    loop_device,
    make_partitions,
    mounted,
    run,
    slow_writes,
    zram_device,
)
from tests.live.tracked import MIB, TrackedDisk
from tests.live.writers import fio_writing, writing

SIZE_BYTES: Final = 24 * MIB
WRITING_SECONDS: Final = 1.5
WRITERS: Final = 3
AREA_MAP_SIZES: Final = (0, 2**8, 2**19)
KILL_CHANCE: Final = 0.15
BLIND_CHANCE: Final = 0.2
POINT_CHANCE: Final = 0.5
LARGE_COPY_SECONDS: Final = 0.005
FAULT_ROUNDS_MAX: Final = 25


@dataclass(slots=True, kw_only=True)
class Found:
    """What a hunt saw."""

    rounds: int = 0
    rounds_by_kind: dict[str, int] = field(default_factory=dict)
    drains: int = 0
    lost: int = 0
    still: int = 0
    points_checked: int = 0
    points_damaged: int = 0
    restarts: int = 0
    """Of the agent's part within the hunt's process, in the midst of a round."""
    agents_killed: int = 0
    alarms: int = 0
    resyncs: int = 0
    losses: list[str] = field(default_factory=list)


class Hunted:
    """One device and what happens to it in one round of the hunt."""

    def __init__(self, tracked: TrackedDisk, draw: random.Random, found: Found, kind: Kind) -> None:
        self._tracked = tracked
        self._draw = draw
        self._found = found
        self._kind = kind
        self._is_countable = not kind.file_system and not kind.takes_bios and not kind.is_slow

    def drain_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._draw.random() < KILL_CHANCE:
                self._be_killed()
            if self._is_countable and self._draw.random() < BLIND_CHANCE:
                self._go_blind()
            self._drain()

    def settle(self) -> None:
        """After the last write: what is still pending, and what an alarm says."""
        for _ in range(3):
            self._drain()

    def _drain(self) -> None:
        self._found.drains += 1
        alarms = self._tracked.source.alarms
        try:
            told = asyncio.run(self._tracked.round_ahead())
        except ResyncNeeded:
            self._found.resyncs += 1
            self._tracked.enter_epoch()
            told = self._tracked.round_or_resync()
        self._found.alarms += self._tracked.source.alarms - alarms
        if told.end.promise is Promise.COPY_IN_VALIDATED:
            self._found.still += 1
            if (
                self._kind.file_system == "ext4"
                and not self._kind.is_partitioned
                and self._draw.random() < POINT_CHANCE
            ):
                self._check_point()

    def _be_killed(self) -> None:
        """Within a round: what was read of it reached nobody."""
        try:
            self._tracked.source.begin_round(first_bytes=0)
        except ResyncNeeded:
            self._tracked.enter_epoch()
        self._tracked.close()
        self._tracked.open()
        self._found.restarts += 1

    def _go_blind(self) -> None:
        """All programs are detached for a moment, in which there are writes. Not with zram, whose driver counts no
        discards and no zeroes: the audit says less there."""
        (place,) = self._tracked._pins.glob("programs_*")
        names = [path.name.removeprefix("link_") for path in place.glob("link_*")]
        for name in names:
            (place / f"link_{name}").unlink()
        time.sleep(0.01)
        for name in sorted(names, key=lambda name: name.endswith("_again")):
            link = bpf_calls.attach_traced(self._tracked.tracker._descriptors[f"program_{name}"])
            bpf_calls.pin(link, str(place / f"link_{name}"))
            os.close(link)

    def _check_point(self) -> None:
        """The copy is what the disk was at one instant of its write order: a crash would have left it so."""
        self._found.points_checked += 1
        with tempfile.NamedTemporaryFile() as image:
            image.write(self._tracked.copy)
            image.flush()
            subprocess.run(["e2fsck", "-E", "journal_only", "-y", image.name], capture_output=True, check=False)
            checked = subprocess.run(["e2fsck", "-f", "-n", image.name], capture_output=True, text=True, check=False)
        if checked.returncode:
            self._found.points_damaged += 1
            self._found.losses.append(checked.stdout[:300])


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What is hunted on."""

    size_bytes: int = SIZE_BYTES
    file_system: str = ""
    mount_options: tuple[str, ...] = ()
    is_partitioned: bool = False
    """It is the second partition that is written to, or holds the file system."""
    is_slow: bool = False
    takes_bios: bool = False


KINDS: Final = {
    "raw": Kind(),
    "ext4": Kind(file_system="ext4", mount_options=("-o", "discard")),
    "xfs": Kind(file_system="xfs", mount_options=("-o", "discard"), size_bytes=320 * MIB),
    "btrfs": Kind(file_system="btrfs", mount_options=("-o", "discard=async"), size_bytes=256 * MIB),
    "raw-partition": Kind(is_partitioned=True),
    "ext4-partition": Kind(file_system="ext4", is_partitioned=True, size_bytes=32 * MIB),
    "slow": Kind(is_slow=True),
    "bios": Kind(takes_bios=True),
}
SLOW_WRITES_PER_SECOND: Final = 40


@contextmanager
def device_of(kind: Kind, at: Path) -> Iterator[tuple[Path, Path]]:
    """(the disk, what of it is written to)."""
    image = at / "disk.img"
    if kind.is_slow:
        image.write_bytes(os.urandom(kind.size_bytes))  # why: so that no write has to allocate first
    with (
        zram_device(size_bytes=kind.size_bytes)
        if kind.takes_bios
        else loop_device(image, size_bytes=kind.size_bytes, is_direct=kind.is_slow, partitions=kind.is_partitioned)
    ) as device:
        used = make_partitions(device, kind.size_bytes) if kind.is_partitioned else device
        if kind.file_system:
            run(f"mkfs.{kind.file_system}", "-q", used)
        yield device, used


def hunt_once(name: str, seed: int, found: Found, plant: Callable[[TrackedDisk], None] = lambda tracked: None) -> None:
    draw, kind = random.Random(seed), KINDS[name]
    with ExitStack() as stack:
        at = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="farpoint-live-")))
        pins = stack.enter_context(bpf_file_system(at / "bpf"))
        device, used = stack.enter_context(device_of(kind, at))
        # why: what a large disk marks by area is seen on a small one too
        with patch.object(block_bits, "AREA_MAP_BYTES_WANTED", draw.choice(AREA_MAP_SIZES)):
            tracked = TrackedDisk(device, at / "state", pins)
        stack.callback(tracked.close)
        plant(tracked)
        hunted = Hunted(tracked, draw, found, kind)
        tracked.round_or_resync()
        with ExitStack() as busy:
            place = busy.enter_context(mounted(used, at / "mnt", *kind.mount_options)) if kind.file_system else used
            group = None
            if kind.is_slow:
                slow = slow_writes(at / "disk.img", at.name, writes_per_second=SLOW_WRITES_PER_SECOND)
                group = busy.enter_context(slow)
            else:
                busy.enter_context(fio_writing(place, seed, at=at))
            acts = "files" if kind.file_system else "slow" if kind.is_slow else "raw"
            for number in range(WRITERS):
                busy.enter_context(writing(acts, place, seed * WRITERS + number, group=group))
            hunted.drain_for(WRITING_SECONDS)
        # why: the first one may tell of what a write past the page cache did to pages that were dirty in it.
        for path in {used, device}:
            subprocess.run(["sync", str(path)], capture_output=True, check=False)
            run("sync", path)
        hunted.settle()
        found.rounds += 1
        found.rounds_by_kind[name] = found.rounds_by_kind.get(name, 0) + 1
        wrong = tracked.differing_blocks()
        if wrong:
            found.lost += 1
            found.losses.append(f"{name} seed {seed}: {len(wrong)} blocks, first at {wrong[0]}")


# planted faults


def mark_at_submission_only(tracked: TrackedDisk) -> None:
    """And take each mark for a write that has landed."""
    _patch(FollowedDisk, "wait_until_quiet", lambda self, parity, seconds_max: True)
    original = FollowedDisk.swap

    def swap(self: FollowedDisk) -> int:
        self.in_use(Marks.COMPLETION)[:] = 0
        ended = original(self)
        self.read_again()
        return ended

    _patch(FollowedDisk, "swap", swap)
    _patch(FollowedDisk, "take_late", lambda self: None)


def clear_words_in_place(tracked: TrackedDisk) -> None:
    """Without a swap, in the map that the programs mark in; with the time that it takes to copy a large disk's."""
    _patch(FollowedDisk, "wait_until_quiet", lambda self, parity, seconds_max: True)

    def swap(self: FollowedDisk) -> int:
        maps = [self.in_use(kind) for kind in Marks]
        taken = [bits.copy() for bits in maps]
        time.sleep(LARGE_COPY_SECONDS)
        for kind, bits, found in zip(Marks, maps, taken, strict=True):
            join_areas(self.pending, found, 1 if kind is Marks.COMPLETION else self.blocks_per_area)
            bits.view("<u8")[found.view("<u8") != 0] = 0
        return 0

    _patch(FollowedDisk, "swap", swap)


def do_not_audit(tracked: TrackedDisk) -> None:
    _patch(bitmap, "judge_audit", lambda base, reading: (AuditFinding.CLEAN, base))


def read_through_the_page_cache(tracked: TrackedDisk) -> None:
    def read_into(self: Any, offset_bytes: int, buffer: Any) -> None:
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.preadv(descriptor, [buffer], offset_bytes)
        finally:
            os.close(descriptor)

    _patch(type(tracked.disk), "read_into", read_into)
    _patch(type(tracked.disk), "_parallel_reads", lambda self: None)


def forget_the_retired_map_early(tracked: TrackedDisk) -> None:
    """As soon as a round has begun, though nothing of it has reached anybody. The round itself still knows."""
    begin, original, taken = (
        bitmap.BitmapSource.begin_round,
        BitmapRound._compare,
        bits_like(tracked.source._tracked.pending),
    )

    def begin_round(self: bitmap.BitmapSource, *, first_bytes: int) -> BitmapRound:
        begun = begin(self, first_bytes=first_bytes)
        taken[:] = self._tracked.pending
        self._tracked.pending[:] = 0
        self._tracked.unaudited[:] = 0
        return begun

    def compare(self: BitmapRound, buffer: memoryview) -> Any:
        self._tracked.pending[:] = taken
        found = original(self, buffer)
        self._tracked.pending[:] = 0
        return found

    _patch(bitmap.BitmapSource, "begin_round", begin_round)
    _patch(BitmapRound, "_compare", compare)


FAULTS: Final[dict[str, tuple[str, Callable[[TrackedDisk], None]]]] = {
    "submission-only": ("slow", mark_at_submission_only),
    "clear-in-place": ("raw", clear_words_in_place),
    "no-audit": ("raw", do_not_audit),
    "buffered-reads": ("ext4", read_through_the_page_cache),
    "retired-cleared-early": ("raw", forget_the_retired_map_early),
}
_patched: list[tuple[Any, str, Any]] = []


def _patch(owner: Any, name: str, value: Any) -> None:
    _patched.append((owner, name, getattr(owner, name)))
    setattr(owner, name, value)


def rounds_until_caught(name: str, first_seed: int) -> int:
    """How many rounds it took to catch the fault; 0 if it was not."""
    kind, plant = FAULTS[name]
    found = Found()
    for number in range(FAULT_ROUNDS_MAX):
        try:
            hunt_once(kind, first_seed + number, found, plant)
        finally:
            while _patched:
                owner, attribute, value = _patched.pop()
                setattr(owner, attribute, value)
        if found.lost:
            return found.rounds
    return 0
