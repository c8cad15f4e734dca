"""What lies in a store, and what the vault's authority signs: every format of SEGMENT_FORMAT.md.

Behind digests and signatures blind bytes find nothing. Where a format has them, the input is also tried with them made
good, as somebody who holds the keys could.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import struct
from typing import Any, Final

from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from protocol.errors import InvalidValue, MalformedInput, VersionNotSupported
from protocol.signed_records import (
    SignatureInvalid,
    parse_authority_key,
    serialise_authority_key,
    sign_grant,
    sign_machine_description,
    sign_point,
    verify_grant,
    verify_machine_description,
    verify_point,
)
from protocol.vocabulary import ChangeKind, Compression, Extent, Position, extent_table
from storage import frame_record, object_names, segment
from storage import keys as vault_keys
from storage.errors import (
    FormatNotSupported,
    NotAVault,
    ObjectCorrupt,
    SegmentMissing,
    VaultFault,
    WrongRecoveryKey,
)
from storage.frame_record import HEAD_BYTES, HEAD_DIGEST_BYTES, encode_head, parse_frame_record
from storage.history import Finding, chain_history
from storage.keys import (
    parse_recovery_key,
    parse_vault,
    recovery_key_needs_passphrase,
    serialise_recovery_key,
    unwrap_vault_key,
)
from storage.object_names import SegmentName
from storage.sealing import FrameCompressor, FrameOpener, SegmentSealer
from storage.segment import TRAILER_BYTES, SegmentHeader, encode_header, encode_opening, parse_opening, verify_segment
from tests.fuzz.target import Target
from tests.storage import segment_writer
from tests.vectors import make_segment
from tests.vectors.make_segment import AUTHORITY, DATA_KEY, GRANT, PROCESS_SERVER_KEY, VAULT_KEY, VECTORS

AUTHORITY_PUBLIC: Final = AUTHORITY.public_key()
DATA_NAME: Final = SegmentName(vault=GRANT.vault, disk=GRANT.disk, epoch=1, ordinal=1)
CLOSING_NAME: Final = dataclasses.replace(DATA_NAME, ordinal=2)
PASSPHRASE: Final = "p"

_SIGNED: Final[tuple[tuple[bytes, Any, Any], ...]] = (
    (b"farpoint grant 1\0", verify_grant, sign_grant),
    (b"farpoint machine description 1\0", verify_machine_description, sign_machine_description),
    (b"farpoint recovery point 1\0", verify_point, sign_point),
)
_TRAILER: Final = struct.Struct("<8sHHIIIIQQ32s64s")
_HASHED_BYTES: Final = TRAILER_BYTES - 32 - 64


@functools.cache
def vector(name: str) -> bytes:
    return (VECTORS / name).read_bytes()


def signed_record(data: bytes) -> None:
    """The first byte: which record it is taken for, and whether the rest is signed first."""
    if not data:
        return
    domain, verify, sign = _SIGNED[data[0] % len(_SIGNED)]
    record = data[1:]
    if data[0] & 0x80:
        record += AUTHORITY.sign(domain + record)
    assert sign(verify(record, AUTHORITY_PUBLIC), AUTHORITY) == record


def signed_record_seeds() -> list[bytes]:
    names = ("grant.bin", "description.machine", "application.point")
    kinds = range(0x80, 0x83)
    return [
        *(bytes((kind % 3,)) + vector(name) for kind, name in zip((0, 1, 2), names, strict=True)),
        *(
            bytes((kind,)) + vector(names[kind % 3])[:-64]
            for kind in kinds
        ),
    ]  # fmt: skip


def authority_key(data: bytes) -> None:
    key = parse_authority_key(data)
    assert parse_authority_key(serialise_authority_key(key)).vault == key.vault


def object_name(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    assert str(object_names.parse(text)) == text


def vault_description(data: bytes) -> None:
    """As it is, and signed anew by the key that it names."""
    for candidate in (data, _signed_vault(data)):
        if candidate is None:
            continue
        try:
            description = parse_vault(candidate, name="n")
        except (ObjectCorrupt, FormatNotSupported):
            continue
        assert vault_keys.serialise_vault(description, AUTHORITY) == candidate or description.authority
        try:
            unwrap_vault_key(description, make_segment.RECOVERY, url="u")
        except (NotAVault, WrongRecoveryKey):
            continue
        assert description.vault_key == VAULT_KEY.public_key().public_bytes_raw()


def _signed_vault(data: bytes) -> bytes | None:
    try:
        fields = json.loads(data)
        fields["authority_key"] = json.loads(vector("vault.json"))["authority_key"]
        fields.pop("signature", None)
        signature = AUTHORITY.sign(b"farpoint vault 1\0" + _json(fields))
        return _json({**fields, "signature": vault_keys.base64.b64encode(signature).decode()})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def _json(fields: object) -> bytes:
    return (json.dumps(fields, sort_keys=True, indent=2, ensure_ascii=True) + "\n").encode()


def recovery_key(data: bytes) -> None:
    """With and without a passphrase; files that ask for more work than a few runs a second are left out."""
    recovery_key_needs_passphrase(data)
    if not _asks_for_little(data):
        return
    key = parse_recovery_key(data, path="p", passphrase=PASSPHRASE)
    assert parse_recovery_key(serialise_recovery_key(key, passphrase=None), path="p", passphrase=None) is not None


def _asks_for_little(data: bytes) -> bool:
    try:
        asked = json.loads(data)["key_derivation"]
        return bool(asked["memory_kib"] * asked["iterations"] <= 1024)
    except (ValueError, TypeError, KeyError, RecursionError):
        return True


@functools.cache
def light_recovery_key() -> bytes:
    """A key file with a passphrase whose derivation costs next to nothing."""
    derivation = {"function": "argon2id", "iterations": 1, "lanes": 1, "memory_kib": 8}
    fields: dict[str, Any] = {
        **json.loads(vector("recovery-key.json")),
        "key_derivation": {**derivation, "salt": vault_keys.base64.b64encode(bytes(16)).decode()},
    }
    raw = vault_keys.base64.b64decode(fields.pop("private_key"))
    cipher = vault_keys.AESGCM(vault_keys._derive(PASSPHRASE, fields["key_derivation"]))
    sealed = cipher.encrypt(bytes(12), raw, b"farpoint recovery key 1\0" + _json(fields))
    encoded = {"nonce": bytes(12), "sealed_private_key": sealed}
    return _json({**fields, **{name: vault_keys.base64.b64encode(value).decode() for name, value in encoded.items()}})


def frame(data: bytes) -> None:
    """As it is, and with both digests made good."""
    for candidate in (data, digested_record(data)):
        try:
            record = parse_frame_record(candidate)
        except InvalidValue:
            continue
        head = record.entry.head
        assert encode_head(head, record.entry.extents.tobytes()) == candidate[:HEAD_BYTES] == record.entry.head_bytes
        assert len(record.sealed) == head.sealed_bytes
        assert HEAD_BYTES + head.table_bytes + head.sealed_bytes == head.record_bytes <= len(candidate)


def digested_record(data: bytes) -> bytes:
    """A frame record with the digests of what is there."""
    if len(data) < HEAD_BYTES:
        return data
    altered = bytearray(data)
    head = frame_record._HEAD.unpack_from(altered)
    table_end = HEAD_BYTES + 16 * head[9]
    sealed = altered[table_end : table_end + head[11]]
    digested_end = HEAD_BYTES - HEAD_DIGEST_BYTES
    altered[digested_end - 32 : digested_end] = blake3(sealed).digest()
    digest = blake3(altered[:digested_end]).update(altered[HEAD_BYTES:table_end]).digest(HEAD_DIGEST_BYTES)
    altered[digested_end:HEAD_BYTES] = digest
    return bytes(altered)


def opening(data: bytes) -> None:
    assert encode_opening(parse_opening(data)) == data


def segment_header(data: bytes) -> None:
    assert encode_header(segment.parse_header(data, name="n")) == data


def whole_segment(data: bytes) -> None:
    """As it is, and with length, hash and signature of the trailer made good; then every frame is opened."""
    for candidate in (data, signed_segment(data)):
        for name in (DATA_NAME, CLOSING_NAME):
            try:
                read_segment(candidate, name)
            except (ObjectCorrupt, FormatNotSupported):
                continue


def read_segment(data: bytes, name: SegmentName = DATA_NAME) -> list[bytes]:
    """Every frame's contents, read as DiskArchive and FrameOpener do. Raises ObjectCorrupt, FormatNotSupported."""
    trailer_data = data[-TRAILER_BYTES:]
    trailer = segment.parse_trailer(trailer_data, name=str(name), object_bytes=len(data))
    verified = verify_segment(
        name,
        header_data=data[: trailer.header_bytes],
        index_data=data[trailer.index_offset : trailer.index_offset + trailer.index_bytes],
        trailer_data=trailer_data,
        object_bytes=len(data),
        authority=AUTHORITY_PUBLIC,
    )
    index = verified.index
    assert [sequence for sequence, _ in index.ends()] == list(
        range(verified.first_sequence, verified.last_sequence + 1)
    )
    index.bookmarked_ends()
    index.newest_cursor_bytes()
    opener = FrameOpener(header=verified.header, vault_private_key=VAULT_KEY)
    found = []
    for number in range(len(index)):
        entry = index.entry(number)
        record = data[int(index.offsets[number]) : int(index.offsets[number + 1])]
        try:
            whole = parse_frame_record(record)
        except InvalidValue as error:
            raise ObjectCorrupt(name=str(name), reason=str(error)) from error
        if whole.entry.head_bytes != entry.head_bytes:
            raise ObjectCorrupt(name=str(name), reason="another frame lies there")
        contents = opener.open(entry, whole.sealed)
        assert len(contents) == entry.head.raw_bytes
        found.append(contents)
    return found


def signed_segment(data: bytes) -> bytes:
    """A segment with the trailer that a granted process server would write behind what is there."""
    if len(data) < TRAILER_BYTES:
        return data
    fields = list(_TRAILER.unpack(data[-TRAILER_BYTES:]))
    fields[8] = len(data)
    hashed = _TRAILER.pack(*fields)[:_HASHED_BYTES]
    header, index = data[: fields[3]], data[min(fields[7], 2**40) : -TRAILER_BYTES]
    digests = blake3(header).digest() + blake3(index).digest()
    trailer_hash = blake3(b"farpoint segment trailer 1\0" + hashed + digests).digest()
    signature = PROCESS_SERVER_KEY.sign(b"farpoint segment signature 1\0" + trailer_hash)
    return data[:-TRAILER_BYTES] + hashed + trailer_hash + signature


def compressed_frame(data: bytes) -> None:
    """Three bytes of raw length, then what an agent says is zstd: sealed, and opened again."""
    raw_bytes, payload = int.from_bytes(data[:3], "little") % 2**20, data[3:]
    sealer = SegmentSealer(
        grant=GRANT,
        signed_grant=vector("grant.bin"),
        ordinal=1,
        first_sequence=1,
        data_key=DATA_KEY,
        vault_public_key=VAULT_KEY.public_key(),
        compressor=FrameCompressor(),
    )
    kinds = [Extent(offset_bytes=0, length_bytes=raw_bytes)] if raw_bytes else []
    sealed = sealer.seal(
        sequence=1,
        frame_number=0,
        nonce_number=0,
        extents=extent_table([*kinds, Extent(offset_bytes=2**21, length_bytes=512, kind=ChangeKind.ZEROES)]),
        raw_bytes=raw_bytes,
        payload=payload,
        compression=Compression.ZSTD,
        end=None,
    )
    header = SegmentHeader(opening=sealer.opening, previous_trailer_hash=bytes(32))
    contents = FrameOpener(header=header, vault_private_key=VAULT_KEY).open(
        sealed.entry, sealed.record[HEAD_BYTES + sealed.entry.head.table_bytes :]
    )
    assert len(contents) == raw_bytes


def compressed_frame_seeds() -> list[bytes]:
    compressor = FrameCompressor()
    bodies = [b"z" * 4096, bytes(2**20 - 1), bytes(range(256)) * 8, b"a"]
    whole = [len(body).to_bytes(3, "little") + compressor.compress(body, level=1) for body in bodies]
    bomb = compressor.compress(bytes(2**26), level=1)
    return [*whole, (2**20 - 1).to_bytes(3, "little") + bomb, (4096).to_bytes(3, "little") + bomb]


HISTORY_NAMES: Final = tuple(
    SegmentName(vault=segment_writer.VAULT, disk=segment_writer.DISK, epoch=epoch, ordinal=ordinal)
    for epoch in (1, 2, 3)
    for ordinal in (1, 2, 3, 4)
)


@functools.cache
def _findings() -> tuple[Finding | None, ...]:
    """A history of three epochs, its segments in the order of HISTORY_NAMES; then what may lie there instead."""
    found: dict[SegmentName, Finding] = {}
    previous = segment.NO_TRAILER_HASH
    for epoch in (1, 2, 3):
        grant = segment_writer.make_grant(epoch=epoch, parent_epoch=epoch - 1)
        writer = segment_writer.SegmentWriter(grant, previous_trailer_hash=previous)
        for _ in range(3):
            written = writer.segment([segment_writer.SETTLED, segment_writer.bookmarked(epoch)], length_bytes=16)
            found[written.end.name] = _verified(written.end.name, written.data)
        end = writer.closing(segment_writer.make_grant(epoch=epoch + 1, parent_epoch=epoch))
        found[end.name] = _verified(end.name, end.header + end.end)
        previous = end.trailer_hash
    other = segment_writer.SegmentWriter(segment_writer.make_grant()).segment(length_bytes=32)
    return (
        *(found[name] for name in HISTORY_NAMES),
        None,
        SegmentMissing(name="n"),
        ObjectCorrupt(name="n", reason="r"),
        _verified(other.end.name, other.data),
    )


def _verified(name: SegmentName, data: bytes) -> Finding:
    trailer = segment.parse_trailer(data[-TRAILER_BYTES:], name=str(name), object_bytes=len(data))
    authority: Ed25519PublicKey = segment_writer.authority().public_key()
    return verify_segment(
        name,
        header_data=data[: trailer.header_bytes],
        index_data=data[trailer.index_offset : trailer.index_offset + trailer.index_bytes],
        trailer_data=data[-TRAILER_BYTES:],
        object_bytes=len(data),
        authority=authority,
    )


def history(data: bytes) -> None:
    """One byte per name: which finding lies there. What is trusted is a chain, whatever lies around it."""
    right, others = _findings()[: len(HISTORY_NAMES)], _findings()[len(HISTORY_NAMES) :]
    lying = {
        # why: what verify_segment returns was written under the name that it lies under
        name: others[byte % len(others)] if byte % 16 > 12 and (byte % len(others) < 3 or not place) else right[place]
        for place, (name, byte) in enumerate(zip(HISTORY_NAMES, data, strict=False))
    }
    present = {name: finding for name, finding in lying.items() if finding is not None}
    chained = chain_history(segment_writer.VAULT, segment_writer.DISK, present)
    for number, epoch in chained.epochs.items():
        sequence = 0
        for one in epoch.segments:
            assert one.first_sequence == sequence + 1
            assert (one.name.epoch, present[one.name]) == (number, one)
            sequence = one.last_sequence
        for asked in range(sequence + 2):
            try:
                path = chained.path_to(Position(epoch=number, sequence=asked))
            except VaultFault:
                assert asked > sequence
                continue
            assert asked <= sequence
            for before, after in itertools.pairwise(path):
                is_next = before.name.epoch == after.name.epoch
                assert not is_next or after.header.previous_trailer_hash == before.trailer_hash
    list(chained.positions())
    assert chained.points is not None


_RECORD_REFUSALS: Final = (SignatureInvalid, VersionNotSupported, MalformedInput)

VAULT_TARGETS: Final = (
    Target(name="signed-record", run=signed_record, refusals=_RECORD_REFUSALS, seeds=signed_record_seeds),
    Target(
        name="authority-key",
        run=authority_key,
        refusals=(MalformedInput, VersionNotSupported),
        seeds=lambda: [vector("authority-key.json")],
    ),
    Target(
        name="object-name",
        run=object_name,
        refusals=(InvalidValue,),
        seeds=lambda: [
            str(DATA_NAME).encode(),
            f"vaults/{GRANT.vault}/vault.json".encode(),
            f"vaults/{GRANT.vault}/points/{GRANT.disk}.point".encode(),
            f"vaults/{GRANT.vault}/machines/{GRANT.machine}/0000000007.machine".encode(),
        ],
    ),
    Target(name="vault-json", run=vault_description, refusals=(), seeds=lambda: [vector("vault.json")]),
    Target(
        name="recovery-key",
        run=recovery_key,
        refusals=(WrongRecoveryKey, FormatNotSupported),
        seeds=lambda: [vector("recovery-key.json"), light_recovery_key()],
        bytes_max=8192,
    ),
    Target(
        name="frame-record",
        run=frame,
        refusals=(),
        seeds=lambda: [bytes(one.record) for one in make_segment.sealed_frames()[1]],
    ),
    Target(
        name="segment-opening",
        run=opening,
        refusals=(MalformedInput,),
        seeds=lambda: [vector("opening.bin")],
    ),
    Target(
        name="segment-header",
        run=segment_header,
        refusals=(ObjectCorrupt, FormatNotSupported),
        seeds=lambda: [make_segment_header()],
    ),
    Target(
        name="segment",
        run=whole_segment,
        refusals=(),
        seeds=lambda: [vector("data.seg"), vector("closing.seg")],
        bytes_max=8192,
    ),
    Target(
        name="compressed-frame",
        run=compressed_frame,
        refusals=(MalformedInput, InvalidValue, ObjectCorrupt),
        seeds=compressed_frame_seeds,
        memory_mib_max=16,
    ),
    Target(
        name="history",
        run=history,
        refusals=(),
        seeds=lambda: [bytes(12), bytes(8), bytes((0, 0, 0, 0, 0, 0, 13, 0, 0, 14, 30)), bytes((31, 0, 0, 0, 29))],
        bytes_max=len(HISTORY_NAMES),
    ),
)


def make_segment_header() -> bytes:
    data = vector("data.seg")
    return data[: segment.parse_trailer(data[-TRAILER_BYTES:], name="n", object_bytes=len(data)).header_bytes]
