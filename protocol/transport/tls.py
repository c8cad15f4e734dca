"""TLS contexts of the data plane, and who is at the other end of a connection.

TLS 1.3 only; both sides show certificates of the vault's authority; no tickets and no resumption, because a resumed
session skips the revocation list. A new revocation list or certificate means a new context: a context never changes
after it was made.

The identity is the certificate's one URI name, `farpoint://<vault>/<role>/<id>`. Host names are not checked: process
servers are reached by whatever address a site routes to, agents have none, and a name that anybody's DNS can move
proves nothing about which role of which vault answers. The URI name proves that, and whoever connects states the role
that it expects.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Final

from cryptography import x509

from protocol.errors import (
    CertificateRefused,
    CertificateUnusable,
    ConnectionLost,
    InvalidValue,
    NotPermitted,
    ReplicationError,
    TlsFault,
)
from protocol.vocabulary import PeerIdentity, Role

_REFUSALS_BY_PEER: Final = {
    "TLSV1_ALERT_UNKNOWN_CA": "the peer does not know its authority",
    "TLSV1_ALERT_DECRYPT_ERROR": "the peer could not verify its signature",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the peer requires a certificate",
    "SSLV3_ALERT_BAD_CERTIFICATE": "the peer found it bad",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "the peer does not support it",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "it has expired, by the peer's clock",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "the peer did not accept it",
    "TLSV1_ALERT_ACCESS_DENIED": "the peer denied access",
}


class IdentityContext(ssl.SSLContext):
    """A context that knows whose certificate it shows."""

    identity: PeerIdentity


def server_context(certificate_path: Path, key_path: Path, authority_path: Path) -> IdentityContext:
    """What a process server listens with. All files are PEM; one file may hold certificate and key.

    Revocation is not looked at here: it goes by serial number, on live connections too. Raises CertificateUnusable.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER, certificate_path, key_path, authority_path)
    context.num_tickets = 0
    return context


def client_context(certificate_path: Path, key_path: Path, authority_path: Path) -> IdentityContext:
    """What an agent connects with; as server_context()."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, certificate_path, key_path, authority_path)


def _context(protocol: int, certificate_path: Path, key_path: Path, authority_path: Path) -> IdentityContext:
    context = IdentityContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # why: see above, the URI name is checked instead
    context.verify_mode = ssl.CERT_REQUIRED
    path = certificate_path
    try:
        context.identity = _own_identity(certificate_path)
        context.load_cert_chain(certificate_path, key_path)
        path = authority_path
        context.load_verify_locations(authority_path)
    except (OSError, ValueError, InvalidValue, *CERTIFICATE_ERRORS) as error:
        raise CertificateUnusable(path=str(path), reason=str(error)) from error
    return context


CERTIFICATE_ERRORS: Final = (x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType)
"""What cryptography raises for damaged certificates and requests beside ValueError."""


def _own_identity(certificate_path: Path) -> PeerIdentity:
    certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound as error:
        raise InvalidValue(what="certificate", value="no names", rule="must carry an identity as URI name") from error
    return _only_identity(names.get_values_for_type(x509.UniformResourceIdentifier))


def _only_identity(uris: list[str]) -> PeerIdentity:
    if len(uris) != 1:
        raise InvalidValue(what="URI names", value=uris, rule="must be exactly one, the identity")
    return PeerIdentity.from_uri(uris[0])


def identity_of(ssl_object: ssl.SSLObject | ssl.SSLSocket) -> PeerIdentity:
    """Whom the verified certificate of the peer speaks for. Raises CertificateRefused if it names nobody, or
    several."""
    certificate = ssl_object.getpeercert()
    if not certificate:
        raise CertificateRefused(subject="the peer", reason="it showed none")
    names: tuple[tuple[str, str], ...] = certificate.get("subjectAltName", ())  # type: ignore[assignment]
    try:
        return _only_identity([value for kind, value in names if kind == "URI"])
    except InvalidValue as error:
        raise CertificateRefused(subject="the peer", reason=str(error)) from error


def certificate_serial_of(ssl_object: ssl.SSLObject | ssl.SSLSocket) -> str:
    """The serial number of the peer's certificate: upper-case hexadecimal, to be held against the revoked list."""
    certificate = ssl_object.getpeercert()
    return str(certificate["serialNumber"]) if certificate else ""


def expiry_seconds_of(ssl_object: ssl.SSLObject | ssl.SSLSocket) -> float:
    """When the peer's certificate ends, in seconds since the Unix epoch."""
    certificate = ssl_object.getpeercert()
    assert certificate
    return float(ssl.cert_time_to_seconds(str(certificate["notAfter"])))


def check_peer(peer: PeerIdentity, *, own: PeerIdentity, expected_roles: frozenset[Role]) -> None:
    """Raises NotPermitted for a peer of another vault, or in a role that has no business here."""
    if peer.vault != own.vault:
        raise NotPermitted(subject=peer.uri, reason=f"it belongs to another vault than {own.vault}")
    if peer.role not in expected_roles:
        roles = " or ".join(sorted(role.value for role in expected_roles))
        raise NotPermitted(subject=peer.uri, reason=f"its role is {peer.role.value}, expected {roles}")


def tls_error(error: ssl.SSLError, *, peer: str) -> ReplicationError:
    """What a failed handshake, or an alert, means: a refused certificate (theirs or ours), another TLS, a cut
    connection."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return CertificateRefused(subject=peer, reason=error.verify_message)
    reason = error.reason or str(error)
    if reason in _REFUSALS_BY_PEER:
        return CertificateRefused(subject="this program", reason=f"{_REFUSALS_BY_PEER[reason]} ({peer})")
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return CertificateRefused(subject=peer, reason="it showed none")
    if isinstance(error, ssl.SSLEOFError):
        return ConnectionLost(peer=peer, reason="cut during the TLS handshake")
    return TlsFault(peer=peer, reason=reason.replace("_", " ").lower())
