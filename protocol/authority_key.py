"""The file that carries a vault's authority key from `farpoint vault init` to `config-server init`.

The authority key signs grants, points and machine descriptions; whoever holds it can extend or forge the vault's
history, so it lies only with the configuration server (0600), never in storage or on a process server. It decrypts
nothing.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass, field
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from protocol.errors import LocalFault, VersionNotSupported
from protocol.vocabulary import VaultId, check_identifier

AUTHORITY_KEY_FORMAT: Final = 1
AUTHORITY_KEY_BYTES_MAX: Final = 4096


class AuthorityKeyInvalid(LocalFault):
    """Fields: reason."""

    code = "authority-key-invalid"
    message = "this is not an authority key file: {reason}"
    hint = "Use the authority key file that `farpoint vault init` wrote."


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthorityKey:
    """A vault's name and its signing key."""

    vault: VaultId
    private_key: Ed25519PrivateKey = field(repr=False)

    def __post_init__(self) -> None:
        check_identifier(self.vault, "vault")

    @property
    def public_key(self) -> Ed25519PublicKey:
        return self.private_key.public_key()

    @property
    def public_bytes(self) -> bytes:
        """The 32 raw bytes of the public key."""
        return self.public_key.public_bytes_raw()

    def encode(self) -> bytes:
        """The file's contents."""
        private = base64.b64encode(self.private_key.private_bytes_raw()).decode()
        content = {"format": AUTHORITY_KEY_FORMAT, "vault": self.vault, "authority_private_key": private}
        return json.dumps(content, indent=1).encode() + b"\n"

    @staticmethod
    def decode(data: bytes) -> AuthorityKey:
        """Raises AuthorityKeyInvalid, VersionNotSupported."""
        if len(data) > AUTHORITY_KEY_BYTES_MAX:
            raise AuthorityKeyInvalid(reason="it is too long")
        try:
            content = json.loads(data)
        except ValueError as error:
            raise AuthorityKeyInvalid(reason="it is not JSON") from error
        if not isinstance(content, dict) or set(content) != {"format", "vault", "authority_private_key"}:
            raise AuthorityKeyInvalid(reason="its fields are not those of an authority key")
        if content["format"] != AUTHORITY_KEY_FORMAT:
            raise VersionNotSupported(
                what="the authority key file", version=content["format"], supported=AUTHORITY_KEY_FORMAT
            )
        try:
            private = Ed25519PrivateKey.from_private_bytes(
                base64.b64decode(content["authority_private_key"], validate=True)
            )
            return AuthorityKey(vault=VaultId(content["vault"]), private_key=private)
        except (binascii.Error, ValueError, TypeError, LocalFault) as error:
            raise AuthorityKeyInvalid(reason="the vault or the key is damaged") from error
