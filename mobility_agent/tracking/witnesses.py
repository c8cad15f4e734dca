"""The places of a disk that show whether another system wrote to it: partition tables, and the beginning of each file
system.

Whoever mounts ext2, ext3, ext4, XFS or btrfs and changes anything changes the first WITNESS_BYTES of it: the superblock
counts mounts (ext), log positions (XFS) or commits (btrfs). A disk that holds anything else shows nothing. Nobody sees
who writes past the file systems.
"""

from __future__ import annotations

import mmap
from typing import Final

from blake3 import blake3

from mobility_agent.disk_identity import file_system_places
from mobility_agent.ports import SourceDisk

WITNESS_BYTES: Final = 128 * 1024
TABLE_BYTES: Final = 2**20
"""At the disk's beginning and end: partition tables, and what boot loaders keep beside them."""
PAGE_BYTES: Final = 4096


def read_witnesses(source: SourceDisk) -> bytes | None:
    """Digest of what the disk itself holds there now, read past the page cache; None where something on it shows
    nothing. Blocks. Raises DiskFault."""

    def read_at(offset_bytes: int, length_bytes: int) -> bytes:
        return _read(source, offset_bytes, length_bytes)

    places = file_system_places(read_at, source.sector_bytes)
    if not places or any(not is_known for _, is_known in places):
        return None
    digest = blake3(b"farpoint witnesses")
    table_at = max(0, source.size_bytes - TABLE_BYTES)
    regions = [(0, TABLE_BYTES), (table_at, TABLE_BYTES), *((start, WITNESS_BYTES) for start, _ in places)]
    for offset, length in regions:
        found = read_at(offset, length)
        digest.update(offset.to_bytes(8, "little") + len(found).to_bytes(8, "little") + found)
    return digest.digest()


def _read(source: SourceDisk, offset_bytes: int, length_bytes: int) -> bytes:
    """Fewer at the end of the disk."""
    first = offset_bytes // PAGE_BYTES * PAGE_BYTES
    end = min(offset_bytes + length_bytes, source.size_bytes)
    if end <= first:
        return b""
    whole_end = min(-(-end // PAGE_BYTES) * PAGE_BYTES, source.size_bytes)
    with mmap.mmap(-1, whole_end - first) as buffer, memoryview(buffer) as view:
        source.read_into(first, view)
        return bytes(view[offset_bytes - first : end - first])
