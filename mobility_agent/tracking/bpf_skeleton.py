"""Loads the tracing programs from their light skeleton: a small program in it, run by the kernel, creates the maps and
loads the others, fitting them to this kernel's types.

docs/decisions/0011 says why it is done so. The file that is loaded is made by `make bpf` and comes with the package.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

import msgpack  # type: ignore[import-untyped]
from blake3 import blake3

from mobility_agent.tracking.bpf_calls import Command, MapKind, call, create_map, update

FORMAT: Final = 1
SKELETON_FILE: Final = "block_writes.skeleton"
LICENSE: Final = b"Dual BSD/GPL\0"
_PROGRAM_KIND_SYSCALL: Final = 31
_PROGRAM_SLEEPABLE: Final = 1 << 4
LOG_BYTES: Final = 4 * 2**20
_CONTEXT_HEAD_BYTES: Final = 24
_MAP_BYTES: Final = 16
_PROGRAM_BYTES: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """The loader program's instructions and its data, and the names of what it makes, in order."""

    data: bytes
    instructions: bytes
    maps: tuple[str, ...]
    programs: tuple[str, ...]

    def packed(self) -> bytes:
        packed: bytes = msgpack.packb([FORMAT, self.data, self.instructions, list(self.maps), list(self.programs)])
        return packed

    @staticmethod
    def unpacked(content: bytes) -> Skeleton:
        """Raises ValueError."""
        version, data, instructions, maps, programs = msgpack.unpackb(content)
        if version != FORMAT:
            raise ValueError(f"format {version} of the skeleton is not known")
        return Skeleton(data=data, instructions=instructions, maps=tuple(maps), programs=tuple(programs))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedSkeleton:
    """Descriptors by name; the caller closes them."""

    maps: Mapping[str, int]
    programs: Mapping[str, int]

    def close(self) -> None:
        for descriptor in (*self.maps.values(), *self.programs.values()):
            os.close(descriptor)


def shipped_skeleton() -> tuple[Skeleton, str]:
    """The package's own, and a short digest of it that names its version."""
    content = files("mobility_agent.tracking").joinpath("bpf", SKELETON_FILE).read_bytes()
    return Skeleton.unpacked(content), blake3(content).hexdigest(8)


def load(skeleton: Skeleton) -> LoadedSkeleton:
    """Creates the maps and loads the programs; attaches nothing. Blocks for some 100 ms. Raises OSError."""
    data_map = create_map(MapKind.ARRAY, name="__loader.map", key_bytes=4, value_bytes=len(skeleton.data), entries=1)
    try:
        update(data_map, bytes(4), skeleton.data)
        call(Command.MAP_FREEZE, struct.pack("<I", data_map))
        loader = _load_loader(skeleton, data_map)
    finally:
        os.close(data_map)
    try:
        return _run_loader(skeleton, loader)
    except OSError as error:
        log = ctypes.create_string_buffer(LOG_BYTES)
        try:
            # why: the kernel says what it refuses only when asked, and it costs much; so it is asked a second time.
            _run_loader(skeleton, loader, log).close()
        except OSError:
            lines = log.value.decode("utf-8", "replace").strip().splitlines()
            reasons = [line for line in lines if not line.startswith("processed ")]
            if reasons:
                raise OSError(error.errno, f"{error.strerror}: {reasons[-1]}", error.filename) from error
        raise
    finally:
        os.close(loader)


def _load_loader(skeleton: Skeleton, data_map: int) -> int:
    instructions = _buffer(skeleton.instructions)
    license_text = _buffer(LICENSE)
    descriptors = _buffer(struct.pack("<i", data_map))
    attributes = struct.pack(
        "<IIQQIIQII",
        _PROGRAM_KIND_SYSCALL,
        len(skeleton.instructions) // 8,
        ctypes.addressof(instructions),
        ctypes.addressof(license_text),
        *(0, 0, 0, 0),
        _PROGRAM_SLEEPABLE,
    )
    attributes = (attributes.ljust(48, b"\0") + b"__loader.prog").ljust(120, b"\0")
    return call(Command.PROGRAM_LOAD, attributes + struct.pack("<Q", ctypes.addressof(descriptors)))[0]


def _run_loader(skeleton: Skeleton, loader: int, log: ctypes.Array[Any] | None = None) -> LoadedSkeleton:
    first_program = _CONTEXT_HEAD_BYTES + _MAP_BYTES * len(skeleton.maps)
    size = first_program + _PROGRAM_BYTES * len(skeleton.programs)
    log_head = (0, 0, 0) if log is None else (1, len(log), ctypes.addressof(log))
    context = _buffer(struct.pack("<IIIIQ", size, 0, *log_head).ljust(size, b"\0"))
    run = struct.pack("<IIIIQQIIIIQQ", loader, *(0, 0, 0, 0, 0, 0, 0), size, 0, ctypes.addressof(context), 0)
    _, attributes = call(Command.PROGRAM_RUN, run)
    (result,) = struct.unpack_from("<i", attributes, 4)
    if result < 0:
        raise OSError(-result, os.strerror(-result), "loading the tracing programs")
    return LoadedSkeleton(
        maps={
            name: struct.unpack_from("<i", context.raw, _CONTEXT_HEAD_BYTES + _MAP_BYTES * index)[0]
            for index, name in enumerate(skeleton.maps)
        },
        programs={
            name: struct.unpack_from("<i", context.raw, first_program + _PROGRAM_BYTES * index)[0]
            for index, name in enumerate(skeleton.programs)
        },
    )


def _buffer(content: bytes) -> ctypes.Array[Any]:
    return ctypes.create_string_buffer(content, len(content))
