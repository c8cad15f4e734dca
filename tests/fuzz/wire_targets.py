"""The wire: message headers, the stream of messages, and the conversation of both ends."""

from __future__ import annotations

import copy
import functools
import json
import struct
from pathlib import Path
from typing import Any, Final

from protocol.codec import decode_header, encode_header
from protocol.errors import InvalidValue, MalformedInput, PeerFault, SendNotAllowed
from protocol.framing import BODY_BYTES_MAX, BodyWanted, FrameReader, body_bytes_of
from protocol.messages import (
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
from protocol.session import OPEN_CHANNELS_MAX, AgentSession, ChannelState, ProcessServerSession
from protocol.vocabulary import ChangeSetEnd, Compression, Consistency, PeerIdentity
from tests.fuzz.target import Target
from tests.vectors.make_wire import DISK, VECTORS

_BODY: Final = memoryview(bytearray(BODY_BYTES_MAX))
_PIECE: Final = struct.Struct("<BH")


@functools.cache
def vectors() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(Path(VECTORS).read_bytes())
    return found


def header(data: bytes) -> None:
    message = decode_header(data)
    assert encode_header(message) == data


def stream(data: bytes) -> None:
    """The first byte says how large the pieces are, and whether the side takes frames at all."""
    if not data:
        return
    body_bytes_max = 0 if data[0] & 0x80 else BODY_BYTES_MAX
    reader, rest = FrameReader(body_bytes_max=body_bytes_max), memoryview(data)[1:]
    piece_bytes = (data[0] & 0x7F) or len(data)
    wanted: BodyWanted | None = None
    while rest:
        buffer = reader.get_buffer()
        count = min(len(buffer), piece_bytes, len(rest))
        assert count > 0
        buffer[:count], rest = rest[:count], rest[count:]
        event = reader.buffer_updated(count)
        if isinstance(event, BodyWanted):
            assert 0 < event.body_bytes <= body_bytes_max
            reader.provide_body(_BODY)
            wanted = event
        elif event is not None:
            assert len(event.body) == body_bytes_of(event.message)
            assert wanted is None or wanted.message is event.message
            wanted = None


def stream_seeds() -> list[bytes]:
    whole = [bytes.fromhex(vector["start"]) + bytes.fromhex(vector.get("body") or "") for vector in vectors()]
    return [*(b"\x00" + one for one in whole), *(b"\x05" + one for one in whole), b"\x80" + b"".join(whole[:5])]


def conversation(data: bytes) -> None:
    """The first byte says whose end it is; then pieces: who sends, the header's length, the header."""
    if not data:
        return
    session = AgentSession() if data[0] & 1 else ProcessServerSession()
    place = 1
    while len(data) - place >= _PIECE.size:
        sender, length = _PIECE.unpack_from(data, place)
        place += _PIECE.size
        message = decode_header(data[place : place + length])
        place += length
        before = _state_of(session)
        try:
            if sender & 1:
                session.check_send(message)
            else:
                session.receive(message)
        except (PeerFault, SendNotAllowed):
            assert _state_of(session) == before
        _check_session(session)


def _state_of(session: AgentSession | ProcessServerSession) -> object:
    return copy.deepcopy({name: value for name, value in vars(session).items() if name != "_hello"})


def _check_session(session: AgentSession | ProcessServerSession) -> None:
    assert 0 <= session.body_bytes_total <= session.credit_bytes_granted
    occupied = vars(session)["_occupied"]
    assert len(occupied) <= OPEN_CHANNELS_MAX
    for disk, channel in occupied.items():
        assert session.disk_of(channel) == disk
        assert session.channel_state(channel) in (ChannelState.OPENING, ChannelState.OPEN)
    for channel in vars(session)["_channels"].values():
        assert channel.committed_sequence <= channel.durable_sequence < max(channel.next_sequence, 1)


def _conversations() -> list[list[tuple[str, Message]]]:
    frame = {"channel": 1, "epoch": 1, "frame_number": 0, "extent_count": 1, "compression": Compression.NONE}
    end = ChangeSetEnd(consistency=Consistency.CRASH)
    opened = DiskOpened(
        channel=1, epoch=1, parent_epoch=0, parent_sequence=0, durable_sequence=0, committed_sequence=0,
        copy_in_cursor_bytes=None,
    )  # fmt: skip
    begin: list[tuple[str, Message]] = [
        ("agent", Hello(wire_version_min=1, wire_version_max=1, agent_version="1", boot_id="b")),
        ("server", Welcome(wire_version=1, process_server="0c" * 16, idle_seconds_max=60)),
        ("server", Credit(total_bytes=2**20)),
        ("agent", OpenDisk(channel=1, disk=DISK, epoch=0, acknowledged_sequence=0)),
    ]
    sends: list[tuple[str, Message]] = [
        ("server", opened),
        ("agent", Frame(**frame, sequence=1, raw_bytes=512, payload_bytes=512, end=None)),  # type: ignore[arg-type]
        ("agent", Frame(**frame | {"frame_number": 1}, sequence=1, raw_bytes=0, payload_bytes=0, end=end)),  # type: ignore[arg-type]
        ("server", Positions(channel=1, epoch=1, durable_sequence=1, committed_sequence=0)),
        ("agent", Tick(instant_ns=None)),
    ]
    return [
        [*begin, *sends, ("agent", Goodbye(reason="done")), ("server", Goodbye(reason="done"))],
        [*begin, ("agent", CloseDisk(channel=1, code="a", detail="", is_retryable=True)), ("server", opened)],
        [
            *begin,
            *sends,
            ("server", CloseDisk(channel=1, code="a", detail="", is_retryable=True)),
            ("agent", Frame(**frame, sequence=2, raw_bytes=0, payload_bytes=0, end=end)),  # type: ignore[arg-type]
            ("agent", OpenDisk(channel=2, disk=DISK, epoch=1, acknowledged_sequence=1, wants_new_epoch=True)),
            ("server", Refusal(code="no-grant", detail="", is_retryable=True)),
        ],
    ]


def conversation_seeds() -> list[bytes]:
    seeds = []
    for ours in ("agent", "server"):
        for events in _conversations():
            pieces = [bytes((ours == "agent",))]
            for sender, message in events:
                encoded = encode_header(message)
                pieces.append(_PIECE.pack(sender == ours, len(encoded)) + encoded)
            seeds.append(b"".join(pieces))
    return seeds


def identity_uri(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    assert PeerIdentity.from_uri(text).uri == text


WIRE_TARGETS: Final = (
    Target(
        name="wire-header",
        run=header,
        refusals=(MalformedInput,),
        seeds=lambda: [bytes.fromhex(vector["header"]) for vector in vectors()],
    ),
    Target(name="wire-stream", run=stream, refusals=(MalformedInput,), seeds=stream_seeds),
    Target(name="wire-conversation", run=conversation, refusals=(MalformedInput,), seeds=conversation_seeds),
    Target(
        name="identity-uri",
        run=identity_uri,
        refusals=(InvalidValue,),
        seeds=lambda: [PeerIdentity.from_uri(f"farpoint://{'0a' * 16}/agent/{'0b' * 16}").uri.encode()],
    ),
)
