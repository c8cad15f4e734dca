"""Opens what commands talk to: a vault in its store, or the configuration server. Whoever opens closes, however it
ends."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from farpoint.errors import DirectoryNotUp, OptionMissing
from farpoint.settings import FarpointSettings
from protocol.errors import MalformedInput
from protocol.transport.operator_client import OperatorClient
from runtime.errors import SecretUnreadable
from runtime.secrets import read_secret

UP_FILE: Final = "up.json"
"""What `farpoint up` tells the other commands about itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpDescription:
    """Where the servers of a directory of `farpoint up` are."""

    server_url: str
    store_url: str
    authority_file: Path
    admin_token_file: Path
    store_credentials_file: Path | None = None

    def serialise(self) -> bytes:
        fields = {
            "server_url": self.server_url,
            "store_url": self.store_url,
            "authority_file": str(self.authority_file),
            "admin_token_file": str(self.admin_token_file),
            "store_credentials_file": self.store_credentials_file and str(self.store_credentials_file),
        }
        return json.dumps(fields, indent=2).encode() + b"\n"

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Raises DirectoryNotUp, MalformedInput."""
        path = directory / UP_FILE
        try:
            fields = json.loads(path.read_bytes())
            credentials = fields.get("store_credentials_file")
            return cls(
                server_url=fields["server_url"],
                store_url=fields["store_url"],
                authority_file=directory / fields["authority_file"],
                admin_token_file=directory / fields["admin_token_file"],
                store_credentials_file=directory / credentials if credentials else None,
            )
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DirectoryNotUp(path=directory) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise MalformedInput(what=str(path), reason=str(error)) from error


def server_url_of(settings: FarpointSettings) -> str:
    """Where operators reach the configuration server. Raises OptionMissing, DirectoryNotUp."""
    if settings.server is not None:
        return settings.server
    if settings.dir is not None:
        return UpDescription.read(settings.dir).server_url
    raise OptionMissing(option="--server (or --dir)", purpose="https://HOST:PORT of the configuration server")


@asynccontextmanager
async def operator_of(settings: FarpointSettings) -> AsyncIterator[OperatorClient]:
    """The configuration server. Raises OptionMissing, DirectoryNotUp, SecretMissing."""
    server, authority, token = server_url_of(settings), settings.ca, settings.token_file
    if settings.dir is not None:
        up = UpDescription.read(settings.dir)
        authority = authority or up.authority_file
        token = token or up.admin_token_file
    if authority is None:
        raise OptionMissing(option="--ca", purpose="the file authority.pem of the configuration server")
    if token is None:
        raise OptionMissing(
            option="--token-file", purpose="a file with an operator token, or the one that `config-server init` wrote"
        )
    client = OperatorClient(server_url=server, authority_pem=read_secret(authority), token=_bearer(token))
    try:
        yield client
    finally:
        await client.close()


def _bearer(path: Path) -> str:
    """Raises SecretMissing, SecretUnreadable."""
    lines = read_secret(path).split()
    if len(lines) != 1 or not lines[0].isascii():
        raise SecretUnreadable(path=path, reason="it must hold one token, and nothing else")
    return lines[0].decode("ascii")
