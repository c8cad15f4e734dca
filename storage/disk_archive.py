"""The one door to a vault in an object store: append segments, list positions and points, read frames.

Nothing is ever overwritten. What is returned has been verified against the vault's authority key. An append has
succeeded if and only if exactly this segment lies under its name. A fault of the store itself (StoreFault) is raised,
never taken for damage.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typing_extensions import Buffer

from protocol.errors import InvalidValue
from protocol.signed_records import Grant
from protocol.vocabulary import EPOCH_FIRST, SEQUENCE_UNKNOWN, ChangeSetEnd, DiskId, VaultId
from storage import object_names
from storage.backends.object_store import ObjectStore
from storage.errors import (
    HistoryForked,
    NotAVault,
    ObjectCorrupt,
    ObjectExists,
    ObjectNotFound,
    ObjectUnreadable,
    SegmentMissing,
    StoreOutcomeUnknown,
    VaultFault,
)
from storage.frame_record import FrameRecord, parse_frame_record
from storage.history import (
    UPLOADS_IN_FLIGHT_MAX,
    ChainLink,
    DiskHistory,
    Finding,
    chain_history,
    is_passed_over,
    may_be_under_way,
)
from storage.keys import (
    VAULT_BYTES_MAX,
    RecoveryKey,
    VaultDescription,
    check_recovery_key,
    parse_vault,
)
from storage.object_names import EPOCH_DIGITS, SegmentName, VaultName
from storage.parallel_reads import read_each
from storage.segment import (
    NO_TRAILER_HASH,
    TRAILER_BYTES,
    VerifiedSegment,
    closing_segment,
    parse_trailer,
    verify_segment,
)
from storage.vault_records import VaultRecords

SMALL_OBJECT_BYTES: Final = 65536
"""A segment up to this size is read whole; of a larger one first so much of its end."""
CLOSE_ATTEMPTS_MAX: Final = 64
"""A predecessor that is still writing can take the closing segment's name that often."""
UNLISTED_EPOCHS_MAX: Final = 64
"""So many epochs that a list does not show are looked for by name."""
READ_BYTES_MAX: Final = 64 * 2**20
"""The most that one read of frames takes into memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentSummary:
    """Where an epoch stands in storage, from its verified end.

    trailer_hash: of the last segment, closing or not: what the next one continues. copy_in_cursor_bytes: the newest
    cursor that was stated near the end, None if none was. successor: whose closing segment ends the epoch, None while
    it is open. is_passed_over: it was closed before anybody had begun it. beyond_gap: ordinals that are stored behind a
    missing one: uploads that were under way, by their owner to be completed.
    """

    name: SegmentName
    last_sequence: int
    trailer_hash: bytes
    grant: Grant
    """Of the epoch; of the successor if nothing but a closing segment is there."""
    last_end: ChangeSetEnd | None
    copy_in_cursor_bytes: int | None
    successor: Grant | None
    is_passed_over: bool
    beyond_gap: tuple[int, ...]

    @property
    def ordinal(self) -> int:
        return self.name.ordinal

    @property
    def is_closed(self) -> bool:
        return self.successor is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochStart:
    """What an epoch continues, and what its first segment (ordinal 1, sequence 1) takes as the previous trailer's hash.

    parent_epoch and parent_sequence are 0 for a disk's first epoch; parent_sequence is SEQUENCE_UNKNOWN behind an epoch
    that was passed over, so that nothing before it is part of the history.
    """

    parent_epoch: int
    parent_sequence: int
    previous_trailer_hash: bytes


async def create_vault_object(store: ObjectStore, vault: VaultId, vault_json: bytes) -> None:
    """Durable on return. Raises ObjectExists, StoreFault; after StoreOutcomeUnknown it may be repeated."""
    name = str(VaultName(vault=vault))
    try:
        await store.create(name, [vault_json])
    except (ObjectExists, StoreOutcomeUnknown) as doubt:
        try:
            stored = await store.read(name, end_byte=VAULT_BYTES_MAX + 1)
        except ObjectNotFound:
            raise doubt from None
        if stored != vault_json:
            raise ObjectExists(url=store.url, name=name) from doubt


async def read_vault_of(store: ObjectStore, key: RecoveryKey) -> VaultDescription:
    """The vault of a recovery key file, proved to be signed by the authority that the file trusts.

    Raises NotAVault, ObjectCorrupt, FormatNotSupported, StoreFault.
    """
    description = await _read_vault(store, key.vault)
    check_recovery_key(description, key, url=store.url)
    return description


class DiskArchive(VaultRecords):
    """One vault in one store: disks' histories, and its points and machine descriptions (VaultRecords).

    Has no state of its own; safe to share between tasks.
    """

    async def read_vault(self) -> VaultDescription:
        """Raises NotAVault (none there, or another authority's), ObjectCorrupt, FormatNotSupported, StoreFault."""
        description = await _read_vault(self._store, self._vault)
        if description.authority_key != self._authority.public_bytes_raw():
            raise NotAVault(url=self._store.url, reason="it is signed by another authority")
        return description

    async def append_segment(self, name: SegmentName, parts: Sequence[Buffer], trailer_hash: bytes) -> None:
        """Committed on return: exactly these bytes lie there, durable and readable. The parts end with the trailer.

        Repeating it is harmless. Raises HistoryForked if another segment has the name (nothing was changed), StoreFault
        (with StoreOutcomeUnknown nothing is known: repeat).
        """
        try:
            await self._store.create(str(name), parts)
        except (ObjectExists, StoreOutcomeUnknown) as doubt:
            try:
                info = await self._store.info(str(name))
                stored = await self._store.read(str(name), first_byte=-TRAILER_BYTES)
            except ObjectNotFound:
                raise doubt from None
            trailer = bytes(memoryview(parts[-1]).cast("B")[-TRAILER_BYTES:])
            size_bytes = sum(memoryview(part).nbytes for part in parts)
            if stored != trailer or info.size_bytes != size_bytes or trailer_hash not in trailer:
                raise HistoryForked(name=str(name)) from doubt

    async def last_segment(self, disk: DiskId, epoch: int) -> SegmentSummary | None:
        """Where the epoch stands in storage; None if none of its segments is there up to a gap.

        Only its end is verified: the last UPLOADS_IN_FLIGHT_MAX + 1 segments and how they follow each other. What a
        list that is behind does not show is found by its name. Raises SegmentMissing (a gap that uploads under way do
        not explain), ObjectCorrupt, FormatNotSupported, StoreFault.
        """
        sizes = await self._segment_sizes(object_names.epoch_prefix(self._vault, disk, epoch))
        await self._add_unlisted(sizes, disk, epoch)
        names = sorted(sizes, key=lambda name: name.ordinal)
        whole = sum(1 for place, name in enumerate(names, start=1) if name.ordinal == place)
        beyond = names[whole:]
        if beyond:
            await self._check_gap(names, whole, sizes)
        if not whole:
            return None
        first = max(0, whole - UPLOADS_IN_FLIGHT_MAX - 1)
        found = await self._read_segments(names[first:whole], sizes)
        return _summary(found, beyond_gap=tuple(name.ordinal for name in beyond))

    async def close_epoch(self, grant: Grant, signed_grant: bytes, signing_key: Ed25519PrivateKey) -> EpochStart:
        """Ends the epoch that `grant`, ours, continues, and says from where ours starts. Repeating it is harmless.

        Afterwards no segment of the parent is ever committed again. Raises HistoryForked if the parent was closed for
        another successor, and as last_segment does.
        """
        if not grant.parent_epoch:
            return EpochStart(parent_epoch=0, parent_sequence=0, previous_trailer_hash=NO_TRAILER_HASH)
        fork: HistoryForked | None = None
        for _ in range(CLOSE_ATTEMPTS_MAX):
            last = await self.last_segment(grant.disk, grant.parent_epoch)
            if last is not None and last.successor is not None:
                if last.successor != grant:
                    raise HistoryForked(name=str(last.name))
                return _start_after(grant, last.last_sequence, last.trailer_hash, is_passed_over=last.is_passed_over)
            previous = last.trailer_hash if last else await self._start_hash(grant.disk, grant.parent_epoch)
            end = closing_segment(
                grant=grant,
                signed_grant=signed_grant,
                ordinal=last.ordinal + 1 if last else 1,
                last_sequence=last.last_sequence if last else 0,
                previous_trailer_hash=previous,
                signing_key=signing_key,
            )
            try:
                await self.append_segment(end.name, (end.header, end.end), end.trailer_hash)
            except HistoryForked as error:
                fork = error
                continue
            is_new = last is None and previous == NO_TRAILER_HASH
            sequence = last.last_sequence if last else 0
            return _start_after(grant, sequence, end.trailer_hash, is_passed_over=is_new)
        raise fork or HistoryForked(name=object_names.epoch_prefix(self._vault, grant.disk, grant.parent_epoch))

    async def history(self, disk: DiskId) -> DiskHistory:
        """Every epoch of the disk with its verified chain; damage is collected in it, everything before it stays
        usable.

        While a process server is uploading, a segment on its way can be missing: it is behind everything committed, and
        told as SegmentAwaited. What the store has but cannot read is damage too. Raises every other StoreFault.
        """
        sizes = await self._segment_sizes(object_names.disk_prefix(self._vault, disk))

        async def find(name: SegmentName) -> Finding:
            try:
                return await self._segment(name, sizes[name])
            except VaultFault as fault:
                return fault
            except ObjectUnreadable as fault:
                # why: a bad place of the medium must not keep anybody from what does not need it
                return ObjectCorrupt(name=str(name), reason=f"the store cannot read it: {fault.reason}")

        names = list(sizes)
        found = await read_each(names, find, at_once=self._reads_at_once)
        return chain_history(self._vault, disk, dict(zip(names, found, strict=True)))

    async def read_frame(self, segment: VerifiedSegment, number: int) -> FrameRecord:
        """One frame, by its number in the segment's index; every byte agrees with the index. As read_frames."""
        return (await self.read_frames(segment, number, number + 1))[0]

    async def read_frames(self, segment: VerifiedSegment, first: int, end: int) -> list[FrameRecord]:
        """The frames [first, end) by one read of at most READ_BYTES_MAX; every byte agrees with the index.

        Raises ObjectCorrupt, SegmentMissing, InvalidValue (too much at once), StoreFault.
        """
        offsets = segment.index.offsets
        first_byte, end_byte = int(offsets[first]), int(offsets[end])
        if end_byte - first_byte > READ_BYTES_MAX:
            raise InvalidValue(what="frames", value=end_byte - first_byte, rule=f"at most {READ_BYTES_MAX} at once")
        name = str(segment.name)
        try:
            data = memoryview(await self._store.read(name, first_byte=first_byte, end_byte=end_byte))
        except ObjectNotFound as error:
            raise SegmentMissing(name=name) from error
        except ObjectUnreadable as error:
            raise ObjectCorrupt(name=name, reason=f"the store cannot read it: {error.reason}") from error
        places = (offsets[first : end + 1] - first_byte).tolist()
        return [
            _checked_record(segment, number, data[start:stop])
            for number, (start, stop) in enumerate(itertools.pairwise(places), start=first)
        ]

    async def list_disks(self) -> tuple[DiskId, ...]:
        """Every disk with at least one object, in ascending order."""
        prefix = object_names.disks_prefix(self._vault)
        return tuple(DiskId(folder) for folder in await self._folders(prefix) if _is_identifier(folder))

    async def _add_unlisted(self, sizes: dict[SegmentName, int], disk: DiskId, epoch: int) -> None:
        """Adds what continues the run of ordinals from 1 on and is there, though a list that is behind lacks it."""
        for ordinal in itertools.count(1):
            name = SegmentName(vault=self._vault, disk=disk, epoch=epoch, ordinal=ordinal)
            if name not in sizes:
                try:
                    sizes[name] = (await self._store.info(str(name))).size_bytes
                except ObjectNotFound:
                    return

    async def _check_gap(self, names: list[SegmentName], whole: int, sizes: dict[SegmentName, int]) -> None:
        """Raises SegmentMissing unless what lies behind the first missing ordinal can be uploads under way."""
        beyond = names[whole:]
        missing = SegmentName(vault=self._vault, disk=beyond[0].disk, epoch=beyond[0].epoch, ordinal=whole + 1)
        newest = beyond[-1].ordinal
        if not may_be_under_way(missing.ordinal, newest, ()):
            raise SegmentMissing(name=str(missing))
        found = await self._read_segments(beyond, sizes)
        if not may_be_under_way(missing.ordinal, newest, found):
            raise SegmentMissing(name=str(missing))

    async def _start_hash(self, disk: DiskId, epoch: int) -> bytes:
        """What the first segment of an epoch, of which none is there yet, has to continue."""
        folders = await self._folders(object_names.disk_prefix(self._vault, disk))
        listed = [int(folder) for folder in folders if _is_epoch(folder) and int(folder) < epoch]
        # why: a list that is behind lacks the newest, and a closing segment that continues the wrong one ends it all
        unlisted = range(max(max(listed, default=0) + 1, epoch - UNLISTED_EPOCHS_MAX), epoch)
        for number in sorted((*listed, *unlisted), reverse=True):
            last = await self.last_segment(disk, number)
            if last is not None and last.successor is not None and last.successor.epoch == epoch:
                return last.trailer_hash
        return NO_TRAILER_HASH

    async def _segment_sizes(self, prefix: str) -> dict[SegmentName, int]:
        """What this version does not name (maps, folds, strangers) is passed over."""
        sizes = {}
        async for info in self._store.list(prefix):
            name = _segment_name(info.name)
            if name is not None:
                sizes[name] = info.size_bytes
        return sizes

    async def _folders(self, prefix: str) -> list[str]:
        """The names directly under the prefix that end in a folder; one listing per folder, however full it is."""
        folders: list[str] = []
        after = ""
        while True:
            found = self._store.list(prefix, after=after)
            info = await anext(found, None)
            if isinstance(found, AsyncGenerator):
                await found.aclose()
            if info is None:
                return folders
            folder, slash, _ = info.name.removeprefix(prefix).partition("/")
            if slash:
                folders.append(folder)
            after = object_names.behind_folder(f"{prefix}{folder}/") if slash else info.name

    async def _read_segments(
        self, names: Sequence[SegmentName], sizes: dict[SegmentName, int]
    ) -> list[VerifiedSegment]:
        return await read_each(names, lambda name: self._segment(name, sizes[name]), at_once=self._reads_at_once)

    async def _segment(self, name: SegmentName, size_bytes: int) -> VerifiedSegment:
        """The verified segment, by reading its end and its header only. Raises VaultFault, StoreFault."""
        text = str(name)
        try:
            tail = await self._store.read(text, first_byte=max(0, size_bytes - SMALL_OBJECT_BYTES), end_byte=size_bytes)
            trailer_data = tail[-TRAILER_BYTES:]
            trailer = parse_trailer(trailer_data, name=text, object_bytes=size_bytes)
            tail_first = size_bytes - len(tail)
            if trailer.index_offset < tail_first:
                missing = await self._store.read(text, first_byte=trailer.index_offset, end_byte=tail_first)
                index_data = missing + tail[:-TRAILER_BYTES]
            else:
                index_data = tail[trailer.index_offset - tail_first : -TRAILER_BYTES]
            if tail_first:
                header_data = await self._store.read(text, end_byte=trailer.header_bytes)
            else:
                header_data = tail[: trailer.header_bytes]
        except ObjectNotFound as error:
            raise SegmentMissing(name=text) from error
        return verify_segment(
            name,
            header_data=header_data,
            index_data=index_data,
            trailer_data=trailer_data,
            object_bytes=size_bytes,
            authority=self._authority,
        )


def _checked_record(segment: VerifiedSegment, number: int, data: memoryview) -> FrameRecord:
    name = str(segment.name)
    expected = segment.index.entry(number)
    try:
        record = parse_frame_record(data)
    except InvalidValue as error:
        raise ObjectCorrupt(name=name, reason=f"frame {number}: {error}") from error
    entry = record.entry
    if entry.head_bytes != expected.head_bytes or entry.extents.tobytes() != expected.extents.tobytes():
        raise ObjectCorrupt(name=name, reason=f"frame {number} is not the one in the index")
    return record


def _summary(found: Sequence[VerifiedSegment], *, beyond_gap: tuple[int, ...]) -> SegmentSummary:
    """Of the first closing segment in `found`, else of the last one. Raises ObjectCorrupt where the chain breaks."""
    last = found[0]
    cursor_bytes, last_end = _cursor_and_end(last, None, None)
    owner = last.grant
    for segment in found[1:]:
        if last.is_closing:
            break
        if refusal := ChainLink.behind(last).refusal(segment):
            raise refusal
        last = segment
        cursor_bytes, last_end = _cursor_and_end(last, cursor_bytes, last_end)
        owner = owner if last.is_closing else last.grant
    return SegmentSummary(
        name=last.name,
        last_sequence=last.last_sequence,
        trailer_hash=last.trailer_hash,
        grant=owner,
        last_end=last_end,
        copy_in_cursor_bytes=cursor_bytes,
        successor=last.grant if last.is_closing else None,
        is_passed_over=is_passed_over(last),
        beyond_gap=beyond_gap,
    )


def _cursor_and_end(
    segment: VerifiedSegment, cursor_bytes: int | None, last_end: ChangeSetEnd | None
) -> tuple[int | None, ChangeSetEnd | None]:
    if segment.is_closing:
        return cursor_bytes, last_end
    newest = segment.index.newest_cursor_bytes()
    return (cursor_bytes if newest is None else newest), segment.index.end_of(segment.last_sequence)


def _start_after(grant: Grant, last_sequence: int, trailer_hash: bytes, *, is_passed_over: bool) -> EpochStart:
    # why: an epoch that was passed over holds nothing, whatever its owner may have told an agent meanwhile. The first
    # one holds nothing at its beginning either way.
    is_unknown = is_passed_over and grant.parent_epoch > EPOCH_FIRST
    return EpochStart(
        parent_epoch=grant.parent_epoch,
        parent_sequence=SEQUENCE_UNKNOWN if is_unknown else last_sequence,
        previous_trailer_hash=trailer_hash,
    )


async def _read_vault(store: ObjectStore, vault: VaultId) -> VaultDescription:
    name = str(VaultName(vault=vault))
    try:
        data = await store.read(name, end_byte=VAULT_BYTES_MAX + 1)
    except ObjectNotFound as error:
        raise NotAVault(url=store.url, reason=f"there is no {name}") from error
    description = parse_vault(data, name=name)
    if description.vault != vault:
        raise ObjectCorrupt(name=name, reason=f"it describes vault {description.vault}")
    return description


def _segment_name(name: str) -> SegmentName | None:
    try:
        parsed = object_names.parse(name)
    except InvalidValue:
        return None
    return parsed if isinstance(parsed, SegmentName) else None


def _is_epoch(folder: str) -> bool:
    # why: text that somebody else put there; isdigit alone takes for a number what int does not
    return len(folder) == EPOCH_DIGITS and folder.isascii() and folder.isdigit()


def _is_identifier(folder: str) -> bool:
    return len(folder) == 32 and set(folder) <= set("0123456789abcdef")
