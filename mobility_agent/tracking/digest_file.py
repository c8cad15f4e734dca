"""What the history holds of each 64 KiB block of one disk: a keyed digest, and the sequence of the change set it
went out in.

An entry counts only if it is whole (its check fits, also after a torn write) and was not forgotten; what does not
count is sent again. The file is one epoch's: entering another epoch makes a new file of what the parent position
covers. Entries are written behind the ledger: an entry with sequence n is never in the file before the ledger holds n.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import numpy
from blake3 import blake3

from mobility_agent.core.extent_set import ExtentSet
from mobility_agent.errors import AgentStateDamaged
from protocol.vocabulary import DIGEST_BLOCK_BYTES, SEQUENCE_MAX, DiskId
from runtime.directory import DurableDirectory, DurableFile

FORMAT: Final = 1
MAGIC: Final = b"FPDIGEST"
HEADER_BYTES: Final = 4096
ENTRY_BYTES: Final = 32
DIGEST_BYTES: Final = 16
PAGE_ENTRIES: Final = 2048
"""64 KiB of entries: 128 MiB of disk. One page is held in memory."""
KEY_BYTES: Final = 32

_HEADER: Final = struct.Struct("<8sII16sQII32s")
"""magic, format, block bytes, disk, disk size, epoch, flags, key."""
_HEADER_CHECK_BYTES: Final = 16
_FLAG_BASE_IS_EMPTY: Final = 1

_NEVER_SENT: Final = bytes(ENTRY_BYTES)
_UNKNOWN: Final = b"\xff" * ENTRY_BYTES
_ALL_ONES: Final = numpy.uint64(2**64 - 1)
_NOTHING_SENT: Final = bytearray(PAGE_ENTRIES * ENTRY_BYTES)


class DigestFile:
    """One disk's digests. Calls block; they may come from several threads. Errors: AgentStateDamaged, OSError."""

    def __init__(
        self,
        directory: DurableDirectory,
        file: DurableFile,
        *,
        name: str,
        size_bytes: int,
        epoch: int,
        base_is_empty: bool,
        key: bytes,
    ) -> None:
        """Use create() or open()."""
        self._directory = directory
        self.name = name
        self.epoch = epoch
        self.base_is_empty = base_is_empty
        self.size_bytes = size_bytes
        self.block_count = -(-size_bytes // DIGEST_BLOCK_BYTES)
        self.key = key
        self._file = file
        self._lock = threading.Lock()
        self._check_key = blake3(b"farpoint digest entry check", key=key).digest()
        self._page_number = -1
        self._page = bytearray()
        self._zero_digest = self.digest(bytes(DIGEST_BLOCK_BYTES))
        tail_bytes = size_bytes - (self.block_count - 1) * DIGEST_BLOCK_BYTES
        self._zero_tail_digest = self.digest(bytes(tail_bytes))

    @staticmethod
    def create(
        directory: DurableDirectory,
        name: str,
        *,
        disk: DiskId,
        size_bytes: int,
        epoch: int,
        base_is_empty: bool,
        key: bytes,
    ) -> DigestFile:
        """A new file without entries, in place of one that may be there. base_is_empty: what was never sent reads as
        zeroes when recovered; otherwise it is unknown."""
        directory.remove(name)
        header = _HEADER.pack(
            MAGIC,
            FORMAT,
            DIGEST_BLOCK_BYTES,
            bytes.fromhex(disk),
            size_bytes,
            epoch,
            _FLAG_BASE_IS_EMPTY if base_is_empty else 0,
            key,
        )
        file = directory.open(name, create=True)
        file.truncate(_file_bytes(size_bytes))
        file.write(0, [header, blake3(header, key=key).digest(_HEADER_CHECK_BYTES)])
        file.synchronize()
        return DigestFile(
            directory, file, name=name, size_bytes=size_bytes, epoch=epoch, base_is_empty=base_is_empty, key=key
        )

    @staticmethod
    def open(directory: DurableDirectory, name: str, *, disk: DiskId, size_bytes: int) -> DigestFile:
        """Raises AgentStateDamaged when it is not a whole digest file of this disk, FileNotFoundError without one."""
        file = directory.open(name)
        try:
            header = bytearray(_HEADER.size + _HEADER_CHECK_BYTES)
            if file.read_into(0, header) < len(header):
                raise AgentStateDamaged(name=name, reason="it is too short")
            magic, version, block_bytes, owner, size, epoch, flags, key = _HEADER.unpack_from(header)
            check = blake3(header[: _HEADER.size], key=key).digest(_HEADER_CHECK_BYTES)
            if (magic, version, block_bytes) != (MAGIC, FORMAT, DIGEST_BLOCK_BYTES) or check != header[_HEADER.size :]:
                raise AgentStateDamaged(name=name, reason="its header is not whole or of another format")
            if owner != bytes.fromhex(disk) or size != size_bytes or file.size_bytes() != _file_bytes(size_bytes):
                raise AgentStateDamaged(name=name, reason="it describes another disk")
        except BaseException:
            file.close()
            raise
        return DigestFile(
            directory,
            file,
            name=name,
            size_bytes=size_bytes,
            epoch=epoch,
            base_is_empty=bool(flags & _FLAG_BASE_IS_EMPTY),
            key=key,
        )

    def digest(self, block: memoryview | bytes) -> bytes:
        """The keyed digest of one block's contents."""
        return blake3(block, key=self.key).digest(DIGEST_BYTES)

    def zero_digest(self, block: int) -> bytes:
        """The digest of this block full of zeroes; the last block may be short."""
        return self._zero_tail_digest if block == self.block_count - 1 else self._zero_digest

    def known(self, first_block: int, end_block: int) -> list[bytes | None]:
        """Per block the digest of what the history holds, None where that is unknown."""
        with self._lock:
            found: list[bytes | None] = []
            for page, first, end in _pages(first_block, end_block):
                self._load(page)
                found += [self._digest_in_page(page, index) for index in range(first, end)]
            return found

    def unknown_blocks(self, page: int) -> list[int]:
        """Of the blocks page * PAGE_ENTRIES and following, those that were forgotten."""
        with self._lock:
            self._load(page)
            words = numpy.frombuffer(self._page, dtype="<u8").reshape(PAGE_ENTRIES, 4)
            return (numpy.flatnonzero((words == _ALL_ONES).all(axis=1)) + page * PAGE_ENTRIES).tolist()

    def not_known_zero(self, first_block: int, end_block: int) -> Iterator[int]:
        """The blocks that the history does not certainly hold as zeroes, ascending. Quick where nothing was ever
        sent."""
        for page, first, end in _pages(first_block, end_block):
            with self._lock:
                self._load(page)
                if self.base_is_empty and self._page == _NOTHING_SENT:
                    continue
                words = numpy.frombuffer(self._page, dtype="<u8").reshape(PAGE_ENTRIES, 4)[first:end]
                if self.base_is_empty:
                    candidates = (numpy.flatnonzero(words.any(axis=1)) + first).tolist()
                else:
                    candidates = list(range(first, end))
                base = page * PAGE_ENTRIES
                wrong = [
                    base + index
                    for index in candidates
                    if self._digest_in_page(page, index) != self.zero_digest(base + index)
                ]
            yield from wrong

    def sequences(self, first_block: int, end_block: int) -> list[int | None]:
        """Per block the sequence of its entry; None where nothing counts, 0 for what the parent or an empty base
        holds."""
        with self._lock:
            found: list[int | None] = []
            for page, first, end in _pages(first_block, end_block):
                self._load(page)
                for index in range(first, end):
                    known = self._digest_in_page(page, index)
                    found.append(None if known is None else int.from_bytes(self._entry(index)[16:24], "little"))
            return found

    def holds_later_than(self, sequence: int) -> bool:
        """Whether any entry that counts is of a later change set. Reads what of the file was ever written."""
        for page in range(-(-self.block_count // PAGE_ENTRIES)):
            with self._lock:
                self._load(page)
                sequences = numpy.frombuffer(self._page, dtype="<u8").reshape(PAGE_ENTRIES, 4)[:, 2]
                later = numpy.flatnonzero((sequences > sequence) & (sequences <= SEQUENCE_MAX))
                if any(self._digest_in_page(page, index) is not None for index in later.tolist()):
                    return True
        return False

    def write(self, sequence: int, digests: Iterable[tuple[int, bytes]]) -> None:
        """Says that these (block, digest) went out in change set `sequence`. The ledger holds it already. Not
        synchronized."""
        with self._lock:
            tail = sequence.to_bytes(8, "little")
            entries = {block: digest + tail + self._check(block, digest + tail) for block, digest in digests}
            self._write_entries(sorted(entries), entries.__getitem__)

    def forget(self, extents: ExtentSet) -> None:
        """Makes the blocks in these extents unknown. Not synchronized."""
        with self._lock:
            for first_bytes, end_bytes in extents:
                first, end = first_bytes // DIGEST_BLOCK_BYTES, -(-end_bytes // DIGEST_BLOCK_BYTES)
                for page, low, high in _pages(first, min(end, self.block_count)):
                    base = page * PAGE_ENTRIES
                    self._put(base + low, _UNKNOWN * (high - low))

    def forget_blocks(self, blocks: Iterable[int]) -> None:
        """Makes these blocks unknown. Not synchronized. Those that lie near each other cost one write."""
        wanted = numpy.unique(numpy.fromiter(blocks, numpy.int64))
        with self._lock:
            for page in numpy.unique(wanted // PAGE_ENTRIES).tolist():
                self._load(page)
                rows = numpy.frombuffer(self._page, numpy.uint8).reshape(PAGE_ENTRIES, ENTRY_BYTES)
                places = wanted[wanted // PAGE_ENTRIES == page] % PAGE_ENTRIES
                places = places[(rows[places] != 0xFF).any(axis=1)]
                if not len(places):
                    continue
                first, end = int(places[0]), int(places[-1]) + 1
                entries = rows[first:end].copy()
                entries[places - first] = 0xFF
                self._put(page * PAGE_ENTRIES + first, entries.tobytes())

    def forget_older(self, extents: ExtentSet, sequence: int) -> None:
        """Makes the blocks in these extents unknown whose entry is older than `sequence`: a newer one was lost."""
        for first_bytes, end_bytes in extents:
            first, end = first_bytes // DIGEST_BLOCK_BYTES, min(-(-end_bytes // DIGEST_BLOCK_BYTES), self.block_count)
            for page, low, high in _pages(first, end):
                base = page * PAGE_ENTRIES
                found = self.sequences(base + low, base + high)
                stale = [base + low + index for index, at in enumerate(found) if at is None or at < sequence]
                with self._lock:
                    self._write_entries(stale, lambda _: _UNKNOWN)

    def synchronize(self) -> None:
        """On return all that was written or forgotten before survives power loss. After an OSError the file is gone."""
        try:
            self._file.synchronize()
        except OSError:
            # why: reads now show what the disk may not hold, and another synchronize would succeed all the same.
            self._directory.remove(self.name)
            raise

    def close(self) -> None:
        self._file.close()

    def next_epoch(
        self, directory: DurableDirectory, name: str, *, disk: DiskId, epoch: int, parent_sequence: int
    ) -> DigestFile:
        """A new, synchronized file for `epoch`, which continues this one's epoch behind parent_sequence.

        What went out at or before it counts with sequence 0; what went out later is unknown. This file stays as it is.
        """
        heir = DigestFile.create(
            directory,
            name,
            disk=disk,
            size_bytes=self.size_bytes,
            epoch=epoch,
            base_is_empty=self.base_is_empty,
            key=self.key,
        )
        for page in range(-(-self.block_count // PAGE_ENTRIES)):
            with self._lock:
                self._load(page)
                if self._page == _NOTHING_SENT:
                    continue
                entries = bytearray(self._page)
                words = numpy.frombuffer(entries, dtype="<u8").reshape(PAGE_ENTRIES, 4)
                for index in numpy.flatnonzero(words.any(axis=1)).tolist():
                    at = index * ENTRY_BYTES
                    entries[at : at + ENTRY_BYTES] = self._inherited(page, index, parent_sequence)
            heir._put_page(page, entries)
        heir.synchronize()
        return heir

    def _inherited(self, page: int, index: int, parent_sequence: int) -> bytes:
        digest = self._digest_in_page(page, index)
        sequence = int.from_bytes(self._entry(index)[16:24], "little")
        if digest is None or sequence > parent_sequence:
            return _UNKNOWN
        tail = bytes(8)
        return digest + tail + self._check(page * PAGE_ENTRIES + index, digest + tail)

    def _entry(self, index: int) -> bytes:
        return bytes(self._page[index * ENTRY_BYTES : (index + 1) * ENTRY_BYTES])

    def _digest_in_page(self, page: int, index: int) -> bytes | None:
        entry = self._entry(index)
        block = page * PAGE_ENTRIES + index
        if entry == _NEVER_SENT:
            return self.zero_digest(block) if self.base_is_empty else None
        if entry == _UNKNOWN or entry[24:] != self._check(block, entry[:24]):
            return None
        return entry[:DIGEST_BYTES]

    def _check(self, block: int, digest_and_sequence: bytes) -> bytes:
        return blake3(digest_and_sequence + block.to_bytes(8, "little"), key=self._check_key).digest(8)

    def _load(self, page: int) -> None:
        if page != self._page_number:
            buffer = bytearray(PAGE_ENTRIES * ENTRY_BYTES)
            self._file.read_into(HEADER_BYTES + len(buffer) * page, buffer)
            self._page, self._page_number = buffer, page

    def _put_page(self, page: int, entries: bytearray) -> None:
        """Writes a page of a fresh file."""
        used = min(PAGE_ENTRIES, self.block_count - page * PAGE_ENTRIES) * ENTRY_BYTES
        self._file.write(HEADER_BYTES + page * PAGE_ENTRIES * ENTRY_BYTES, [memoryview(entries)[:used]])

    def _write_entries(self, blocks: list[int], entry_of: Callable[[int], bytes]) -> None:
        """Writes entries of ascending blocks, neighbours in one go."""
        start = 0
        for index in range(1, len(blocks) + 1):
            if index == len(blocks) or blocks[index] != blocks[index - 1] + 1:
                run = blocks[start:index]
                self._put(run[0], b"".join(entry_of(block) for block in run))
                start = index

    def _put(self, block: int, entries: bytes) -> None:
        self._file.write(HEADER_BYTES + block * ENTRY_BYTES, [entries])
        count = len(entries) // ENTRY_BYTES
        first = self._page_number * PAGE_ENTRIES
        low, high = max(block, first), min(block + count, first + PAGE_ENTRIES)
        if self._page_number >= 0 and low < high:
            piece = entries[(low - block) * ENTRY_BYTES : (high - block) * ENTRY_BYTES]
            self._page[(low - first) * ENTRY_BYTES : (high - first) * ENTRY_BYTES] = piece


def _file_bytes(size_bytes: int) -> int:
    return HEADER_BYTES + -(-size_bytes // DIGEST_BLOCK_BYTES) * ENTRY_BYTES


def _pages(first_block: int, end_block: int) -> Iterator[tuple[int, int, int]]:
    """(page, first index, end index) that cover the blocks."""
    while first_block < end_block:
        page, first = divmod(first_block, PAGE_ENTRIES)
        end = min(PAGE_ENTRIES, first + end_block - first_block)
        yield page, first, end
        first_block += end - first
