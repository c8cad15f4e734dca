"""A configuration server's state directory: its keys, its admin token, its database; made once, never overwritten.

The marker is written last: without it the directory is an unfinished beginning, which may be begun again because nobody
can have been enrolled by it.
"""

from __future__ import annotations

import base64
import json
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from config_server.authority import CertificateAuthority
from config_server.errors import AlreadyInitialised, InstallationDamaged, NotInitialised
from config_server.token_hashes import hash_secret, is_hash
from protocol.errors import MalformedInput, ReplicationError
from protocol.signed_records import AuthorityKey, parse_authority_key, serialise_authority_key
from protocol.vocabulary import PeerIdentity, Role, VaultId, check_identifier
from runtime.directory import DurableDirectory
from runtime.local_directory import LocalDirectory
from runtime.locks import exclusive_lock

MARKER_FILE: Final = "installation.json"
VAULT_AUTHORITY_KEY_FILE: Final = "vault-authority-key.json"
AUTHORITY_FILE: Final = "authority.pem"
"""The certificate authority's certificate, for operators' clients. Not a secret."""
AUTHORITY_KEY_FILE: Final = "authority-key.pem"
ADMIN_TOKEN_FILE: Final = "admin-token"  # noqa: S105
"""One line: the bearer token of administrators, who take it away from here: the server needs only the hash."""
ADMIN_TOKEN_HASH_FILE: Final = "admin-token-hash"  # noqa: S105
CREDENTIALS_FILE: Final = "credentials.pem"
"""The server's own certificate and key; made at the start and renewed by the server."""
DATABASE_FILE: Final = "database.sqlite"
LOCK_FILE: Final = "lock"

FORMAT: Final = 1
ADMIN_TOKEN_BYTES: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """What the directory holds, read and checked."""

    path: Path
    identity: PeerIdentity
    vault_authority: AuthorityKey
    authority: CertificateAuthority
    admin_token_hash: str = field(repr=False)

    @property
    def vault(self) -> VaultId:
        return self.identity.vault


def _read_admin_token_hash(directory: DurableDirectory) -> str:
    """Made of the token where an older program has left only that."""
    try:
        return directory.read(ADMIN_TOKEN_HASH_FILE).decode("ascii").strip()
    except FileNotFoundError:
        hashed = hash_secret(directory.read(ADMIN_TOKEN_FILE).strip())
        directory.replace(ADMIN_TOKEN_HASH_FILE, hashed.encode() + b"\n")
        return hashed


def replace_admin_token(path: Path) -> None:
    """Makes a new admin token, into its file; the old one counts no more. Blocks.

    Raises NotInitialised, InstallationDamaged, StateLocked (the server runs), OSError.
    """
    read_installation(path)
    with exclusive_lock(path / LOCK_FILE):
        _write_admin_token(LocalDirectory(path))


def _write_admin_token(directory: DurableDirectory) -> None:
    token = base64.urlsafe_b64encode(secrets.token_bytes(ADMIN_TOKEN_BYTES)).rstrip(b"=")
    # why in this order: cut off in between, the token in the file is not one that counts, which shows at once
    directory.replace(ADMIN_TOKEN_HASH_FILE, hash_secret(token).encode() + b"\n")
    directory.replace(ADMIN_TOKEN_FILE, token + b"\n")


def initialise(path: Path, *, authority_key: AuthorityKey, now_ns: int) -> Installation:
    """Makes a configuration server for the key's vault in `path` (0700, made if missing); durable on return. Blocks.

    Raises AlreadyInitialised, StateLocked (another init, or a server, is at it; nothing is touched then), OSError.
    """
    directory = LocalDirectory(path)
    with exclusive_lock(path / LOCK_FILE):
        if MARKER_FILE in directory.names():
            raise AlreadyInitialised(path=path)
        _make(directory, authority_key, now_ns)
    return read_installation(path)


def _make(directory: DurableDirectory, authority_key: AuthorityKey, now_ns: int) -> None:
    authority = CertificateAuthority.make(authority_key.vault, now_ns)
    identifier = secrets.token_hex(16)
    marker = {"format": FORMAT, "vault": authority_key.vault, "identifier": identifier}
    for name, data in (
        (VAULT_AUTHORITY_KEY_FILE, serialise_authority_key(authority_key)),
        (AUTHORITY_KEY_FILE, authority.key_pem),
        (AUTHORITY_FILE, authority.certificate_pem),
    ):
        directory.replace(name, data)
    _write_admin_token(directory)
    directory.replace(MARKER_FILE, json.dumps(marker, indent=1).encode() + b"\n")


def read_installation(path: Path) -> Installation:
    """Blocks. Raises NotInitialised, InstallationDamaged, OSError."""
    if not (path / MARKER_FILE).is_file():
        raise NotInitialised(path=path)
    directory = LocalDirectory(path)
    try:
        return _read(path, directory)
    except FileNotFoundError as error:
        raise InstallationDamaged(path=path, reason=f"{error.filename} is missing") from error
    except (ValueError, KeyError, TypeError, RecursionError, ReplicationError) as error:
        raise InstallationDamaged(path=path, reason=str(error)) from error


def _read(path: Path, directory: DurableDirectory) -> Installation:
    marker = json.loads(directory.read(MARKER_FILE))
    if marker["format"] != FORMAT:
        raise MalformedInput(what=MARKER_FILE, reason=f"its format is {marker['format']}, this program knows {FORMAT}")
    vault_authority = parse_authority_key(directory.read(VAULT_AUTHORITY_KEY_FILE))
    vault = VaultId(marker["vault"])
    if vault != vault_authority.vault:
        raise MalformedInput(what=VAULT_AUTHORITY_KEY_FILE, reason="it is another vault's")
    authority = CertificateAuthority.load(
        vault=vault,
        certificate_pem=directory.read(AUTHORITY_FILE),
        key_pem=directory.read(AUTHORITY_KEY_FILE),
    )
    admin_token_hash = _read_admin_token_hash(directory)
    if not is_hash(admin_token_hash):
        raise MalformedInput(what=ADMIN_TOKEN_HASH_FILE, reason="it holds no hash that this program knows")
    identifier = check_identifier(marker["identifier"], "identifier")
    return Installation(
        path=path,
        identity=PeerIdentity(vault=vault, role=Role.CONFIGURATION_SERVER, identifier=identifier),
        vault_authority=vault_authority,
        authority=authority,
        admin_token_hash=admin_token_hash,
    )
