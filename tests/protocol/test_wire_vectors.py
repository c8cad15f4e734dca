"""The committed vectors are the format; the code follows them, in both directions."""

from __future__ import annotations

import json
from typing import Any

import pytest

import protocol.messages
from protocol.codec import decode_header, encode_header
from protocol.framing import Assembled, BodyWanted, FrameReader, encode_start
from protocol.messages import Frame, Message
from protocol.vocabulary import Bookmark, ChangeSetEnd, Compression, Consistency
from tests.vectors.make_wire import VECTORS, messages

RECORDS: list[dict[str, Any]] = json.loads(VECTORS.read_text())


def build(record: dict[str, Any]) -> Message:
    fields = dict(record["fields"])
    if record["type"] == "Frame":
        fields["compression"] = Compression[fields["compression"]]
        if (end := fields["end"]) is not None:
            fields["end"] = ChangeSetEnd(
                consistency=Consistency[end["consistency"]],
                copy_in_cursor_bytes=end["copy_in_cursor_bytes"],
                bookmark=Bookmark(**end["bookmark"]) if end["bookmark"] else None,
            )
    message: Message = getattr(protocol.messages, record["type"])(**fields)
    return message


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["name"])
def test_a_vector_is_what_its_message_encodes_to(record: dict[str, Any]) -> None:
    message = build(record)
    assert encode_header(message).hex() == record["header"]
    assert encode_start(message).hex() == record["start"]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["name"])
def test_a_vector_decodes_to_its_message(record: dict[str, Any]) -> None:
    assert decode_header(bytes.fromhex(record["header"])) == build(record)


@pytest.mark.parametrize("record", [record for record in RECORDS if record["body"]], ids=lambda record: record["name"])
def test_a_vectors_body_follows_its_start_in_the_stream(record: dict[str, Any]) -> None:
    reader = FrameReader()
    stream = memoryview(bytes.fromhex(record["start"] + record["body"]))
    event = None
    while stream:
        buffer = reader.get_buffer()
        count = min(len(buffer), len(stream))
        buffer[:count] = stream[:count]
        stream = stream[count:]
        event = reader.buffer_updated(count)
        if isinstance(event, BodyWanted):
            reader.provide_body(memoryview(bytearray(event.body_bytes)))
    assert isinstance(event, Assembled)
    assert event.message == build(record)
    assert event.body.hex() == record["body"]


def test_the_vectors_are_those_that_the_script_writes_and_name_every_message_type() -> None:
    assert {record["name"]: build(record) for record in RECORDS} == messages()
    assert {record["type"] for record in RECORDS} == {kind.__name__ for kind in Message.__args__}  # type: ignore[attr-defined]
    assert any(record["body"] for record in RECORDS if record["type"] == Frame.__name__)
