"""Seals frames in worker threads, one hand-over per frame; the order of a disk's frames is kept by whoever awaits them.

Invariants: at most what the executor has threads is sealed at one time; a data key lives in its segment's sealer and
nowhere else; what comes out is a cache record, so that the event loop touches no payload.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from process_server.cache_log import CacheRecord, RecordKind
from process_server.grants import HeldGrant
from process_server.metrics import ProcessServerMetrics
from protocol.messages import Frame
from protocol.vocabulary import EXTENT_DTYPE
from storage.frame_record import HEAD_DIGEST_BYTES, FrameEntry
from storage.keys import DATA_KEY_BYTES
from storage.sealing import FrameCompressor, SegmentSealer
from storage.segment import SegmentOpening


class SegmentSealing:
    """One segment's sealer, made by the first worker thread that needs it: wrapping the data key is CPU work too."""

    def __init__(
        self,
        *,
        held: HeldGrant,
        ordinal: int,
        first_sequence: int,
        data_key: bytes,
        vault_public_key: X25519PublicKey,
        compressor: FrameCompressor,
    ) -> None:
        self._lock = threading.Lock()
        self._sealer: SegmentSealer | None = None
        self._make: Callable[[], SegmentSealer] | None = lambda: SegmentSealer(
            grant=held.grant,
            signed_grant=held.signed,
            ordinal=ordinal,
            first_sequence=first_sequence,
            data_key=data_key,
            vault_public_key=vault_public_key,
            compressor=compressor,
        )

    def sealer(self) -> SegmentSealer:
        """From a worker thread."""
        with self._lock:
            if self._sealer is None:
                assert self._make is not None
                self._sealer, self._make = self._make(), None
            return self._sealer

    @property
    def opening(self) -> SegmentOpening:
        """Known once the first frame is sealed."""
        assert self._sealer is not None
        return self._sealer.opening


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SealedRecord:
    """A frame as the cache takes it, and its entry for the segment's index."""

    record: CacheRecord
    entry: FrameEntry


class Sealer:
    """Hands frames to the executor. One per process server."""

    def __init__(
        self,
        executor: Executor,
        metrics: ProcessServerMetrics,
        *,
        random_bytes: Callable[[int], bytes],
        compression_level: int,
    ) -> None:
        self._executor = executor
        self._metrics = metrics
        self._random_bytes = random_bytes
        self._level = compression_level
        self._compressor = FrameCompressor()

    def begin_segment(
        self, held: HeldGrant, *, ordinal: int, first_sequence: int, vault_public_key: X25519PublicKey
    ) -> SegmentSealing:
        """A sealer with a fresh data key."""
        return SegmentSealing(
            held=held,
            ordinal=ordinal,
            first_sequence=first_sequence,
            data_key=self._random_bytes(DATA_KEY_BYTES),
            vault_public_key=vault_public_key,
            compressor=self._compressor,
        )

    def seal(
        self, sealing: SegmentSealing, frame: Frame, body: memoryview, *, ordinal: int, nonce_number: int
    ) -> asyncio.Future[SealedRecord]:
        """The frame's record, some time later. `body` must stay as it is until then.

        The future raises MalformedInput if the payload is not what the frame says.
        """

        def work() -> SealedRecord:
            with self._metrics.stages.stage("seal", size_bytes=frame.raw_bytes):
                sealed = _seal(
                    sealing.sealer(), frame, body, ordinal=ordinal, nonce_number=nonce_number, level=self._level
                )
            self._metrics.sealed_bytes.inc(sealed.record.payload_bytes)
            return sealed

        self._metrics.received_bytes.inc(len(body))
        return asyncio.get_running_loop().run_in_executor(self._executor, work)


def _seal(
    sealer: SegmentSealer, frame: Frame, body: memoryview, *, ordinal: int, nonce_number: int, level: int
) -> SealedRecord:
    table_bytes = frame.extent_count * EXTENT_DTYPE.itemsize
    sealed = sealer.seal(
        sequence=frame.sequence,
        frame_number=frame.frame_number,
        nonce_number=nonce_number,
        extents=numpy.frombuffer(body[:table_bytes], dtype=EXTENT_DTYPE),
        raw_bytes=frame.raw_bytes,
        payload=body[table_bytes:],
        compression=frame.compression,
        end=frame.end,
        level=level,
    )
    head = sealed.entry.head
    record = CacheRecord(
        kind=RecordKind.FRAME,
        disk=head.disk,
        epoch=head.epoch,
        ordinal=ordinal,
        parts=(sealed.record,),
        payload_bytes=head.record_bytes,
        digest=sealed.entry.head_bytes[-HEAD_DIGEST_BYTES:],
    )
    return SealedRecord(record=record, entry=sealed.entry)
