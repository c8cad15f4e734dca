"""What the agent sent, applied here in the simplest way there is: tells whose fault a wrong image is.

The image of a position by the frames that were sent is compared with what recovery made of it. If they differ, storage
or recovery applied something else, or in another order. If they agree, the stream itself was no image of the source:
blocks that are older than the round that the point ends were forgotten; all else is fuzzy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy
import zstandard
from typing_extensions import Buffer

from protocol.messages import Frame
from protocol.vocabulary import EXTENT_DTYPE, FRAME_RAW_BYTES_MAX, ChangeKind, Compression, DiskId
from tests.simulation.source_history import SourceHistory

APPLIED: Final = "6-applied-once-and-in-order"
FORGOTTEN: Final = "2-dirty-is-not-forgotten"
FUZZY: Final = "3-point-equals-source"


@dataclass(frozen=True, slots=True, kw_only=True)
class SentFrame:
    """One frame as it left: its table and its payload."""

    body: bytes
    extent_count: int
    compression: Compression

    def apply(self, image: bytearray) -> None:
        table_bytes = self.extent_count * EXTENT_DTYPE.itemsize
        extents = numpy.frombuffer(self.body[:table_bytes], dtype=EXTENT_DTYPE)
        data = self.body[table_bytes:]
        if self.compression is Compression.ZSTD:
            data = zstandard.ZstdDecompressor().decompress(data, max_output_size=FRAME_RAW_BYTES_MAX)
        place = 0
        for offset, length, kind in extents[["offset", "length", "kind"]].tolist():
            if kind == ChangeKind.DATA:
                image[offset : offset + length] = data[place : place + length]
                place += length
            else:
                image[offset : offset + length] = bytes(length)


class SentStream:
    """All frames of one run, by their place in the stream; of one that was sent again the newest, which is the one that
    became durable."""

    def __init__(self) -> None:
        self._frames: dict[tuple[DiskId, int], dict[tuple[int, int], SentFrame]] = {}
        self._parents: dict[tuple[DiskId, int], tuple[int, int]] = {}
        self.marked_ns: dict[str, int] = {}
        """By point: when in truth its mark left the agent."""

    def sent(self, disk: DiskId, frame: Frame, body: Sequence[Buffer], *, now_ns: int) -> bytes:
        """Returns the frame's body."""
        data = b"".join(bytes(part) for part in body)
        frames = self._frames.setdefault((disk, frame.epoch), {})
        frames[frame.sequence, frame.frame_number] = SentFrame(
            body=data, extent_count=frame.extent_count, compression=frame.compression
        )
        if frame.end is not None:
            # why: what was sent in an earlier attempt behind this frame is not part of the change set
            number = frame.frame_number + 1
            while frames.pop((frame.sequence, number), None) is not None:
                number += 1
            if frame.end.bookmark is not None:
                self.marked_ns[frame.end.bookmark.point] = now_ns
        return data

    def continues(self, disk: DiskId, epoch: int, parent: tuple[int, int]) -> None:
        self._parents[disk, epoch] = parent

    def image_at(self, disk: DiskId, epoch: int, sequence: int, *, size_bytes: int) -> bytes:
        """The reference image of a position."""
        path = [(epoch, sequence)]
        while (parent := self._parents.get((disk, path[-1][0]), (0, 0)))[0]:
            path.append(parent)
        image = bytearray(size_bytes)
        for number, last in reversed(path):
            for (frame_sequence, _), frame in sorted(self._frames.get((disk, number), {}).items()):
                if frame_sequence <= last:
                    frame.apply(image)
        return bytes(image)


def name_fault(recovered: bytes, reference: bytes, history: SourceHistory, *, round_began: int) -> str:
    """The invariant that a wrong image breaks. round_began: the source's version when the point's round began."""
    if recovered != reference:
        return APPLIED
    return FORGOTTEN if history.has_block_older_than(recovered, round_began) else FUZZY
