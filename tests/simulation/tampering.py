"""What an enemy with the store's credential could do to one disk's segments; recovery must refuse it or not be
fooled by it.

Each way returns what changes: name → new contents, None for a removed object. A forger knows everything that is
public: the vault's public key, every grant, every trailer; what it lacks is the process server's signing key.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.signed_records import Grant, sign_grant
from protocol.vocabulary import Bookmark, ChangeSetEnd, Compression, Consistency, Extent, PointId, extent_table
from storage.object_names import SegmentName
from storage.sealing import FrameCompressor, SegmentSealer
from storage.segment import (
    TRAILER_BYTES,
    SegmentHeader,
    VerifiedSegment,
    closing_segment,
    finish_segment,
    parse_trailer,
    verify_segment,
)
from tests.simulation.vault import SimulatedVault

Changes = dict[SegmentName, bytes | None]
Objects = Mapping[SegmentName, bytes]
BLOTTED_OUT: Final = "newest-blotted-out"
"""Nothing but damage is left of the newest points: no record vouches for them."""
FORGED_BYTES: Final = 512
LATER_NS: Final = 60 * 10**9


def flip_a_bit(objects: Objects, vault: SimulatedVault, draw: random.Random) -> Changes:
    name = draw.choice(sorted(objects, key=str))
    data = bytearray(objects[name])
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return {name: bytes(data)}


def truncate(objects: Objects, vault: SimulatedVault, draw: random.Random) -> Changes:
    name = draw.choice(sorted(objects, key=str))
    return {name: objects[name][: draw.randrange(len(objects[name]))]}


def remove(objects: Objects, vault: SimulatedVault, draw: random.Random) -> Changes:
    return {draw.choice(sorted(objects, key=str)): None}


def swap(objects: Objects, vault: SimulatedVault, draw: random.Random) -> Changes:
    names = sorted(objects, key=str)
    one, other = draw.choice(names), draw.choice(names)
    return {one: objects[other], other: objects[one]}


def replay(objects: Objects, vault: SimulatedVault, draw: random.Random) -> Changes:
    """An old segment once more, behind the newest."""
    newest = max(objects, key=str)
    name = SegmentName(vault=newest.vault, disk=newest.disk, epoch=newest.epoch, ordinal=newest.ordinal + 1)
    return {name: objects[draw.choice(sorted(objects, key=str))]}


def remove_newest(objects: Objects, vault: SimulatedVault, draw: random.Random) -> Changes:
    """The newest of the history goes, so that an older point looks like the newest; what was signed of it stays."""
    names = sorted(objects, key=str)
    return dict.fromkeys(names[draw.randrange(len(names)) :])


def damage_newest(objects: Objects, vault: SimulatedVault, draw: random.Random) -> Changes:
    """The newest segment that holds anything is damaged; who uses this removes the records of its points as well."""
    newest = _newest_with_frames(objects, vault)
    if newest is None:
        return {}
    data = bytearray(objects[newest.name])
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return {newest.name: bytes(data)}


def forge(objects: Objects, vault: SimulatedVault, draw: random.Random) -> Changes:
    """Another segment in place of the newest: every seal, digest, chain and name is right, but the signature."""
    newest = _newest_with_frames(objects, vault)
    if newest is None:
        return {}
    genuine = newest.header.opening
    return {
        newest.name: _segment(
            newest.grant,
            genuine.signed_grant,
            vault,
            draw,
            place=(genuine.ordinal, genuine.first_sequence, newest.header.previous_trailer_hash),
            ends=newest.index.ends(),
            signing_key=Ed25519PrivateKey.from_private_bytes(draw.randbytes(32)),
        )
    }


def usurp(objects: Objects, vault: SimulatedVault, draw: random.Random) -> Changes:
    """The next epoch by a grant that nobody gave: a closing segment behind the newest, and one that follows it."""
    newest = _newest_with_frames(objects, vault)
    if newest is None or any(name.epoch > newest.name.epoch for name in objects):
        return {}
    signing_key = Ed25519PrivateKey.from_private_bytes(draw.randbytes(32))
    epoch = newest.grant.epoch
    grant = dataclasses.replace(
        newest.grant,
        epoch=epoch + 1,
        parent_epoch=epoch,
        process_server_key=signing_key.public_key().public_bytes_raw(),
        is_spare=False,
    )
    signed_grant = sign_grant(grant, Ed25519PrivateKey.from_private_bytes(draw.randbytes(32)))
    closing = closing_segment(
        grant=grant,
        signed_grant=signed_grant,
        ordinal=newest.name.ordinal + 1,
        last_sequence=newest.last_sequence,
        previous_trailer_hash=newest.trailer_hash,
        signing_key=signing_key,
    )
    data = _segment(
        grant,
        signed_grant,
        vault,
        draw,
        place=(1, 1, closing.trailer_hash),
        ends=[(1, ChangeSetEnd(consistency=Consistency.CRASH, bookmark=_later_bookmark(newest, draw)))],
        signing_key=signing_key,
    )
    first = SegmentName(vault=newest.name.vault, disk=newest.name.disk, epoch=epoch + 1, ordinal=1)
    return {closing.name: b"".join((closing.header, closing.end)), first: data}


def _later_bookmark(newest: VerifiedSegment, draw: random.Random) -> Bookmark:
    instant_ns = int(newest.index.heads["instant_ns"].max()) + LATER_NS
    return Bookmark(point=PointId(draw.randbytes(16).hex()), instant_ns=instant_ns)


def _newest_with_frames(objects: Objects, vault: SimulatedVault) -> VerifiedSegment | None:
    segments = (verified(name, objects[name], vault) for name in sorted(objects, key=str, reverse=True))
    return next((segment for segment in segments if len(segment.index)), None)


def _segment(
    grant: Grant,
    signed_grant: bytes,
    vault: SimulatedVault,
    draw: random.Random,
    *,
    place: tuple[int, int, bytes],
    ends: Sequence[tuple[int, ChangeSetEnd]],
    signing_key: Ed25519PrivateKey,
) -> bytes:
    """A whole segment of made-up contents. place: ordinal, first sequence, the hash that it continues."""
    ordinal, first_sequence, previous_trailer_hash = place
    sealer = SegmentSealer(
        grant=grant,
        signed_grant=signed_grant,
        ordinal=ordinal,
        first_sequence=first_sequence,
        data_key=draw.randbytes(32),
        vault_public_key=vault.description.vault_public_key,
        compressor=FrameCompressor(),
    )
    frames = [
        sealer.seal(
            sequence=first_sequence + number,
            frame_number=0,
            nonce_number=number,
            extents=extent_table([Extent(offset_bytes=0, length_bytes=FORGED_BYTES)]),
            raw_bytes=FORGED_BYTES,
            payload=draw.randbytes(FORGED_BYTES),
            compression=Compression.NONE,
            end=end,
        )
        for number, (_, end) in enumerate(ends)
    ]
    header = SegmentHeader(opening=sealer.opening, previous_trailer_hash=previous_trailer_hash)
    end = finish_segment(header, [frame.entry for frame in frames], signing_key)
    return b"".join((end.header, *(bytes(frame.record) for frame in frames), end.end))


def verified(name: SegmentName, data: bytes, vault: SimulatedVault) -> VerifiedSegment:
    """A genuine segment out of its object."""
    trailer = parse_trailer(data[-TRAILER_BYTES:], name=str(name), object_bytes=len(data))
    return verify_segment(
        name,
        header_data=data[: trailer.header_bytes],
        index_data=data[trailer.index_offset : -TRAILER_BYTES],
        trailer_data=data[-TRAILER_BYTES:],
        object_bytes=len(data),
        authority=vault.authority.public_key(),
    )


TAMPERINGS: Final[dict[str, Callable[[Objects, SimulatedVault, random.Random], Changes]]] = {
    "object-bit-flipped": flip_a_bit,
    "object-forged": forge,
    "object-removed": remove,
    "object-replayed": replay,
    "object-truncated": truncate,
    "objects-swapped": swap,
    "newest-objects-removed": remove_newest,
    BLOTTED_OUT: damage_newest,
    "epoch-usurped": usurp,
}
