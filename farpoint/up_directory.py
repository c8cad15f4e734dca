"""The directory of `farpoint up`: what its first run makes, and where everything lies.

The configuration server's marker is written last; a first run that was cut off before it says what to remove.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

from config_server.installation import ADMIN_TOKEN_FILE, AUTHORITY_FILE, MARKER_FILE, initialise
from farpoint.errors import FirstRunCutOff, StoreChanged
from farpoint.server_connection import UP_FILE, UpDescription
from farpoint.vault_commands import make_vault
from protocol.signed_records import parse_authority_key
from runtime.local_directory import LocalDirectory
from runtime.secrets import read_secret
from storage.backends.open_store import open_store


@dataclass(frozen=True, slots=True, kw_only=True)
class UpDirectory:
    """Names the parts of one directory."""

    path: Path

    @property
    def config_server(self) -> Path:
        return self.path / "config-server"

    @property
    def process_server(self) -> Path:
        return self.path / "process-server"

    @property
    def keys(self) -> Path:
        return self.path / "keys"

    @property
    def recovery_keys(self) -> tuple[Path, ...]:
        return (self.keys / "recovery-1.key", self.keys / "recovery-2.key")

    @property
    def authority_key(self) -> Path:
        return self.keys / "vault-authority.key"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def is_initialised(self) -> bool:
        return (self.config_server / MARKER_FILE).is_file()

    def describe(self, *, server_url: str, store_url: str, store_credentials_file: Path | None) -> UpDescription:
        """What the other commands read with `--dir`, and the next run."""
        config_server = self.config_server.absolute()
        return UpDescription(
            server_url=server_url,
            store_url=store_url,
            store_credentials_file=store_credentials_file and store_credentials_file.absolute(),
            authority_file=config_server / AUTHORITY_FILE,
            admin_token_file=config_server / ADMIN_TOKEN_FILE,
        )

    def write_description(self, description: UpDescription) -> None:
        """Durable on return. Blocks."""
        LocalDirectory(self.path).replace(UP_FILE, description.serialise())

    def store_url(self, wanted: str | None) -> str:
        """The store of this directory: the known one, else the wanted one, else DIR/store.

        Raises StoreChanged if another one is wanted than is known.
        """
        default = (self.path.absolute() / "store").as_uri()
        if not (self.path / UP_FILE).is_file():
            return wanted or default
        known = UpDescription.read(self.path).store_url
        if wanted is not None and wanted != known:
            raise StoreChanged(path=self.path, known=known, wanted=wanted)
        return known

    def store_credentials_file(self, wanted: Path | None) -> Path | None:
        """The wanted one, else that of the last run."""
        if wanted is not None or not (self.path / UP_FILE).is_file():
            return wanted
        return UpDescription.read(self.path).store_credentials_file


async def initialise_directory(directory: UpDirectory, *, store_url: str, credentials_file: Path | None) -> None:
    """The first run: a vault with two recovery keys in the store, and a configuration server for it; durable on return.

    Raises FirstRunCutOff, StoreFault, SecretUnreadable, OSError.
    """
    if directory.keys.exists() and any(directory.keys.iterdir()):
        raise FirstRunCutOff(path=directory.keys)
    LocalDirectory(directory.keys)
    store = open_store(store_url, credentials_file=credentials_file, create=True)
    try:
        await make_vault(store, directory.recovery_keys, directory.authority_key, passphrase=None)
    finally:
        await store.close()
    await asyncio.get_running_loop().run_in_executor(None, _initialise_config_server, directory)


def _initialise_config_server(directory: UpDirectory) -> None:
    key = parse_authority_key(read_secret(directory.authority_key))
    initialise(directory.config_server, authority_key=key, now_ns=time.time_ns())
    # why: the configuration server has it now; a second copy would only be one more to steal
    directory.authority_key.unlink()
