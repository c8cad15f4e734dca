"""What an operator may set for the command line: where the configuration server is, and where the vault."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from runtime.settings import Settings

PROGRAM: Final = "farpoint"


class FarpointSettings(Settings):
    """None where it was not given; which of them a command needs, it says itself."""

    server: str | None = None
    """https://HOST:PORT of the configuration server."""
    ca: Path | None = None
    """Its certificate authority's certificate: `authority.pem` of its state directory."""
    token_file: Path | None = None
    """An operator token, or the admin token."""
    dir: Path | None = None
    """The directory of `farpoint up`: stands for server, ca and token_file."""
    store: str | None = None
    store_credentials_file: Path | None = None
    recovery_key: Path | None = None
    passphrase_file: Path | None = None
    """Of the recovery key, where it has one; asked for on a terminal if not given."""
