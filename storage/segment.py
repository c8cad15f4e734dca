"""A segment's header, index and trailer (SEGMENT_FORMAT.md): made, parsed, verified. No I/O, no keys but signing ones.

A segment is `header | frame records | index | trailer`. The trailer has a fixed size, says where the index is, and is
signed; its hash covers header and index, and the index has the digest of every frame's sealed bytes. What a parser
returns has been bounded and checked; what `verify_segment` returns was signed by the key that the vault's authority
granted.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NoReturn, cast

import msgpack  # type: ignore[import-untyped]
import numpy
from blake3 import blake3
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from protocol.errors import InvalidValue, MalformedInput, VersionNotSupported
from protocol.signed_records import SIGNED_RECORD_BYTES_MAX, Grant, SignatureInvalid, verify_grant
from protocol.vocabulary import (
    DISK_SIZE_BYTES_MAX,
    EPOCH_MAX,
    EXTENT_DTYPE,
    SEQUENCE_MAX,
    DiskId,
    MachineId,
    VaultId,
    check_identifier,
    check_range,
)
from storage.errors import FormatNotSupported, ObjectCorrupt
from storage.frame_record import HEAD_BYTES, HEAD_DTYPE, FrameEntry
from storage.object_names import ORDINAL_MAX, SegmentName
from storage.segment_index import IndexRules, SegmentIndex, build_index

SEGMENT_VERSION: Final = 1
"""1: the first version."""

HEADER_BYTES_MAX: Final = 16384
INDEX_BYTES_MAX: Final = 96 * 2**20
SEGMENT_FRAMES_MAX: Final = 2 * 65536
"""Two change sets of the most frames: one that is gathered when the segment is all but due, and what was there
before.
"""
SEGMENT_EXTENTS_MAX: Final = 2**22
"""A process server refuses a change set that would not fit even into a segment of its own."""
SEGMENT_BYTES_MAX: Final = 512 * 2**20
WRAPPED_KEYS_MAX: Final = 16
WRAPPED_KEY_BYTES: Final = 80
"""HPKE with X25519 and AES-256-GCM: 32 bytes encapsulated key, 32 bytes of data key, 16 bytes tag."""
HASH_BYTES: Final = 32
NO_TRAILER_HASH: Final = bytes(HASH_BYTES)
"""What stands for the previous trailer's hash where there is none: at the start of a history without a parent."""

_HEADER_MAGIC: Final = b"FPSEGHDR"
_TRAILER_MAGIC: Final = b"FPSEGEND"
_HEADER_PREFIX: Final = struct.Struct("<8sHHI")
_TRAILER: Final = struct.Struct("<8sHHIIIIQQ32s64s")
TRAILER_BYTES: Final = _TRAILER.size
_TRAILER_HASHED_BYTES: Final = TRAILER_BYTES - HASH_BYTES - 64
_HASH_DOMAIN: Final = b"farpoint segment trailer 1\0"
_SIGNATURE_DOMAIN: Final = b"farpoint segment signature 1\0"


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentOpening:
    """What is known of a segment before its first frame is sealed: durable in the cache no later than that frame.

    For a closing segment epoch is the epoch that is closed, and signed_grant is the successor's.
    """

    vault: VaultId
    machine: MachineId
    disk: DiskId
    epoch: int
    ordinal: int
    first_sequence: int
    signed_grant: bytes
    wrapped_keys: tuple[bytes, ...]
    """The data keys, wrapped to the vault's public key; a frame's key_number counts in here. Empty when closing."""
    is_closing: bool = False

    def __post_init__(self) -> None:
        check_identifier(self.vault, "vault")
        check_identifier(self.machine, "machine")
        check_identifier(self.disk, "disk")
        check_range(self.epoch, "epoch", low=1, high=EPOCH_MAX)
        check_range(self.ordinal, "ordinal", low=1, high=ORDINAL_MAX)
        check_range(self.first_sequence, "first_sequence", low=1, high=SEQUENCE_MAX)
        check_range(len(self.signed_grant), "grant length", low=1, high=SIGNED_RECORD_BYTES_MAX)
        check_range(len(self.wrapped_keys), "wrapped keys", low=0, high=0 if self.is_closing else WRAPPED_KEYS_MAX)
        for key in self.wrapped_keys:
            check_range(len(key), "wrapped key length", low=WRAPPED_KEY_BYTES, high=WRAPPED_KEY_BYTES)

    @property
    def name(self) -> SegmentName:
        return SegmentName(vault=self.vault, disk=self.disk, epoch=self.epoch, ordinal=self.ordinal)


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentHeader:
    """A segment's header: its opening, and the trailer hash of the segment before it in the disk's history.

    For the first segment of an epoch that is the hash of the closing segment that names the epoch, NO_TRAILER_HASH if
    it has no parent.
    """

    opening: SegmentOpening
    previous_trailer_hash: bytes

    def __post_init__(self) -> None:
        check_range(len(self.previous_trailer_hash), "previous_trailer_hash", low=HASH_BYTES, high=HASH_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trailer:
    """The end of an object. Unverified: bounded values that say what to read next."""

    header_bytes: int
    frame_count: int
    extent_count: int
    index_offset: int
    is_closing: bool
    object_bytes: int
    trailer_hash: bytes
    signature: bytes

    @property
    def index_bytes(self) -> int:
        return self.frame_count * HEAD_BYTES + self.extent_count * EXTENT_DTYPE.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentEnd:
    """What surrounds the frame records. The object is `header | records, in entry order | end`. Deterministic."""

    name: SegmentName
    header: bytes
    end: bytes
    """Index and trailer."""
    trailer_hash: bytes
    object_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VerifiedSegment:
    """A segment whose trailer was signed by the granted key and whose grant was signed by the vault's authority.

    Its place in the history is not proved by that: `history` chains the trailers.
    """

    name: SegmentName
    object_bytes: int
    header: SegmentHeader
    grant: Grant
    """Of a closing segment: the successor's."""
    index: SegmentIndex
    trailer_hash: bytes

    @property
    def is_closing(self) -> bool:
        return self.header.opening.is_closing

    @property
    def first_sequence(self) -> int:
        return self.header.opening.first_sequence

    @property
    def last_sequence(self) -> int:
        """The last change set's sequence; first_sequence - 1 for a closing segment, which has none."""
        return int(self.index.heads["sequence"][-1]) if len(self.index) else self.first_sequence - 1


def encode_opening(opening: SegmentOpening) -> bytes:
    """For the cache. Deterministic."""
    return cast(bytes, msgpack.packb(_opening_fields(opening)))


def parse_opening(data: bytes) -> SegmentOpening:
    """Raises MalformedInput."""
    return _opening(_unpack(data, arity=9))


def finish_segment(header: SegmentHeader, entries: Sequence[FrameEntry], signing_key: Ed25519PrivateKey) -> SegmentEnd:
    """Header, index and signed trailer round the records of `entries`, which are whole change sets, in order.

    The same arguments give the same bytes: a repeated upload is identical. Raises InvalidValue if a reader would
    refuse it.
    """
    opening = header.opening
    header_bytes = encode_header(header)
    heads = numpy.frombuffer(b"".join(entry.head_bytes for entry in entries), dtype=HEAD_DTYPE)
    extents = numpy.concatenate([entry.extents for entry in entries]) if entries else numpy.zeros(0, dtype=EXTENT_DTYPE)
    if bool(entries) == opening.is_closing:
        raise InvalidValue(what="frames", value=len(entries), rule="are in every segment but a closing one")
    index = build_index(heads, extents, header_bytes=len(header_bytes), rules=_rules(opening))
    index_data = heads.tobytes() + extents.tobytes()
    object_bytes = int(index.offsets[-1]) + len(index_data) + TRAILER_BYTES
    check_range(len(index), "frames", low=0, high=SEGMENT_FRAMES_MAX)
    check_range(len(extents), "extents", low=0, high=SEGMENT_EXTENTS_MAX)
    check_range(object_bytes, "segment bytes", low=1, high=SEGMENT_BYTES_MAX)
    hashed = _TRAILER.pack(
        _TRAILER_MAGIC,
        SEGMENT_VERSION,
        int(opening.is_closing),
        len(header_bytes),
        len(index),
        len(extents),
        0,
        int(index.offsets[-1]),
        object_bytes,
        bytes(HASH_BYTES),
        bytes(64),
    )[:_TRAILER_HASHED_BYTES]
    trailer_hash = _trailer_hash(hashed, header_bytes, index_data)
    return SegmentEnd(
        name=opening.name,
        header=header_bytes,
        end=index_data + hashed + trailer_hash + signing_key.sign(_SIGNATURE_DOMAIN + trailer_hash),
        trailer_hash=trailer_hash,
        object_bytes=object_bytes,
    )


def closing_segment(
    *,
    grant: Grant,
    signed_grant: bytes,
    ordinal: int,
    last_sequence: int,
    previous_trailer_hash: bytes,
    signing_key: Ed25519PrivateKey,
) -> SegmentEnd:
    """The whole closing segment (`header | end`) of the epoch that `grant`, the successor's, names as its parent.

    ordinal: the parent's next. last_sequence: where the parent ends, 0 if it has no change sets. Deterministic.
    """
    opening = SegmentOpening(
        vault=grant.vault,
        machine=grant.machine,
        disk=grant.disk,
        epoch=grant.parent_epoch,
        ordinal=ordinal,
        first_sequence=last_sequence + 1,
        signed_grant=signed_grant,
        wrapped_keys=(),
        is_closing=True,
    )
    header = SegmentHeader(opening=opening, previous_trailer_hash=previous_trailer_hash)
    return finish_segment(header, (), signing_key)


def encode_header(header: SegmentHeader) -> bytes:
    """Raises InvalidValue if it would be longer than HEADER_BYTES_MAX."""
    body = cast(bytes, msgpack.packb([*_opening_fields(header.opening), header.previous_trailer_hash]))
    check_range(_HEADER_PREFIX.size + len(body), "header length", low=1, high=HEADER_BYTES_MAX)
    return _HEADER_PREFIX.pack(_HEADER_MAGIC, SEGMENT_VERSION, 0, len(body)) + body


def parse_header(data: bytes, *, name: str) -> SegmentHeader:
    """From exactly the header's bytes. Raises ObjectCorrupt, FormatNotSupported, both with `name`."""
    if len(data) < _HEADER_PREFIX.size:
        _refuse(name, "the header is cut short")
    magic, version, reserved, body_bytes = _HEADER_PREFIX.unpack_from(data)
    _check_version(name, magic == _HEADER_MAGIC, version)
    if reserved or body_bytes != len(data) - _HEADER_PREFIX.size:
        _refuse(name, "the header's length is not what it states")
    try:
        *opening, previous_trailer_hash = _unpack(data[_HEADER_PREFIX.size :], arity=10)
        if not isinstance(previous_trailer_hash, bytes):
            raise MalformedInput(what="header", reason="previous_trailer_hash is not bytes")
        return SegmentHeader(opening=_opening(opening), previous_trailer_hash=previous_trailer_hash)
    except (InvalidValue, MalformedInput) as error:
        raise ObjectCorrupt(name=name, reason=str(error)) from error


def parse_trailer(data: bytes, *, name: str, object_bytes: int) -> Trailer:
    """From the last TRAILER_BYTES of an object of that size. Raises ObjectCorrupt, FormatNotSupported, with `name`."""
    if len(data) != TRAILER_BYTES or object_bytes < TRAILER_BYTES:
        _refuse(name, "the object is shorter than a trailer")
    fields = _TRAILER.unpack(data)
    magic, version, flags, header_bytes, frame_count, extent_count, reserved, index_offset, stated_bytes = fields[:9]
    _check_version(name, magic == _TRAILER_MAGIC, version)
    trailer = Trailer(
        header_bytes=header_bytes,
        frame_count=frame_count,
        extent_count=extent_count,
        index_offset=index_offset,
        is_closing=bool(flags),
        object_bytes=object_bytes,
        trailer_hash=fields[9],
        signature=fields[10],
    )
    if flags > 1 or reserved or stated_bytes != object_bytes or object_bytes > SEGMENT_BYTES_MAX:
        _refuse(name, "the object's length is not what its trailer states")
    is_bounded = (
        _HEADER_PREFIX.size < header_bytes <= HEADER_BYTES_MAX
        and frame_count <= SEGMENT_FRAMES_MAX
        and extent_count <= SEGMENT_EXTENTS_MAX
        and trailer.index_bytes <= INDEX_BYTES_MAX
        and header_bytes <= index_offset
        and index_offset + trailer.index_bytes + TRAILER_BYTES == object_bytes
    )
    if not is_bounded:
        _refuse(name, "the trailer states impossible lengths")
    return trailer


def verify_segment(
    name: SegmentName,
    *,
    header_data: bytes,
    index_data: bytes,
    trailer_data: bytes,
    object_bytes: int,
    authority: Ed25519PublicKey,
) -> VerifiedSegment:
    """The segment, proved to be what a granted process server wrote under that name.

    Raises ObjectCorrupt, FormatNotSupported. The frames are covered by the index's digests and checked when they are
    read.
    """
    text = str(name)
    trailer = parse_trailer(trailer_data, name=text, object_bytes=object_bytes)
    if len(header_data) != trailer.header_bytes or len(index_data) != trailer.index_bytes:
        _refuse(text, "header or index is cut short")
    if _trailer_hash(trailer_data[:_TRAILER_HASHED_BYTES], header_data, index_data) != trailer.trailer_hash:
        _refuse(text, "header, index and trailer do not belong together")
    header = parse_header(header_data, name=text)
    grant = _verified_grant(text, header.opening, authority)
    try:
        key = Ed25519PublicKey.from_public_bytes(grant.process_server_key)
        key.verify(trailer.signature, _SIGNATURE_DOMAIN + trailer.trailer_hash)
    except (InvalidSignature, ValueError) as error:
        raise ObjectCorrupt(name=text, reason="the trailer is not signed by the granted key") from error
    _check_place(name, header.opening, trailer)
    heads = numpy.frombuffer(index_data, dtype=HEAD_DTYPE, count=trailer.frame_count)
    extents = numpy.frombuffer(index_data, dtype=EXTENT_DTYPE, offset=trailer.frame_count * HEAD_BYTES)
    try:
        rules = _rules(header.opening, disk_size_bytes=grant.disk_size_bytes)
        index = build_index(heads, extents, header_bytes=trailer.header_bytes, rules=rules)
    except InvalidValue as error:
        raise ObjectCorrupt(name=text, reason=str(error)) from error
    if int(index.offsets[-1]) != trailer.index_offset:
        _refuse(text, "the frames do not fill the space before the index")
    return VerifiedSegment(
        name=name,
        object_bytes=object_bytes,
        header=header,
        grant=grant,
        index=index,
        trailer_hash=trailer.trailer_hash,
    )


def _rules(opening: SegmentOpening, *, disk_size_bytes: int = DISK_SIZE_BYTES_MAX) -> IndexRules:
    return IndexRules(
        disk=opening.disk,
        epoch=opening.epoch,
        first_sequence=opening.first_sequence,
        key_count=len(opening.wrapped_keys),
        disk_size_bytes=disk_size_bytes,
    )


def _check_place(name: SegmentName, opening: SegmentOpening, trailer: Trailer) -> None:
    if opening.name != name:
        _refuse(str(name), f"it was written as {opening.name}")
    if opening.is_closing != trailer.is_closing:
        _refuse(str(name), "header and trailer do not agree on whether it closes the epoch")
    if opening.is_closing == bool(trailer.frame_count) or (opening.is_closing and trailer.extent_count):
        _refuse(str(name), "frames are in every segment but a closing one")


def _verified_grant(name: str, opening: SegmentOpening, authority: Ed25519PublicKey) -> Grant:
    try:
        grant = verify_grant(opening.signed_grant, authority)
    except VersionNotSupported as error:
        fields = error.fields
        raise FormatNotSupported(name=name, version=fields["version"], supported=fields["supported"]) from error
    except (SignatureInvalid, MalformedInput) as error:
        raise ObjectCorrupt(name=name, reason=str(error)) from error
    granted_epoch = grant.parent_epoch if opening.is_closing else grant.epoch
    if (grant.vault, grant.machine, grant.disk) != (opening.vault, opening.machine, opening.disk):
        _refuse(name, "its grant is for another disk")
    if granted_epoch != opening.epoch:
        _refuse(name, "its grant is for another epoch")
    return grant


def _trailer_hash(hashed: bytes, header_data: bytes, index_data: bytes) -> bytes:
    digests = blake3(header_data).digest() + blake3(index_data).digest()
    return blake3(_HASH_DOMAIN + hashed + digests).digest()


def _opening_fields(opening: SegmentOpening) -> list[object]:
    return [
        bytes.fromhex(opening.vault),
        bytes.fromhex(opening.machine),
        bytes.fromhex(opening.disk),
        opening.epoch,
        opening.ordinal,
        opening.first_sequence,
        opening.signed_grant,
        list(opening.wrapped_keys),
        opening.is_closing,
    ]


def _opening(fields: list[object]) -> SegmentOpening:
    vault, machine, disk, epoch, ordinal, first_sequence, signed_grant, wrapped_keys, is_closing = fields
    if not isinstance(wrapped_keys, list) or type(is_closing) is not bool:
        raise MalformedInput(what="segment opening", reason="a field has the wrong type")
    if not all(isinstance(value, bytes) for value in (vault, machine, disk, signed_grant, *wrapped_keys)):
        raise MalformedInput(what="segment opening", reason="a field has the wrong type")
    try:
        return SegmentOpening(
            vault=VaultId(cast(bytes, vault).hex()),
            machine=MachineId(cast(bytes, machine).hex()),
            disk=DiskId(cast(bytes, disk).hex()),
            epoch=cast(int, epoch),
            ordinal=cast(int, ordinal),
            first_sequence=cast(int, first_sequence),
            signed_grant=cast(bytes, signed_grant),
            wrapped_keys=tuple(wrapped_keys),
            is_closing=is_closing,
        )
    except InvalidValue as error:
        raise MalformedInput(what="segment opening", reason=str(error)) from error


def _unpack(data: bytes, *, arity: int) -> list[object]:
    try:
        fields = msgpack.unpackb(data, max_map_len=0, max_ext_len=0, max_str_len=0, max_array_len=WRAPPED_KEYS_MAX)
        is_canonical = msgpack.packb(fields) == data
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise MalformedInput(what="segment opening", reason="not msgpack within the limits") from error
    if not isinstance(fields, list) or len(fields) != arity or not is_canonical:
        raise MalformedInput(what="segment opening", reason=f"not a canonical array of {arity}")
    return fields


def _check_version(name: str, has_magic: bool, version: int) -> None:
    if not has_magic:
        _refuse(name, "it is not a segment")
    if version > SEGMENT_VERSION:
        raise FormatNotSupported(name=name, version=version, supported=SEGMENT_VERSION)
    if version != SEGMENT_VERSION:
        _refuse(name, f"there is no version {version}")


def _refuse(name: str, reason: str) -> NoReturn:
    raise ObjectCorrupt(name=name, reason=reason)
