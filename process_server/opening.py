"""Opens a disk for an agent: who may, in which epoch, from which position.

Invariants: nothing of the disk is on its way into the cache when its position is told; an epoch begins only when all
that is kept of its parent is committed and the parent's closing segment stands; what the cache does not know is asked
of the store and of nobody else; a disk that another process server has taken is never extended.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from process_server.cache_records import CachedPoint, DiskCheckpoint
from process_server.cache_writer import CacheWriter
from process_server.core.disk_lifecycle import DiskState
from process_server.core.epochs import AskedEpoch, EpochStep, KnownEpoch, choose_epoch
from process_server.core.intake import GrantedDisk, check_peer
from process_server.disk_history import DiskHistory, Holder
from process_server.errors import CacheFull, DiskNotReady, DiskOpenedElsewhere, DiskTakenOver, EpochNotCommitted
from process_server.grants import GrantBook, HeldGrant
from process_server.uploader import Uploader
from protocol.errors import NoGrant
from protocol.messages import DiskOpened, OpenDisk
from protocol.vocabulary import SEQUENCE_UNKNOWN, DiskId, PeerIdentity
from storage.disk_archive import DiskArchive, EpochStart, SegmentSummary
from storage.errors import HistoryForked

COMMIT_WAIT_SECONDS: Final = 20.0
"""How long an opening waits for the store to have what an epoch ends with, before it tells the agent to come back."""


class DiskOpener:
    """One per process server. Openings of different disks run side by side, those of one disk in turn."""

    def __init__(
        self,
        *,
        archive: DiskArchive,
        writer: CacheWriter,
        uploader: Uploader,
        grants: GrantBook,
        signing_key: Ed25519PrivateKey,
        vault_public_key: Callable[[], Awaitable[X25519PublicKey]],
        history_of: Callable[[DiskId], DiskHistory],
        has_room: Callable[[], bool],
    ) -> None:
        self._archive = archive
        self._writer = writer
        self._uploader = uploader
        self._grants = grants
        self._signing_key = signing_key
        self._history_of = history_of
        self._has_room = has_room
        self._locks: dict[DiskId, asyncio.Lock] = {}
        self._vault_public_key = vault_public_key

    async def open(self, request: OpenDisk, peer: PeerIdentity, holder: Holder) -> tuple[DiskHistory, DiskOpened]:
        """The disk is the holder's on return. What the answer says is durable.

        Raises CacheFull, NoGrant, NotPermitted, StaleEpoch, DiskStopped, DiskTakenOver, EpochNotCommitted, StoreFault,
        VaultFault.
        """
        granted = self._check_permission(request, peer)
        if not self._has_room():
            raise CacheFull(name="its change sets", reason="uploads do not keep up")
        async with self._locks.setdefault(request.disk, asyncio.Lock()):
            history = self._history_of(request.disk)
            history.take_over(DiskOpenedElsewhere(disk=request.disk))
            await self._settle(history, highest_granted=max(granted))
            held = await self._find_epoch(history, granted, request)
            vault_public_key = await self._vault_public_key()
            await self._writer.barrier()
            positions, position = history.positions, history.position
            if history.state is not DiskState.RESTING or positions is None or position is None:
                raise DiskNotReady(disk=request.disk)
            history.open(holder, peer, held, vault_public_key)
            return history, DiskOpened(
                channel=request.channel,
                epoch=positions.epoch,
                parent_epoch=position.parent_epoch,
                parent_sequence=position.parent_sequence,
                durable_sequence=positions.durable,
                committed_sequence=positions.committed,
                copy_in_cursor_bytes=history.copy_in_cursor_bytes,
            )

    def _check_permission(self, request: OpenDisk, peer: PeerIdentity) -> dict[int, HeldGrant]:
        held = self._grants.held(request.disk)
        if not held:
            raise NoGrant(disk=request.disk)
        for grant in (one.grant for one in held.values()):
            check_peer(
                GrantedDisk(
                    vault=grant.vault,
                    machine=grant.machine,
                    disk=grant.disk,
                    epoch=grant.epoch,
                    disk_size_bytes=grant.disk_size_bytes,
                ),
                peer,
            )
        return held

    async def _settle(self, history: DiskHistory, *, highest_granted: int) -> None:
        """Waits for all that is on its way, and cuts an unfinished change set off."""
        await self._writer.barrier()
        # why: the segment in work may hold frames of a change set whose end never came.
        history.end_segment()
        await self._writer.barrier()
        if history.state is DiskState.STOPPED and history.stopped_epoch < highest_granted:
            history.regrant()
        if history.stop_reason is not None:
            raise history.stop_reason
        history.settle()

    async def _find_epoch(self, history: DiskHistory, granted: dict[int, HeldGrant], request: OpenDisk) -> HeldGrant:
        while True:
            positions = history.positions
            must_leave = history.prepared is not None and history.prepared.must_be_left
            asked = AskedEpoch(epoch=request.epoch, wants_new=request.wants_new_epoch or must_leave)
            known = (
                KnownEpoch(epoch=positions.epoch, is_used=must_leave or positions.durable > 0) if positions else None
            )
            choice = choose_epoch(request.disk, granted=list(granted), known=known, asked=asked)
            held = granted[choice.epoch]
            if choice.step is EpochStep.CONTINUE:
                return held
            if choice.step is EpochStep.BEGIN:
                await self._wait_until_committed(history)
            else:
                await self._uploader.wait_until_quiet(history)
            await self._enter(history, held, newest_seen=request.epoch)

    async def _wait_until_committed(self, history: DiskHistory) -> None:
        try:
            async with asyncio.timeout(COMMIT_WAIT_SECONDS):
                await self._uploader.wait_until_committed(history)
        except TimeoutError:
            raise EpochNotCommitted(disk=history.disk, segments=len(history.waiting)) from None

    async def _enter(self, history: DiskHistory, held: HeldGrant, *, newest_seen: int) -> None:
        """Puts the history where the store says that the granted epoch stands, and ends its parent if nobody has.

        newest_seen: the newest epoch that the agent knows.
        """
        grant = held.grant
        try:
            start = await self._archive.close_epoch(grant, held.signed, self._signing_key)
            summary = await self._archive.last_segment(grant.disk, grant.epoch)
        except HistoryForked as error:
            history.stop(error)
            raise
        if summary is not None and summary.successor is not None:
            successor = self._grants.held(grant.disk).get(summary.successor.epoch)
            if successor is None or successor.grant != summary.successor:
                taken = DiskTakenOver(disk=grant.disk, epoch=grant.epoch, successor=summary.successor.process_server)
                history.stop(taken)
                raise taken
            await self._enter(history, successor, newest_seen=newest_seen)
            return
        # why: what the store shows of an epoch that was in use is not its end. Uploads of what a lost cache held may
        # still arrive, or lie behind a gap that nobody can fill. Only a closing segment ends it.
        is_used = summary is not None or newest_seen >= grant.epoch
        position = _position(grant.disk, grant.epoch, start, summary)
        if history.forked_epoch is not None and history.forked_epoch == position.parent_epoch:
            # why: the parent holds what another life of this cache had stored, and the agent has since sent other
            # bytes under the same numbers: what it knows of the contents is of use no more.
            position = dataclasses.replace(position, parent_sequence=SEQUENCE_UNKNOWN)
        history.start_epoch(dataclasses.replace(position, must_be_left=is_used))


def _position(disk: DiskId, epoch: int, start: EpochStart, summary: SegmentSummary | None) -> DiskCheckpoint:
    """Where the epoch stands: at its start, or behind the last of its segments that is stored."""
    if summary is None:
        return DiskCheckpoint(
            disk=disk,
            epoch=epoch,
            parent_epoch=start.parent_epoch,
            parent_sequence=start.parent_sequence,
            ordinal=0,
            committed_ordinal=0,
            sequence=0,
            trailer_hash=start.previous_trailer_hash,
            copy_in_cursor_bytes=None,
        )
    return DiskCheckpoint(
        disk=disk,
        epoch=epoch,
        parent_epoch=start.parent_epoch,
        parent_sequence=start.parent_sequence,
        ordinal=summary.ordinal,
        committed_ordinal=summary.ordinal,
        sequence=summary.last_sequence,
        trailer_hash=summary.trailer_hash,
        copy_in_cursor_bytes=summary.copy_in_cursor_bytes,
        unreported_points=_points(epoch, summary),
    )


def _points(epoch: int, summary: SegmentSummary) -> tuple[CachedPoint, ...]:
    """The newest committed bookmark: after a lost cache it is reported once more rather than not at all."""
    end = summary.last_end
    if end is None or end.bookmark is None:
        return ()
    bookmark = end.bookmark
    return (
        CachedPoint(
            point=bookmark.point,
            instant_ns=bookmark.instant_ns,
            epoch=epoch,
            sequence=summary.last_sequence,
            consistency=end.consistency,
        ),
    )
