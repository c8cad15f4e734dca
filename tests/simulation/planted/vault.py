"""Defects of storage and of recovery."""

from __future__ import annotations

from typing import Any

import numpy
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

import recovery.core.point_choice
import recovery.core.rebuild_plan
import recovery.opened_vault
import recovery.rebuild
import storage.disk_archive
import storage.frame_record
import storage.history
import storage.sealing
import storage.segment
from protocol.signed_records import Grant
from recovery.errors import PointDamaged
from recovery.opened_vault import DiskCatalogue
from storage.disk_archive import DiskArchive, EpochStart
from storage.errors import ObjectExists, StoreFault, VaultFault
from storage.frame_record import TAG_BYTES
from storage.history import ChainLink
from tests.simulation.planted.seams import counted, replace, seam_calls


class _Believer:
    """A public key to which every signature is good."""

    def verify(self, signature: bytes, data: bytes) -> None:
        seam_calls["_Believer.verify"] += 1


def check_no_trailer() -> None:
    """Readers believe every trailer, whoever signed it."""

    class Keys:
        @staticmethod
        def from_public_bytes(data: bytes) -> _Believer:
            return _Believer()

    replace(storage.segment, "Ed25519PublicKey", lambda key: Keys)


def check_no_grant() -> None:
    """Readers believe every grant, whoever signed it."""

    def make(verify_grant: Any) -> Any:
        def believe(signed: bytes, authority: Any) -> Grant:
            grant: Grant = verify_grant(signed, _Believer())
            return grant

        return counted(believe)

    replace(storage.segment, "verify_grant", make)


def check_no_place() -> None:
    """A segment counts wherever it lies and whatever it follows."""
    replace(storage.segment, "_check_place", lambda check: counted(lambda name, opening, trailer: None))
    replace(ChainLink, "refusal", lambda refusal: counted(lambda self, segment: None))


def skip_damaged_frames() -> None:
    """What cannot be read is left out of the image."""

    def make(open_and_write: Any) -> Any:
        async def work(self: Any, batches: Any) -> None:
            for batch in batches:
                try:
                    records = await self._vault.archive.read_frames(batch.segment, batch.first_number, batch.end_number)
                    await self._call(lambda batch=batch, records=records: self._open_and_write(batch, records))
                except VaultFault:
                    continue

        return counted(work)

    replace(recovery.rebuild._Rebuild, "_work", make)


class _Unauthenticated:
    """AES-GCM without its tag."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._cipher = AESGCM(key)

    def encrypt_into(self, nonce: Any, data: Any, associated: Any, buffer: Any) -> int:
        return self._cipher.encrypt_into(nonce, data, associated, buffer)

    def decrypt(self, nonce: Any, data: Any, associated: Any) -> bytes:
        seam_calls["_Unauthenticated.decrypt"] += 1
        counter = bytes(nonce) + (2).to_bytes(4, "big")
        return Cipher(algorithms.AES(self._key), modes.CTR(counter)).decryptor().update(bytes(data)[:-TAG_BYTES])


def check_no_seal() -> None:
    """Frames are decrypted without a look at their digests and their seals."""

    replace(storage.sealing, "AESGCM", lambda cipher: _Unauthenticated)
    replace(storage.disk_archive, "_checked_record", lambda check: counted(_believed_record))


def _believed_record(segment: Any, number: int, data: memoryview) -> Any:
    entry = segment.index.entry(number)
    sealed = data[entry.head.record_bytes - entry.head.sealed_bytes : entry.head.record_bytes]
    return storage.frame_record.FrameRecord(entry=entry, sealed=sealed)


def apply_the_oldest_last() -> None:
    """Where extents overlap, the oldest stays."""

    def make(highest: Any) -> Any:
        def lowest(first_range: Any, range_count: Any, *, range_total: int) -> Any:
            painted = numpy.zeros(range_total, dtype=numpy.int32)
            for number in reversed(range(len(first_range))):
                first = int(first_range[number])
                painted[first : first + int(range_count[number])] = number + 1
            return painted

        return counted(lowest)

    replace(recovery.core.rebuild_plan, "_highest_painter", make)


def take_no_answer_for_success() -> None:
    """An append whose outcome is unknown counts as committed."""

    def make(append: Any) -> Any:
        async def append_hopefully(self: DiskArchive, name: Any, parts: Any, trailer_hash: bytes) -> None:
            try:
                await append(self, name, parts, trailer_hash)
            except StoreFault:
                return

        return counted(append_hopefully)

    replace(DiskArchive, "append_segment", make)


def take_a_taken_name_for_ours() -> None:
    """A segment under our name is taken for ours, unseen."""

    def make(append: Any) -> Any:
        async def append_blindly(self: DiskArchive, name: Any, parts: Any, trailer_hash: bytes) -> None:
            try:
                await self._store.create(str(name), parts)
            except ObjectExists:
                return

        return counted(append_blindly)

    replace(DiskArchive, "append_segment", make)


def close_no_epoch() -> None:
    """An epoch begins without a closing segment in its parent."""

    def make(close_epoch: Any) -> Any:
        async def begin_without(self: DiskArchive, grant: Grant, signed_grant: bytes, signing_key: Any) -> EpochStart:
            last = await self.last_segment(grant.disk, grant.parent_epoch) if grant.parent_epoch else None
            return EpochStart(
                parent_epoch=grant.parent_epoch,
                parent_sequence=last.last_sequence if last else 0,
                previous_trailer_hash=last.trailer_hash if last else storage.segment.NO_TRAILER_HASH,
            )

        return counted(begin_without)

    replace(DiskArchive, "close_epoch", make)


def believe_the_list() -> None:
    """What a list does not show is not there; and what so was taken for the beginning of everything, nobody mends."""

    async def add_nothing(self: DiskArchive, sizes: Any, disk: Any, epoch: int) -> None:
        return

    replace(DiskArchive, "_add_unlisted", lambda add: counted(add_nothing))
    replace(storage.disk_archive, "UNLISTED_EPOCHS_MAX", lambda epochs_max: 0)
    replace(storage.history, "is_passed_over", lambda is_passed_over: lambda first: False)


def look_at_no_records() -> None:
    """The signed records of points are no witness of anything."""
    replace(recovery.opened_vault, "_recorded_point", lambda recorded: counted(lambda record, disk: None))


def pass_over_the_damaged() -> None:
    """The newest point that can be recovered passes for the newest."""

    def make(choose: Any) -> Any:
        def choose_what_works(self: DiskCatalogue, selector: str) -> Any:
            try:
                return choose(self, selector)
            except PointDamaged:
                found = [point for point in self.points if self.is_recoverable(point)]
                if not found:
                    raise
                return found[-1]

        return counted(choose_what_works)

    replace(DiskCatalogue, "choose", make)


def keep_quiet_about_damage() -> None:
    """Nobody says that damage may hide a newer point."""
    replace(DiskCatalogue, "_hiding_behind", lambda hiding: counted(lambda self, chosen: None))


def choose_by_instant() -> None:
    """The newest point is the one with the latest instant, whatever the server's clock went through."""

    def make(by_age: Any) -> Any:
        return counted(lambda points: sorted(points, key=lambda point: (point.instant_ns, point.position)))

    replace(recovery.core.point_choice, "by_age", make)
    replace(recovery.opened_vault, "by_age", make)


class _Open:
    """A cipher that leaves everything as it is."""

    def __init__(self, key: bytes) -> None:
        return

    def encrypt_into(self, nonce: Any, data: Any, associated: Any, buffer: Any) -> int:
        seam_calls["_Open.encrypt_into"] += 1
        view = memoryview(data).cast("B")
        buffer[: len(view)] = view
        buffer[len(view) : len(view) + TAG_BYTES] = bytes(TAG_BYTES)
        return len(view) + TAG_BYTES

    def decrypt(self, nonce: Any, data: Any, associated: Any) -> bytes:
        return bytes(data)[:-TAG_BYTES]


def seal_nothing() -> None:
    """Contents are stored as they come."""
    replace(storage.sealing, "AESGCM", lambda cipher: _Open)
