"""Computes anew the digests that were lost because only a part of their block was sent, little by little, while the
disk is idle.

A digest is recorded only if the history certainly holds what was read: the block had no mark before the read and has
none after it, and at a moment after it, with nothing in flight, the programs had seen all that the kernel counted. What
nobody saw being written can so never be taken for what was sent.
"""

from __future__ import annotations

import mmap
import time
from typing import Final

from mobility_agent.core.write_audit import AuditBase
from mobility_agent.ports import SourceDisk
from mobility_agent.tracking.block_bits import WINDOW_BYTES, Bits, BlockLayout
from mobility_agent.tracking.digest_file import PAGE_ENTRIES, DigestFile
from mobility_agent.tracking.followed_disk import FollowedDisk
from protocol.vocabulary import DIGEST_BLOCK_BYTES

PAGES_MAX: Final = 16
"""Of digests that are looked through at a time: 2 GiB of the disk."""
BLOCKS_MAX: Final = 64
SECONDS_MAX: Final = 0.05
"""A round waits for no more than this and one read."""


class DigestRenewal:
    """Of one disk. Calls block shortly; one thread at a time."""

    def __init__(self, source: SourceDisk, tracked: FollowedDisk) -> None:
        self._source = source
        self._tracked = tracked
        self._next_page = 0
        self._pages_without = 0
        """Looked through one after the other without finding anything to do."""

    def expect(self) -> None:
        """Digests became unknown."""
        self._pages_without = 0

    def renew(self, digests: DigestFile, *, sequence: int) -> int:
        """sequence: of the newest change set, which was acknowledged. Returns how many became known. Raises DiskFault,
        OSError."""
        found = self._find(digests)
        if not found:
            return 0
        deadline = time.monotonic() + SECONDS_MAX
        read: list[tuple[int, bytes]] = []
        with mmap.mmap(-1, DIGEST_BLOCK_BYTES) as buffer, memoryview(buffer) as view:
            for block in found:
                if time.monotonic() > deadline:
                    break
                first = block * DIGEST_BLOCK_BYTES
                with view[: min(DIGEST_BLOCK_BYTES, digests.size_bytes - first)] as part:
                    self._source.read_into(first, part)
                    read.append((block, digests.digest(part)))
        if not self._has_all_been_seen():
            return 0
        sound = [(block, digest) for block, digest in read if not self._is_marked(block)]
        digests.write(sequence, sound)
        return len(sound)

    def _find(self, digests: DigestFile) -> list[int]:
        """Blocks with an unknown digest and no mark, of the next pages that have any."""
        pages = -(-digests.block_count // PAGE_ENTRIES)
        found: list[int] = []
        for _ in range(min(PAGES_MAX, pages)):
            if self._pages_without >= pages:
                break
            page = self._next_page % pages
            unknown = digests.unknown_blocks(page)
            self._pages_without = 0 if unknown else self._pages_without + 1
            found += [block for block in unknown if not self._is_marked(block)]
            if len(found) >= BLOCKS_MAX:
                return found[:BLOCKS_MAX]
            self._next_page = page + 1
        return found

    def _is_marked(self, block: int) -> bool:
        window, place = divmod(block * DIGEST_BLOCK_BYTES, WINDOW_BYTES)

        def is_in(layout: BlockLayout, bits: Bits) -> bool:
            first = place // layout.block_bytes
            return bool(layout.mask_of(bits, window)[first : first + layout.digest_blocks].any())

        return any(is_in(layout, bits) for layout, bits in self._tracked.all_maps())

    def _has_all_been_seen(self) -> bool:
        """Whether each write that can have been read was seen: none is in flight, and what has completed adds up."""
        facts = self._tracked.facts
        if self._tracked.kernel_in_flight():
            return False
        reading, counters = self._tracked.read_audit(), self._tracked.counters()
        return (
            AuditBase.of(reading).completed_ahead == facts.audit_base.completed_ahead
            and AuditBase.of(reading).submitted_ahead <= facts.audit_base.submitted_ahead
            and reading.missed_submissions == facts.audit_base.missed_submissions
            and counters.never_completed == facts.never_completed
            and self._tracked.unplaced_changes(counters) is None
        )
