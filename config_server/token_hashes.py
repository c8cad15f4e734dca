"""Secrets of bearer tokens at rest: Argon2id, so that who reads the database or the state directory gets no token.

Checking one takes a moment of a processor on purpose. So that nobody can take many moments with wrong ones, some bits
of a plain hash stand beside it: what differs there is wrong at once. A secret of 256 random bits has them to spare. One
that was right is remembered until the program ends.
"""

from __future__ import annotations

import asyncio
import hmac
import os
from typing import Final

import blake3
from cryptography.exceptions import InvalidKey
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from protocol.control_errors import ServerUnwell

SALT_BYTES: Final = 16
HASH_BYTES: Final = 32
ITERATIONS: Final = 2
MEMORY_KIBIBYTES: Final = 19 * 1024
"""OWASP's least for Argon2id (Password Storage Cheat Sheet); our secrets are of 32 random bytes, not passwords."""
CHECK_BYTES: Final = 4
CHECKS_AT_ONCE_MAX: Final = 2
CHECKS_WAITING_MAX: Final = 16
"""Whoever comes beyond that is told to try again."""
REMEMBERED_MAX: Final = 1024


def hash_secret(secret: bytes) -> str:
    """`check:hash`: CHECK_BYTES of BLAKE3 in hexadecimal, and Argon2id in PHC string format with a salt of its own.
    Blocks for tens of milliseconds."""
    kdf = Argon2id(
        salt=os.urandom(SALT_BYTES), length=HASH_BYTES, iterations=ITERATIONS, lanes=1, memory_cost=MEMORY_KIBIBYTES
    )
    return f"{_check(secret)}:{kdf.derive_phc_encoded(secret)}"


def is_hash(text: str) -> bool:
    """Whether hash_secret() may have made it."""
    check, _, phc = text.partition(":")
    return len(check) == 2 * CHECK_BYTES and phc.startswith("$argon2id$")


def may_be_hash_of(secret: bytes, hashed: str) -> bool:
    """False: certainly not. At once."""
    return hmac.compare_digest(hashed.partition(":")[0].encode(), _check(secret).encode())


def is_hash_of(secret: bytes, hashed: str) -> bool:
    """Blocks for tens of milliseconds."""
    try:
        Argon2id.verify_phc_encoded(secret, hashed.partition(":")[2])
    except (InvalidKey, ValueError):
        return False
    return True


def _check(secret: bytes) -> str:
    return blake3.blake3(secret).hexdigest(length=CHECK_BYTES)


class SecretChecker:
    """Used within one event loop."""

    def __init__(self) -> None:
        self._key = os.urandom(32)
        self._right: dict[bytes, None] = {}
        self._slots = asyncio.Semaphore(CHECKS_AT_ONCE_MAX)
        self._waiting = 0

    async def is_right(self, secret: bytes, hashed: str) -> bool:
        """Raises ServerUnwell when too many are being checked."""
        mark = self._mark(secret, hashed)
        if mark in self._right:
            return True
        if not may_be_hash_of(secret, hashed):
            return False
        if self._waiting >= CHECKS_WAITING_MAX:
            raise ServerUnwell(reason="too many tokens are being checked at once")
        self._waiting += 1
        try:
            async with self._slots:
                is_right = await asyncio.get_running_loop().run_in_executor(None, is_hash_of, secret, hashed)
        finally:
            self._waiting -= 1
        if is_right:
            self._remember(mark)
        return is_right

    async def hash(self, secret: bytes) -> str:
        """See hash_secret()."""
        async with self._slots:
            return await asyncio.get_running_loop().run_in_executor(None, hash_secret, secret)

    def _mark(self, secret: bytes, hashed: str) -> bytes:
        return blake3.blake3(len(secret).to_bytes(8, "big") + secret + hashed.encode(), key=self._key).digest()

    def _remember(self, mark: bytes) -> None:
        while len(self._right) >= REMEMBERED_MAX:
            self._right.pop(next(iter(self._right)))
        self._right[mark] = None
