"""Reads one step ahead of the sender: while frames of one step travel, the next step is read, compared and packed.

Buffers are the bound: a step begins only when a pair is free, and a pair goes back when its last frame was sent.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Final

import zstandard
from typing_extensions import Buffer

from mobility_agent.frame_buffers import BufferPair, FrameBuffers
from mobility_agent.io_priority import IoPriority, set_io_priority
from mobility_agent.tracking.change_source import Round, SourceFrame
from protocol.vocabulary import Compression
from runtime.blocking import ended, finished

COMPRESSION_LEVEL: Final = 1
COMPRESSED_SHARE_MAX: Final = 0.95
"""A payload that shrinks less than this travels as it is."""

_per_thread = threading.local()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyFrame:
    """A frame as it travels. Release it when it was sent, or will not be."""

    source: SourceFrame
    payload: tuple[Buffer, ...]
    payload_bytes: int
    compression: Compression
    buffers: BufferPair | None

    def release(self) -> None:
        if self.buffers is not None:
            self.buffers.release()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyStep:
    """The frames of one step, ascending, perhaps none; the round had come to compared_to_bytes behind them."""

    frames: list[ReadyFrame]
    compared_to_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    frames: list[tuple[SourceFrame, bytes | None]]
    compared_to_bytes: int


class ReadAhead:
    """The frames of one round, in order. close() it."""

    def __init__(
        self,
        changes: Round,
        buffers: FrameBuffers,
        executor: Executor,
        *,
        compress: bool,
        priority: IoPriority = IoPriority.NORMAL,
        is_ahead: bool = True,
    ) -> None:
        """priority: of its reads. is_ahead: it reads on before it is asked for more."""
        self._is_ahead = is_ahead
        self._changes = changes
        self._buffers = buffers
        self._executor = executor
        self._compress = compress
        self._priority = priority
        self._pair: BufferPair | None = None
        self._step: asyncio.Future[_Found] | None = None

    async def next(self) -> ReadyStep | None:
        """The next step; None at the end of the round. Raises what reading raised."""
        if self._step is None:
            if self._changes.is_exhausted:
                return None
            self._begin(await self._buffers.acquire())
        step, pair = self._step, self._pair
        assert step is not None
        assert pair is not None
        found = await finished(step)
        self._pair = self._step = None
        ready = [_ready(frame, compressed, pair) for frame, compressed in found.frames]
        pair.release()
        if self._is_ahead and not self._changes.is_exhausted:
            next_pair = self._buffers.try_acquire()
            if next_pair is not None:
                self._begin(next_pair)
        return ReadyStep(frames=ready, compared_to_bytes=found.compared_to_bytes)

    async def close(self) -> None:
        """Waits for a step in work, cancelled or not, and gives its buffers back."""
        step, self._step = self._step, None
        pair, self._pair = self._pair, None
        try:
            if step is not None:
                await ended(step)
        finally:
            if pair is not None:
                pair.release()

    def _begin(self, pair: BufferPair) -> None:
        self._pair = pair
        self._step = asyncio.get_running_loop().run_in_executor(
            self._executor, _read, self._changes, pair, self._compress, self._priority
        )


def _read(changes: Round, pair: BufferPair, compress: bool, priority: IoPriority) -> _Found:
    """Runs in the executor."""
    set_io_priority(priority)
    try:
        found = changes.read(pair.window, pair.packing)
    finally:
        # why: the thread's next work may be a live disk's, or the ledger's
        set_io_priority(IoPriority.NORMAL)
    frames = [(frame, _compressed(frame) if compress else None) for frame in found]
    return _Found(frames=frames, compared_to_bytes=changes.compared_to_bytes)


def _compressed(frame: SourceFrame) -> bytes | None:
    """The payload compressed, None where that is not worth it."""
    raw_bytes = frame.packed.raw_bytes
    if not raw_bytes:
        return None
    compressor = getattr(_per_thread, "compressor", None)
    if compressor is None:
        compressor = _per_thread.compressor = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL)
    payload = frame.packed.payload
    data = compressor.compress(payload[0] if len(payload) == 1 else b"".join(payload))
    return data if len(data) <= raw_bytes * COMPRESSED_SHARE_MAX else None


def _ready(frame: SourceFrame, compressed: bytes | None, pair: BufferPair) -> ReadyFrame:
    holds = frame.buffer_index is not None
    if holds:
        # why: also where the compressed payload is all that travels: the pairs bound what is on its way of all disks.
        pair.hold()
    if compressed is not None:
        return ReadyFrame(
            source=frame,
            payload=(compressed,),
            payload_bytes=len(compressed),
            compression=Compression.ZSTD,
            buffers=pair,
        )
    return ReadyFrame(
        source=frame,
        payload=frame.packed.payload,
        payload_bytes=frame.packed.raw_bytes,
        compression=Compression.NONE,
        buffers=pair if holds else None,
    )
