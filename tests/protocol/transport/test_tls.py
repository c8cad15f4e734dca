"""Contexts are TLS 1.3 without tickets; an identity comes from a certificate's one URI name and from nothing else."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from protocol.errors import CertificateRefused, CertificateUnusable, NotPermitted
from protocol.transport.tls import check_peer, client_context, identity_of, server_context
from protocol.vocabulary import PeerIdentity, Role, VaultId
from tests.protocol.transport.certificates import AGENT, PROCESS_SERVER, VAULT, Authority


class Showing:
    """Stands for the ssl object of a connection whose peer showed this certificate."""

    def __init__(self, certificate: object) -> None:
        self._certificate = certificate

    def getpeercert(self) -> object:
        return self._certificate


def test_contexts_speak_tls_1_3_only_demand_a_certificate_and_hand_out_no_tickets(tmp_path: Path) -> None:
    leaf = Authority(tmp_path).issue(AGENT.uri)
    server = server_context(leaf.path, leaf.path, leaf.authority_path)
    client = client_context(leaf.path, leaf.path, leaf.authority_path)
    for context in (server, client):
        assert context.minimum_version is ssl.TLSVersion.TLSv1_3
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.identity == AGENT
    assert server.num_tickets == 0


def test_a_certificate_that_names_no_identity_cannot_be_used(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    for leaf in (
        authority.issue(file_name="no-names"),
        authority.issue("https://example.org/", file_name="another-uri"),
        authority.issue(AGENT.uri, PROCESS_SERVER.uri, file_name="two"),
    ):
        with pytest.raises(CertificateUnusable, match="must"):
            client_context(leaf.path, leaf.path, leaf.authority_path)


def test_missing_or_damaged_files_are_named(tmp_path: Path) -> None:
    leaf = Authority(tmp_path).issue(AGENT.uri)
    other = Authority(tmp_path, "other").issue(AGENT.uri, file_name="other-leaf")
    damaged = tmp_path / "damaged.pem"
    damaged.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    missing = tmp_path / "missing.pem"
    for certificate, key, authority, culprit in (
        (missing, missing, leaf.authority_path, missing),
        (damaged, damaged, leaf.authority_path, damaged),
        (leaf.path, other.path, leaf.authority_path, leaf.path),
        (leaf.path, leaf.path, missing, missing),
        (leaf.path, leaf.path, damaged, damaged),
    ):
        with pytest.raises(CertificateUnusable) as caught:
            server_context(certificate, key, authority)
        assert caught.value.fields["path"] == str(culprit)
        assert caught.value.hint


@pytest.mark.parametrize(
    "certificate",
    [
        None,
        {},
        {"subjectAltName": ()},
        {"subjectAltName": (("DNS", AGENT.uri),)},
        {"subjectAltName": (("URI", AGENT.uri), ("URI", PROCESS_SERVER.uri))},
        {"subjectAltName": (("URI", AGENT.uri + "/"),)},
        {"subjectAltName": (("URI", AGENT.uri.replace("agent", "root")),)},
        {"subjectAltName": (("URI", AGENT.uri.upper()),)},
        {"subjectAltName": (("URI", AGENT.uri + "\n"),)},
        {"subject": ((("commonName", AGENT.uri),),)},
    ],
)
def test_whoever_does_not_name_exactly_one_identity_is_refused(certificate: object) -> None:
    with pytest.raises(CertificateRefused):
        identity_of(Showing(certificate))  # type: ignore[arg-type]


def test_other_kinds_of_names_beside_the_identity_do_not_matter() -> None:
    names = (("DNS", "ps.example.org"), ("URI", AGENT.uri), ("IP Address", "127.0.0.1"))
    assert identity_of(Showing({"subjectAltName": names})) == AGENT  # type: ignore[arg-type]


def test_a_peer_of_another_vault_or_role_is_not_permitted() -> None:
    roles = frozenset({Role.AGENT})
    check_peer(AGENT, own=PROCESS_SERVER, expected_roles=roles)
    with pytest.raises(NotPermitted, match="role is process-server, expected agent"):
        check_peer(PROCESS_SERVER, own=PROCESS_SERVER, expected_roles=roles)
    stranger = PeerIdentity(vault=VaultId("ff" * 16), role=Role.AGENT, identifier=AGENT.identifier)
    with pytest.raises(NotPermitted, match=f"another vault than {VAULT}"):
        check_peer(stranger, own=PROCESS_SERVER, expected_roles=roles)
