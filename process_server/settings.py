"""What an operator may set for a process server, and the limits that its shells are given from it.

`ProcessServerLimits` is what the service itself takes: plain numbers, so that a test or the simulation needs no
settings file.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from pydantic import Field, field_validator, model_validator

from process_server.core.backpressure import FRAME_ROOM_BYTES_MIN
from protocol.errors import InvalidValue
from protocol.vocabulary import check_range
from runtime.logs import LogSettings
from runtime.observability import ListenAddress, ObservabilitySettings
from runtime.settings import Settings
from runtime.units import Bytes, Seconds

PROGRAM: Final = "process-server"
DEFAULT_DIRECTORY: Final = Path("/var/lib/farpoint/process-server")
DEFAULT_LISTEN_ADDRESS: Final = "0.0.0.0:9443"  # agents come from everywhere, with certificates
DEFAULT_OBSERVABILITY_ADDRESS: Final = "127.0.0.1:9465"

MEBIBYTE: Final = 2**20
GIBIBYTE: Final = 2**30
CACHE_BYTES_MIN: Final = 8 * MEBIBYTE
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
    upload_bytes_in_memory_max: int = 48 * MEBIBYTE
    upload_pause_seconds_first: float = 0.5
    upload_pause_seconds_max: float = 30.0
    received_bytes_in_memory_max: int = 48 * MEBIBYTE
    idle_seconds_max: int = 60
    report_seconds: float = 10.0
    stop_seconds_max: float = 30.0

    def __post_init__(self) -> None:
        check_range(self.cache_file_bytes, "cache_file_bytes", low=CACHE_FILE_BYTES_MIN, high=2**40)
        check_range(self.cache_bytes_max, "cache_bytes_max", low=4 * self.cache_file_bytes, high=2**60)
        # why: two files may hold nothing that can be removed, and the end of any other may be too short for a record
        frame_room_bytes = (self.cache_bytes_max // self.cache_file_bytes - 2) * (self.cache_file_bytes // 2)
        if frame_room_bytes < FRAME_ROOM_BYTES_MIN:
            rule = f"must leave room for a whole frame beside two files of {self.cache_file_bytes} bytes"
            raise InvalidValue(what="cache_bytes_max", value=self.cache_bytes_max, rule=rule)
        check_range(self.segment_stored_bytes_due, "segment_stored_bytes_due", low=1, high=16 * MEBIBYTE)
        check_range(self.compression_level, "compression_level", low=-7, high=19)
        check_range(self.uploads_per_disk_max, "uploads_per_disk_max", low=1, high=32)
        check_range(self.idle_seconds_max, "idle_seconds_max", low=3, high=3600)


class ProcessServerSettings(Settings):
    """What an operator may set. Seconds and bytes where the name says so."""

    state_directory: Path = DEFAULT_DIRECTORY
    """Identity, certificate, keys, grants."""
    cache_directory: Path | None = None
    """The cache's log files; `cache` in the state directory if not set. A disk of its own is best."""
    store: str = ""
    """file:///absolute/path or azure://account/container/prefix."""
    store_credentials_file: Path | None = None
    listen: str = DEFAULT_LISTEN_ADDRESS
    """HOST:PORT for agents."""
    host: Annotated[str, Field(min_length=1, max_length=255)] = Field(default_factory=socket.gethostname)
    """By what name or address agents reach this process server; they are told so by the configuration server."""
    cache_bytes_max: Annotated[Bytes, Field(ge=CACHE_BYTES_MIN)] = 16 * GIBIBYTE
    """The cache's hard limit on its disk."""
    cache_file_bytes: Annotated[Bytes, Field(ge=CACHE_FILE_BYTES_MIN)] = 256 * MEBIBYTE
    segment_stored_bytes_due: Annotated[Bytes, Field(ge=2**16, le=16 * MEBIBYTE)] = 8 * MEBIBYTE
    segment_age_seconds_max: Annotated[Seconds, Field(ge=0.1, le=5.0)] = 5.0
    compression_level: Annotated[int, Field(ge=-7, le=19)] = 1
    uploads_per_disk_max: Annotated[int, Field(ge=1, le=32)] = 4
    sealing_threads: Annotated[int, Field(ge=1, le=16)] = 2
    idle_seconds_max: Annotated[int, Field(ge=3, le=3600)] = 60
    stop_seconds_max: Annotated[Seconds, Field(ge=1.0, le=600.0)] = 25.0
    renew_after_seconds: Annotated[Seconds, Field(ge=1, le=13 * 86400)] = 86400.0
    """The age at which the certificate is renewed, with a new key."""
    log: LogSettings = LogSettings()
    observability: ObservabilitySettings = ObservabilitySettings(address=DEFAULT_OBSERVABILITY_ADDRESS)

    @field_validator("listen")
    @classmethod
    def _check_listen(cls, value: str) -> str:
        ListenAddress.parse(value)
        return value

    @model_validator(mode="after")
    def _check_limits(self) -> ProcessServerSettings:
        try:
            self.limits()
        except InvalidValue as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def listen_address(self) -> ListenAddress:
        return ListenAddress.parse(self.listen)

    @property
    def cache_path(self) -> Path:
        return self.cache_directory or self.state_directory / "cache"

    def limits(self) -> ProcessServerLimits:
        """What the service takes of all this."""
        return ProcessServerLimits(
            cache_bytes_max=self.cache_bytes_max,
            cache_file_bytes=min(self.cache_file_bytes, max(CACHE_FILE_BYTES_MIN, self.cache_bytes_max // 4)),
            segment_stored_bytes_due=self.segment_stored_bytes_due,
            segment_age_seconds_max=self.segment_age_seconds_max,
            compression_level=self.compression_level,
            uploads_per_disk_max=self.uploads_per_disk_max,
            idle_seconds_max=self.idle_seconds_max,
            stop_seconds_max=self.stop_seconds_max,
        )
