"""Opens a vault in its store with a recovery key, and closes the store however the command ends."""

from __future__ import annotations

from collections.abc import AsyncIterator
from concurrent.futures import Executor
from contextlib import asynccontextmanager

from farpoint.errors import OptionMissing
from farpoint.key_files import read_recovery_key
from farpoint.settings import FarpointSettings
from recovery.opened_vault import OpenedVault, open_vault
from storage.backends.open_store import open_store


@asynccontextmanager
async def vault_of(settings: FarpointSettings, *, executor: Executor | None = None) -> AsyncIterator[OpenedVault]:
    """The vault that store and recovery key name. Raises OptionMissing, and what opening either raises."""
    if settings.store is None:
        raise OptionMissing(option="--store", purpose="the URL of the store that holds the vault")
    if settings.recovery_key is None:
        raise OptionMissing(option="--recovery-key", purpose="a recovery key file of the vault")
    key = read_recovery_key(settings.recovery_key, passphrase_file=settings.passphrase_file)
    store = open_store(settings.store, credentials_file=settings.store_credentials_file, executor=executor)
    try:
        yield await open_vault(store, key)
    finally:
        await store.close()
