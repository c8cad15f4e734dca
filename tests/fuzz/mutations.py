"""Structured mutations of sound inputs: flips, cuts, insertions, repeats, edited lengths, splices of two inputs."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final

LENGTHS: Final = (0, 1, 2, 7, 8, 15, 16, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
"""What a length field is set to, beside its neighbours."""

TOKENS: Final = (
    b"\xdd\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xc7\x0c\xff" + bytes(12),
    b"\x91" * 600,
    b"\x81\x90\xc0",
    b"[" * 1200,
    b'{"a":' * 400,
    b"9" * 4400,
    b"1e999",
    b"NaN",
    b"-1",
    b"null",
    b"true",
    b"\x00",
    b"\xff\xfe",
    "ü٣＃".encode(),
    b"\\ud800",
    b"%00",
    b"//[",
)
"""Where parsers break: sizes and depths of msgpack and JSON, numbers without end, texts that are no texts."""


def flip_bits(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    altered = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        if altered:
            altered[draw.randrange(len(altered))] ^= 1 << draw.randrange(8)
    return bytes(altered)


def set_bytes(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    altered = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        if altered:
            altered[draw.randrange(len(altered))] = draw.choice((0, 0x7F, 0x80, 0xC0, 0xFF, draw.randrange(256)))
    return bytes(altered)


def cut(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def remove(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    first = draw.randrange(len(data) + 1)
    return data[:first] + data[first + draw.choice((1, 4, 16, 64)) :]


def insert(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    place = draw.randrange(len(data) + 1)
    piece = draw.choice((draw.randbytes(draw.randint(1, 16)), *TOKENS))
    return data[:place] + piece + data[place:]


def replace_token(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    place = draw.randrange(len(data) + 1)
    token = draw.choice(TOKENS)
    return data[:place] + token + data[place + draw.choice((1, 4, len(token))) :]


def repeat(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    first = draw.randrange(len(data) + 1)
    end = min(len(data), first + draw.randint(1, 64))
    return data[:end] + data[first:end] * draw.randint(1, 8) + data[end:]


def edit_length(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    width = draw.choice((1, 2, 4, 8))
    if len(data) < width:
        return data
    order = draw.choice(("little", "big"))
    place = draw.randrange(len(data) - width + 1)
    found = int.from_bytes(data[place : place + width], order)  # type: ignore[arg-type]
    value = draw.choice((*LENGTHS, found + 1, found - 1, len(data), 2 ** (8 * width) - 1)) % 2 ** (8 * width)
    return data[:place] + value.to_bytes(width, order) + data[place + width :]  # type: ignore[arg-type]


def splice(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    other = draw.choice(others)
    first, second = draw.randrange(len(data) + 1), draw.randrange(len(other) + 1)
    return data[:first] + other[draw.choice((first % (len(other) + 1), second)) :]


MUTATIONS: Final[tuple[Callable[[bytes, Sequence[bytes], random.Random], bytes], ...]] = (
    flip_bits,
    set_bytes,
    cut,
    remove,
    insert,
    replace_token,
    repeat,
    edit_length,
    splice,
)


def mutate(seeds: Sequence[bytes], draw: random.Random, *, bytes_max: int) -> bytes:
    """One to four mutations of one of the seeds."""
    data = draw.choice(seeds)
    for _ in range(draw.choice((1, 1, 2, 4))):
        data = draw.choice(MUTATIONS)(data, seeds, draw)
    return data[:bytes_max]
