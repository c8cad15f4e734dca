"""Writes tests/vectors/segment/: `python -m tests.vectors.make_segment`.

The vectors are the format: a change of any byte in an existing one is another format version, never a new file. HPKE
draws randomness, so what it once gave stands here as constants. No key in here protects anything.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from protocol.signed_records import (
    AuthorityKey,
    DiskDescription,
    Grant,
    MachineDescription,
    NicDescription,
    PointMember,
    PointRecord,
    authority_fingerprint,
    serialise_authority_key,
    sign_grant,
    sign_machine_description,
    sign_point,
)
from protocol.vocabulary import (
    Bookmark,
    ChangeKind,
    ChangeSetEnd,
    Compression,
    Consistency,
    DiskId,
    Extent,
    MachineId,
    PointId,
    ProcessServerId,
    VaultId,
    extent_table,
)
from storage.keys import (
    RecoveryKey,
    VaultDescription,
    WrappedVaultKey,
    serialise_recovery_key,
    serialise_vault,
)
from storage.sealing import FrameCompressor, SealedFrame, SegmentSealer
from storage.segment import NO_TRAILER_HASH, SegmentHeader, closing_segment, encode_opening, finish_segment

VECTORS: Final = Path(__file__).parent / "segment"

AUTHORITY: Final = Ed25519PrivateKey.from_private_bytes(bytes(range(0x20)))
PROCESS_SERVER_KEY: Final = Ed25519PrivateKey.from_private_bytes(bytes(range(0x20, 0x40)))
SUCCESSOR_KEY: Final = Ed25519PrivateKey.from_private_bytes(bytes(range(0x40, 0x60)))
VAULT_KEY: Final = X25519PrivateKey.from_private_bytes(bytes(range(0x60, 0x80)))
RECOVERY_KEY: Final = X25519PrivateKey.from_private_bytes(bytes(range(0x80, 0xA0)))
DATA_KEY: Final = bytes(range(0xA0, 0xC0))
PASSPHRASE: Final = "correct horse battery staple"

WRAPPED_DATA_KEY: Final = bytes.fromhex(
    "9aa89a9a39a05265a59d86d4ce2553ef19ee262f143a534da75c4bddb6da1862eb1eca70c67cb428"
    "217427dbb4e7f42ac6595af5cb276b7eb860fa29c330d45e2c3414556fd857b2599879b6680c2b9c"
)
WRAPPED_VAULT_KEY: Final = bytes.fromhex(
    "73ef11ad93dd45ebdeac7fa523c4e97ebab9ad11b604b395ccd295f1bdfd7753e51b0ac988f03dbe"
    "3f459b5c3d54eceabb307ee33b8cbd210ea80b8b8de06972da539e6ed46dedfdd66e6e54e69cbb65"
)
ZSTD_PAYLOAD: Final = bytes.fromhex("28b52ffd60000f4d0000107a7a0100fbf70116")
"""4096 times the letter z, as a zstd frame that declares its size."""

VAULT: Final = VaultId("0123456789abcdef" * 2)
MACHINE: Final = MachineId("11" * 16)
DISK: Final = DiskId("22" * 16)

GRANT: Final = Grant(
    vault=VAULT,
    machine=MACHINE,
    disk=DISK,
    epoch=1,
    parent_epoch=0,
    process_server=ProcessServerId("33" * 16),
    process_server_key=PROCESS_SERVER_KEY.public_key().public_bytes_raw(),
    issued_ns=1_760_000_000_000_000_000,
    disk_size_bytes=2**30,
    sector_bytes=512,
)
SUCCESSOR_GRANT: Final = dataclasses.replace(
    GRANT,
    epoch=4,
    parent_epoch=1,
    process_server=ProcessServerId("44" * 16),
    process_server_key=SUCCESSOR_KEY.public_key().public_bytes_raw(),
    is_spare=True,
)
DESCRIPTION: Final = MachineDescription(
    vault=VAULT,
    machine=MACHINE,
    version=3,
    name="Zoë's server",
    disks=(DiskDescription(disk=DISK, name="/dev/vda", size_bytes=2**30, sector_bytes=512, boot_order=0),),
    firmware="uefi",
    processors=4,
    memory_bytes=2**33,
    nics=(NicDescription(name="eth0", hardware_address="52:54:00:00:00:01", addresses=("192.0.2.7/24",)),),
)
POINT: Final = PointRecord(
    vault=VAULT,
    point=PointId("55" * 16),
    instant_ns=1_760_000_000_500_000_000,
    consistency=Consistency.APPLICATION,
    members=(PointMember(machine=MACHINE, disk=DISK, epoch=1, sequence=2),),
)
DESCRIBED_VAULT: Final = VaultDescription(
    vault=VAULT,
    created_ns=1_759_999_999_000_000_000,
    authority_key=AUTHORITY.public_key().public_bytes_raw(),
    vault_key=VAULT_KEY.public_key().public_bytes_raw(),
    recovery_keys=(
        WrappedVaultKey(
            label="safe in Zürich",
            recovery_key=RECOVERY_KEY.public_key().public_bytes_raw(),
            wrapped=WRAPPED_VAULT_KEY,
        ),
    ),
)
RECOVERY: Final = RecoveryKey(
    vault=VAULT,
    label="safe in Zürich",
    authority_fingerprint=authority_fingerprint(AUTHORITY.public_key()),
    private_key=RECOVERY_KEY,
)

FRAMES: Final[list[dict[str, Any]]] = [
    {
        "sequence": 1,
        "frame_number": 0,
        "extents": [Extent(offset_bytes=4096, length_bytes=512), Extent(offset_bytes=8192, length_bytes=512)],
        "payload": bytes(range(256)) * 4,
        "compression": Compression.NONE,
        "end": None,
    },
    {
        "sequence": 1,
        "frame_number": 1,
        "extents": [
            Extent(offset_bytes=2**20, length_bytes=2**20, kind=ChangeKind.ZEROES),
            Extent(offset_bytes=2**29, length_bytes=4096, kind=ChangeKind.DISCARDED),
        ],
        "payload": b"",
        "compression": Compression.NONE,
        "end": ChangeSetEnd(consistency=Consistency.UNSETTLED, copy_in_cursor_bytes=2**21),
    },
    {
        "sequence": 2,
        "frame_number": 0,
        "extents": [Extent(offset_bytes=0, length_bytes=4096)],
        "payload": ZSTD_PAYLOAD,
        "compression": Compression.ZSTD,
        "end": ChangeSetEnd(
            consistency=Consistency.APPLICATION,
            bookmark=Bookmark(point=PointId("55" * 16), instant_ns=1_760_000_000_500_000_000),
        ),
    },
]


def sealed_frames() -> tuple[SegmentSealer, list[SealedFrame]]:
    sealer = SegmentSealer(
        grant=GRANT,
        signed_grant=sign_grant(GRANT, AUTHORITY),
        ordinal=1,
        first_sequence=1,
        data_key=DATA_KEY,
        vault_public_key=VAULT_KEY.public_key(),
        compressor=FrameCompressor(),
    )
    frames = []
    for number, frame in enumerate(FRAMES):
        options = {**frame, "extents": extent_table(frame["extents"])}
        raw_bytes = sum(e.length_bytes for e in frame["extents"] if e.kind is ChangeKind.DATA)
        frames.append(sealer.seal(nonce_number=number, raw_bytes=raw_bytes, level=None, **options))
    return sealer, frames


def segment_files() -> dict[str, bytes]:
    sealer, frames = sealed_frames()
    opening = dataclasses.replace(sealer.opening, wrapped_keys=(WRAPPED_DATA_KEY,))
    header = SegmentHeader(opening=opening, previous_trailer_hash=NO_TRAILER_HASH)
    end = finish_segment(header, [frame.entry for frame in frames], PROCESS_SERVER_KEY)
    closing = closing_segment(
        grant=SUCCESSOR_GRANT,
        signed_grant=sign_grant(SUCCESSOR_GRANT, AUTHORITY),
        ordinal=2,
        last_sequence=2,
        previous_trailer_hash=end.trailer_hash,
        signing_key=SUCCESSOR_KEY,
    )
    return {
        "opening.bin": encode_opening(opening),
        "data.seg": b"".join((end.header, *(bytes(frame.record) for frame in frames), end.end)),
        "closing.seg": closing.header + closing.end,
    }


def files() -> dict[str, bytes]:
    """Every file that is the same whenever it is made."""
    return {
        **segment_files(),
        "grant.bin": sign_grant(GRANT, AUTHORITY),
        "successor-grant.bin": sign_grant(SUCCESSOR_GRANT, AUTHORITY),
        "description.machine": sign_machine_description(DESCRIPTION, AUTHORITY),
        "application.point": sign_point(POINT, AUTHORITY),
        "vault.json": serialise_vault(DESCRIBED_VAULT, AUTHORITY),
        "authority-key.json": serialise_authority_key(AuthorityKey(vault=VAULT, private_key=AUTHORITY)),
        "recovery-key.json": serialise_recovery_key(RECOVERY, passphrase=None),
        "expected.json": expected(),
    }


def expected() -> bytes:
    """What a reader of data.seg finds, in words."""
    rows = [
        {
            "sequence": frame["sequence"],
            "frame_number": frame["frame_number"],
            "extents": [[extent.offset_bytes, extent.length_bytes, extent.kind.name] for extent in frame["extents"]],
            "contents": (b"z" * 4096 if frame["compression"] is Compression.ZSTD else frame["payload"]).hex(),
            "compression": frame["compression"].name,
            "consistency": frame["end"].consistency.value if frame["end"] else None,
            "copy_in_cursor_bytes": frame["end"].copy_in_cursor_bytes if frame["end"] else None,
            "bookmark": dataclasses.asdict(frame["end"].bookmark) if frame["end"] and frame["end"].bookmark else None,
        }
        for frame in FRAMES
    ]
    return (json.dumps(rows, indent=1) + "\n").encode()


def main() -> None:
    VECTORS.mkdir(exist_ok=True)
    for name, data in files().items():
        (VECTORS / name).write_bytes(data)
    protected = VECTORS / "recovery-key-with-passphrase.json"
    if not protected.exists():
        protected.write_bytes(serialise_recovery_key(RECOVERY, passphrase=PASSPHRASE))


if __name__ == "__main__":
    main()
