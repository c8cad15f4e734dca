"""What a process server keeps: the cache's files and records, grants, revocations, the clock."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import Final, cast

import msgpack  # type: ignore[import-untyped]
from blake3 import blake3

from process_server.cache_log import (
    HEADER_BYTES,
    ROW_BYTES,
    LocatedRecord,
    Location,
    RecordKind,
    file_name,
    payload_digest,
)
from process_server.cache_records import decode_checkpoint, decode_closed, decode_file_ends
from process_server.errors import CacheDamaged, CacheFormatNotSupported, StateUnreadable
from process_server.grants import GRANTS_FILE, GrantBook, load_grants, save_grants
from process_server.reporting import REVOKED_FILE, load_revoked, save_revoked
from process_server.server_clock import CLOCK_FILE, load_clock, save_clock
from process_server.state_file import keep, kept
from protocol.control import RevocationList
from protocol.vocabulary import PeerIdentity, Role
from storage.frame_record import HEAD_BYTES, HEAD_DIGEST_BYTES
from tests.fuzz import cache_files
from tests.fuzz.cache_files import BytesDirectory
from tests.fuzz.target import Target
from tests.fuzz.vault_targets import digested_record
from tests.vectors.make_segment import AUTHORITY, DISK, GRANT, PROCESS_SERVER_KEY, VECTORS

_HEADER: Final = struct.Struct("<4sHHQIIQ")
_ROW: Final = struct.Struct("<B3xI16sI4xQ16s")
_BLOCK: Final = 4096


def cache_file(data: bytes) -> None:
    """The first byte: which file of a sound cache this is in the place of, and whether its digests are made good."""
    if not data:
        return
    number = data[0] % 3
    contents = digested_cache_file(data[1:]) if data[0] & 0x80 else data[1:]
    files = {**cache_files.cache_bytes(), file_name(number): contents}
    if data[0] & 0x80:
        cache_files.taken(files)
    else:
        cache_files.check_taken(files)


def digested_cache_file(data: bytes) -> bytes:
    """The batches that lie there, as far as they state lengths that fit, with the digests of what they hold."""
    altered = bytearray(data)
    place = 0
    while len(altered) - place >= HEADER_BYTES:
        *_, rows, payload_bytes = _HEADER.unpack_from(altered, place)
        rows_end = place + HEADER_BYTES + ROW_BYTES * rows
        length = rows_end + payload_bytes - place
        if place + length > len(altered):
            break
        _digest_rows(altered, place + HEADER_BYTES, rows, rows_end)
        prefix = altered[place : place + _HEADER.size]
        digest = blake3(prefix).update(altered[place + HEADER_BYTES : rows_end]).digest()
        altered[place + _HEADER.size : place + HEADER_BYTES] = digest
        place += -(-length // _BLOCK) * _BLOCK
    return bytes(altered)


def _digest_rows(altered: bytearray, row: int, rows: int, payload: int) -> None:
    for number in range(rows):
        kind, length = _ROW.unpack_from(altered, row + ROW_BYTES * number)[:2]
        body = bytes(altered[payload : payload + length])
        if kind == RecordKind.FRAME:
            body = digested_record(body)
            altered[payload : payload + len(body)] = body
            digest = body[HEAD_BYTES - HEAD_DIGEST_BYTES : HEAD_BYTES]
        else:
            digest = payload_digest(body)
        end = row + ROW_BYTES * (number + 1)
        altered[end - len(digest) : end] = digest
        payload += length


def cache_file_seeds() -> list[bytes]:
    return [
        bytes((flag | number,)) + data
        for flag in (0, 0x80)
        for number, data in enumerate(cache_files.cache_bytes().values())
    ]


def cache_payload(data: bytes) -> None:
    """The first byte: which record's payload it is."""
    if not data:
        return
    decoders: tuple[Callable[[bytes], object], ...] = (
        lambda payload: decode_checkpoint(_record(RecordKind.POSITION), payload),
        lambda payload: decode_closed(payload, "n"),
        lambda payload: decode_file_ends(payload, "n"),
    )
    decoders[data[0] % 3](data[1:])


def _record(kind: RecordKind) -> LocatedRecord:
    location = Location(file_number=0, offset_bytes=0, length_bytes=0, digest=bytes(16))
    return LocatedRecord(batch_number=1, kind=kind, disk=DISK, epoch=1, ordinal=5, location=location)


def cache_payload_seeds() -> list[bytes]:
    kinds = {RecordKind.POSITION: 0, RecordKind.SEGMENT_CLOSED: 1, RecordKind.CHECKPOINT: 2}
    return [
        bytes((kinds[record.kind],)) + b"".join(bytes(part) for part in record.parts)
        for batches in cache_files.batches()
        for batch in batches
        for record in batch
        if record.kind in kinds
    ]


def grants(data: bytes) -> None:
    """What was kept is believed only as far as it is signed."""
    found = load_grants(_holding(GRANTS_FILE, data))
    book = GrantBook(
        identity=PeerIdentity(vault=GRANT.vault, role=Role.PROCESS_SERVER, identifier=GRANT.process_server),
        public_key=PROCESS_SERVER_KEY.public_key().public_bytes_raw(),
        authority=AUTHORITY.public_key(),
    )
    book.take(found[:4])
    for disk in book.disks():
        assert [held.grant for held in book.held(disk).values()] == [GRANT]


def _saved(save: Callable[[BytesDirectory], None], name: str) -> bytes:
    directory = BytesDirectory({})
    save(directory)
    return cast(bytes, kept(directory, name))


def _holding(name: str, contents: bytes) -> BytesDirectory:
    """A state directory with these contents: their digest is right, so that the parser behind it is reached."""
    directory = BytesDirectory({})
    keep(directory, name, contents)
    return directory


@functools.cache
def grant(name: str) -> bytes:
    return (VECTORS / name).read_bytes()


PROCESS_SERVER_TARGETS: Final = (
    Target(
        name="cache-file",
        run=cache_file,
        refusals=(CacheFormatNotSupported, CacheDamaged),
        seeds=cache_file_seeds,
        bytes_max=2**15,
    ),
    Target(name="cache-payload", run=cache_payload, refusals=(CacheDamaged,), seeds=cache_payload_seeds),
    Target(
        name="grants-file",
        run=grants,
        refusals=(StateUnreadable,),
        seeds=lambda: [
            _saved(lambda state: save_grants(state, [grant("grant.bin"), grant("successor-grant.bin")]), GRANTS_FILE),
            msgpack.packb([]),
        ],
    ),
    Target(
        name="revoked-file",
        run=lambda data: load_revoked(_holding(REVOKED_FILE, data)),
        refusals=(StateUnreadable,),
        seeds=lambda: [
            _saved(lambda state: save_revoked(state, RevocationList(number=7, serials=("0A", "FF00"))), REVOKED_FILE)
        ],
    ),
    Target(
        name="clock-file",
        run=lambda data: load_clock(_holding(CLOCK_FILE, data)),
        refusals=(StateUnreadable,),
        seeds=lambda: [_saved(lambda state: save_clock(state, 1_760_000_000_000_000_000), CLOCK_FILE)],
        bytes_max=512,
    ),
)  # fmt: skip
