"""The vault's certificate authority: it says who may speak for which identity, for 14 days at a time.

A certificate says only what this server decided: of a request nothing but the public key is used. The URI name
`farpoint://<vault>/<role>/<id>` is the identity; host names stand in the configuration server's own certificate alone.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from protocol.control import CertificateBundle
from protocol.control_errors import CertificateRequestInvalid
from protocol.enrollment import LEAF_LIFETIME, common_name, public_key_hash
from protocol.errors import MalformedInput
from protocol.vocabulary import PeerIdentity, Role, VaultId

AUTHORITY_LIFETIME: Final = datetime.timedelta(days=3650)
BACKDATED: Final = datetime.timedelta(minutes=5)
"""By how much a newcomer's clock may be behind when the authority is new. A leaf begins where its authority does."""

_CLIENT: Final = ExtendedKeyUsageOID.CLIENT_AUTH
_SERVER: Final = ExtendedKeyUsageOID.SERVER_AUTH
USAGES: Final = {
    Role.AGENT: (_CLIENT,),
    Role.PROCESS_SERVER: (_CLIENT, _SERVER),
    Role.RECOVERY_WORKER: (_CLIENT,),
    Role.CONFIGURATION_SERVER: (_SERVER,),
}
"""Who only calls cannot pass for somebody who is called, whatever name it gave itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuedCertificate:
    """serial as in protocol.control.CertificateSerial; validity by the server's clock."""

    serial: str
    certificate_pem: str
    valid_from_ns: int
    valid_until_ns: int


class CertificateAuthority:
    """An authority's certificate and key. Signs; keeps nothing."""

    def __init__(self, *, vault: VaultId, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._vault = vault
        self._certificate = certificate
        self._key = key

    @staticmethod
    def make(vault: VaultId, now_ns: int) -> CertificateAuthority:
        """A new authority with a new key."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Farpoint {vault}")])
        begin = _instant(now_ns) - BACKDATED
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + AUTHORITY_LIFETIME)
            # why: one level below it is left free for an intermediate authority
            .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
            .add_extension(_key_usage(is_authority=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return CertificateAuthority(vault=vault, certificate=certificate, key=key)

    @staticmethod
    def load(*, vault: VaultId, certificate_pem: bytes, key_pem: bytes) -> CertificateAuthority:
        """Raises MalformedInput unless both can be read and belong together."""
        what = "the certificate authority"
        try:
            certificate = x509.load_pem_x509_certificate(certificate_pem)
            key = serialization.load_pem_private_key(key_pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm, InternalError, x509.InvalidVersion) as error:
            raise MalformedInput(what=what, reason="its certificate or key cannot be read") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise MalformedInput(what=what, reason="its certificate and key do not belong together")
        return CertificateAuthority(vault=vault, certificate=certificate, key=key)

    @property
    def certificate_pem(self) -> bytes:
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    @property
    def public_key_hash(self) -> bytes:
        """What join tokens pin."""
        return public_key_hash(self._certificate)

    def issue(
        self,
        request_pem: str,
        identity: PeerIdentity,
        *,
        name: str,
        now_ns: int,
        server_names: Sequence[str] = (),
    ) -> IssuedCertificate:
        """A leaf for `identity`; server_names: host names and addresses, for this server's own.

        Raises CertificateRequestInvalid.
        """
        names = [x509.UniformResourceIdentifier(identity.uri), *(_general_name(one) for one in server_names)]
        extensions = (x509.SubjectAlternativeName(names), x509.ExtendedKeyUsage(USAGES[identity.role]))
        return self._sign(_requested_key(request_pem), extensions, common_name(name), now_ns)

    def bundle(self, issued: IssuedCertificate) -> CertificateBundle:
        return CertificateBundle(certificate_pem=issued.certificate_pem, authority_pem=self.certificate_pem.decode())

    def _sign(
        self,
        public_key: ec.EllipticCurvePublicKey,
        extensions: tuple[x509.SubjectAlternativeName, x509.ExtendedKeyUsage],
        subject: x509.Name,
        now_ns: int,
    ) -> IssuedCertificate:
        serial = x509.random_serial_number()
        # why: a renewal while this server's clock was ahead must not lock its holder out when the clock is right again
        begin = self._certificate.not_valid_before_utc
        end = max(begin, _instant(now_ns)) + LEAF_LIFETIME
        names, usages = extensions
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._certificate.subject)
            .public_key(public_key)
            .serial_number(serial)
            .not_valid_before(begin)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(is_authority=False), critical=True)
            .add_extension(usages, critical=False)
            .add_extension(names, critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(_issuer_key(self._certificate), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return IssuedCertificate(
            serial=serial.to_bytes((serial.bit_length() + 7) // 8, "big").hex().upper(),
            certificate_pem=certificate.public_bytes(serialization.Encoding.PEM).decode(),
            valid_from_ns=now_ns,
            valid_until_ns=now_ns + int(LEAF_LIFETIME.total_seconds()) * 10**9,
        )


def _requested_key(request_pem: str) -> ec.EllipticCurvePublicKey:
    try:
        request = x509.load_pem_x509_csr(request_pem.encode())
        is_proved = request.is_signature_valid
        key = request.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature, x509.InvalidVersion) as error:
        raise CertificateRequestInvalid(reason="it is not a certificate request") from error
    if not is_proved:
        raise CertificateRequestInvalid(reason="it is not signed by the key that it names")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise CertificateRequestInvalid(reason="its key must be ECDSA P-256")
    return key


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _issuer_key(certificate: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    identifier = certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _key_usage(*, is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        encipher_only=False,
        decipher_only=False,
    )


def _instant(now_ns: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(now_ns // 10**9, tz=datetime.UTC)
