"""Checks every frame of one open disk against its certificate, its grant, its epoch, and the frame before it.

Invariants: a frame passes only if the peer's certificate is that of the granted machine, the epoch is the one that was
opened, and it continues the stream without a gap or a repeat; after the first refusal nothing passes any more.
"""

from __future__ import annotations

from dataclasses import dataclass

from process_server.core.segmenting import CHANGE_SET_EXTENTS_MAX
from process_server.errors import DiskStopped
from protocol.errors import LimitExceeded, MalformedInput, NotPermitted, ReplicationError, SequenceGap, StaleEpoch
from protocol.messages import Frame
from protocol.vocabulary import (
    CHANGE_SET_FRAMES_MAX,
    CHANGE_SET_RAW_BYTES_MAX,
    DiskId,
    ExtentTable,
    MachineId,
    PeerIdentity,
    Role,
    VaultId,
    check_extent_table,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantedDisk:
    """What the verified grant says: whose disk it is, and which epoch may be extended here."""

    vault: VaultId
    machine: MachineId
    disk: DiskId
    epoch: int
    disk_size_bytes: int


def check_peer(granted: GrantedDisk, peer: PeerIdentity) -> None:
    """Raises NotPermitted unless the peer's certificate is that of the granted disk's machine, as an agent of the same
    vault.
    """
    if peer.role is not Role.AGENT:
        raise NotPermitted(subject=peer.uri, reason="only an agent sends change sets")
    if peer.vault != granted.vault:
        raise NotPermitted(subject=peer.uri, reason=f"disk {granted.disk} belongs to another vault")
    if peer.identifier != granted.machine:
        raise NotPermitted(subject=peer.uri, reason=f"disk {granted.disk} belongs to another machine")


@dataclass(slots=True, kw_only=True)
class DiskIntake:
    """The place in one disk's stream at which the next frame must stand."""

    granted: GrantedDisk
    peer: PeerIdentity
    next_sequence: int
    next_frame_number: int = 0
    raw_bytes: int = 0
    """Of the change set in work, as is extents."""
    extents: int = 0
    is_refused: bool = False

    def accept(self, frame: Frame, extents: ExtentTable, *, current_epoch: int) -> None:
        """Takes the next frame, or refuses it for good.

        current_epoch: the epoch that the disk's history is in now, which a takeover may have raised since the disk was
        opened. Raises NotPermitted, StaleEpoch, SequenceGap, LimitExceeded, MalformedInput.
        """
        if self.is_refused:
            raise DiskStopped(disk=self.granted.disk, reason_code="refused", reason="an earlier frame was refused")
        try:
            self._check(frame, extents, current_epoch)
        except ReplicationError:
            self.is_refused = True
            raise
        if frame.is_last:
            self.next_sequence += 1
            self.next_frame_number = 0
            self.raw_bytes = 0
            self.extents = 0
        else:
            self.next_frame_number += 1
            self.raw_bytes += frame.raw_bytes
            self.extents += frame.extent_count

    def _check(self, frame: Frame, extents: ExtentTable, current_epoch: int) -> None:
        disk = self.granted.disk
        check_peer(self.granted, self.peer)
        if frame.epoch != self.granted.epoch or frame.epoch != current_epoch:
            raise StaleEpoch(disk=disk, epoch=frame.epoch, current=current_epoch)
        expected = (self.next_sequence, self.next_frame_number)
        if (frame.sequence, frame.frame_number) != expected:
            raise SequenceGap(
                disk=disk,
                expected=f"{expected[0]} frame {expected[1]}",
                received=f"{frame.sequence} frame {frame.frame_number}",
            )
        if not frame.is_last and frame.frame_number + 1 >= CHANGE_SET_FRAMES_MAX:
            raise LimitExceeded(
                what="frames of a change set", value=frame.frame_number + 2, limit=CHANGE_SET_FRAMES_MAX
            )
        raw_bytes = self.raw_bytes + frame.raw_bytes
        if raw_bytes > CHANGE_SET_RAW_BYTES_MAX:
            raise LimitExceeded(what="raw bytes of a change set", value=raw_bytes, limit=CHANGE_SET_RAW_BYTES_MAX)
        extent_count = self.extents + frame.extent_count
        if extent_count > CHANGE_SET_EXTENTS_MAX:
            raise LimitExceeded(what="extents of a change set", value=extent_count, limit=CHANGE_SET_EXTENTS_MAX)
        if len(extents) != frame.extent_count:
            raise MalformedInput(
                what="extent table", reason=f"{len(extents)} rows where {frame.extent_count} were stated"
            )
        try:
            check_extent_table(extents, raw_bytes=frame.raw_bytes, disk_size_bytes=self.granted.disk_size_bytes)
        except ReplicationError as error:
            raise MalformedInput(what="extent table", reason=str(error)) from error
