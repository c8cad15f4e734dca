"""A join token: `id.secret.authority-key-hash`, the one thing that a newcomer needs besides the server's address.

The hash pins the certificate authority before anything is believed; the secret is proved, never sent.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from typing import Final

from protocol.control_errors import JoinTokenMalformed
from protocol.errors import InvalidValue
from protocol.vocabulary import check_identifier

SECRET_BYTES: Final = 32
HASH_BYTES: Final = 32

_TEXT = re.compile(r"([0-9a-f]{32})\.([A-Za-z0-9_-]{43})\.([A-Za-z0-9_-]{43})")


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinToken:
    """identifier names the token in logs and errors; secret must not be logged.

    authority_key_hash: SHA-256 of the certificate authority's public key (DER SubjectPublicKeyInfo).
    """

    identifier: str
    secret: bytes = field(repr=False)
    authority_key_hash: bytes

    def __post_init__(self) -> None:
        check_identifier(self.identifier, "join token")
        if len(self.secret) != SECRET_BYTES or len(self.authority_key_hash) != HASH_BYTES:
            raise InvalidValue(
                what="join token", value=self.identifier, rule="must hold 32 bytes of secret and of hash"
            )

    def format(self) -> str:
        """The text that operators pass on."""
        return f"{self.identifier}.{_encode(self.secret)}.{_encode(self.authority_key_hash)}"

    @staticmethod
    def parse(text: str) -> JoinToken:
        """Blanks and line ends around it are ignored. Raises JoinTokenMalformed."""
        match = _TEXT.fullmatch(text.strip())
        if match is None:
            raise JoinTokenMalformed(reason="it must have three parts, separated by dots, of 32, 43 and 43 characters")
        secret, authority_key_hash = _decode(match[2]), _decode(match[3])
        token = JoinToken(identifier=match[1], secret=secret, authority_key_hash=authority_key_hash)
        if token.format() != match[0]:
            raise JoinTokenMalformed(reason="its last characters are damaged")
        return token


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=")
