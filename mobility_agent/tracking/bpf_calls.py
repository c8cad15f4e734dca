"""The system call bpf(2), as far as tracking needs it: no library, no compiler, nothing but the kernel's own interface.

Structures are laid out as <linux/bpf.h> has them; a kernel takes shorter ones as if they ended in zeroes. Descriptors
are the caller's to close.
"""

from __future__ import annotations

import ctypes
import enum
import os
import struct
from collections.abc import Iterator
from typing import Final

ATTRIBUTE_BYTES: Final = 144
NAME_BYTES: Final = 16
_NUMBER_OF_BPF: Final = {"x86_64": 321, "aarch64": 280}
_INFO_BYTES: Final = 256
_RECURSION_MISSES_OFFSET: Final = 208
"""In struct bpf_prog_info, since 5.12."""


class Command(enum.IntEnum):
    MAP_CREATE = 0
    MAP_LOOKUP = 1
    MAP_UPDATE = 2
    MAP_DELETE = 3
    MAP_NEXT_KEY = 4
    PROGRAM_LOAD = 5
    OBJECT_PIN = 6
    OBJECT_GET = 7
    PROGRAM_RUN = 10
    OBJECT_INFO = 15
    RAW_TRACEPOINT_OPEN = 17
    MAP_FREEZE = 22


KEYS_MAX: Final = 2 * 32768
"""Of one walk: twice what the largest map of the programs holds."""


class MapKind(enum.IntEnum):
    ARRAY = 2


MAP_MMAPABLE: Final = 1 << 10
MAP_INNER: Final = 1 << 12

_library = ctypes.CDLL(None, use_errno=True)


def is_architecture_known() -> bool:
    return os.uname().machine in _NUMBER_OF_BPF


def call(command: Command, attributes: bytes) -> tuple[int, bytes]:
    """(what it returned, the attributes as the kernel left them). Raises OSError."""
    buffer = ctypes.create_string_buffer(attributes.ljust(ATTRIBUTE_BYTES, b"\0"), ATTRIBUTE_BYTES)
    number = _NUMBER_OF_BPF[os.uname().machine]
    returned = _library.syscall(ctypes.c_long(number), ctypes.c_int(command), buffer, ctypes.c_uint(ATTRIBUTE_BYTES))
    if returned < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), f"bpf {command.name}")
    return int(returned), buffer.raw


def create_map(kind: MapKind, *, name: str, key_bytes: int, value_bytes: int, entries: int, flags: int = 0) -> int:
    """A new map's descriptor."""
    head = struct.pack("<IIIIIII", kind, key_bytes, value_bytes, entries, flags, 0, 0)
    return call(Command.MAP_CREATE, head + name.encode()[: NAME_BYTES - 1].ljust(NAME_BYTES, b"\0"))[0]


def lookup(descriptor: int, key: bytes, *, value_bytes: int) -> bytes | None:
    """The key's value, None without one. For a map per processor: of all possible processors, each rounded up to 8."""
    value = ctypes.create_string_buffer(value_bytes)
    try:
        call(Command.MAP_LOOKUP, _element(descriptor, key, value))
    except FileNotFoundError:
        return None
    return value.raw


def update(descriptor: int, key: bytes, value: bytes) -> None:
    """For a map of maps it returns once no program uses the map that was there before any more."""
    buffer = ctypes.create_string_buffer(value, len(value))
    call(Command.MAP_UPDATE, _element(descriptor, key, buffer))


def delete(descriptor: int, key: bytes) -> bool:
    """Whether it was there."""
    try:
        call(Command.MAP_DELETE, _element(descriptor, key, None))
    except FileNotFoundError:
        return False
    return True


def keys(descriptor: int, *, key_bytes: int) -> Iterator[bytes]:
    """Of a map that changes meanwhile perhaps not all, and some twice."""
    key: bytes | None = None
    # why: when the present key is deleted meanwhile, the kernel begins again with the first
    for _ in range(KEYS_MAX):
        found = ctypes.create_string_buffer(key_bytes)
        try:
            call(Command.MAP_NEXT_KEY, _element(descriptor, key, found))
        except FileNotFoundError:
            return
        key = found.raw
        yield key


def pin(descriptor: int, path: str) -> None:
    """The object outlives this process, until the name is removed."""
    name = ctypes.create_string_buffer(path.encode())
    call(Command.OBJECT_PIN, struct.pack("<QII", ctypes.addressof(name), descriptor, 0))


def get_pinned(path: str) -> int:
    """Raises FileNotFoundError."""
    name = ctypes.create_string_buffer(path.encode())
    return call(Command.OBJECT_GET, struct.pack("<QII", ctypes.addressof(name), 0, 0))[0]


def attach_traced(program: int) -> int:
    """Attaches a program to the tracepoint that it was loaded for; returns the link, which detaches when it is closed
    and pinned nowhere."""
    return call(Command.RAW_TRACEPOINT_OPEN, struct.pack("<QI", 0, program))[0]


def map_identifier(descriptor: int) -> int:
    return int(struct.unpack_from("<I", _info(descriptor), 4)[0])


def program_of_link(descriptor: int) -> int:
    """The identifier of the program that a link attaches."""
    return int(struct.unpack_from("<I", _info(descriptor), 8)[0])


def recursion_misses(program: int) -> int:
    """How often a program was not run because an interrupt came while it ran already."""
    return int(struct.unpack_from("<Q", _info(program), _RECURSION_MISSES_OFFSET)[0])


def _info(descriptor: int) -> bytes:
    buffer = ctypes.create_string_buffer(_INFO_BYTES)
    call(Command.OBJECT_INFO, struct.pack("<IIQ", descriptor, _INFO_BYTES, ctypes.addressof(buffer)))
    return buffer.raw


def _element(descriptor: int, key: bytes | None, value: ctypes.Array[ctypes.c_char] | None) -> bytes:
    """Key and value must live until the call has been made: only their addresses are in it."""
    key_address = 0 if key is None else ctypes.cast(ctypes.c_char_p(key), ctypes.c_void_p).value or 0
    return struct.pack("<IxxxxQQQ", descriptor, key_address, 0 if value is None else ctypes.addressof(value), 0)
