"""Writes tests/vectors/wire/messages.json: `python -m tests.vectors.make_wire`.

The vectors are the format: a change of any byte in an existing one is another wire version, never a new file.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from pathlib import Path
from typing import Any, Final

from protocol.codec import encode_header
from protocol.framing import encode_start
from protocol.messages import (
    CREDIT_BYTES_MAX,
    CloseDisk,
    Credit,
    DiskOpened,
    Frame,
    Goodbye,
    Hello,
    Message,
    OpenDisk,
    Positions,
    Refusal,
    Tick,
    Welcome,
)
from protocol.vocabulary import (
    CHANGE_SET_FRAMES_MAX,
    DISK_SIZE_BYTES_MAX,
    EPOCH_MAX,
    FRAME_EXTENTS_MAX,
    FRAME_RAW_BYTES_MAX,
    SEQUENCE_MAX,
    Bookmark,
    ChangeKind,
    ChangeSetEnd,
    Compression,
    Consistency,
    DiskId,
    Extent,
    PointId,
    extent_table,
)

VECTORS: Final = Path(__file__).parent / "wire" / "messages.json"
DISK: Final = DiskId("00112233445566778899aabbccddeeff")
POINT: Final = PointId("f0e1d2c3b4a5968778695a4b3c2d1e0f")


def _bodies() -> dict[str, bytes]:
    """The bodies of those frames that have a short one."""
    mixed = extent_table(
        [
            Extent(offset_bytes=4096, length_bytes=8),
            Extent(offset_bytes=1 << 40, length_bytes=1 << 31, kind=ChangeKind.ZEROES),
            Extent(offset_bytes=(1 << 40) + (1 << 31), length_bytes=512, kind=ChangeKind.DISCARDED),
        ]
    )
    return {"frame with data, zeroes and a discarded extent": mixed.tobytes() + b"8 bytes!"}


def _frame(**fields: Any) -> Frame:
    settled = {
        "channel": 0,
        "epoch": 1,
        "sequence": 1,
        "frame_number": 0,
        "extent_count": 0,
        "raw_bytes": 0,
        "payload_bytes": 0,
        "compression": Compression.NONE,
        "end": None,
    }
    return Frame(**(settled | fields))


def _frames() -> dict[str, Message]:
    return {
        "frame, empty": _frame(),
        "frame, empty, moves a mark": _frame(
            end=ChangeSetEnd(
                consistency=Consistency.APPLICATION, bookmark=Bookmark(point=POINT, instant_ns=1795000000123456789)
            )
        ),
        "frame with data, zeroes and a discarded extent": _frame(
            channel=7, epoch=3, sequence=42, extent_count=3, raw_bytes=8, payload_bytes=8
        ),
        "frame, compressed, last of a copy-in change set": _frame(
            sequence=300,
            frame_number=63,
            extent_count=1,
            raw_bytes=FRAME_RAW_BYTES_MAX,
            payload_bytes=70000,
            compression=Compression.ZSTD,
            end=ChangeSetEnd(consistency=Consistency.UNSETTLED, copy_in_cursor_bytes=64 << 20),
        ),
        "frame at every limit": _frame(
            channel=65535,
            epoch=EPOCH_MAX,
            sequence=SEQUENCE_MAX,
            frame_number=CHANGE_SET_FRAMES_MAX - 1,
            extent_count=FRAME_EXTENTS_MAX,
            raw_bytes=FRAME_RAW_BYTES_MAX,
            payload_bytes=FRAME_RAW_BYTES_MAX,
            compression=Compression.ZSTD,
            end=ChangeSetEnd(consistency=Consistency.FILE_SYSTEM, bookmark=Bookmark(point=POINT, instant_ns=2**63 - 1)),
        ),
        "frame, last, crash-consistent, no bookmark": _frame(end=ChangeSetEnd(consistency=Consistency.CRASH)),
    }


def messages() -> dict[str, Message]:
    """Every message type, every optional field present and absent, every limit once."""
    return {
        "hello": Hello(wire_version_min=1, wire_version_max=1, agent_version="0.1.0", boot_id="5e3f"),
        "hello in other scripts": Hello(wire_version_min=1, wire_version_max=65535, agent_version="", boot_id="ü→漢"),
        "welcome": Welcome(wire_version=1, process_server="0c" * 16, idle_seconds_max=60),
        "open disk, first time": OpenDisk(channel=0, disk=DISK, epoch=0, acknowledged_sequence=0),
        "open disk, new epoch wanted": OpenDisk(
            channel=65535, disk=DISK, epoch=EPOCH_MAX, acknowledged_sequence=SEQUENCE_MAX, wants_new_epoch=True
        ),
        "disk opened, first epoch": DiskOpened(
            channel=0,
            epoch=1,
            parent_epoch=0,
            parent_sequence=0,
            durable_sequence=0,
            committed_sequence=0,
            copy_in_cursor_bytes=None,
        ),
        "disk opened, within a copy-in": DiskOpened(
            channel=7,
            epoch=3,
            parent_epoch=2,
            parent_sequence=900,
            durable_sequence=41,
            committed_sequence=40,
            copy_in_cursor_bytes=DISK_SIZE_BYTES_MAX,
        ),
        **_frames(),
        "positions": Positions(channel=7, epoch=3, durable_sequence=42, committed_sequence=40),
        "credit": Credit(total_bytes=16 << 20),
        "credit at its limit": Credit(total_bytes=CREDIT_BYTES_MAX),
        "tick of an agent": Tick(instant_ns=None),
        "tick of a process server": Tick(instant_ns=1795000000123456789),
        "close disk": CloseDisk(channel=7, code="no-grant", detail="no grant for disk", is_retryable=True),
        "refusal": Refusal(code="sequence-gap", detail="change set 44 where 43 was expected", is_retryable=False),
        "refusal, longest text": Refusal(code="x" * 1024, detail="y" * 1024, is_retryable=True),
        "goodbye": Goodbye(reason="stopping"),
    }


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value.name if isinstance(value, enum.Enum) else value


def vectors() -> list[dict[str, object]]:
    bodies = _bodies()
    return [
        {
            "name": name,
            "type": type(message).__name__,
            "fields": _plain(message),
            "header": encode_header(message).hex(),
            "start": encode_start(message).hex(),
            "body": bodies[name].hex() if name in bodies else None,
        }
        for name, message in messages().items()
    ]


if __name__ == "__main__":
    VECTORS.parent.mkdir(parents=True, exist_ok=True)
    VECTORS.write_text(json.dumps(vectors(), indent=1, ensure_ascii=False) + "\n")
