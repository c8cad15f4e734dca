"""How fast copy-ins may read, over all disks of one agent: a rate that is exceeded by no more than a step of each."""

from __future__ import annotations


class ReadPace:
    """Bytes that were read are paid for afterwards, by waiting."""

    def __init__(self, bytes_per_second: float) -> None:
        """0: as fast as it goes."""
        self._bytes_per_second = bytes_per_second
        self._paid_until_seconds = 0.0

    @property
    def is_bounded(self) -> bool:
        return self._bytes_per_second > 0

    def wait_seconds(self, read_bytes: int, now_seconds: float) -> float:
        """How long whoever has just read so much waits before the next read. Time in which nobody read is not saved."""
        if not self._bytes_per_second:
            return 0.0
        self._paid_until_seconds = max(self._paid_until_seconds, now_seconds) + read_bytes / self._bytes_per_second
        return self._paid_until_seconds - now_seconds
