"""Takes disks' tracking over a restart of the machine: notes their marks when it stops, and takes them up once.

A marker is gone, durably, before its disk is tracked again, whatever becomes of it then: it is believed at most once,
and never by a start that comes after another one.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
from blake3 import blake3

from mobility_agent.core.restart_marker import (
    BOOT_BYTES,
    DIGEST_BYTES,
    Marker,
    StartFacts,
    StopFacts,
    decode_marker,
    encode_marker,
    judge_start,
    judge_stop,
)
from mobility_agent.core.resync_cause import ResyncCause
from mobility_agent.core.write_audit import AuditFinding, judge_audit
from mobility_agent.disk_reader import LocalDisk
from mobility_agent.tracking.abilities import disk_abilities
from mobility_agent.tracking.disk_users import open_for_writing, writable_mounts_and_swap
from mobility_agent.tracking.followed_disk import FollowedDisk
from mobility_agent.tracking.kernel_tracker import KernelTracker
from mobility_agent.tracking.witnesses import read_witnesses
from protocol.control import DiskIdentity
from protocol.vocabulary import DiskId
from runtime.directory import DurableDirectory

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")

log = structlog.get_logger(__name__)


def this_boot() -> bytes:
    """What the kernel calls this run of the machine."""
    return bytes.fromhex(_BOOT_ID.read_text(encoding="ascii").strip().replace("-", ""))[:BOOT_BYTES]


def marker_name(disk: DiskId) -> str:
    return f"{disk}.marker"


@dataclass(frozen=True, slots=True, kw_only=True)
class Restarts:
    """The markers of one agent's disks in its state directory. Calls block. Errors: OSError, DiskFault."""

    directory: DurableDirectory
    boot_id: bytes

    def follow(self, tracker: KernelTracker, disk: DiskId, source: LocalDisk) -> FollowedDisk:
        """KernelTracker.follow, with what was marked before a clean stop in place of everything. tracker is open."""
        found = decode_marker(self._take_away(disk))
        device = _device(source)
        followed = tracker.follow(disk, device=device, size_bytes=source.size_bytes)
        if followed.facts.resync_cause != ResyncCause.NO_CLEAN_STOP:
            return followed
        try:
            cause = judge_start(found, self._start_facts(followed, disk, source))
            if cause is None and isinstance(found, Marker):
                followed.take_up(found.marks)
                log.info("tracking goes on after a clean stop", disk=disk, path=source.path)
            elif cause is not None:
                followed.lose(cause)
                log.info("tracking begins", disk=disk, path=source.path, cause=cause.value)
        except BaseException:
            followed.close()
            raise
        return followed

    def note_stop(self, tracker: KernelTracker, disk: DiskId, source: LocalDisk) -> ResyncCause | None:
        """Writes the disk's marker, for the very end of a shutdown. Durable on return. Why the stop is not clean.

        The tracker is open. Without any tracking of the disk nothing is written, and the next start finds no clean
        stop.
        """
        self.forget(disk)
        followed = tracker.followed(disk, device=_device(source), size_bytes=source.size_bytes)
        if followed is None:
            return ResyncCause.NO_CLEAN_STOP
        try:
            with _claimed(source) as refused_by:
                marks, witnesses, facts = _stop_facts(followed, source, refused_by)
                cause = judge_stop(facts)
                marker = Marker(
                    disk=disk,
                    size_bytes=source.size_bytes,
                    block_bytes=followed.layout.block_bytes,
                    boot_id=self.boot_id,
                    identity=_identity(source.identity),
                    witnesses=bytes(DIGEST_BYTES) if witnesses is None else witnesses,
                    refused=cause,
                    marks=b"" if cause else marks,
                )
                self.directory.replace(marker_name(disk), encode_marker(marker))
        finally:
            followed.close()
        log.info("stop", disk=disk, path=source.path, cause=cause and cause.value, users=facts.users)
        return cause

    def forget(self, disk: DiskId) -> None:
        """The disk has no marker from now on. Durable on return."""
        self.directory.remove(marker_name(disk))

    def _take_away(self, disk: DiskId) -> bytes | None:
        try:
            data = self.directory.read(marker_name(disk))
        except FileNotFoundError:
            return None
        self.forget(disk)
        return data

    def _start_facts(self, followed: FollowedDisk, disk: DiskId, source: LocalDisk) -> StartFacts:
        device = _device(source)
        # why: in this order: a write that ends in between is counted by the second
        in_flight = followed.kernel_in_flight()
        return StartFacts(
            disk=disk,
            size_bytes=source.size_bytes,
            block_bytes=followed.layout.block_bytes,
            mark_bytes=len(followed.pending),
            boot_id=self.boot_id,
            identity=_identity(source.identity),
            witnesses=read_witnesses(source),
            users=writable_mounts_and_swap(device),
            sectors_written=followed.read_audit().kernel_sectors,
            writes_in_flight=in_flight,
            counts_io=disk_abilities(device).counts_io,
        )


@contextmanager
def _claimed(source: LocalDisk) -> Iterator[tuple[str, ...]]:
    """Nobody can mount or otherwise claim the disk meanwhile; yields who does already."""
    try:
        descriptor = os.open(source.path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        yield ("claimed by a file system or a device above it",)
        return
    try:
        # why: what was written to the device itself and lies in memory yet
        os.fsync(descriptor)
        yield ()
    finally:
        os.close(descriptor)


def _stop_facts(
    followed: FollowedDisk, source: LocalDisk, claimed_by: tuple[str, ...]
) -> tuple[bytes, bytes | None, StopFacts]:
    """(marks, witnesses, facts)"""
    device = _device(source)
    users = claimed_by + writable_mounts_and_swap(device) + open_for_writing(device)
    was_quiet, before = _is_quiet(followed), followed.read_audit().kernel_sectors
    marks, witnesses = followed.all_marks(), read_witnesses(source)
    facts = followed.facts
    lost = ResyncCause(facts.resync_cause) if facts.resync_cause else followed.unplaced_changes(followed.counters())
    is_quiet = was_quiet and _is_quiet(followed) and followed.read_audit().kernel_sectors == before
    return (
        marks,
        witnesses,
        StopFacts(track_lost=lost, users=users, is_quiet=is_quiet, is_witnessed=witnesses is not None),
    )


def _is_quiet(followed: FollowedDisk) -> bool:
    finding, _ = judge_audit(followed.facts.audit_base, followed.read_audit())
    # why: completions alone that were missed do no harm here: all submissions are among the marks
    return not followed.kernel_in_flight() and finding is not AuditFinding.LOST_TRACK


def _identity(identity: DiskIdentity) -> bytes:
    """Of what the disk itself tells: early in a boot nobody has asked its hardware yet, which is compared whenever it
    is known (disk_identity)."""
    # why: an absent mark and a missing one must not look alike; JSON keeps them apart
    told = identity.model_copy(update={"wwn": None, "serial": None})
    return blake3(told.model_dump_json().encode()).digest(DIGEST_BYTES)


def _device(source: LocalDisk) -> int:
    device = source.device
    assert device is not None
    return device
