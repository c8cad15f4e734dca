"""The committed vectors are the format; the code follows them, in both directions."""

from __future__ import annotations

import json
from typing import Any

import pytest

from protocol.signed_records import (
    parse_authority_key,
    verify_grant,
    verify_machine_description,
    verify_point,
)
from protocol.vocabulary import Position, extents_of
from storage.disk_archive import DiskArchive, read_vault_of
from storage.frame_record import parse_frame_record
from storage.keys import parse_recovery_key, unwrap_vault_key
from storage.object_names import SegmentName, VaultName
from storage.sealing import FrameOpener
from storage.segment import parse_opening
from tests.storage.memory_store import MemoryStore
from tests.vectors import make_segment
from tests.vectors.make_segment import AUTHORITY, DISK, PASSPHRASE, RECOVERY, SUCCESSOR_GRANT, VAULT, VECTORS

MADE = make_segment.files()


def stored(name: str) -> bytes:
    return (VECTORS / name).read_bytes()


@pytest.mark.parametrize("name", MADE)
def test_what_is_written_today_is_the_vector(name: str) -> None:
    assert MADE[name] == stored(name)


def test_the_signed_vectors_are_read() -> None:
    key = AUTHORITY.public_key()
    assert verify_grant(stored("grant.bin"), key) == make_segment.GRANT
    assert verify_grant(stored("successor-grant.bin"), key) == SUCCESSOR_GRANT
    assert verify_machine_description(stored("description.machine"), key) == make_segment.DESCRIPTION
    assert verify_point(stored("application.point"), key) == make_segment.POINT


def test_the_key_files_of_the_vectors_are_read() -> None:
    plain = parse_recovery_key(stored("recovery-key.json"), path="-", passphrase=None)
    protected = parse_recovery_key(stored("recovery-key-with-passphrase.json"), path="-", passphrase=PASSPHRASE)
    for key in (plain, protected):
        assert (key.vault, key.label, key.authority_fingerprint) == (
            VAULT,
            RECOVERY.label,
            RECOVERY.authority_fingerprint,
        )
        assert key.private_key.private_bytes_raw() == RECOVERY.private_key.private_bytes_raw()
    authority = parse_authority_key(stored("authority-key.json"))
    assert authority.private_key.private_bytes_raw() == AUTHORITY.private_bytes_raw()


def test_the_opening_and_the_records_of_the_vectors_are_read_without_a_key() -> None:
    opening = parse_opening(stored("opening.bin"))
    assert opening.name == SegmentName(vault=VAULT, disk=DISK, epoch=1, ordinal=1)
    _, frames = make_segment.sealed_frames()
    data = stored("data.seg")
    place = data.index(b"FPFR")
    for frame in frames:
        record = parse_frame_record(data[place:])
        assert record.entry.head == frame.entry.head
        place += record.entry.head.record_bytes


async def test_a_vault_of_the_vectors_is_recovered_with_the_recovery_key_alone() -> None:
    store = MemoryStore()
    store.objects = {
        str(VaultName(vault=VAULT)): stored("vault.json"),
        str(SegmentName(vault=VAULT, disk=DISK, epoch=1, ordinal=1)): stored("data.seg"),
        str(SegmentName(vault=VAULT, disk=DISK, epoch=1, ordinal=2)): stored("closing.seg"),
    }
    key = parse_recovery_key(stored("recovery-key.json"), path="-", passphrase=None)
    description = await read_vault_of(store, key)
    vault_key = unwrap_vault_key(description, key, url=store.url)
    archive = DiskArchive(store, vault=VAULT, authority=description.authority)
    history = await archive.history(DISK)
    assert not history.damage
    assert history.head == Position(epoch=4, sequence=0)
    assert history.epochs[1].closing is not None
    assert history.epochs[1].closing.grant == SUCCESSOR_GRANT
    [segment] = history.path_to(history.head)
    opener = FrameOpener(header=segment.header, vault_private_key=vault_key)
    records = await archive.read_frames(segment, 0, len(segment.index))
    expected: list[dict[str, Any]] = json.loads(stored("expected.json"))
    for record, row in zip(records, expected, strict=True):
        head, end = record.entry.head, record.entry.head.end
        assert (head.sequence, head.frame_number) == (row["sequence"], row["frame_number"])
        assert [[e.offset_bytes, e.length_bytes, e.kind.name] for e in extents_of(record.entry.extents)] == row[
            "extents"
        ]
        assert opener.open(record.entry, record.sealed).hex() == row["contents"]
        assert head.compression.name == row["compression"]
        assert (end.consistency.value if end else None) == row["consistency"]
        assert (end.copy_in_cursor_bytes if end else None) == row["copy_in_cursor_bytes"]
        bookmark = end.bookmark if end else None
        assert ({"point": bookmark.point, "instant_ns": bookmark.instant_ns} if bookmark else None) == row["bookmark"]
