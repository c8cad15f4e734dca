"""What an enemy with the store's credential could do to one disk's segments; recovery must refuse it or not be
fooled by it.

Each way returns what changes: name → new contents, None for a removed object. A forger knows everything that is
public: the vault's public key, every grant, every trailer; what it lacks is the process server's signing key.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.vocabulary import Compression, Extent, extent_table
from storage.object_names import SegmentName
from storage.sealing import FrameCompressor, SegmentSealer
from storage.segment import TRAILER_BYTES, SegmentHeader, VerifiedSegment, finish_segment, parse_trailer, verify_segment
from tests.simulation.vault import SimulatedVault

Changes = dict[SegmentName, bytes | None]
Objects = Mapping[SegmentName, bytes]
FORGED_BYTES: Final = 512


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


def forge(objects: Objects, vault: SimulatedVault, draw: random.Random) -> Changes:
    """Another segment in place of the newest: every seal, digest, chain and name is right, but the signature."""
    newest = max((name for name, data in objects.items() if len(verified(name, data, vault).index)), key=str)
    genuine = verified(newest, objects[newest], vault)
    opening = genuine.header.opening
    sealer = SegmentSealer(
        grant=genuine.grant,
        signed_grant=opening.signed_grant,
        ordinal=opening.ordinal,
        first_sequence=opening.first_sequence,
        data_key=draw.randbytes(32),
        vault_public_key=vault.description.vault_public_key,
        compressor=FrameCompressor(),
    )
    frames = []
    for number, (sequence, end) in enumerate(genuine.index.ends()):
        frames.append(
            sealer.seal(
                sequence=sequence,
                frame_number=0,
                nonce_number=number,
                extents=extent_table([Extent(offset_bytes=0, length_bytes=FORGED_BYTES)]),
                raw_bytes=FORGED_BYTES,
                payload=draw.randbytes(FORGED_BYTES),
                compression=Compression.NONE,
                end=end,
            )
        )
    header = SegmentHeader(opening=sealer.opening, previous_trailer_hash=genuine.header.previous_trailer_hash)
    forger = Ed25519PrivateKey.from_private_bytes(draw.randbytes(32))
    end = finish_segment(header, [frame.entry for frame in frames], forger)
    return {newest: b"".join((end.header, *(bytes(frame.record) for frame in frames), end.end))}


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
    "bit-flipped": flip_a_bit,
    "forged": forge,
    "removed": remove,
    "replayed": replay,
    "swapped": swap,
    "truncated": truncate,
}
