"""The vault's public key, to which every segment's data key is wrapped: from the store, then from the state directory.

Invariant: the key was read from a vault description that the vault's authority signed; a store that is away does not
keep a restarted process server from sealing.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from typing import Final

import structlog
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from process_server.errors import StateUnreadable
from process_server.state_file import keep, kept
from runtime.directory import DurableDirectory
from storage.disk_archive import DiskArchive

VAULT_KEY_FILE: Final = "vault-key"

_log = structlog.get_logger("process_server.vault_key")


class VaultKey:
    """`get` gives it, from wherever it is known."""

    def __init__(self, archive: DiskArchive, state: DurableDirectory, executor: Executor) -> None:
        self._archive = archive
        self._state = state
        self._executor = executor
        self._key: X25519PublicKey | None = None
        self._asking = asyncio.Lock()

    async def get(self) -> X25519PublicKey:
        """Raises StoreFault or VaultFault if it was never known and the store does not give it, StateUnreadable."""
        # why: disks that begin at once would write the one file at once
        async with self._asking:
            if self._key is None:
                self._key = await self._ask()
        return self._key

    async def _ask(self) -> X25519PublicKey:
        loop = asyncio.get_running_loop()
        try:
            data = await loop.run_in_executor(self._executor, self._load)
            if data is None:
                data = (await self._archive.read_vault()).vault_key
                await loop.run_in_executor(self._executor, keep, self._state, VAULT_KEY_FILE, data)
            return X25519PublicKey.from_public_bytes(data)
        except (OSError, ValueError) as error:
            raise StateUnreadable(name=VAULT_KEY_FILE, reason=str(error)) from error

    def _load(self) -> bytes | None:
        try:
            return kept(self._state, VAULT_KEY_FILE)
        except StateUnreadable as error:
            # why: any 32 bytes are a key, and what is sealed to a wrong one nobody can ever open
            _log.error("the vault's key is read from the store again", reason=str(error))
            return None
