"""Enrolment: how a newcomer proves a join token's secret, what it asks for, what it gets, and what it keeps.

The secret never travels. The proof is an HMAC over a transcript of everything that is asked for, so a proof that
somebody saw is good for that very request only; repeating it gives the same answer again and nothing more.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import json
from dataclasses import dataclass, field
from typing import Annotated, Final, TypeAlias

from cryptography import x509
from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import NameOID
from pydantic import AfterValidator, Field, WithJsonSchema

from protocol.control import CertificateBundle, ControlMessage, Identifier, Name, Pem, Vault
from protocol.errors import InvalidValue, LocalFault
from protocol.vocabulary import PeerIdentity, Role, VaultId, check_identifier

CREDENTIALS_FILE: Final = "credentials.pem"
"""Certificate chain and private key in one file, so that a renewal replaces both at once; ssl takes it for either."""
AUTHORITY_FILE: Final = "authority.pem"
SIGNING_KEY_FILE: Final = "signing-key.pem"
IDENTITY_FILE: Final = "identity.json"
"""Written last: a state directory that has it is enrolled."""

LEAF_LIFETIME: Final = datetime.timedelta(days=14)
"""A member's certificate ends so long after it was issued. When it was issued is told by its end: it begins where its
authority does."""

IDENTITY_FORMAT: Final = 1
COMMON_NAME_BYTES_MAX: Final = 64
"""X.509's ub-common-name, which the library counts in bytes of UTF-8."""


def _check_enrollable(role: Role) -> Role:
    if role is Role.CONFIGURATION_SERVER:
        raise ValueError("the configuration server enrols others, not itself")
    return role


_ENROLLABLE: Final = sorted(role.value for role in Role if role is not Role.CONFIGURATION_SERVER)


def _base64_schema(pattern: str) -> WithJsonSchema:
    """The generated one would count the bytes as characters."""
    return WithJsonSchema({"type": "string", "contentEncoding": "base64url", "pattern": pattern})


EnrollableRole: TypeAlias = Annotated[
    Role, AfterValidator(_check_enrollable), WithJsonSchema({"type": "string", "enum": _ENROLLABLE})
]
KeyBytes: TypeAlias = Annotated[
    bytes, Field(min_length=32, max_length=32), _base64_schema("^[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]=$")
]
SignatureBytes: TypeAlias = Annotated[
    bytes, Field(min_length=64, max_length=64), _base64_schema("^[A-Za-z0-9_-]{85}[AQgw]==$")
]

_PROOF_INFORMATION = b"farpoint join token proof v1"
_TRANSCRIPT_DOMAIN = b"farpoint enrolment v1"


class EnrollmentRequest(ControlMessage):
    """Newcomer → server."""

    token: Identifier
    role: EnrollableRole
    name: Name
    request_pem: Pem
    """PKCS #10, ECDSA P-256."""
    signing_public_key: KeyBytes | None = None
    """Process servers only: raw Ed25519."""
    signing_proof: SignatureBytes | None = None
    """The signing key's signature over the transcript."""
    proof: KeyBytes
    """HMAC-SHA256 over the transcript, keyed by the token's proof key."""


class EnrollmentReply(ControlMessage):
    """Server → newcomer."""

    vault: Vault
    role: EnrollableRole
    identifier: Identifier
    certificate: CertificateBundle
    vault_authority_public_key: KeyBytes


def proof_key(secret: bytes) -> bytes:
    """What the server keeps instead of a token's secret."""
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=_PROOF_INFORMATION).derive(secret)


def transcript(
    *,
    token: str,
    role: Role,
    name: str,
    request_pem: str,
    signing_public_key: bytes | None,
    authority_key_hash: bytes,
) -> bytes:
    """Everything that an enrolment is about, without ambiguity: each part with its length before it."""
    parts = (
        _TRANSCRIPT_DOMAIN,
        token.encode(),
        role.value.encode(),
        name.encode(),
        request_pem.encode(),
        signing_public_key or b"",
        authority_key_hash,
    )
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def prove(key: bytes, transcript_bytes: bytes) -> bytes:
    """The proof for proof_key(secret)."""
    return hmac.digest(key, transcript_bytes, "sha256")


def is_proved(key: bytes, transcript_bytes: bytes, proof: bytes) -> bool:
    """In constant time."""
    return hmac.compare_digest(prove(key, transcript_bytes), proof)


def is_signing_key_proved(request: EnrollmentRequest, transcript_bytes: bytes) -> bool:
    """Whether the newcomer holds the signing key that it names."""
    if request.signing_public_key is None or request.signing_proof is None:
        return False
    try:
        public = Ed25519PublicKey.from_public_bytes(request.signing_public_key)
        public.verify(request.signing_proof, transcript_bytes)
    except (InvalidSignature, ValueError):
        return False
    return True


def public_key_hash(certificate: x509.Certificate) -> bytes:
    """SHA-256 of the certificate's public key, as join tokens pin it."""
    public = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(public).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateKey:
    """A fresh private key and the request for its certificate."""

    key_pem: str = field(repr=False)
    request_pem: str


def common_name(name: str) -> x509.Name:
    """`name` as a certificate's subject, for people only: cut to what fits."""
    fitting = name.encode(errors="replace")[:COMMON_NAME_BYTES_MAX].decode(errors="ignore")
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, fitting)])


def make_certificate_key(name: str) -> CertificateKey:
    """A new ECDSA P-256 key; `name` is for people only: the authority decides what the certificate says."""
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(common_name(name)).sign(key, hashes.SHA256())
    return CertificateKey(
        key_pem=_private_pem(key).decode(), request_pem=request.public_bytes(serialization.Encoding.PEM).decode()
    )


def credentials_pem(certificate: CertificateBundle, key: CertificateKey) -> bytes:
    """The contents of CREDENTIALS_FILE, for enrolment and renewal alike."""
    return (certificate.certificate_pem.rstrip() + "\n" + key.key_pem).encode()


def make_signing_key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrolledIdentity:
    """Who this program is in its vault, whom it calls, and whose signature on grants it trusts."""

    peer: PeerIdentity
    name: str
    server_url: str
    vault_authority_public_key: bytes
    """Raw Ed25519."""

    def __post_init__(self) -> None:
        if len(self.vault_authority_public_key) != 32:
            raise InvalidValue(what="vault_authority_public_key", value="", rule="must be 32 bytes")

    def encode(self) -> bytes:
        """The contents of IDENTITY_FILE."""
        content = {
            "format": IDENTITY_FORMAT,
            "vault": self.peer.vault,
            "role": self.peer.role.value,
            "identifier": self.peer.identifier,
            "name": self.name,
            "server_url": self.server_url,
            "vault_authority_public_key": self.vault_authority_public_key.hex(),
        }
        return json.dumps(content, indent=1).encode() + b"\n"

    @staticmethod
    def decode(data: bytes) -> EnrolledIdentity:
        """Raises IdentityFileInvalid."""
        try:
            content = json.loads(data)
            if content["format"] != IDENTITY_FORMAT:
                raise IdentityFileInvalid(reason=f"its format is {content['format']}, not {IDENTITY_FORMAT}")
            peer = PeerIdentity(
                vault=VaultId(content["vault"]),
                role=Role(content["role"]),
                identifier=check_identifier(content["identifier"], "identifier"),
            )
            return EnrolledIdentity(
                peer=peer,
                name=str(content["name"]),
                server_url=str(content["server_url"]),
                vault_authority_public_key=bytes.fromhex(content["vault_authority_public_key"]),
            )
        except (ValueError, KeyError, TypeError, RecursionError, InvalidValue) as error:
            raise IdentityFileInvalid(reason=str(error)) from error


class IdentityFileInvalid(LocalFault):
    """Fields: reason."""

    code = "identity-file-invalid"
    message = "identity.json is damaged: {reason}"
    hint = "Restore it from a backup, or enrol again with a new join token."


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrollmentBundle:
    """All that an enrolment leaves behind. The program writes it into its state directory and is enrolled then."""

    identity: EnrolledIdentity
    credentials_pem: bytes = field(repr=False)
    authority_pem: bytes
    signing_key_pem: bytes | None = field(repr=False, default=None)
    """Process servers only: PKCS #8, Ed25519, not encrypted."""

    def files(self) -> tuple[tuple[str, bytes], ...]:
        """Names and contents in the order in which they are to be written (mode 0600, each durable before the next)."""
        signing = () if self.signing_key_pem is None else ((SIGNING_KEY_FILE, self.signing_key_pem),)
        return (
            (CREDENTIALS_FILE, self.credentials_pem),
            (AUTHORITY_FILE, self.authority_pem),
            *signing,
            (IDENTITY_FILE, self.identity.encode()),
        )


def signing_key_pem(key: Ed25519PrivateKey) -> bytes:
    """The contents of SIGNING_KEY_FILE."""
    return _private_pem(key)


def read_signing_key(data: bytes) -> Ed25519PrivateKey:
    """Raises IdentityFileInvalid."""
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm, InternalError) as error:
        raise IdentityFileInvalid(reason="the signing key cannot be read") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise IdentityFileInvalid(reason="the signing key is not an Ed25519 key")
    return key


def _private_pem(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
