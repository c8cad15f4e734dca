"""Azurite, the Azure Blob emulator: where it lies, how it is started, and by what it is spoken to.

For the demo and the tests, never for data: killed, it loses what it has just acknowledged. `make azurite` installs it
into the checkout's ignored directory `.node/`.
"""

from __future__ import annotations

import datetime
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from azure.storage.blob import ContainerSasPermissions, generate_container_sas

ACCOUNT: Final = "devstoreaccount1"
KEY: Final = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Azurite's published key, the same for everybody."""

PROCESS_SERVER_PERMISSIONS: Final = "rcl"
RECOVERY_PERMISSIONS: Final = "rl"
FOLD_WORKER_PERMISSIONS: Final = "rdl"
"""What a shared access signature on the container has to allow to each: read, create, delete, list."""

_PROGRAM: Final = Path(__file__).parents[2] / ".node" / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
_LISTENS: Final = re.compile(r"successfully listens on (http://127\.0\.0\.1:\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Azurite:
    """A running one. origin: `http://127.0.0.1:PORT`."""

    origin: str

    @property
    def endpoint(self) -> str:
        """The account's blob service."""
        return f"{self.origin}/{ACCOUNT}"

    @property
    def connection_string(self) -> str:
        """With the account's key, which may do everything."""
        return f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={self.endpoint};"

    def signed_connection_string(self, container: str, *, permissions: str, lifetime: datetime.timedelta) -> str:
        """With a shared access signature on one container; a negative lifetime gives one that has ended."""
        signature = container_signature(container, permissions=permissions, lifetime=lifetime)
        return f"AccountName={ACCOUNT};BlobEndpoint={self.endpoint};SharedAccessSignature={signature}"


def container_signature(container: str, *, permissions: str, lifetime: datetime.timedelta) -> str:
    """A shared access signature, by the account's key; the letters are Azure's own."""
    signature: str = generate_container_sas(
        ACCOUNT,
        container,
        account_key=KEY,
        permission=ContainerSasPermissions.from_string(permissions),
        expiry=datetime.datetime.now(datetime.UTC) + lifetime,
    )
    return signature


def why_missing() -> str:
    """Why there is no Azurite here; empty if there is."""
    if shutil.which("node") is None:
        return "it needs node, which is not installed"
    return "" if _PROGRAM.exists() else "`make azurite`, in a checkout, installs it"


def azurite_command(location: Path, *, port: int) -> list[str]:
    """Starts it with its data in `location`; port 0 is any free one. Ended by SIGTERM it has written all it was given.

    Not through npx, which leaves node behind when it is ended. It knows no API version as new as the SDK's.
    """
    options = ["--silent", "--disableTelemetry", "--skipApiVersionCheck"]
    place = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(location)]
    return ["node", str(_PROGRAM), *place, *options]


def running_azurite_of(said: str) -> Azurite | None:
    """The one whose output this is, as soon as it says that it listens."""
    found = _LISTENS.search(said)
    return Azurite(origin=found[1]) if found else None
