"""Sealing frames into records and opening them again: compress, then encrypt; verify, then decompress with a bound.

A nonce number is never used twice by one sealer, and a data key belongs to one sealer only. A payload that arrives
compressed passes through unopened: what its zstd header claims is checked, so that opening it is bounded; that the rest
is whole is its agent's word, and opening it tells.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Final

import numpy
import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from typing_extensions import Buffer

from protocol.errors import InvalidValue, MalformedInput
from protocol.signed_records import Grant
from protocol.vocabulary import (
    EXTENT_DTYPE,
    FRAME_RAW_BYTES_MAX,
    ChangeSetEnd,
    Compression,
    ExtentTable,
    check_extent_table,
    check_range,
)
from storage.errors import ObjectCorrupt
from storage.frame_record import (
    DIGEST_BYTES,
    HEAD_BYTES,
    TAG_BYTES,
    FrameEntry,
    FrameHead,
    associated_data,
    encode_head,
    nonce,
)
from storage.keys import unwrap_data_key, wrap_data_key
from storage.segment import SEGMENT_FRAMES_MAX, SegmentHeader, SegmentOpening

COMPRESSION_LEVEL_DEFAULT: Final = 1
WINDOW_BYTES_MAX: Final = FRAME_RAW_BYTES_MAX
"""A frame's zstd window: nobody needs more memory than this to open it."""


class FrameCompressor:
    """zstd for many threads and levels: every thread has contexts of its own. One per process is enough."""

    def __init__(self) -> None:
        self._contexts = threading.local()

    def compress(self, payload: Buffer, *, level: int) -> bytes:
        """One zstd frame that declares its content size."""
        contexts: dict[int, zstandard.ZstdCompressor] | None = getattr(self._contexts, "by_level", None)
        if contexts is None:
            contexts = self._contexts.by_level = {}
        if level not in contexts:
            contexts[level] = zstandard.ZstdCompressor(level=level, write_checksum=False, write_content_size=True)
        return contexts[level].compress(memoryview(payload).cast("B"))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SealedFrame:
    """A sealed record, in one piece, and its entry for the index."""

    entry: FrameEntry
    record: memoryview


class SegmentSealer:
    """Seals one segment's frames. Safe to use from several threads at once; the data key stays in memory only."""

    def __init__(
        self,
        *,
        grant: Grant,
        signed_grant: bytes,
        ordinal: int,
        first_sequence: int,
        data_key: bytes,
        vault_public_key: X25519PublicKey,
        compressor: FrameCompressor,
    ) -> None:
        """data_key: 32 bytes from the operating system's random source, used for this segment and never again."""
        wrapped_key = wrap_data_key(
            data_key,
            vault_public_key,
            vault=grant.vault,
            machine=grant.machine,
            disk=grant.disk,
            epoch=grant.epoch,
            ordinal=ordinal,
        )
        self._opening = SegmentOpening(
            vault=grant.vault,
            machine=grant.machine,
            disk=grant.disk,
            epoch=grant.epoch,
            ordinal=ordinal,
            first_sequence=first_sequence,
            signed_grant=signed_grant,
            wrapped_keys=(wrapped_key,),
        )
        self._grant = grant
        self._cipher = AESGCM(data_key)
        self._compressor = compressor
        self._lock = threading.Lock()
        self._used_nonces: set[int] = set()

    @property
    def opening(self) -> SegmentOpening:
        """To be made durable no later than the first frame."""
        return self._opening

    def seal(
        self,
        *,
        sequence: int,
        frame_number: int,
        nonce_number: int,
        extents: ExtentTable,
        raw_bytes: int,
        payload: Buffer,
        compression: Compression,
        end: ChangeSetEnd | None,
        level: int | None = COMPRESSION_LEVEL_DEFAULT,
        out: Buffer | None = None,
    ) -> SealedFrame:
        """The record of one frame. CPU work: call it in a worker thread; it releases the GIL for most of its time.

        nonce_number: the frame's place in the segment, 0, 1, 2… compression: how `payload` comes. NONE is compressed
        here at `level` (None: never) and kept as it is where that does not make it smaller. ZSTD passes through. out:
        where the record is laid from the first byte on, at least `record_bytes_max(…)` long; a fresh buffer if None.

        Raises MalformedInput (the agent's payload is not what it says), InvalidValue (extents or numbers break a rule,
        or a nonce number comes a second time).
        """
        check_extent_table(extents, raw_bytes=raw_bytes, disk_size_bytes=self._grant.disk_size_bytes)
        packed, packed_as = self._pack(payload, compression, raw_bytes, level)
        table = extents.tobytes()
        sealed_bytes = len(packed) + TAG_BYTES
        head = FrameHead(
            disk=self._grant.disk,
            epoch=self._grant.epoch,
            sequence=sequence,
            frame_number=frame_number,
            extent_count=len(extents),
            raw_bytes=raw_bytes,
            sealed_bytes=sealed_bytes,
            compression=packed_as,
            end=end,
            key_number=0,
            nonce_number=nonce_number,
            sealed_digest=bytes(DIGEST_BYTES),
        )
        record = _room_for(head, out)
        sealed = record[HEAD_BYTES + len(table) :]
        bound = associated_data(encode_head(head, table), table, vault=self._grant.vault, machine=self._grant.machine)
        self._use_nonce(nonce_number)
        self._cipher.encrypt_into(nonce(nonce_number), packed, bound, sealed)
        head = replace(head, sealed_digest=blake3(sealed).digest())
        head_bytes = encode_head(head, table)
        record[:HEAD_BYTES] = head_bytes
        record[HEAD_BYTES : HEAD_BYTES + len(table)] = table
        kept = numpy.frombuffer(table, dtype=EXTENT_DTYPE)
        return SealedFrame(entry=FrameEntry(head=head, extents=kept, head_bytes=head_bytes), record=record)

    def _pack(
        self, payload: Buffer, compression: Compression, raw_bytes: int, level: int | None
    ) -> tuple[memoryview, Compression]:
        view = memoryview(payload).cast("B")
        if compression is Compression.ZSTD:
            if not raw_bytes:
                return memoryview(b""), Compression.NONE
            _check_zstd_header(view, raw_bytes)
            return view, Compression.ZSTD
        if len(view) != raw_bytes:
            raise MalformedInput(what="frame", reason=f"its payload has {len(view)} bytes instead of {raw_bytes}")
        if level is not None and raw_bytes:
            compressed = self._compressor.compress(view, level=level)
            if len(compressed) < raw_bytes:
                return memoryview(compressed), Compression.ZSTD
        return view, Compression.NONE

    def _use_nonce(self, nonce_number: int) -> None:
        check_range(nonce_number, "nonce_number", low=0, high=SEGMENT_FRAMES_MAX - 1)
        with self._lock:
            if nonce_number in self._used_nonces:
                raise InvalidValue(what="nonce_number", value=nonce_number, rule="must never be used twice")
            self._used_nonces.add(nonce_number)


class FrameOpener:
    """Opens one segment's frames. Safe to use from several threads at once."""

    def __init__(self, *, header: SegmentHeader, vault_private_key: X25519PrivateKey) -> None:
        """Raises ObjectCorrupt if a data key was not wrapped to this vault for this segment."""
        opening = header.opening
        self._opening = opening
        self._name = str(opening.name)
        self._ciphers = tuple(
            AESGCM(
                unwrap_data_key(
                    wrapped,
                    vault_private_key,
                    name=self._name,
                    vault=opening.vault,
                    machine=opening.machine,
                    disk=opening.disk,
                    epoch=opening.epoch,
                    ordinal=opening.ordinal,
                )
            )
            for wrapped in opening.wrapped_keys
        )
        self._contexts = threading.local()

    def open(self, entry: FrameEntry, sealed: Buffer) -> bytes:
        """The frame's data extents' contents in table order, exactly raw_bytes long. CPU work, mostly without the GIL.

        sealed: the record's sealed bytes, as `DiskArchive.read_frame` returns them. Raises ObjectCorrupt.
        """
        head = entry.head
        if head.key_number >= len(self._ciphers):
            raise self._damage(head, "its key is not in the header")
        bound = associated_data(
            entry.head_bytes, entry.extents.tobytes(), vault=self._opening.vault, machine=self._opening.machine
        )
        view = memoryview(sealed).cast("B")
        try:
            packed = self._ciphers[head.key_number].decrypt(nonce(head.nonce_number), view, bound)
        except InvalidTag as error:
            raise self._damage(head, "its seal is broken") from error
        if head.compression is Compression.NONE:
            if len(packed) != head.raw_bytes:
                raise self._damage(head, "its length is not what it states")
            return packed
        try:
            _check_zstd_header(memoryview(packed), head.raw_bytes)
            raw = self._decompressor().decompress(packed, max_output_size=head.raw_bytes, allow_extra_data=False)
        except (MalformedInput, zstandard.ZstdError) as error:
            raise self._damage(head, f"its payload cannot be decompressed: {error}") from error
        if len(raw) != head.raw_bytes:
            raise self._damage(head, "its length is not what it states")
        return raw

    def _decompressor(self) -> zstandard.ZstdDecompressor:
        context: zstandard.ZstdDecompressor | None = getattr(self._contexts, "decompressor", None)
        if context is None:
            context = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES_MAX)
            self._contexts.decompressor = context
        return context

    def _damage(self, head: FrameHead, reason: str) -> ObjectCorrupt:
        return ObjectCorrupt(name=self._name, reason=f"change set {head.sequence} frame {head.frame_number}: {reason}")


def record_bytes_max(*, extent_count: int, payload_bytes: int) -> int:
    """The most that the record of such a frame can take: what `out` must hold."""
    return HEAD_BYTES + extent_count * EXTENT_DTYPE.itemsize + payload_bytes + TAG_BYTES


def _room_for(head: FrameHead, out: Buffer | None) -> memoryview:
    if out is None:
        return memoryview(bytearray(head.record_bytes))
    view = memoryview(out).cast("B")
    check_range(len(view), "room for the record", low=head.record_bytes, high=2**63)
    return view[: head.record_bytes]


def _check_zstd_header(packed: memoryview, raw_bytes: int) -> None:
    """Raises MalformedInput unless it begins one plain zstd frame of exactly raw_bytes with a bounded window.

    why: zstandard takes the size that the frame declares for the one to allocate, whatever max_output_size says.
    """
    try:
        parameters = zstandard.get_frame_parameters(packed)
    except zstandard.ZstdError as error:
        raise MalformedInput(what="compressed frame", reason="not a zstd frame") from error
    if parameters.content_size != raw_bytes or parameters.dict_id:
        raise MalformedInput(what="compressed frame", reason=f"does not declare {raw_bytes} bytes of content")
    if parameters.window_size > WINDOW_BYTES_MAX:
        raise MalformedInput(what="compressed frame", reason=f"needs a window above {WINDOW_BYTES_MAX} bytes")
    if not len(packed) <= FRAME_RAW_BYTES_MAX:
        raise MalformedInput(what="compressed frame", reason=f"has more than {FRAME_RAW_BYTES_MAX} bytes")
