"""Reads that are under way at once, of a real file: each piece where it belongs, and what did not come is named."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

from mobility_agent.parallel_reads import READS_MAX, ParallelReads

FILE_BYTES = 4 * 2**20
PIECE_BYTES = 4096
FIRSTS = list(range(0, FILE_BYTES, 3 * PIECE_BYTES))
assert len(FIRSTS) > 3 * READS_MAX


class Reading:
    """A file, the calls for it, and a buffer to read into."""

    def __init__(self, path: Path) -> None:
        self.data = os.urandom(FILE_BYTES)
        path.write_bytes(self.data)
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.reads = ParallelReads(self.descriptor)
        self.buffer = memoryview(mmap.mmap(-1, FILE_BYTES))

    def read(self, firsts: list[int], length: int = PIECE_BYTES) -> list[int]:
        """The numbers of the pieces that did not come; all others are checked."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))
        self.buffer[:] = bytes(FILE_BYTES)
        lengths = numpy.full(len(firsts), length, numpy.int64)
        places = numpy.arange(len(firsts), dtype=numpy.int64) * length
        missing = self.reads.read(numpy.array(firsts, numpy.int64), lengths, address + places)
        for number, first in enumerate(firsts):
            if number not in missing:
                assert self.buffer[number * length : (number + 1) * length] == self.data[first : first + length]
        return missing


@pytest.fixture
def reading(tmp_path: Path) -> Iterator[Reading]:
    one = Reading(tmp_path / "file")
    yield one
    one.reads.close()
    os.close(one.descriptor)


@pytest.mark.parametrize("count", [0, 1, READS_MAX, READS_MAX + 1, len(FIRSTS)])
def test_all_pieces_come(reading: Reading, count: int) -> None:
    assert reading.read(FIRSTS[:count]) == []
    assert reading.read(FIRSTS[:count][::-1]) == []


def test_what_is_short_or_behind_the_end_is_named(reading: Reading) -> None:
    behind, over = FILE_BYTES + PIECE_BYTES, FILE_BYTES - 512
    assert reading.read([0, behind, PIECE_BYTES, over, 2 * PIECE_BYTES]) == [1, 3]
    assert reading.read([*FIRSTS[:READS_MAX], behind]) == [READS_MAX]
    assert reading.read(FIRSTS) == []


def test_a_descriptor_that_cannot_be_read_gives_nothing(reading: Reading, tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "written", os.O_WRONLY | os.O_CREAT)
    reading.reads._requests["descriptor"] = descriptor
    assert reading.read(FIRSTS[:5]) == [0, 1, 2, 3, 4]
    reading.reads._requests["descriptor"] = reading.descriptor
    assert reading.read(FIRSTS) == []
    os.close(descriptor)


def intercept(reading: Reading, monkeypatch: pytest.MonkeyPatch, call: Any) -> None:
    original = reading.reads._call
    monkeypatch.setattr(reading.reads, "_call", lambda number, *arguments: call(original, number, *arguments))


@pytest.mark.parametrize("taken", [1, 7, READS_MAX - 1])
def test_a_kernel_that_takes_few_at_a_time_is_asked_again(
    reading: Reading, monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    calls = []

    def few(original: Any, number: int, *arguments: Any) -> int:
        if number == reading.reads._submit:
            calls.append(number)
            context, count, pointers = arguments
            arguments = (context, ctypes.c_long(min(count.value, taken)), pointers)
        return original(number, *arguments)  # type: ignore[no-any-return]

    intercept(reading, monkeypatch, few)
    assert reading.read(FIRSTS[:READS_MAX]) == []
    assert len(calls) == -(-READS_MAX // taken)


@pytest.mark.parametrize("how", ["none", "error"])
def test_what_the_kernel_does_not_take_is_named(reading: Reading, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    calls = []

    def refuse(original: Any, number: int, *arguments: Any) -> int:
        if number == reading.reads._submit:
            calls.append(number)
            if len(calls) > 1:
                if how == "none":
                    return 0
                raise OSError(errno.EAGAIN, "no room")
            context, _, pointers = arguments
            arguments = (context, ctypes.c_long(5), pointers)
        return original(number, *arguments)  # type: ignore[no-any-return]

    intercept(reading, monkeypatch, refuse)
    assert reading.read(FIRSTS[:9]) == [5, 6, 7, 8]


def test_an_interrupted_wait_goes_on(reading: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted = []

    def interrupt(original: Any, number: int, *arguments: Any) -> int:
        if number == reading.reads._get_events and len(interrupted) < 3:
            interrupted.append(number)
            raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
        return original(number, *arguments)  # type: ignore[no-any-return]

    intercept(reading, monkeypatch, interrupt)
    assert reading.read(FIRSTS[:9]) == []
    assert len(interrupted) == 3


@pytest.mark.parametrize("error", [OSError(errno.EINVAL, "odd"), MemoryError(), KeyboardInterrupt()])
def test_after_a_wait_that_fails_nothing_is_under_way_and_nothing_is_believed(
    reading: Reading, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    destroyed = []

    def fail(original: Any, number: int, *arguments: Any) -> int:
        if number == reading.reads._get_events:
            raise error
        if number == reading.reads._destroy:
            destroyed.append(number)
        return original(number, *arguments)  # type: ignore[no-any-return]

    with monkeypatch.context() as patched:
        intercept(reading, patched, fail)
        if isinstance(error, OSError):
            assert reading.read(FIRSTS[:9]) == list(range(9))
        else:
            with pytest.raises(type(error)):
                reading.read(FIRSTS[:9])
        assert len(destroyed) == 1, "destroying waits for what is under way"
    assert reading.read(FIRSTS[:3]) == [0, 1, 2], "nobody takes the late events of others for these"


def test_after_closing_nothing_comes(reading: Reading) -> None:
    reading.reads.close()
    reading.reads.close()
    assert reading.read(FIRSTS[:3]) == [0, 1, 2]


def test_several_threads_get_each_their_own(reading: Reading) -> None:
    address = ctypes.addressof(ctypes.c_char.from_buffer(reading.buffer))
    failures: list[str] = []

    def read(slot: int) -> None:
        room = FILE_BYTES // 4
        pieces = room // PIECE_BYTES // 2
        for turn in range(20):
            firsts = numpy.array([((slot + turn + 7 * n) * PIECE_BYTES) % FILE_BYTES for n in range(pieces)])
            places = slot * room + numpy.arange(pieces) * PIECE_BYTES
            if reading.reads.read(firsts, numpy.full(pieces, PIECE_BYTES), address + places):
                failures.append(f"{slot}: missing")
            for first, place in zip(firsts.tolist(), places.tolist(), strict=True):
                if reading.buffer[place : place + PIECE_BYTES] != reading.data[first : first + PIECE_BYTES]:
                    failures.append(f"{slot}: {first}")

    threads = [threading.Thread(target=read, args=(slot,)) for slot in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_signals_do_not_disturb_it(reading: Reading) -> None:
    seen = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        while len(seen) < 20:
            assert reading.read(FIRSTS) == []
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
