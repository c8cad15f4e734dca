"""What an operator may set for a process server, and the limits that its shells are given from it.

`ProcessServerLimits` is what the service itself takes: plain numbers, so that a test or the simulation needs no
settings file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocol.vocabulary import check_range

MEBIBYTE: Final = 2**20
GIBIBYTE: Final = 2**30
CACHE_FILE_BYTES_MIN: Final = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessServerLimits:
    """Bounds and periods of the running service. Bytes, seconds, counts.

    The cache never occupies more than cache_bytes_max on disk. It needs at least four files: one being written, one
    kept free for what closes segments when the cache is full, and two for frames.
    """

    cache_bytes_max: int = 16 * GIBIBYTE
    cache_file_bytes: int = 256 * MEBIBYTE
    segment_stored_bytes_due: int = 8 * MEBIBYTE
    segment_age_seconds_max: float = 5.0
    compression_level: int = 1
    uploads_per_disk_max: int = 4
    upload_bytes_in_memory_max: int = 80 * MEBIBYTE
    upload_pause_seconds_first: float = 0.5
    upload_pause_seconds_max: float = 30.0
    received_bytes_in_memory_max: int = 64 * MEBIBYTE
    idle_seconds_max: int = 60
    report_seconds: float = 10.0
    stop_seconds_max: float = 30.0

    def __post_init__(self) -> None:
        check_range(self.cache_file_bytes, "cache_file_bytes", low=CACHE_FILE_BYTES_MIN, high=2**40)
        check_range(self.cache_bytes_max, "cache_bytes_max", low=4 * self.cache_file_bytes, high=2**60)
        check_range(self.segment_stored_bytes_due, "segment_stored_bytes_due", low=1, high=16 * MEBIBYTE)
        check_range(self.compression_level, "compression_level", low=-7, high=19)
        check_range(self.uploads_per_disk_max, "uploads_per_disk_max", low=1, high=32)
        check_range(self.idle_seconds_max, "idle_seconds_max", low=3, high=3600)
