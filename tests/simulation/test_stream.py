"""A wrong image is blamed on whoever made it wrong: recovery, the agent's memory, or a disk that was not still."""

import zstandard

from protocol.messages import Frame
from protocol.vocabulary import Bookmark, ChangeSetEnd, Compression, Consistency, Extent, PointId, extent_table
from tests.simulation.source_history import ORACLE_BLOCK_BYTES, SourceHistory
from tests.simulation.stream import APPLIED, FORGOTTEN, FUZZY, SentStream, name_fault

DISK = "d" * 32
BLOCK = ORACLE_BLOCK_BYTES
POINT = PointId("f" * 32)


def frame(sequence, number, *, data, offset, compression=Compression.NONE, is_last=False):
    payload = zstandard.ZstdCompressor().compress(data) if compression is Compression.ZSTD else data
    end = ChangeSetEnd(consistency=Consistency.CRASH, bookmark=Bookmark(point=POINT, instant_ns=1)) if is_last else None
    message = Frame(
        channel=0,
        epoch=1,
        sequence=sequence,
        frame_number=number,
        extent_count=1,
        raw_bytes=len(data),
        payload_bytes=len(payload),
        compression=compression,
        end=end,
    )
    return message, [extent_table([Extent(offset_bytes=offset, length_bytes=len(data))]).tobytes(), payload]


def test_the_reference_image_is_what_was_sent_last_in_order_and_across_epochs():
    stream = SentStream()
    attempts = [
        frame(1, 0, data=b"a" * BLOCK, offset=0),
        frame(1, 1, data=b"lost" * (BLOCK // 4), offset=BLOCK, is_last=True),
        frame(1, 0, data=b"b" * BLOCK, offset=0, compression=Compression.ZSTD, is_last=True),
        frame(2, 0, data=b"beyond", offset=0, is_last=True),
    ]
    for now_ns, (message, body) in enumerate(attempts):
        stream.sent(DISK, message, body, now_ns=now_ns)
    stream.continues(DISK, 2, (1, 1))
    assert stream.image_at(DISK, 1, 1, size_bytes=2 * BLOCK) == b"b" * BLOCK + bytes(BLOCK)
    assert stream.image_at(DISK, 2, 0, size_bytes=2 * BLOCK) == b"b" * BLOCK + bytes(BLOCK)
    assert stream.image_at(DISK, 1, 2, size_bytes=2 * BLOCK).startswith(b"beyondb")
    assert stream.marked_ns == {POINT: 3}


def test_a_wrong_image_is_named_by_what_was_sent_and_when_its_blocks_were_so():
    history = SourceHistory(bytes(2 * BLOCK), 0)
    for version, (offset, letter) in enumerate([(0, b"a"), (BLOCK, b"b"), (0, b"c"), (BLOCK, b"d")], start=1):
        history.write(offset, letter * BLOCK, version)
    forgotten = b"a" * BLOCK + b"d" * BLOCK
    fuzzy = b"a" * BLOCK + b"d" * BLOCK
    assert name_fault(forgotten, bytes(2 * BLOCK), history, round_began=3) == APPLIED
    assert name_fault(forgotten, forgotten, history, round_began=3) == FORGOTTEN
    assert name_fault(fuzzy, fuzzy, history, round_began=2) == FUZZY
