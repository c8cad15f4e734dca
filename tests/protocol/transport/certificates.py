"""A small certificate authority for tests: leaves with a role's URI name, expired ones, revocation lists."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from protocol.vocabulary import PeerIdentity, Role, VaultId

VAULT = VaultId("0a" * 16)
AGENT = PeerIdentity(vault=VAULT, role=Role.AGENT, identifier="0b" * 16)
PROCESS_SERVER = PeerIdentity(vault=VAULT, role=Role.PROCESS_SERVER, identifier="0c" * 16)
DAY = datetime.timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """Certificate and key in one file, as enrolment writes them, and the authority that the holder trusts."""

    path: Path
    authority_path: Path
    serial: int


class Authority:
    """One self-signed authority with its files in `directory`."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        self._directory = directory
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(self._name)
            .issuer_name(self._name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(self.now - 30 * DAY)
            .not_valid_after(self.now + 30 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.path = directory / f"{name}.pem"
        self.path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(
        self,
        *uris: str,
        file_name: str = "leaf",
        valid_from: datetime.timedelta = -DAY,
        valid_to: datetime.timedelta = DAY,
        trusts: Authority | None = None,
    ) -> Leaf:
        """A leaf with these URI names. It trusts this authority unless told otherwise."""
        key = ec.generate_private_key(ec.SECP256R1())
        serial = x509.random_serial_number()
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, file_name)]))
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(serial)
            .not_valid_before(self.now + valid_from)
            .not_valid_after(self.now + valid_to)
        )
        if uris:
            names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])
            builder = builder.add_extension(names, critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        path = self._directory / f"{file_name}.pem"
        path.write_bytes(
            certificate.public_bytes(serialization.Encoding.PEM)
            + key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return Leaf(path=path, authority_path=(trusts or self).path, serial=serial)
