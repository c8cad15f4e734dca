"""What a mobility agent keeps and reads: its ledger, digests, intents and orders, the disk's own sectors, requests."""

from __future__ import annotations

import dataclasses
import struct
from typing import Final

from blake3 import blake3
from pydantic import ValidationError

from mobility_agent.control_socket import Request
from mobility_agent.core.dirty_map import DirtyMap, SentRecord
from mobility_agent.core.extent_set import ExtentSet
from mobility_agent.core.ledger import encode_entry, replay, standing_entry
from mobility_agent.core.restart_marker import DIGEST_BYTES, Marker, decode_marker, encode_marker
from mobility_agent.core.resync_cause import ResyncCause
from mobility_agent.disk_identity import _contents, file_system_places
from mobility_agent.errors import AgentStateDamaged
from mobility_agent.protection import ORDERS_FILE, PROTECTION_FILE, read_orders, read_protection
from mobility_agent.tracking.digest_file import DigestFile
from protocol.control import DiskIdentity, DiskKind
from protocol.errors import InvalidValue
from protocol.vocabulary import DIGEST_BLOCK_BYTES, DiskId
from tests.fuzz.cache_files import BytesDirectory
from tests.fuzz.target import Target

DISK: Final = DiskId("22" * 16)
DIGESTED_BYTES: Final = 20 * DIGEST_BLOCK_BYTES + 512
DIGEST_KEY: Final = bytes(range(32))
_LEDGER_HEAD: Final = struct.Struct("<4sIQQQI")
_DIGEST_HEADER: Final = struct.Struct("<8sII16sQII32s")


def ledger(data: bytes) -> None:
    """As it is, and with each entry's check made good; what is replayed can be taken up again."""
    for candidate in (data, checked_ledger(data)):
        try:
            contents = replay(candidate)
        except InvalidValue:
            continue
        assert contents.epoch >= 1
        restored = DirtyMap(disk_size_bytes=2**40)
        for record in contents.records:
            restored.restore(record)
            assert 1 <= record.first_sequence <= record.last_sequence <= contents.sent_sequence
            assert all(0 <= first < end for first, end in record.extents)


def checked_ledger(data: bytes) -> bytes:
    altered = bytearray(data)
    place = 0
    while len(altered) - place >= _LEDGER_HEAD.size + 8:
        count = _LEDGER_HEAD.unpack_from(altered, place)[5]
        end = place + _LEDGER_HEAD.size + 16 * count
        if end + 8 > len(altered):
            break
        altered[end : end + 8] = blake3(altered[place:end]).digest(8)
        place = end + 8
    return bytes(altered)


def ledger_entries() -> list[bytes]:
    """A ledger of two epochs, entry by entry."""

    def sent(sequence: int, *ranges: tuple[int, int]) -> SentRecord:
        return SentRecord(first_sequence=sequence, last_sequence=sequence, extents=ExtentSet.of(ranges))

    return [
        standing_entry(epoch=1, sent_sequence=0, acknowledged_sequence=0),
        encode_entry(epoch=1, acknowledged_sequence=0, record=sent(1, (0, 65536), (2**20, 2**21))),
        encode_entry(epoch=1, acknowledged_sequence=1, record=sent(2, (65536, 2**30))),
        standing_entry(epoch=2, sent_sequence=0, acknowledged_sequence=0),
        encode_entry(epoch=2, acknowledged_sequence=0, record=sent(1, (4096, 8192))),
        encode_entry(epoch=2, acknowledged_sequence=1, record=sent(2, (0, 4096), (2**20, 2**20 + 1), (2**30, 2**31))),
    ]


def digests(data: bytes) -> None:
    """As it is, and with the header's check made good."""
    for candidate in (data, checked_digests(data)):
        try:
            read_digests(candidate)
        except AgentStateDamaged:
            continue


def read_digests(data: bytes) -> list[tuple[bytes | None, int | None]]:
    """(digest, sequence) of each block. Raises AgentStateDamaged."""
    file = DigestFile.open(BytesDirectory({"d": data}), "d", disk=DISK, size_bytes=DIGESTED_BYTES)
    known = file.known(0, file.block_count)
    sequences = file.sequences(0, file.block_count)
    assert len(known) == len(sequences) == file.block_count
    zeroes = {number for number in range(file.block_count) if known[number] == file.zero_digest(number)}
    assert zeroes.isdisjoint(file.not_known_zero(0, file.block_count))
    return list(zip(known, sequences, strict=True))


def checked_digests(data: bytes) -> bytes:
    if len(data) < _DIGEST_HEADER.size + 16:
        return data
    header = data[: _DIGEST_HEADER.size]
    return header + blake3(header, key=header[-32:]).digest(16) + data[len(header) + 16 :]


def digest_bytes() -> bytes:
    """A digest file of 21 blocks, six of which were sent."""
    size = 4096 + 32 * -(-DIGESTED_BYTES // DIGEST_BLOCK_BYTES)
    header = _DIGEST_HEADER.pack(
        b"FPDIGEST", 1, DIGEST_BLOCK_BYTES, bytes.fromhex(DISK), DIGESTED_BYTES, 3, 1, DIGEST_KEY
    )
    data = bytearray(checked_digests(header + bytes(size - len(header))))
    check_key = blake3(b"farpoint digest entry check", key=DIGEST_KEY).digest()
    for block, sequence in ((0, 1), (1, 1), (2, 7), (9, 0), (19, 2**40), (20, 3)):
        entry = blake3(b"%d" % block, key=DIGEST_KEY).digest(16) + sequence.to_bytes(8, "little")
        check = blake3(entry + block.to_bytes(8, "little"), key=check_key).digest(8)
        data[4096 + 32 * block : 4096 + 32 * (block + 1)] = entry + check
    return bytes(data)


def disk_sectors(data: bytes) -> None:
    """A disk that holds these bytes, twice over at every power of two: what its own sectors say it is."""

    def read_at(offset: int, length: int) -> bytes:
        # why: as os.pread does, which takes no offset above what the kernel's type holds
        if offset >= 2**63:
            raise OverflowError("Python int too large to convert to C long")
        return data[offset : offset + length]

    for sector_bytes in (512, 4096):
        partition_table, file_systems = _contents(read_at, sector_bytes)
        DiskIdentity(
            kind=DiskKind.BLOCK_DEVICE,
            size_bytes=2**30,
            logical_sector_bytes=sector_bytes,  # type: ignore[arg-type]
            partition_table=partition_table,
            file_systems=file_systems,
        )
        places = file_system_places(read_at, sector_bytes)
        assert [start for start, _ in places] == sorted({start for start, _ in places})


def restart_marker(data: bytes) -> None:
    """As it is, and with its check made good: what is decoded is encoded to what decodes to the same."""
    body = data[:-DIGEST_BYTES]
    for candidate in (data, body + blake3(body).digest(DIGEST_BYTES)):
        found = decode_marker(candidate)
        if isinstance(found, Marker):
            assert decode_marker(encode_marker(found)) == found


def restart_markers() -> list[bytes]:
    clean = Marker(
        disk=DISK,
        size_bytes=2**28,
        block_bytes=4096,
        boot_id=bytes(16),
        identity=bytes(range(32)),
        witnesses=bytes(range(32, 64)),
        refused=None,
        marks=bytes(range(256)) * 32,
    )
    refused = dataclasses.replace(clean, refused=ResyncCause.IN_USE_AT_STOP, marks=b"")
    return [encode_marker(clean), encode_marker(refused)]


def disk_sector_seeds() -> list[bytes]:
    gpt = bytearray(16384)
    struct.pack_into("<8s48x16sQII", gpt, 512, b"EFI PART", bytes(range(16)), 2, 4, 128)
    for number, first in enumerate((8, 20)):
        struct.pack_into("<16s16sQQ", gpt, 1024 + 128 * number, b"t" * 16, b"p" * 16, first, first + 8)
    struct.pack_into("<H46x16s", gpt, 8 * 512 + 1080, 0xEF53, bytes(range(16)))
    gpt[20 * 512 : 20 * 512 + 48] = b"XFSB" + bytes(28) + bytes(range(16))
    mbr = bytearray(4096)
    mbr[440:444], mbr[510:512] = b"sign", b"\x55\xaa"
    struct.pack_into("<4xB3xI4x", mbr, 446, 0x83, 2)
    mbr[1024:1028] = b"XFSB"
    btrfs = bytearray(65536 + 128)
    btrfs[65536 + 64 : 65536 + 72] = b"_BHRfS_M"
    return [bytes(gpt), bytes(mbr), bytes(btrfs), bytes(gpt[512:]) + bytes(mbr)]


_IDENTITY: Final = (
    b'{"kind":"block_device","size_bytes":4096,"logical_sector_bytes":512,"wwn":"w","file_systems":["a"]}'
)

AGENT_TARGETS: Final = (
    Target(
        name="ledger",
        run=ledger,
        refusals=(),
        seeds=lambda: [b"".join(ledger_entries()[:count]) for count in (1, 3, 6)],
    ),
    Target(name="digest-file", run=digests, refusals=(), seeds=lambda: [digest_bytes()], bytes_max=8192),
    Target(name="restart-marker", run=restart_marker, refusals=(), seeds=restart_markers),
    Target(
        name="protection-file",
        run=lambda data: read_protection(BytesDirectory({PROTECTION_FILE: data})),
        refusals=(AgentStateDamaged,),
        seeds=lambda: [
            b'{"format":1,"disks":[{"path":"/dev/sda","identity":' + _IDENTITY + b',"disk":null,"release":"keep"}]}'
        ],
    ),
    Target(
        name="orders-file",
        run=lambda data: read_orders(BytesDirectory({ORDERS_FILE: data})),
        refusals=(AgentStateDamaged,),
        seeds=lambda: [
            b'{"revision":"0a","now_ns":1,"heartbeat_seconds":5.0,"renew_certificate":false,"disks":[{"disk":"'
            + DISK.encode()
            + b'","process_server":null,"is_paused":false,"copy_interval_seconds":1.0,"point_interval_seconds":2.0}],'
            b'"revoked":{"number":1,"serials":["0A"]}}'
        ],
    ),
    Target(
        name="control-socket",
        run=Request.model_validate_json,
        refusals=(ValidationError,),
        seeds=lambda: [b'{"command":"protect","path":"/dev/sda","keep":true}', b'{"command":"status"}'],
    ),
    Target(name="disk-sectors", run=disk_sectors, refusals=(), seeds=disk_sector_seeds, bytes_max=2**17),
)
