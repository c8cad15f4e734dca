"""Many reads of one disk under way at once, by the kernel's own asynchronous I/O (io_submit(2), since 2.6).

One read after the other costs a wake-up each, and on a disk with many queues nearly all of its speed. Where reads go
past the page cache all of them are under way together; others are done one by one within io_submit().
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import threading
from typing import Final

import numpy
import numpy.typing

READS_MAX: Final = 64
"""Under way at once."""
_SYSTEM_CALLS: Final = {  # io_setup, io_destroy, io_submit, io_getevents
    "x86_64": (206, 207, 209, 208),
    "aarch64": (0, 1, 2, 4),
}
_NOTHING_CAME: Final = -1
_READ: Final = 0
"""IOCB_CMD_PREAD"""
_REQUEST: Final = numpy.dtype(  # struct iocb of <linux/aio_abi.h>, where numbers are little-endian
    [
        ("number", "<u8"),
        ("key", "<u4"),
        ("flags_of_read", "<u4"),
        ("operation", "<u2"),
        ("priority", "<i2"),
        ("descriptor", "<u4"),
        ("address", "<u8"),
        ("length", "<u8"),
        ("offset", "<i8"),
        ("reserved", "<u8"),
        ("flags", "<u4"),
        ("event_descriptor", "<u4"),
    ]
)
_EVENT: Final = numpy.dtype([("number", "<u8"), ("request", "<u8"), ("result", "<i8"), ("result_2", "<i8")])
_library = ctypes.CDLL(None, use_errno=True)

Places = numpy.typing.NDArray[numpy.int64]


class ParallelReads:
    """Of one open file. Close it before the file."""

    def __init__(self, descriptor: int) -> None:
        """Raises OSError where the kernel has no such calls, refuses them, or has too many users of them
        (fs.aio-max-nr)."""
        numbers = _SYSTEM_CALLS.get(os.uname().machine)
        if numbers is None or sys.maxsize < 2**32:
            raise OSError(errno.ENOSYS, "no asynchronous I/O is known for this architecture")
        self._setup, self._destroy, self._submit, self._get_events = numbers
        self._requests = numpy.zeros(READS_MAX, _REQUEST)
        self._requests["number"] = numpy.arange(READS_MAX)
        self._requests["operation"] = _READ
        self._requests["descriptor"] = descriptor
        self._pointers = self._requests.ctypes.data + _REQUEST.itemsize * numpy.arange(READS_MAX, dtype="<u8")
        self._events = numpy.zeros(READS_MAX, _EVENT)
        self._context = ctypes.c_ulong(0)
        self._lock = threading.Lock()
        """Who waits for events gets those of all."""
        self._call(self._setup, ctypes.c_long(READS_MAX), ctypes.byref(self._context))

    def read(self, offsets_bytes: Places, lengths_bytes: Places, addresses: Places) -> list[int]:
        """Reads each of the pieces to its address; returns the numbers of those that did not come whole, of which the
        memory may hold anything. After it, whichever way it ended, nothing is written there any more."""
        missing: list[int] = []
        with self._lock:
            for first in range(0, len(offsets_bytes), READS_MAX):
                batch = slice(first, first + READS_MAX)
                lengths = lengths_bytes[batch]
                count = len(lengths)
                requests, results = self._requests[:count], numpy.full(count, _NOTHING_CAME, numpy.int64)
                requests["offset"], requests["length"] = offsets_bytes[batch], lengths
                requests["address"] = addresses[batch]
                try:
                    self._collect(self._begin(count), results)
                except OSError:
                    self._end()
                    results[:] = _NOTHING_CAME
                except BaseException:
                    self._end()
                    raise
                missing += (numpy.flatnonzero(results != lengths) + first).tolist()
        return missing

    def close(self) -> None:
        """Waits for reads that are under way. What is read from then on does not come."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        """On return nothing is under way."""
        context, self._context = self._context, ctypes.c_ulong(0)
        if context.value:
            self._call(self._destroy, context)

    def _begin(self, count: int) -> int:
        """How many of the first `count` requests are under way: what the kernel does not take is not read."""
        begun = 0
        while begun < count:
            try:
                taken = self._call(
                    self._submit,
                    self._context,
                    ctypes.c_long(count - begun),
                    ctypes.c_void_p(self._pointers[begun:].ctypes.data),
                )
            except OSError:
                break
            if not taken:
                break
            begun += taken
        return begun

    def _collect(self, begun: int, results: Places) -> None:
        """Fills in, by request: the bytes that came, or an error below 0."""
        while begun:
            try:
                ended = self._call(
                    self._get_events,
                    self._context,
                    ctypes.c_long(begun),
                    ctypes.c_long(begun),
                    ctypes.c_void_p(self._events.ctypes.data),
                    None,
                )
            except InterruptedError:
                continue
            events = self._events[:ended]
            results[events["number"].astype(numpy.int64)] = events["result"]
            begun -= ended

    def _call(self, number: int, *arguments: object) -> int:
        returned: int = _library.syscall(ctypes.c_long(number), *arguments)
        if returned < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        return returned
