"""Where the demo keeps the copy: a directory, or a real Azurite with a credential for each purpose.

Invariant: nobody is given more than he needs. The process server may create, read and list, the recovery may read and
list; only who makes the vault's container has the account's key.
"""

from __future__ import annotations

import asyncio
import datetime
import shlex
import time
from pathlib import Path
from typing import Final, Protocol

from azure.storage.blob import ContainerClient

from farpoint.demo.azurite import (
    ACCOUNT,
    PROCESS_SERVER_PERMISSIONS,
    RECOVERY_PERMISSIONS,
    Azurite,
    azurite_command,
    running_azurite_of,
    why_missing,
)
from farpoint.demo.errors import AzuriteMissing
from farpoint.demo.places import Places
from farpoint.demo.programs import Program, Programs, free_port
from runtime.secrets import write_secret

CONTAINER: Final = "farpoint-demo"
AZURITE_PORT: Final = 10000
START_SECONDS_MAX: Final = 30.0
POLL_SECONDS: Final = 0.1
SIGNATURE_LIFETIME: Final = datetime.timedelta(days=7)
"""For as long the copy of a demo that was kept can be recovered from."""


class DemoStore(Protocol):
    """The credentials files are None where the store needs none."""

    @property
    def url(self) -> str: ...

    @property
    def owner_credentials(self) -> Path | None: ...

    @property
    def process_server_credentials(self) -> Path | None: ...

    @property
    def recovery_credentials(self) -> Path | None: ...

    @property
    def start_command(self) -> str | None:
        """By which it can be read again after the demo; None if nothing has to be started."""
        ...

    async def start(self, programs: Programs) -> None:
        """Ready for a vault on return. Raises DemoFault."""
        ...

    async def stop(self, programs: Programs) -> None: ...

    async def stored_bytes(self) -> int:
        """Of all objects; while it runs."""
        ...


class DirectoryStore:
    """A `DemoStore`."""

    owner_credentials: Path | None = None
    process_server_credentials: Path | None = None
    recovery_credentials: Path | None = None
    start_command: str | None = None

    def __init__(self, places: Places) -> None:
        self._path = places.store

    @property
    def url(self) -> str:
        return self._path.absolute().as_uri()

    async def start(self, programs: Programs) -> None:
        return

    async def stop(self, programs: Programs) -> None:
        return

    async def stored_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._path.rglob("*") if path.is_file())


class AzuriteStore:
    """A `DemoStore`: a program of its own on loopback, and a container in it."""

    url = f"azure://{ACCOUNT}/{CONTAINER}/site"

    def __init__(self, places: Places) -> None:
        """Raises AzuriteMissing."""
        if reason := why_missing():
            raise AzuriteMissing(reason=reason)
        self._path = places.store
        self._port = free_port(AZURITE_PORT, taken=set())
        self._program: Program | None = None
        self.owner_credentials: Path | None = places.state / "store-owner.credentials"
        self.process_server_credentials: Path | None = places.state / "store-process-server.credentials"
        self.recovery_credentials: Path | None = places.keys / "store-recovery.credentials"

    @property
    def start_command(self) -> str | None:
        return shlex.join(azurite_command(self._path, port=self._port))

    async def start(self, programs: Programs) -> None:
        self._path.mkdir(mode=0o700)
        program = await programs.start_command("azurite", azurite_command(self._path, port=self._port))
        self._program = program
        azurite = await self._listening(programs, program)
        await asyncio.get_running_loop().run_in_executor(None, self._make_container, azurite)

    async def stop(self, programs: Programs) -> None:
        """In order: killed, it would lose what it has acknowledged."""
        if self._program is not None:
            await programs.stop(self._program)

    async def stored_bytes(self) -> int:
        return await asyncio.get_running_loop().run_in_executor(None, self._listed_bytes)

    async def _listening(self, programs: Programs, program: Program) -> Azurite:
        deadline = time.monotonic() + START_SECONDS_MAX
        while True:
            programs.check()
            azurite = running_azurite_of(program.log_path.read_text(errors="replace"))
            if azurite is not None:
                return azurite
            if time.monotonic() > deadline:
                programs.give_up("Azurite", START_SECONDS_MAX)
            await asyncio.sleep(POLL_SECONDS)

    def _make_container(self, azurite: Azurite) -> None:
        """And the files with a credential for each purpose."""
        assert self.owner_credentials is not None
        write_secret(self.owner_credentials, azurite.connection_string.encode())
        for path, permissions in (
            (self.process_server_credentials, PROCESS_SERVER_PERMISSIONS),
            (self.recovery_credentials, RECOVERY_PERMISSIONS),
        ):
            assert path is not None
            signed = azurite.signed_connection_string(CONTAINER, permissions=permissions, lifetime=SIGNATURE_LIFETIME)
            write_secret(path, signed.encode())
        with self._container() as container:
            container.create_container()

    def _listed_bytes(self) -> int:
        with self._container() as container:
            return sum(blob.size for blob in container.list_blobs())

    def _container(self) -> ContainerClient:
        assert self.owner_credentials is not None
        client: ContainerClient = ContainerClient.from_connection_string(self.owner_credentials.read_text(), CONTAINER)
        return client
