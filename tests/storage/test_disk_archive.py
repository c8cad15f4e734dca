"""What the archive tells of a disk is what a chain of signed trailers proves; damage is named and hides nothing
before it.
"""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.errors import InvalidValue
from protocol.signed_records import (
    MachineDescription,
    PointMember,
    PointRecord,
    SignatureInvalid,
    sign_grant,
    sign_machine_description,
    sign_point,
)
from protocol.vocabulary import SEQUENCE_UNKNOWN, ChangeSetEnd, Consistency, PointId, Position, VaultId
from storage import object_names
from storage.disk_archive import (
    SMALL_OBJECT_BYTES,
    DiskArchive,
    EpochStart,
    create_vault_object,
    read_vault_of,
)
from storage.errors import (
    HistoryForked,
    NotAVault,
    ObjectCorrupt,
    ObjectExists,
    ObjectNotFound,
    ObjectUnreadable,
    PositionNotFound,
    SegmentAwaited,
    SegmentMissing,
    StoreFull,
    StoreOutcomeUnknown,
    StoreUnavailable,
    VaultFault,
)
from storage.history import UPLOADS_IN_FLIGHT_MAX
from storage.keys import create_vault
from storage.object_names import MachineName, PointName, SegmentName, VaultName
from storage.sealing import FrameOpener
from storage.segment import NO_TRAILER_HASH
from tests.storage.memory_store import MemoryStore
from tests.storage.segment_writer import (
    DISK,
    MACHINE,
    OTHER_DISK,
    SETTLED,
    UNSETTLED,
    VAULT,
    SegmentWriter,
    WrittenSegment,
    append,
    append_closing,
    authority,
    bookmarked,
    contents,
    make_grant,
    new_vault,
    signing_key,
    vault_private_key,
)

BIG_END_CHANGE_SETS = 400
"""So many that the index alone is longer than the first read of the end."""


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def archive(store: MemoryStore) -> DiskArchive:
    return DiskArchive(store, vault=VAULT, authority=authority().public_key())


async def write(archive: DiskArchive, writer: SegmentWriter, count: int) -> list[WrittenSegment]:
    written = []
    for _ in range(count):
        segment = writer.segment([SETTLED, bookmarked(writer.sequence + 1)])
        await append(archive, segment)
        written.append(segment)
    return written


async def switch(archive: DiskArchive, *, epoch: int, parent_epoch: int) -> SegmentWriter:
    """A successor closes the parent and begins."""
    grant = make_grant(epoch=epoch, parent_epoch=parent_epoch)
    start = await archive.close_epoch(grant, sign_grant(grant, authority()), signing_key(epoch))
    return SegmentWriter(grant, previous_trailer_hash=start.previous_trailer_hash)


async def every_byte(archive: DiskArchive, position: Position) -> list[bytes]:
    """What recovery would apply for the position, read, verified and opened."""
    found: list[bytes] = []
    for segment in (await archive.history(DISK)).path_to(position):
        opener = FrameOpener(header=segment.header, vault_private_key=vault_private_key())
        records = await archive.read_frames(segment, 0, len(segment.index))
        found.extend(opener.open(record.entry, record.sealed) for record in records)
    return found


async def test_a_history_of_one_epoch_is_found_whole(archive: DiskArchive) -> None:
    written = await write(archive, SegmentWriter(make_grant()), 3)
    history = await archive.history(DISK)
    assert not history.damage
    assert history.head == Position(epoch=1, sequence=6)
    assert [segment.name for segment in history.segments] == [segment.end.name for segment in written]
    assert [(point.position.sequence, point.instant_ns) for point in history.points] == [(2, 2), (4, 4), (6, 6)]
    assert [position.sequence for position, _ in history.positions()] == [1, 2, 3, 4, 5, 6]
    assert history.end_at(Position(epoch=1, sequence=3)) == SETTLED
    assert history.end_at(Position(epoch=1, sequence=4)) == bookmarked(4)
    assert await archive.list_disks() == (DISK,)


async def test_every_byte_of_a_path_opens_to_what_was_written(archive: DiskArchive) -> None:
    await write(archive, SegmentWriter(make_grant()), 2)
    expected = [part for sequence in range(1, 5) for part in (contents(sequence), b"")]
    assert await every_byte(archive, Position(epoch=1, sequence=4)) == expected


async def test_a_path_ends_with_the_segment_of_its_position(archive: DiskArchive) -> None:
    await write(archive, SegmentWriter(make_grant()), 3)
    history = await archive.history(DISK)
    path = history.path_to(Position(epoch=1, sequence=3))
    assert [segment.name.ordinal for segment in path] == [1, 2]
    assert path[-1].index.frames_through(3) == 2
    assert history.path_to(Position(epoch=1, sequence=0)) == ()
    assert history.end_at(Position(epoch=1, sequence=0)) is None
    for beyond in (Position(epoch=1, sequence=7), Position(epoch=2, sequence=0)):
        with pytest.raises(PositionNotFound):
            history.path_to(beyond)


async def test_a_path_leads_through_the_epochs_that_it_continues(archive: DiskArchive) -> None:
    await write(archive, SegmentWriter(make_grant()), 2)
    await write(archive, await switch(archive, epoch=3, parent_epoch=1), 2)
    await write(archive, await switch(archive, epoch=7, parent_epoch=3), 1)
    history = await archive.history(DISK)
    assert not history.damage
    assert history.head == Position(epoch=7, sequence=2)
    assert history.epochs[3].parent == Position(epoch=1, sequence=4)
    assert history.epochs[7].parent == Position(epoch=3, sequence=4)
    assert [(segment.name.epoch, segment.name.ordinal) for segment in history.path_to(history.head)] == [
        (1, 1),
        (1, 2),
        (3, 1),
        (3, 2),
        (7, 1),
    ]
    assert history.end_at(Position(epoch=7, sequence=0)) == bookmarked(4)
    assert len(await every_byte(archive, history.head)) == 20


async def test_an_epoch_without_segments_can_be_continued(archive: DiskArchive) -> None:
    await write(archive, SegmentWriter(make_grant()), 1)
    await switch(archive, epoch=2, parent_epoch=1)
    await write(archive, await switch(archive, epoch=3, parent_epoch=2), 1)
    history = await archive.history(DISK)
    assert not history.damage
    assert history.epochs[2].parent == Position(epoch=1, sequence=2)
    assert history.epochs[3].parent == Position(epoch=2, sequence=0)
    assert [segment.name.epoch for segment in history.path_to(Position(epoch=3, sequence=2))] == [1, 3]


async def test_a_first_epoch_without_segments_can_be_continued(archive: DiskArchive) -> None:
    await write(archive, await switch(archive, epoch=2, parent_epoch=1), 1)
    history = await archive.history(DISK)
    assert not history.damage
    assert [segment.name.epoch for segment in history.path_to(Position(epoch=2, sequence=2))] == [2]


async def test_a_successor_that_has_written_nothing_is_the_head(archive: DiskArchive) -> None:
    await write(archive, SegmentWriter(make_grant()), 1)
    await switch(archive, epoch=2, parent_epoch=1)
    history = await archive.history(DISK)
    assert history.head == Position(epoch=2, sequence=0)
    assert len(history.path_to(history.head)) == 1


@pytest.mark.parametrize("stranger", ["²", "9" * 5000, "0000000001x"])
async def test_a_strangers_folder_beside_the_epochs_is_passed_over(
    archive: DiskArchive, store: MemoryStore, stranger: str
) -> None:
    await switch(archive, epoch=2, parent_epoch=1)
    store.objects[f"{object_names.disk_prefix(VAULT, DISK)}{stranger}/1.seg"] = b"not ours"
    await switch(archive, epoch=3, parent_epoch=2)
    history = await archive.history(DISK)
    assert history.head == Position(epoch=3, sequence=0)
    assert not history.damage


async def test_a_new_beginning_stands_beside_the_old_history(archive: DiskArchive) -> None:
    await write(archive, SegmentWriter(make_grant()), 2)
    await write(archive, SegmentWriter(make_grant(epoch=5)), 1)
    history = await archive.history(DISK)
    assert not history.damage
    assert history.head == Position(epoch=5, sequence=2)
    assert [segment.name.epoch for segment in history.path_to(history.head)] == [5]
    assert len(history.path_to(Position(epoch=1, sequence=4))) == 2


async def test_an_index_longer_than_the_first_read_of_the_end_is_read_whole(
    archive: DiskArchive, store: MemoryStore
) -> None:
    writer = SegmentWriter(make_grant())
    big = writer.segment([SETTLED] * BIG_END_CHANGE_SETS, length_bytes=512)
    assert len(big.end.end) > SMALL_OBJECT_BYTES
    await append(archive, big)
    history = await archive.history(DISK)
    assert not history.damage
    assert history.head == Position(epoch=1, sequence=BIG_END_CHANGE_SETS)
    assert store.bytes_read == len(big.end.end) + len(big.end.header)


async def test_of_a_large_segment_only_the_end_and_the_header_are_read(
    archive: DiskArchive, store: MemoryStore
) -> None:
    await append(archive, SegmentWriter(make_grant()).segment([SETTLED] * 4, length_bytes=2**18))
    assert (await archive.history(DISK)).head == Position(epoch=1, sequence=4)
    assert store.bytes_read < SMALL_OBJECT_BYTES + 1000


class TestDamage:
    async def test_no_flipped_byte_of_a_segment_goes_unnoticed(self, archive: DiskArchive, store: MemoryStore) -> None:
        written = SegmentWriter(make_grant()).segment(length_bytes=40)
        name = str(written.end.name)
        await append(archive, written)
        assert len(await every_byte(archive, Position(epoch=1, sequence=1))) == 2
        for place in range(len(written.data)):
            store.flip(name, place)
            with pytest.raises(VaultFault) as caught:
                await every_byte(archive, Position(epoch=1, sequence=1))
            assert caught.value.fields["name"] == name
            store.flip(name, place)

    async def test_no_truncated_segment_goes_unnoticed(self, archive: DiskArchive, store: MemoryStore) -> None:
        written = SegmentWriter(make_grant()).segment(length_bytes=40)
        name = str(written.end.name)
        for end in range(len(written.data)):
            store.objects[name] = written.data[:end]
            history = await archive.history(DISK)
            assert [fault.fields["name"] for fault in history.damage] == [name]
            assert history.head is None

    async def test_a_damaged_segment_is_named_and_all_before_it_stays_usable(
        self, archive: DiskArchive, store: MemoryStore
    ) -> None:
        written = await write(archive, SegmentWriter(make_grant()), 4)
        store.flip(str(written[2].end.name), -1)
        history = await archive.history(DISK)
        assert [(type(fault), fault.fields["name"]) for fault in history.damage] == [
            (ObjectCorrupt, str(written[2].end.name))
        ]
        assert history.head == Position(epoch=1, sequence=4)
        assert len(history.path_to(Position(epoch=1, sequence=4))) == 2
        with pytest.raises(ObjectCorrupt, match=r"000000000003\.seg"):
            history.path_to(Position(epoch=1, sequence=5))

    async def test_a_missing_segment_in_the_middle_is_named(self, archive: DiskArchive, store: MemoryStore) -> None:
        written = await write(archive, SegmentWriter(make_grant()), UPLOADS_IN_FLIGHT_MAX + 2)
        del store.objects[str(written[1].end.name)]
        history = await archive.history(DISK)
        assert [(type(fault), fault.fields["name"]) for fault in history.damage] == [
            (SegmentMissing, str(written[1].end.name))
        ]
        assert history.head == Position(epoch=1, sequence=2)
        with pytest.raises(SegmentMissing):
            history.path_to(Position(epoch=1, sequence=8))

    async def test_a_gap_that_uploads_under_way_explain_is_told_as_such(
        self, archive: DiskArchive, store: MemoryStore
    ) -> None:
        written = await write(archive, SegmentWriter(make_grant()), UPLOADS_IN_FLIGHT_MAX + 1)
        del store.objects[str(written[1].end.name)]
        history = await archive.history(DISK)
        assert [type(fault) for fault in history.damage] == [SegmentAwaited]
        assert history.head == Position(epoch=1, sequence=2)

    @pytest.mark.parametrize("successor_writes", [False, True])
    async def test_no_upload_is_under_way_in_an_epoch_that_was_closed(
        self, archive: DiskArchive, store: MemoryStore, successor_writes: bool
    ) -> None:
        written = await write(archive, SegmentWriter(make_grant()), 3)
        successor = await switch(archive, epoch=2, parent_epoch=1)
        if successor_writes:
            await write(archive, successor, 1)
        del store.objects[str(written[1].end.name)]
        history = await archive.history(DISK)
        assert [type(fault) for fault in history.damage] == [SegmentMissing]

    async def test_what_the_store_cannot_read_is_damage_and_hides_nothing_before_it(
        self, archive: DiskArchive, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        written = await write(archive, SegmentWriter(make_grant()), 3)
        bad, read = str(written[2].end.name), store.read
        whole = await archive.history(DISK)

        async def fails(name: str, **options: int | None) -> bytes:
            if name == bad:
                raise ObjectUnreadable(url=store.url, name=name, reason="Input/output error")
            return await read(name, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(store, "read", fails)
        history = await archive.history(DISK)
        assert [(type(fault), fault.fields["name"]) for fault in history.damage] == [(ObjectCorrupt, bad)]
        assert len(history.path_to(Position(epoch=1, sequence=4))) == 2
        with pytest.raises(ObjectCorrupt, match=r"000000000003\.seg.*Input/output error"):
            await archive.read_frame(whole.segments[2], 0)

    async def test_damage_in_an_epoch_is_told_for_positions_of_its_successors(
        self, archive: DiskArchive, store: MemoryStore
    ) -> None:
        written = await write(archive, SegmentWriter(make_grant()), 2)
        await write(archive, await switch(archive, epoch=2, parent_epoch=1), 1)
        await write(archive, await switch(archive, epoch=3, parent_epoch=2), 1)
        store.flip(str(written[1].end.name), -1)
        history = await archive.history(DISK)
        assert [fault.fields["name"] for fault in history.damage] == [str(written[1].end.name)]
        assert history.head == Position(epoch=1, sequence=2)
        for epoch in (2, 3):
            with pytest.raises(ObjectCorrupt, match=r"000000000002\.seg"):
                history.path_to(Position(epoch=epoch, sequence=1))

    async def test_segments_swapped_within_an_epoch_are_refused(self, archive: DiskArchive, store: MemoryStore) -> None:
        written = await write(archive, SegmentWriter(make_grant()), 3)
        first, second = (str(segment.end.name) for segment in written[:2])
        store.objects[first], store.objects[second] = store.objects[second], store.objects[first]
        history = await archive.history(DISK)
        assert [fault.fields["name"] for fault in history.damage] == [first, second]
        assert history.head is None

    async def test_segments_swapped_between_disks_are_refused(self, archive: DiskArchive, store: MemoryStore) -> None:
        [own] = await write(archive, SegmentWriter(make_grant()), 1)
        [other] = await write(archive, SegmentWriter(make_grant(disk=OTHER_DISK)), 1)
        names = str(own.end.name), str(other.end.name)
        store.objects[names[0]], store.objects[names[1]] = store.objects[names[1]], store.objects[names[0]]
        for disk in (DISK, OTHER_DISK):
            [fault] = (await archive.history(disk)).damage
            assert isinstance(fault, ObjectCorrupt)

    async def test_a_segment_swapped_into_another_epoch_is_refused(
        self, archive: DiskArchive, store: MemoryStore
    ) -> None:
        await write(archive, SegmentWriter(make_grant()), 1)
        [written] = await write(archive, await switch(archive, epoch=2, parent_epoch=1), 1)
        moved = dataclasses.replace(written.end.name, epoch=9)
        store.objects[str(moved)] = store.objects[str(written.end.name)]
        history = await archive.history(DISK)
        assert [fault.fields["name"] for fault in history.damage] == [str(moved)]
        assert history.head == Position(epoch=2, sequence=2)

    async def test_an_older_segment_replayed_as_the_newest_is_refused(
        self, archive: DiskArchive, store: MemoryStore
    ) -> None:
        written = await write(archive, SegmentWriter(make_grant()), 3)
        replayed = str(dataclasses.replace(written[0].end.name, ordinal=4))
        store.objects[replayed] = store.objects[str(written[1].end.name)]
        history = await archive.history(DISK)
        assert [fault.fields["name"] for fault in history.damage] == [replayed]
        assert history.head == Position(epoch=1, sequence=6)

    async def test_a_segment_replaced_by_another_that_was_signed_too_breaks_the_chain_behind_it(
        self, archive: DiskArchive, store: MemoryStore
    ) -> None:
        written = await write(archive, SegmentWriter(make_grant()), 3)
        twin = SegmentWriter(make_grant(), previous_trailer_hash=written[0].end.trailer_hash)
        twin.ordinal, twin.sequence = 2, 3
        store.objects[str(written[1].end.name)] = twin.segment([SETTLED, UNSETTLED]).data
        history = await archive.history(DISK)
        assert [fault.fields["name"] for fault in history.damage] == [str(written[2].end.name)]
        with pytest.raises(ObjectCorrupt, match="does not follow"):
            await archive.last_segment(DISK, 1)

    async def test_a_signed_segment_that_skips_a_change_set_is_refused(self, archive: DiskArchive) -> None:
        writer = SegmentWriter(make_grant())
        await write(archive, writer, 1)
        writer.sequence += 1
        [skipping] = await write(archive, writer, 1)
        history = await archive.history(DISK)
        assert [fault.fields["name"] for fault in history.damage] == [str(skipping.end.name)]
        assert history.head == Position(epoch=1, sequence=2)

    async def test_an_epoch_that_nobody_named_as_the_successor_is_refused(self, archive: DiskArchive) -> None:
        first = SegmentWriter(make_grant())
        await write(archive, first, 2)
        usurper = SegmentWriter(make_grant(epoch=2, parent_epoch=1), previous_trailer_hash=first.previous_trailer_hash)
        [forged] = await write(archive, usurper, 1)
        history = await archive.history(DISK)
        assert [fault.fields["name"] for fault in history.damage] == [str(forged.end.name)]
        assert history.head == Position(epoch=1, sequence=4)

    async def test_a_segment_of_the_same_epoch_under_another_grant_is_refused(self, archive: DiskArchive) -> None:
        writer = SegmentWriter(make_grant())
        await write(archive, writer, 1)
        writer.grant = dataclasses.replace(writer.grant, issued_ns=8)
        writer.signed_grant = sign_grant(writer.grant, authority())
        [other] = await write(archive, writer, 1)
        history = await archive.history(DISK)
        assert [fault.fields["name"] for fault in history.damage] == [str(other.end.name)]

    async def test_a_closing_segment_that_does_not_follow_the_last_one_is_refused(self, archive: DiskArchive) -> None:
        writer = SegmentWriter(make_grant())
        await write(archive, writer, 2)
        writer.previous_trailer_hash = NO_TRAILER_HASH
        end = writer.closing(make_grant(epoch=2, parent_epoch=1))
        await append_closing(archive, end)
        history = await archive.history(DISK)
        assert [fault.fields["name"] for fault in history.damage] == [str(end.name)]
        assert 2 not in history.epochs

    async def test_frames_altered_after_the_history_was_read_are_refused(
        self, archive: DiskArchive, store: MemoryStore
    ) -> None:
        [written] = await write(archive, SegmentWriter(make_grant()), 1)
        [segment] = (await archive.history(DISK)).segments
        store.objects[str(written.end.name)] = written.data[: int(segment.index.offsets[1]) - 1]
        with pytest.raises(ObjectCorrupt):
            await archive.read_frame(segment, 0)
        other = SegmentWriter(make_grant()).segment([SETTLED, bookmarked(2)])
        store.objects[str(written.end.name)] = other.data
        assert (await archive.read_frame(segment, 0)).entry.head == written.frames[0].entry.head
        other = SegmentWriter(make_grant(disk=OTHER_DISK)).segment([SETTLED, bookmarked(2)])
        store.objects[str(written.end.name)] = other.data
        with pytest.raises(ObjectCorrupt, match="not the one in the index"):
            await archive.read_frame(segment, 0)
        del store.objects[str(written.end.name)]
        with pytest.raises(SegmentMissing):
            await archive.read_frame(segment, 0)

    async def test_objects_of_no_known_name_are_passed_over(self, archive: DiskArchive, store: MemoryStore) -> None:
        [written] = await write(archive, SegmentWriter(make_grant()), 1)
        prefix = str(written.end.name).rpartition("/")[0]
        for name in (f"{prefix}/000000000001.map", f"{prefix}/notes", f"vaults/{VAULT}/disks/{DISK}/folds/1.fold"):
            store.objects[name] = b"?"
        store.objects[f"vaults/{VAULT}/disks/strange/x"] = b"?"
        history = await archive.history(DISK)
        assert (history.damage, history.head) == ((), Position(epoch=1, sequence=2))
        assert await archive.list_disks() == (DISK,)


class TestAppend:
    async def test_an_append_repeated_changes_nothing(self, archive: DiskArchive, store: MemoryStore) -> None:
        written = SegmentWriter(make_grant()).segment()
        await append(archive, written)
        before = dict(store.objects)
        await append(archive, written)
        assert store.objects == before

    async def test_another_segment_under_the_name_is_a_fork(self, archive: DiskArchive, store: MemoryStore) -> None:
        await append(archive, SegmentWriter(make_grant()).segment([SETTLED]))
        before = dict(store.objects)
        with pytest.raises(HistoryForked):
            await append(archive, SegmentWriter(make_grant()).segment([UNSETTLED]))
        assert store.objects == before

    async def test_a_torn_object_under_the_name_is_a_fork(self, archive: DiskArchive, store: MemoryStore) -> None:
        written = SegmentWriter(make_grant()).segment()
        store.objects[str(written.end.name)] = written.data[10:]
        with pytest.raises(HistoryForked):
            await append(archive, written)

    async def test_a_lost_reply_is_settled_by_the_trailer_there(self, archive: DiskArchive, store: MemoryStore) -> None:
        written = SegmentWriter(make_grant()).segment()
        store.lost_replies.add(str(written.end.name))
        await append(archive, written)
        assert store.objects[str(written.end.name)] == written.data

    async def test_a_lost_request_stays_unknown_until_it_is_repeated(
        self, archive: DiskArchive, store: MemoryStore
    ) -> None:
        written = SegmentWriter(make_grant()).segment()
        store.lost_requests.add(str(written.end.name))
        with pytest.raises(StoreOutcomeUnknown):
            await append(archive, written)
        await append(archive, written)
        assert store.objects[str(written.end.name)] == written.data

    async def test_a_predecessor_that_wakes_up_finds_its_name_taken(self, archive: DiskArchive) -> None:
        predecessor = SegmentWriter(make_grant())
        await write(archive, predecessor, 1)
        await switch(archive, epoch=2, parent_epoch=1)
        with pytest.raises(HistoryForked):
            await write(archive, predecessor, 1)


class TestLastSegment:
    async def test_an_epoch_without_segments_has_none(self, archive: DiskArchive) -> None:
        assert await archive.last_segment(DISK, 1) is None

    async def test_it_tells_where_the_epoch_stands(self, archive: DiskArchive) -> None:
        writer = SegmentWriter(make_grant())
        cursor = ChangeSetEnd(consistency=Consistency.UNSETTLED, copy_in_cursor_bytes=4096)
        await append(archive, writer.segment([cursor, dataclasses.replace(cursor, copy_in_cursor_bytes=8192)]))
        await append(archive, writer.segment([SETTLED]))
        last = await archive.last_segment(DISK, 1)
        assert last is not None
        assert (last.ordinal, last.last_sequence, last.trailer_hash) == (2, 3, writer.previous_trailer_hash)
        assert (last.copy_in_cursor_bytes, last.last_end, last.grant) == (8192, SETTLED, writer.grant)
        assert (last.successor, last.is_closed, last.beyond_gap) == (None, False, ())

    async def test_it_tells_who_closed_the_epoch(self, archive: DiskArchive) -> None:
        await write(archive, SegmentWriter(make_grant()), 2)
        writer = await switch(archive, epoch=2, parent_epoch=1)
        last = await archive.last_segment(DISK, 1)
        assert last is not None
        assert (last.ordinal, last.last_sequence, last.successor) == (3, 4, writer.grant)
        assert last.trailer_hash == writer.previous_trailer_hash
        assert last.grant == make_grant()

    async def test_only_the_end_is_read(self, archive: DiskArchive, store: MemoryStore) -> None:
        written = await write(archive, SegmentWriter(make_grant()), UPLOADS_IN_FLIGHT_MAX + 10)
        store.flip(str(written[0].end.name), -1)
        last = await archive.last_segment(DISK, 1)
        assert last is not None
        assert last.ordinal == UPLOADS_IN_FLIGHT_MAX + 10

    async def test_a_damaged_end_is_told(self, archive: DiskArchive, store: MemoryStore) -> None:
        written = await write(archive, SegmentWriter(make_grant()), 2)
        store.flip(str(written[1].end.name), -1)
        with pytest.raises(ObjectCorrupt):
            await archive.last_segment(DISK, 1)

    async def test_uploads_under_way_leave_a_gap_that_is_told(self, archive: DiskArchive, store: MemoryStore) -> None:
        written = await write(archive, SegmentWriter(make_grant()), 4)
        del store.objects[str(written[1].end.name)]
        last = await archive.last_segment(DISK, 1)
        assert last is not None
        assert (last.ordinal, last.beyond_gap) == (1, (3, 4))

    async def test_a_gap_too_wide_for_uploads_is_a_missing_segment(
        self, archive: DiskArchive, store: MemoryStore
    ) -> None:
        written = await write(archive, SegmentWriter(make_grant()), UPLOADS_IN_FLIGHT_MAX + 1)
        del store.objects[str(written[0].end.name)]
        with pytest.raises(SegmentMissing):
            await archive.last_segment(DISK, 1)

    async def test_a_gap_before_a_closing_segment_is_a_missing_segment(
        self, archive: DiskArchive, store: MemoryStore
    ) -> None:
        written = await write(archive, SegmentWriter(make_grant()), 3)
        await switch(archive, epoch=2, parent_epoch=1)
        del store.objects[str(written[1].end.name)]
        with pytest.raises(SegmentMissing):
            await archive.last_segment(DISK, 1)


class TestCloseEpoch:
    async def test_an_epoch_that_begins_at_nothing_closes_nothing(
        self, archive: DiskArchive, store: MemoryStore
    ) -> None:
        start = await archive.close_epoch(make_grant(), sign_grant(make_grant(), authority()), signing_key(1))
        assert start == EpochStart(parent_epoch=0, parent_sequence=0, previous_trailer_hash=NO_TRAILER_HASH)
        assert not store.objects

    async def test_it_can_be_repeated(self, archive: DiskArchive, store: MemoryStore) -> None:
        await write(archive, SegmentWriter(make_grant()), 2)
        grant = make_grant(epoch=2, parent_epoch=1)
        starts = [await archive.close_epoch(grant, sign_grant(grant, authority()), signing_key(2)) for _ in range(2)]
        assert starts[0] == starts[1]
        assert starts[0].parent_sequence == 4
        assert len(store.objects) == 3

    async def test_a_list_that_is_behind_neither_stops_it_nor_breaks_the_chain(
        self, archive: DiskArchive, store: MemoryStore
    ) -> None:
        """Simulation: the closing segment of an empty epoch continued nothing, and all behind it was lost."""
        await write(archive, SegmentWriter(make_grant()), 2)
        store.unlisted = set(store.objects)
        await switch(archive, epoch=2, parent_epoch=1)
        store.unlisted = set(store.objects)
        writer = await switch(archive, epoch=3, parent_epoch=2)
        store.unlisted = set(store.objects)
        await write(archive, writer, 1)
        store.unlisted = set()
        history = await archive.history(DISK)
        assert history.damage == ()
        assert history.epochs[3].parent == Position(epoch=2, sequence=0)
        assert len(history.path_to(Position(epoch=3, sequence=2))) == 3

    async def test_what_continues_an_epoch_that_nobody_had_begun_begins_at_nothing(self, archive: DiskArchive) -> None:
        """Simulation: whoever was to begin it came later, and named it as a successor, and all behind it was lost."""
        written = await write(archive, SegmentWriter(make_grant()), 2)
        owner, late = make_grant(epoch=3, parent_epoch=2), make_grant(epoch=2, parent_epoch=1)
        starts = [await archive.close_epoch(owner, sign_grant(owner, authority()), signing_key(3)) for _ in range(2)]
        assert {start.parent_sequence for start in starts} == {SEQUENCE_UNKNOWN}
        writer = SegmentWriter(owner, previous_trailer_hash=starts[0].previous_trailer_hash)
        await archive.close_epoch(late, sign_grant(late, authority()), signing_key(2))
        beyond = await write(archive, writer, 1)
        history = await archive.history(DISK)
        assert history.damage == ()
        assert [segment.name for segment in history.path_to(Position(epoch=3, sequence=2))] == [beyond[0].end.name]
        assert len(history.path_to(Position(epoch=1, sequence=4))) == len(written)

    async def test_an_epoch_closed_for_another_is_a_fork(self, archive: DiskArchive) -> None:
        await write(archive, SegmentWriter(make_grant()), 2)
        await switch(archive, epoch=2, parent_epoch=1)
        with pytest.raises(HistoryForked):
            await switch(archive, epoch=3, parent_epoch=1)

    async def test_what_a_predecessor_had_under_way_behind_the_closing_segment_is_not_history(
        self, archive: DiskArchive, store: MemoryStore
    ) -> None:
        predecessor = SegmentWriter(make_grant())
        await write(archive, predecessor, 2)
        under_way = [predecessor.segment() for _ in range(3)]
        await append(archive, under_way[1])
        await append(archive, under_way[2])
        successor = await switch(archive, epoch=2, parent_epoch=1)
        with pytest.raises(HistoryForked):
            await append(archive, under_way[0])
        await write(archive, successor, 1)
        history = await archive.history(DISK)
        assert history.damage == ()
        assert history.epochs[2].parent == Position(epoch=1, sequence=4)
        last = await archive.last_segment(DISK, 1)
        assert last is not None
        assert (last.ordinal, last.last_sequence) == (3, 4)
        assert last.successor == successor.grant

    async def test_a_predecessor_that_writes_meanwhile_is_closed_behind_its_newest_segment(
        self, archive: DiskArchive, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        predecessor = SegmentWriter(make_grant())
        await write(archive, predecessor, 1)
        late = predecessor.segment()
        create = store.create

        async def overtaken(name: str, parts: object) -> None:
            store.objects.setdefault(str(late.end.name), late.data)
            await create(name, parts)  # type: ignore[arg-type]

        monkeypatch.setattr(store, "create", overtaken)
        successor = await switch(archive, epoch=2, parent_epoch=1)
        monkeypatch.undo()
        await write(archive, successor, 1)
        history = await archive.history(DISK)
        assert history.damage == ()
        assert history.epochs[2].parent == Position(epoch=1, sequence=3)

    async def test_two_successors_race_and_one_of_them_wins(self, archive: DiskArchive) -> None:
        await write(archive, SegmentWriter(make_grant()), 1)
        outcomes = await asyncio.gather(
            switch(archive, epoch=2, parent_epoch=1), switch(archive, epoch=3, parent_epoch=1), return_exceptions=True
        )
        assert sorted(type(outcome).__name__ for outcome in outcomes) == ["HistoryForked", "SegmentWriter"]
        assert not (await archive.history(DISK)).damage


class TestStoreFaults:
    """A store that fails is no damage: what it holds may be whole."""

    async def test_a_store_that_fails_while_a_history_is_read_is_told_as_such(
        self, archive: DiskArchive, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await write(archive, SegmentWriter(make_grant()), 20)

        async def fail(name: str, **_: object) -> bytes:
            raise StoreUnavailable(url=store.url, reason="timeout")

        monkeypatch.setattr(store, "read", fail)
        with pytest.raises(StoreUnavailable):
            await archive.history(DISK)
        with pytest.raises(StoreUnavailable):
            await archive.last_segment(DISK, 1)
        with pytest.raises(StoreUnavailable):
            await archive.read_vault()

    async def test_an_append_that_fails_otherwise_is_told_as_it_is(
        self, archive: DiskArchive, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def fail(name: str, parts: object) -> None:
            raise StoreFull(url=store.url, reason="no space")

        monkeypatch.setattr(store, "create", fail)
        with pytest.raises(StoreFull):
            await append(archive, SegmentWriter(make_grant()).segment())

    async def test_no_more_reads_than_allowed_run_at_once(
        self, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        archive = DiskArchive(store, vault=VAULT, authority=authority().public_key(), reads_at_once=3)
        await write(archive, SegmentWriter(make_grant()), 12)
        read, running, most = store.read, 0, 0

        async def counted(name: str, **options: int) -> bytes:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0)
            running -= 1
            return await read(name, **options)

        monkeypatch.setattr(store, "read", counted)
        assert (await archive.history(DISK)).head == Position(epoch=1, sequence=24)
        assert most == 3

    async def test_a_segment_that_is_gone_when_it_is_read_is_missing(
        self, archive: DiskArchive, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        written = await write(archive, SegmentWriter(make_grant()), 2)

        async def gone(name: str, **_: object) -> bytes:
            raise ObjectNotFound(url=store.url, name=name)

        monkeypatch.setattr(store, "read", gone)
        history = await archive.history(DISK)
        assert {type(fault) for fault in history.damage} == {SegmentMissing}
        assert history.damage[0].fields["name"] == str(written[0].end.name)

    async def test_too_much_is_not_read_at_once(self, archive: DiskArchive, monkeypatch: pytest.MonkeyPatch) -> None:
        await write(archive, SegmentWriter(make_grant()), 1)
        [segment] = (await archive.history(DISK)).segments
        monkeypatch.setattr("storage.disk_archive.READ_BYTES_MAX", 4096)
        with pytest.raises(InvalidValue):
            await archive.read_frames(segment, 0, 2)


class TestVault:
    async def test_a_vault_is_read_back(self, archive: DiskArchive, store: MemoryStore) -> None:
        vault = new_vault()
        await create_vault_object(store, VAULT, vault.vault_json)
        await create_vault_object(store, VAULT, vault.vault_json)
        assert await archive.read_vault() == vault.description
        assert await read_vault_of(store, vault.recovery_keys[0]) == vault.description

    async def test_a_vault_is_never_overwritten(self, store: MemoryStore) -> None:
        await create_vault_object(store, VAULT, new_vault().vault_json)
        other = create_vault(vault=VAULT, created_ns=1, recovery_labels=("one",))
        with pytest.raises(ObjectExists):
            await create_vault_object(store, VAULT, other.vault_json)

    async def test_a_vaults_lost_reply_is_settled(self, archive: DiskArchive, store: MemoryStore) -> None:
        """Or its keys would be thrown away, and a vault be left that nobody can open."""
        vault = new_vault()
        store.lost_replies.add(str(VaultName(vault=VAULT)))
        await create_vault_object(store, VAULT, vault.vault_json)
        assert await archive.read_vault() == vault.description

    async def test_a_vaults_lost_request_is_told_as_unknown(self, store: MemoryStore) -> None:
        store.lost_requests.add(str(VaultName(vault=VAULT)))
        with pytest.raises(StoreOutcomeUnknown):
            await create_vault_object(store, VAULT, new_vault().vault_json)

    async def test_a_store_without_the_vault_is_told_so(self, archive: DiskArchive, store: MemoryStore) -> None:
        with pytest.raises(NotAVault):
            await archive.read_vault()
        with pytest.raises(NotAVault):
            await read_vault_of(store, new_vault().recovery_keys[0])

    async def test_a_vault_of_another_authority_is_told_so(self, store: MemoryStore) -> None:
        await create_vault_object(store, VAULT, new_vault().vault_json)
        stranger = DiskArchive(store, vault=VAULT, authority=Ed25519PrivateKey.generate().public_key())
        with pytest.raises(NotAVault):
            await stranger.read_vault()

    async def test_a_description_of_another_vault_in_its_place_is_refused(
        self, archive: DiskArchive, store: MemoryStore
    ) -> None:
        other = create_vault(vault=VaultId("f0" * 16), created_ns=1, recovery_labels=("one",))
        await create_vault_object(store, VAULT, other.vault_json)
        with pytest.raises(ObjectCorrupt):
            await archive.read_vault()


def point(number: int) -> PointRecord:
    return PointRecord(
        vault=VAULT,
        point=PointId(f"{number:032x}"),
        instant_ns=100 - number,
        consistency=Consistency.CRASH,
        members=(PointMember(machine=MACHINE, disk=DISK, epoch=1, sequence=number),),
    )


class TestRecords:
    async def test_points_are_listed_by_instant(self, archive: DiskArchive) -> None:
        for number in (1, 2, 3):
            assert await archive.put_point(sign_point(point(number), authority())) == point(number)
        await archive.put_point(sign_point(point(1), authority()))
        stored = await archive.list_points()
        assert stored.records == (point(3), point(2), point(1))
        assert stored.damage == ()

    async def test_a_damaged_or_misplaced_point_is_named_and_hides_no_other(
        self, archive: DiskArchive, store: MemoryStore
    ) -> None:
        for number in (1, 2, 3):
            await archive.put_point(sign_point(point(number), authority()))
        names = [str(PointName(vault=VAULT, point=point(number).point)) for number in (1, 2, 3)]
        store.flip(names[0], 5)
        store.objects[names[1]] = store.objects[names[2]]
        stored = await archive.list_points()
        assert stored.records == (point(3),)
        assert [fault.fields["name"] for fault in stored.damage] == names[:2]

    async def test_many_points_are_read_several_at_a_time_and_an_unreadable_one_hides_no_other(
        self, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        archive = DiskArchive(store, vault=VAULT, authority=authority().public_key(), reads_at_once=3)
        for number in range(1, 13):
            await archive.put_point(sign_point(point(number), authority()))
        bad = str(PointName(vault=VAULT, point=point(7).point))
        running, most, read = 0, 0, store.read

        async def counted(name: str, **options: int | None) -> bytes:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0)
            running -= 1
            if name == bad:
                raise ObjectUnreadable(url=store.url, name=name, reason="Input/output error")
            return await read(name, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(store, "read", counted)
        stored = await archive.list_points()
        assert {record.point for record in stored.records} == {
            point(number).point for number in range(1, 13) if number != 7
        }
        assert [fault.fields["name"] for fault in stored.damage] == [bad]
        assert most == 3

    async def test_a_point_that_the_authority_did_not_sign_is_not_stored(
        self, archive: DiskArchive, store: MemoryStore
    ) -> None:
        with pytest.raises(SignatureInvalid):
            await archive.put_point(sign_point(point(1), Ed25519PrivateKey.generate()))
        assert not store.objects

    async def test_another_record_under_a_points_name_is_not_overwritten(self, archive: DiskArchive) -> None:
        await archive.put_point(sign_point(point(1), authority()))
        other = dataclasses.replace(point(1), instant_ns=5)
        with pytest.raises(ObjectExists):
            await archive.put_point(sign_point(other, authority()))

    async def test_a_points_lost_reply_is_settled(self, archive: DiskArchive, store: MemoryStore) -> None:
        name = str(PointName(vault=VAULT, point=point(1).point))
        store.lost_replies.add(name)
        await archive.put_point(sign_point(point(1), authority()))
        store.lost_requests.add(str(PointName(vault=VAULT, point=point(2).point)))
        with pytest.raises(StoreOutcomeUnknown):
            await archive.put_point(sign_point(point(2), authority()))

    async def test_the_newest_sound_description_of_a_machine_is_read(
        self, archive: DiskArchive, store: MemoryStore
    ) -> None:
        described = [
            MachineDescription(vault=VAULT, machine=MACHINE, version=version, name=f"name {version}", disks=())
            for version in (1, 2, 3)
        ]
        for description in described:
            await archive.put_machine_description(sign_machine_description(description, authority()))
        assert (await archive.read_machine_descriptions()).descriptions == (described[2],)
        name = str(MachineName(vault=VAULT, machine=MACHINE, version=3))
        store.flip(name, 0)
        stored = await archive.read_machine_descriptions()
        assert stored.descriptions == (described[1],)
        assert [fault.fields["name"] for fault in stored.damage] == [name]


async def test_many_disks_are_listed_without_listing_their_segments(archive: DiskArchive, store: MemoryStore) -> None:
    for disk in (DISK, OTHER_DISK):
        await write(archive, SegmentWriter(make_grant(disk=disk)), 2)
    listed = 0
    info = store.info

    async def counted(name: str) -> object:
        nonlocal listed
        listed += 1
        return await info(name)

    store.info = counted  # type: ignore[assignment, method-assign]
    assert await archive.list_disks() == (DISK, OTHER_DISK)
    assert listed == 2


def test_the_largest_names_are_names() -> None:
    assert str(SegmentName(vault=VAULT, disk=DISK, epoch=2**32 - 1, ordinal=10**12 - 1)).endswith(
        "/4294967295/999999999999.seg"
    )
