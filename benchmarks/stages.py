"""What each stage of the line costs by itself, in CPU-seconds per GiB of non-zero data: the floor under the line.

Every stage is the bare call that the product makes, on the same data, without the product around it. Figures are the
minimum of several rounds, because noise only ever adds.
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
import secrets
import socket
import ssl
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trustme
import zstandard
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

MIB: Final = 2**20
GIB: Final = 2**30
DIGEST_BLOCK_BYTES: Final = 65536
ROUNDS: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """cpu_seconds_per_gib is per GiB of the image's non-zero data, whatever the stage itself handled."""

    stage: str
    cpu_seconds_per_gib: float
    note: str = ""


def cpu_seconds() -> float:
    """User and system time of this process and its ended children."""
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def data_blocks(descriptor: int) -> Iterator[int]:
    """Offsets of the 1 MiB blocks that hold data by SEEK_DATA / SEEK_HOLE."""
    size = os.fstat(descriptor).st_size
    position, last = 0, -1
    while position < size:
        try:
            first = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        position = os.lseek(descriptor, first, os.SEEK_HOLE)
        for block in range(first // MIB, (position + MIB - 1) // MIB):
            if block > last:
                yield block * MIB
                last = block


def _read(image: Path, zero_test: bool) -> int:
    """Reads all data; returns the bytes of blocks that are not zero (all of them without the test)."""
    buffer = mmap.mmap(-1, MIB)
    view = memoryview(buffer)
    zeroes = bytearray(MIB)
    found = 0
    descriptor = os.open(image, os.O_RDONLY)
    try:
        for offset in data_blocks(descriptor):
            length = os.preadv(descriptor, [view], offset)
            if not zero_test or zeroes[:length] != view[:length]:
                found += length
    finally:
        os.close(descriptor)
    return found


def non_zero_bytes(image: Path) -> int:
    """Bytes of the 1 MiB blocks that are not all zero."""
    return _read(image, True)


def _load(image: Path, limit_bytes: int) -> list[bytes]:
    zeroes = bytes(MIB)
    blocks: list[bytes] = []
    descriptor = os.open(image, os.O_RDONLY)
    try:
        for offset in data_blocks(descriptor):
            block = os.pread(descriptor, MIB, offset)
            if block != zeroes[: len(block)]:
                blocks.append(block)
            if len(blocks) * MIB >= limit_bytes:
                break
    finally:
        os.close(descriptor)
    return blocks


def _timed(work: Callable[[], object], data_bytes: int) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        before = cpu_seconds()
        work()
        best = min(best, cpu_seconds() - before)
    return best * GIB / data_bytes


class _TlsEnd:
    """TLS by memory buffers over a blocking socket: 512 KiB a system call, the cheapest way that was measured."""

    def __init__(self, connection: socket.socket, context: ssl.SSLContext, *, server_name: str | None) -> None:
        self._socket = connection
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_name is None, server_hostname=server_name
        )
        self._buffer = memoryview(bytearray(512 * 1024))
        while True:
            try:
                self._tls.do_handshake()
                self._flush()
                return
            except ssl.SSLWantReadError:
                self._flush()
                self._fill()

    def _flush(self) -> None:
        if self._outgoing.pending:
            self._socket.sendall(self._outgoing.read())

    def _fill(self) -> None:
        received = self._socket.recv_into(self._buffer)
        if not received:
            raise EOFError
        self._incoming.write(self._buffer[:received])

    def send(self, block: bytes) -> None:
        view = memoryview(block)
        for first in range(0, len(view), 262144):
            self._tls.write(view[first : first + 262144])
            self._flush()

    def drain(self) -> None:
        target = memoryview(bytearray(MIB))
        while True:
            try:
                self._tls.read(MIB, target)
            except ssl.SSLWantReadError:
                try:
                    self._fill()
                except EOFError:
                    return


def _tls(blocks: list[bytes]) -> None:
    """Sends all blocks through TLS 1.3 on loopback to a child process that decrypts them into one buffer."""
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.minimum_version = ssl.TLSVersion.TLSv1_3
    server.num_tickets = 0  # why: unread tickets would turn the client's close into a reset
    authority.issue_cert("localhost").configure_cert(server)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(client)
    listener = socket.create_server(("127.0.0.1", 0))
    child = os.fork()
    if child == 0:
        _TlsEnd(listener.accept()[0], server, server_name=None).drain()
        os._exit(0)
    with socket.create_connection(listener.getsockname()) as connection:
        end = _TlsEnd(connection, client, server_name="localhost")
        for block in blocks:
            end.send(block)
        connection.shutdown(socket.SHUT_WR)
        _, status = os.waitpid(child, 0)
    listener.close()
    if status:
        raise RuntimeError("the receiving end failed")


def _write_direct(path: Path, chunks: list[bytes]) -> None:
    """Appends by O_DIRECT where the file system takes it, one fdatasync per 4 MiB, as the cache does."""
    flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
    try:
        descriptor = os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError:
        descriptor = os.open(path, flags, 0o600)
    buffer = mmap.mmap(-1, 4 * MIB)
    position = filled = 0
    try:
        for chunk in chunks:
            if filled + len(chunk) > len(buffer):
                os.pwrite(descriptor, buffer, position)
                os.fdatasync(descriptor)
                position, filled = position + len(buffer), 0
            buffer[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
        os.pwrite(descriptor, buffer, position)
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def measure(image: Path, *, directory: Path, limit_bytes: int = 512 * MIB) -> list[StageCost]:
    """Measures every stage on `image`; files are written to `directory`. The whole takes about a minute per 512 MiB."""
    data_bytes = non_zero_bytes(image)
    read = _timed(lambda: _read(image, False), data_bytes)
    zero_test = max(0.0, _timed(lambda: _read(image, True), data_bytes) - read)
    blocks = _load(image, limit_bytes)
    total = sum(map(len, blocks))
    key = secrets.token_bytes(32)

    def digest() -> None:
        for block in blocks:
            view = memoryview(block)
            for first in range(0, len(view), DIGEST_BLOCK_BYTES):
                blake3(view[first : first + DIGEST_BLOCK_BYTES], key=key).digest(16)

    compressor = zstandard.ZstdCompressor(level=1)
    packed = [compressor.compress(block) for block in blocks]
    cipher = AESGCM(secrets.token_bytes(32))
    sealed = bytearray(2 * MIB)
    view = memoryview(sealed)

    def seal() -> None:
        for number, block in enumerate(packed):
            cipher.encrypt_into(number.to_bytes(12, "big"), block, None, view[: len(block) + 16])

    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        path = Path(temporary) / "stage"
        write = _timed(lambda: _write_direct(path, packed), total)
        reread = _timed(lambda: _read(path, False), total)
    return [
        StageCost(stage="read source", cpu_seconds_per_gib=read),
        StageCost(stage="zero test", cpu_seconds_per_gib=zero_test),
        StageCost(stage="keyed digest", cpu_seconds_per_gib=_timed(digest, total)),
        StageCost(stage="TLS 1.3, both ends", cpu_seconds_per_gib=_timed(lambda: _tls(blocks), total)),
        StageCost(
            stage="zstd 1",
            cpu_seconds_per_gib=_timed(lambda: [compressor.compress(block) for block in blocks], total),
            note=f"ratio {total / sum(map(len, packed)):.2f}",
        ),
        StageCost(stage="AES-256-GCM", cpu_seconds_per_gib=_timed(seal, total)),
        StageCost(stage="cache append and sync", cpu_seconds_per_gib=write),
        StageCost(stage="re-read of the cache", cpu_seconds_per_gib=reread),
        StageCost(stage="object write and sync", cpu_seconds_per_gib=write, note="same call as the cache append"),
    ]
