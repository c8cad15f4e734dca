"""The tracing programs of one agent in the kernel: attached, pinned, found after a restart, replaced by an upgrade.

Everything lies below one directory of a BPF file system, which is one agent's alone (it holds its state directory's
lock): `programs_VERSION` with programs, links and shared maps, and `disks/DISK` with the maps of each followed disk.
A name that ends in `_new` is unfinished and removed by the next start. To remove the directory is to end tracking.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from mobility_agent.core.resync_cause import ResyncCause
from mobility_agent.core.write_audit import AuditBase
from mobility_agent.tracking import bpf_calls
from mobility_agent.tracking.abilities import block_device_directory
from mobility_agent.tracking.block_bits import BlockLayout
from mobility_agent.tracking.bpf_skeleton import Skeleton, load, shipped_skeleton
from mobility_agent.tracking.followed_disk import Facts, FollowedDisk, MapsInUse, Marks, ProgramMaps
from protocol.vocabulary import DiskId

FOLLOWED_DISKS_MAX: Final = 64
"""The programs' own limit."""
UNFINISHED: Final = "_new"
SUBMISSION_PROGRAM: Final = "mark_submitted"
_FOLLOWED: Final = struct.Struct("<IIIIQQ")
"""Device, slot, sectors per block and per area as powers of two, blocks, areas."""
_PLACES: Final = 1024
_PLACES_TRIED: Final = 4
_GOLDEN_RATIO: Final = 0x9E3779B9


class KernelTracker:
    """Attached from open() on, also after close(). Calls block; they may come from several threads. Errors: OSError."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._disks = directory / "disks"
        self._lock = threading.Lock()
        self._descriptors: dict[str, int] = {}

    def open(self) -> None:
        """Finds the programs that are attached, or attaches this version's; an older version's go afterwards."""
        with self._lock:
            if self._descriptors:
                return
            skeleton, version = shipped_skeleton()
            current = self._directory / f"programs_{version}"
            self._disks.mkdir(mode=0o700, parents=True, exist_ok=True)
            for place in (*self._directory.iterdir(), *self._disks.iterdir()):
                if place.name.endswith(UNFINISHED):
                    remove_pins(place)
            links = (f"link_{name}" for name in skeleton.programs)
            if not all((current / name).exists() for name in (*links, *_names_of(skeleton))):
                # why: without all links there were writes that nobody saw; disks that new programs do not know begin
                # anew.
                remove_pins(current)
                _attach(skeleton, current)
            self._descriptors = _open_programs(skeleton, current)
            try:
                self._take_over(current)
            except BaseException:
                # why: the next open() has to take over again
                self._close()
                raise

    def follow(self, disk: DiskId, *, device: int, size_bytes: int) -> FollowedDisk:
        """The disk's maps. device: st_rdev of the whole disk.

        Where its tracking did not go on all the while, everything is pending, and its facts have the cause.
        """
        with self._lock:
            found = self._find(disk, device=device, size_bytes=size_bytes)
            if isinstance(found, FollowedDisk):
                found.adopt_retired()
                return found
            self._unfollow(disk)
            return self._begin(disk, device=device, size_bytes=size_bytes, cause=found)

    def followed(self, disk: DiskId, *, device: int, size_bytes: int) -> FollowedDisk | None:
        """The disk's maps, for looking only; None where its tracking did not go on all the while."""
        with self._lock:
            found = self._find(disk, device=device, size_bytes=size_bytes)
            return found if isinstance(found, FollowedDisk) else None

    def unfollow(self, disk: DiskId) -> None:
        """Ends the disk's tracking and frees its maps; no effect where it is not followed."""
        with self._lock:
            self._unfollow(disk)

    def misses(self) -> dict[str, int]:
        """By program: how often an interrupt kept it from running."""
        return {
            name.removeprefix("program_"): bpf_calls.recursion_misses(descriptor)
            for name, descriptor in self._descriptors.items()
            if name.startswith("program_")
        }

    def close(self) -> None:
        """The programs stay attached."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        descriptors, self._descriptors = self._descriptors, {}
        for descriptor in descriptors.values():
            os.close(descriptor)

    @property
    def _programs(self) -> ProgramMaps:
        return ProgramMaps(
            marks_in_use=self._descriptors["marks_in_use"],
            in_flight=self._descriptors["in_flight"],
            disk_counters=self._descriptors["disk_counters"],
            submission_program=self._descriptors[f"program_{SUBMISSION_PROGRAM}"],
        )

    def _take_over(self, current: Path) -> None:
        """Lets these programs mark for the disks that an older version's follow, and ends the older ones."""
        older = [place for place in self._directory.glob("programs_*") if place != current]
        for place in self._disks.iterdir():
            facts = FollowedDisk.read_facts(place)
            if facts is None:
                remove_pins(place)
            elif older and not self._is_followed(facts) and _disk_sequence(facts.device) == facts.disk_sequence:
                found = FollowedDisk(place, self._programs, facts, is_new=False)
                try:
                    before = _marked_in(found, older)
                    if before.keys() == set(Marks):
                        self._start(found, before=before)
                finally:
                    found.close()
        for place in older:
            remove_pins(place)
        known = {facts.device for place in self._disks.iterdir() if (facts := FollowedDisk.read_facts(place))}
        for number in range(_PLACES):
            device, _ = self._followed_at(number)
            if device and device not in {_kernel_number(one) for one in known}:
                self._leave(number)

    def _find(self, disk: DiskId, *, device: int, size_bytes: int) -> FollowedDisk | ResyncCause:
        place = self._disks / disk
        if not place.exists():
            return ResyncCause.NO_CLEAN_STOP
        facts = FollowedDisk.read_facts(place)
        wanted = (device, _disk_sequence(device), size_bytes)
        if facts is None or (facts.device, facts.disk_sequence, facts.size_bytes) != wanted:
            return ResyncCause.DEVICE_CHANGED
        if not self._is_followed(facts):
            return ResyncCause.TRACKING_INTERRUPTED
        return FollowedDisk(place, self._programs, facts, is_new=False)

    def _begin(self, disk: DiskId, *, device: int, size_bytes: int, cause: ResyncCause) -> FollowedDisk:
        taken = {facts.slot for place in self._disks.iterdir() if (facts := FollowedDisk.read_facts(place))}
        slot = next((slot for slot in range(FOLLOWED_DISKS_MAX) if slot not in taken), None)
        if slot is None:
            raise OSError(f"at most {FOLLOWED_DISKS_MAX} disks of a machine are tracked")
        facts = Facts(
            device=device,
            disk_sequence=_disk_sequence(device),
            size_bytes=size_bytes,
            block_bytes=BlockLayout.of(size_bytes).block_bytes,
            area_bytes=BlockLayout.of_areas(size_bytes).block_bytes,
            slot=slot,
        )
        place = self._disks / f"{disk}{UNFINISHED}"
        if place.exists():
            remove_pins(place)
        place.mkdir(mode=0o700)
        made = FollowedDisk(place, self._programs, facts, is_new=True)
        made.lose(cause)
        self._start(made)
        os.rename(place, self._disks / disk)
        return made

    def _start(self, disk: FollowedDisk, *, before: MapsInUse | None = None) -> None:
        """From now on the programs mark for it. before: where an older version's go on marking for a while."""
        facts = disk.facts
        disk.put_in_use(before)
        number = _kernel_number(facts.device)
        places = _places_of(number)
        free = next((place for place in places if self._followed_at(place)[0] in (0, number)), None)
        if free is None:
            raise OSError("too many disks whose device numbers lead to the same place are tracked")
        # why: a program may look at it while it is copied; its device comes last, and goes first.
        for device in (0, number):
            shifts = disk.layout.sectors_shift, disk.areas.sectors_shift
            followed = _FOLLOWED.pack(device, facts.slot, *shifts, disk.layout.blocks, disk.areas.blocks)
            bpf_calls.update(self._descriptors["followed_disks"], struct.pack("<I", free), followed)
        if before:
            # why: these programs count from here on: what the older ones missed since the last audit nobody will miss
            disk.suspect_generation()
        counters = disk.counters()
        facts.pass_through, facts.beyond_end = counters.pass_through, counters.beyond_end
        facts.never_completed, facts.untracked = counters.never_completed, counters.untracked
        facts.audit_base = AuditBase.of(disk.read_audit(is_base=True))
        facts.is_unsettled = 1
        disk.write_facts()

    def _is_followed(self, facts: Facts) -> bool:
        return self._place_of(facts) is not None

    def _place_of(self, facts: Facts) -> int | None:
        wanted = (_kernel_number(facts.device), facts.slot)
        return next((place for place in _places_of(wanted[0]) if self._followed_at(place) == wanted), None)

    def _followed_at(self, place: int) -> tuple[int, int]:
        """(device, slot); zeroes where there is none."""
        value = bpf_calls.lookup(
            self._descriptors["followed_disks"], struct.pack("<I", place), value_bytes=_FOLLOWED.size
        )
        device, slot, *_ = _FOLLOWED.unpack(value or bytes(_FOLLOWED.size))
        return device, slot

    def _leave(self, place: int) -> None:
        """Nothing is followed at this place any more."""
        key = struct.pack("<I", place)
        followed = bpf_calls.lookup(self._descriptors["followed_disks"], key, value_bytes=_FOLLOWED.size)
        if followed is not None:
            bpf_calls.update(self._descriptors["followed_disks"], key, bytes(4) + followed[4:])

    def _unfollow(self, disk: DiskId) -> None:
        place = self._disks / disk
        facts = FollowedDisk.read_facts(place)
        if facts is not None:
            # why: whoever is killed in the midst of this leaves nothing that tracking seems to have gone on for
            (place / "facts").unlink()
            # why: its number may have come to mean another disk, which is followed by it now
            followed_at = self._place_of(facts)
            if followed_at is not None:
                self._leave(followed_at)
            for kind in Marks:
                bpf_calls.delete(self._descriptors["marks_in_use"], struct.pack("<I", len(Marks) * facts.slot + kind))
        remove_pins(place)


def _marked_in(disk: FollowedDisk, programs: Iterable[Path]) -> MapsInUse:
    """Where these programs, by their directories, mark for the disk."""
    found: MapsInUse = {}
    for place in programs:
        try:
            descriptor = bpf_calls.get_pinned(str(place / "marks_in_use"))
        except FileNotFoundError:
            continue  # why: they are gone already, but for what is left of their directory
        try:
            found |= disk.maps_in_use(descriptor)
        finally:
            os.close(descriptor)
    return found


def remove_pins(place: Path) -> None:
    """Removes a directory of pins and all in it: what only they kept alive ends. No error if it is not there."""
    if not place.is_dir():
        return
    for child in place.iterdir():
        if child.is_dir():
            remove_pins(child)
        else:
            child.unlink()
    place.rmdir()


def _attach(skeleton: Skeleton, place: Path) -> None:
    """Loads, attaches and pins. Whoever ends in between leaves what the next start removes."""
    unfinished = place.with_name(place.name + UNFINISHED)
    unfinished.mkdir(mode=0o700)
    loaded = load(skeleton)
    try:
        for name, descriptor in loaded.maps.items():
            bpf_calls.pin(descriptor, str(unfinished / name))
        for name in skeleton.programs:
            bpf_calls.pin(loaded.programs[name], str(unfinished / f"program_{name}"))
            link = bpf_calls.attach_traced(loaded.programs[name])
            try:
                bpf_calls.pin(link, str(unfinished / f"link_{name}"))
            finally:
                os.close(link)
    finally:
        loaded.close()
    os.rename(unfinished, place)


def _names_of(skeleton: Skeleton) -> tuple[str, ...]:
    """What an agent opens of them."""
    return (*skeleton.maps, *(f"program_{program}" for program in skeleton.programs))


def _open_programs(skeleton: Skeleton, place: Path) -> dict[str, int]:
    opened: dict[str, int] = {}
    try:
        for name in _names_of(skeleton):
            opened[name] = bpf_calls.get_pinned(str(place / name))
    except BaseException:
        for descriptor in opened.values():
            os.close(descriptor)
        raise
    return opened


def _disk_sequence(device: int) -> int:
    """Rises each time that a device number comes to mean another medium; 0 where the kernel does not tell."""
    try:
        return int((block_device_directory(device) / "diskseq").read_text(encoding="ascii"))
    except OSError:
        return 0  # why: before 5.15, or the device is going; opening it tells which


def _kernel_number(device: int) -> int:
    """As the kernel itself writes a device's number."""
    return os.major(device) << 20 | os.minor(device)


def _places_of(number: int) -> list[int]:
    """Where the programs look for a device."""
    first = (number * _GOLDEN_RATIO & 0xFFFFFFFF) >> 22
    return [(first + tried) % _PLACES for tried in range(_PLACES_TRIED)]
