"""Joining, staying and leaving, against a server that really runs."""

from __future__ import annotations

import asyncio
import datetime
import os
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID

from config_server import service
from config_server.installation import initialise
from protocol.control_errors import (
    CertificateTimeInvalid,
    CredentialMissing,
    JoinTokenExpired,
    JoinTokenForAnotherRole,
    JoinTokenUsed,
    JoinTokenWrong,
    ServerNotTrusted,
    ServerUnreachable,
)
from protocol.enrollment import (
    AUTHORITY_FILE,
    CREDENTIALS_FILE,
    IDENTITY_FILE,
    SIGNING_KEY_FILE,
    EnrolledIdentity,
    EnrollmentReply,
    EnrollmentRequest,
    credentials_pem,
    make_certificate_key,
    proof_key,
    prove,
    read_signing_key,
    transcript,
)
from protocol.errors import CertificateRefused
from protocol.join_token import JoinToken
from protocol.signed_records import AuthorityKey
from protocol.transport.control_client import AgentControlClient, ControlConnection, client_context, enroll
from protocol.transport.operator_client import OperatorClient
from protocol.vocabulary import PeerIdentity, Role, VaultId
from runtime.local_directory import LocalDirectory
from tests.config_server.running import (
    AUTHORITY_KEY,
    VAULT,
    AdjustableClock,
    agent_report,
    process_server_report,
    running_server,
)

DAY_NS = 86400 * 10**9


async def test_a_newcomer_joins_and_is_known_by_its_certificate(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server:
        bundle = await server.enroll(Role.AGENT, tmp_path / "agent", name="db-1")
        identity = EnrolledIdentity.decode((tmp_path / "agent" / IDENTITY_FILE).read_bytes())
        assert identity == bundle.identity
        assert (identity.peer.vault, identity.peer.role, identity.server_url) == (VAULT, Role.AGENT, server.url)
        assert identity.vault_authority_public_key == AUTHORITY_KEY.public_key.public_bytes_raw()
        assert (tmp_path / "agent" / AUTHORITY_FILE).read_bytes() == server.authority_pem
        leaf = x509.load_pem_x509_certificate((tmp_path / "agent" / CREDENTIALS_FILE).read_bytes())
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.UniformResourceIdentifier) == [identity.peer.uri]
        async with server.agent_client(tmp_path / "agent") as agent, server.operator() as operator:
            await agent.report(agent_report())
            (machine,) = (await operator.machines()).machines
    assert (machine.machine, machine.name) == (identity.peer.identifier, "db-1")


async def test_what_enrolment_leaves_behind_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server:
        await server.enroll(Role.PROCESS_SERVER, tmp_path / "member")
    names = {CREDENTIALS_FILE, AUTHORITY_FILE, IDENTITY_FILE, SIGNING_KEY_FILE}
    assert set(os.listdir(tmp_path / "member")) == names
    assert {(tmp_path / "member" / name).stat().st_mode & 0o777 for name in names} == {0o600}


async def test_a_process_server_is_granted_with_the_signing_key_that_it_keeps(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server:
        bundle = await server.enroll(Role.PROCESS_SERVER, tmp_path / "member")
        assert bundle.signing_key_pem is not None
        kept = read_signing_key((tmp_path / "member" / SIGNING_KEY_FILE).read_bytes())
        assert kept.private_bytes_raw() == read_signing_key(bundle.signing_key_pem).private_bytes_raw()


async def test_a_token_with_a_wrong_secret_is_refused(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server:
        token = await server.token(Role.AGENT)
        wrong = JoinToken(identifier=token.identifier, secret=bytes(32), authority_key_hash=token.authority_key_hash)
        with pytest.raises(JoinTokenWrong):
            await enroll(server_url=server.url, token=wrong, role=Role.AGENT, name="db-1")
        unknown = JoinToken(identifier="f" * 32, secret=token.secret, authority_key_hash=token.authority_key_hash)
        with pytest.raises(JoinTokenWrong):
            await enroll(server_url=server.url, token=unknown, role=Role.AGENT, name="db-1")
        await enroll(server_url=server.url, token=token, role=Role.AGENT, name="db-1")


async def test_an_expired_token_is_refused(tmp_path: Path) -> None:
    clock = AdjustableClock()
    async with running_server(tmp_path / "server", clock=clock) as server:
        token = await server.token(Role.AGENT, lifetime_seconds=60)
        clock.offset_ns = 61 * 10**9
        with pytest.raises(JoinTokenExpired):
            await enroll(server_url=server.url, token=token, role=Role.AGENT, name="db-1")


async def test_a_used_token_is_refused(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server:
        token = await server.token(Role.AGENT)
        await enroll(server_url=server.url, token=token, role=Role.AGENT, name="db-1")
        with pytest.raises(JoinTokenUsed):
            await enroll(server_url=server.url, token=token, role=Role.AGENT, name="db-2")


async def test_a_token_admits_one_of_many_who_try_at_once(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server:
        token = await server.token(Role.AGENT)
        outcomes = await asyncio.gather(
            *(enroll(server_url=server.url, token=token, role=Role.AGENT, name=f"db-{n}") for n in range(6)),
            return_exceptions=True,
        )
        async with server.operator() as operator:
            machines = (await operator.machines()).machines
    assert sum(isinstance(outcome, JoinTokenUsed) for outcome in outcomes) == 5
    assert len(machines) == 1


async def test_a_token_for_one_role_admits_no_other(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server:
        token = await server.token(Role.AGENT)
        with pytest.raises(JoinTokenForAnotherRole):
            await enroll(server_url=server.url, token=token, role=Role.PROCESS_SERVER, name="site-1")
        await enroll(server_url=server.url, token=token, role=Role.AGENT, name="db-1")


async def test_a_lost_reply_is_asked_for_again_and_does_not_cost_the_token(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server:
        token = await server.token(Role.AGENT)
        key = make_certificate_key("db-1")
        statement = transcript(
            token=token.identifier,
            role=Role.AGENT,
            name="db-1",
            request_pem=key.request_pem,
            signing_public_key=None,
            authority_key_hash=token.authority_key_hash,
        )
        request = EnrollmentRequest(
            token=token.identifier,
            role=Role.AGENT,
            name="db-1",
            request_pem=key.request_pem,
            proof=prove(proof_key(token.secret), statement),
        )
        connection = ControlConnection(
            server_url=server.url, context=client_context(authority_pem=server.authority_pem)
        )
        first = await connection.request("POST", "/v1/enrollments", EnrollmentReply, body=request)
        again = await connection.request("POST", "/v1/enrollments", EnrollmentReply, body=request)
        other = request.model_copy(update={"name": "mallory"})
        with pytest.raises(JoinTokenWrong):
            await connection.request("POST", "/v1/enrollments", EnrollmentReply, body=other)
        await connection.close()
        async with server.operator() as operator:
            machines = (await operator.machines()).machines
    assert first == again
    assert len(machines) == 1


async def test_a_server_of_another_authority_is_found_out_before_anything_is_said(tmp_path: Path) -> None:
    async with running_server(tmp_path / "one") as one, running_server(tmp_path / "two") as two:
        token = await one.token(Role.AGENT)
        with pytest.raises(ServerNotTrusted):
            await enroll(server_url=two.url, token=token, role=Role.AGENT, name="db-1")
        await enroll(server_url=one.url, token=token, role=Role.AGENT, name="db-1")


async def test_an_unreachable_server_is_named(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server:
        token = await server.token(Role.AGENT)
        url = server.url
    with pytest.raises(ServerUnreachable, match=url) as caught:
        await enroll(server_url=url, token=token, role=Role.AGENT, name="db-1")
    assert caught.value.is_retryable


@pytest.mark.parametrize("days", [-400, 400])
async def test_clocks_that_differ_too_much_are_told_as_that(tmp_path: Path, days: int) -> None:
    """The server's certificates are then not yet, or no longer, valid by the newcomer's clock."""
    clock = AdjustableClock()
    clock.offset_ns = days * DAY_NS
    async with running_server(tmp_path / "server", clock=clock) as server:
        with pytest.raises(CertificateTimeInvalid):
            await server.token(Role.AGENT)


async def test_a_certificate_of_another_authority_is_refused(tmp_path: Path) -> None:
    async with running_server(tmp_path / "one") as one, running_server(tmp_path / "two") as two:
        await two.enroll(Role.AGENT, tmp_path / "stranger")
        async with one.agent_client(tmp_path / "stranger") as stranger:
            with pytest.raises(CertificateRefused):
                await stranger.report(agent_report())


async def test_a_certificate_that_the_authority_signed_for_another_vault_is_refused(tmp_path: Path) -> None:
    """The database decides who is a member, not the signature alone."""
    installation = initialise(tmp_path / "server", authority_key=AUTHORITY_KEY, now_ns=AdjustableClock().now_ns())
    key = make_certificate_key("ghost")
    ghost = PeerIdentity(vault=VaultId("f" * 32), role=Role.AGENT, identifier="e" * 32)
    issued = installation.authority.issue(key.request_pem, ghost, name="ghost", now_ns=AdjustableClock().now_ns())
    LocalDirectory(tmp_path / "ghost").replace(
        CREDENTIALS_FILE, credentials_pem(installation.authority.bundle(issued), key)
    )
    async with running_server(tmp_path / "server") as server, server.agent_client(tmp_path / "ghost") as agent:
        with pytest.raises(CertificateRefused):
            await agent.report(agent_report())


async def test_a_renewed_certificate_has_a_new_key_and_the_same_identity(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server, await server.agent(tmp_path / "agent") as agent:
        before = x509.load_pem_x509_certificate((tmp_path / "agent" / CREDENTIALS_FILE).read_bytes())
        key = make_certificate_key("db-1")
        bundle = await agent.renew(key.request_pem)
        LocalDirectory(tmp_path / "agent").replace(CREDENTIALS_FILE, credentials_pem(bundle, key))
        await agent.reload_credentials(server.authority_pem)
        await agent.report(agent_report())
        after = x509.load_pem_x509_certificate((tmp_path / "agent" / CREDENTIALS_FILE).read_bytes())
        async with server.operator() as operator:
            machines = (await operator.machines()).machines
    assert before.public_key() != after.public_key()
    assert before.serial_number != after.serial_number
    assert _names(before) == _names(after)
    assert len(machines) == 1


async def test_renewal_is_ordered_when_the_certificate_is_a_day_old(tmp_path: Path) -> None:
    clock = AdjustableClock()
    async with (
        running_server(tmp_path / "server", clock=clock) as server,
        await server.agent(tmp_path / "agent") as agent,
    ):
        assert not (await agent.report(agent_report())).renew_certificate
        clock.offset_ns = DAY_NS + 10**9
        assert (await agent.report(agent_report())).renew_certificate


async def test_a_revoked_member_is_refused_and_everybody_else_is_told(tmp_path: Path) -> None:
    async with (
        running_server(tmp_path / "server") as server,
        await server.agent(tmp_path / "agent") as agent,
        await server.process_server(tmp_path / "ps") as process_server,
        server.operator() as operator,
    ):
        key = make_certificate_key("db-1")
        await agent.renew(key.request_pem)
        held = [one for one in (await operator.certificates()).certificates if one.role is Role.AGENT]
        assert len(held) == 2
        orders = await process_server.report(process_server_report())
        assert (orders.revoked.number, orders.revoked.serials) == (0, ())
        waiting = asyncio.ensure_future(process_server.wait_for_orders(orders.revision, 30.0))
        await operator.revoke_certificate(held[0].serial)
        revoked = (await asyncio.wait_for(waiting, 10)).revoked
        with pytest.raises(CertificateRefused):
            await agent.report(agent_report())
        with pytest.raises(CertificateRefused):
            await agent.renew(key.request_pem)
    assert revoked.number == 1
    assert set(revoked.serials) == {one.serial for one in held}


async def test_a_long_poll_of_a_member_ends_with_its_revocation(tmp_path: Path) -> None:
    async with (
        running_server(tmp_path / "server") as server,
        await server.agent(tmp_path / "agent") as agent,
        server.operator() as operator,
    ):
        orders = await agent.report(agent_report())
        waiting = asyncio.ensure_future(agent.wait_for_orders(orders.revision, 30.0))
        (held,) = (await operator.certificates()).certificates
        await operator.revoke_certificate(held.serial)
        with pytest.raises(CertificateRefused):
            await asyncio.wait_for(waiting, 10)


async def test_a_wrong_admin_token_is_refused(tmp_path: Path) -> None:
    async with (
        running_server(tmp_path / "server") as server,
        OperatorClient(server_url=server.url, authority_pem=server.authority_pem, token="x" * 43) as operator,
    ):
        with pytest.raises(CredentialMissing):
            await operator.machines()


async def test_another_vaults_server_does_not_pass_for_this_one(tmp_path: Path) -> None:
    """A member goes on trusting only the authority that it has pinned."""
    other_key = AuthorityKey(vault=VaultId("a" * 32), private_key=Ed25519PrivateKey.generate())
    async with (
        running_server(tmp_path / "one") as one,
        running_server(tmp_path / "two", authority_key=other_key) as two,
    ):
        await one.enroll(Role.AGENT, tmp_path / "agent")
        async with AgentControlClient(
            server_url=two.url,
            authority_pem=one.authority_pem,
            credentials_path=str(tmp_path / "agent" / CREDENTIALS_FILE),
        ) as agent:
            with pytest.raises(ServerNotTrusted):
                await agent.report(agent_report())


def _names(certificate: x509.Certificate) -> list[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.UniformResourceIdentifier)


@pytest.mark.parametrize("role", [Role.AGENT, Role.PROCESS_SERVER])
async def test_a_member_that_calls_itself_like_the_server_does_not_pass_for_it(tmp_path: Path, role: Role) -> None:
    """The name is the newcomer's own choice; who waits at the server's address with it must not get the admin token."""

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read(1024))
        writer.close()

    heard: list[bytes] = []
    async with running_server(tmp_path / "server") as server:
        await server.enroll(role, tmp_path / "member", name="localhost")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "member" / CREDENTIALS_FILE)
        impostor = await asyncio.start_server(take, "127.0.0.1", 0, ssl=context)
        async with impostor:
            operator = OperatorClient(
                server_url=f"https://localhost:{impostor.sockets[0].getsockname()[1]}",
                authority_pem=server.authority_pem,
                token=server.admin_token,
            )
            async with operator:
                with pytest.raises(ServerNotTrusted):
                    await operator.machines()
    assert heard in ([], [b""])


async def test_a_certificate_is_good_for_no_more_than_its_role_does(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server:
        usages = {}
        for role in (Role.AGENT, Role.PROCESS_SERVER, Role.RECOVERY_WORKER):
            await server.enroll(role, tmp_path / role.value)
            certificate = x509.load_pem_x509_certificate((tmp_path / role.value / CREDENTIALS_FILE).read_bytes())
            usages[role] = set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    client, server_side = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
    assert usages == {
        Role.AGENT: {client},
        Role.PROCESS_SERVER: {client, server_side},
        Role.RECOVERY_WORKER: {client},
    }


async def test_a_long_name_of_letters_that_take_two_bytes_each_is_cut_and_joins(tmp_path: Path) -> None:
    name = "ä" * 200
    async with running_server(tmp_path / "server") as server, server.operator() as operator:
        await server.enroll(Role.AGENT, tmp_path / "agent", name=name)
        assert [machine.name for machine in (await operator.machines()).machines] == [name]


async def test_a_renewal_while_the_servers_clock_was_ahead_locks_nobody_out(tmp_path: Path) -> None:
    clock = AdjustableClock()
    async with (
        running_server(tmp_path / "server", clock=clock) as server,
        await server.agent(tmp_path / "agent") as agent,
    ):
        clock.offset_ns = 10 * DAY_NS
        key = make_certificate_key("db-1")
        bundle = await agent.renew(key.request_pem)
        clock.offset_ns = 0
        LocalDirectory(tmp_path / "agent").replace(CREDENTIALS_FILE, credentials_pem(bundle, key))
        await agent.reload_credentials(server.authority_pem)
        await agent.report(agent_report())


async def test_a_connection_does_not_outlive_its_certificate(tmp_path: Path) -> None:
    clock = AdjustableClock()
    async with (
        running_server(tmp_path / "server", clock=clock) as server,
        await server.agent(tmp_path / "agent") as agent,
    ):
        await agent.report(agent_report())
        clock.offset_ns = 15 * DAY_NS
        with pytest.raises(CertificateRefused, match="expired"):
            await agent.report(agent_report())
        with pytest.raises(CertificateRefused, match="expired"):
            await agent.renew(make_certificate_key("db-1").request_pem)


async def test_the_server_renews_its_own_certificate_by_the_wall_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that was suspended has not waited for a day, but a day has passed."""
    monkeypatch.setattr(service, "CERTIFICATE_CHECK_SECONDS", 0.01)
    clock = AdjustableClock()
    async with running_server(tmp_path / "server", clock=clock):
        path = tmp_path / "server" / CREDENTIALS_FILE
        before = x509.load_pem_x509_certificate(path.read_bytes())
        clock.offset_ns = 2 * DAY_NS
        after = before
        async with asyncio.timeout(20):
            while after.serial_number == before.serial_number:
                await asyncio.sleep(0.01)
                after = x509.load_pem_x509_certificate(path.read_bytes())
    assert after.not_valid_after_utc - before.not_valid_after_utc >= datetime.timedelta(days=2)
