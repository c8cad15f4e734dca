"""Who is let in: join tokens, certificates, and whose disk it is. Every refusal is typed, told, and disturbs nobody."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from protocol.control import AgentReport, DiskRegistration, HostDescription
from protocol.control_errors import (
    CredentialMissing,
    DiskOfAnotherMachine,
    MachineQuarantined,
    ResourceNotFound,
    ServerNotTrusted,
)
from protocol.enrollment import AUTHORITY_FILE, CREDENTIALS_FILE
from protocol.errors import CertificateRefused, ConnectionLost, NotPermitted
from protocol.messages import CloseDisk, DiskOpened, Hello, Message, OpenDisk, Refusal, Welcome
from protocol.transport import channel, tls
from protocol.transport.control_client import AgentControlClient, ProcessServerControlClient
from protocol.vocabulary import DiskId, MachineId, PeerIdentity, Role, VaultId
from runtime.exit_codes import ExitCode
from tests.protocol.transport.certificates import Authority
from tests.scenarios.conftest import ReplicatedSite
from tests.scenarios.disks import MEBIBYTE, SourceDisk
from tests.scenarios.processes import Finished, call_command
from tests.scenarios.site import Agent, Site


@pytest.fixture(autouse=True, scope="module")
def replication_goes_on(replicated: ReplicatedSite) -> Iterator[None]:
    """Whatever was tried, the honest agent's disk is in its first epoch, and its next change is protected as ever."""
    yield
    replicated.source.change()
    newest = replicated.site.wait_for_point(replicated.disk, after_ns=replicated.source.changed_ns)
    replicated.site.expect_recovered_equal(replicated.disk, newest, replicated.source.path)
    assert replicated.agent.gauge("epoch", replicated.disk) == 1


def newcomer(site: Site, tmp_path: Path) -> Agent:
    agent = Agent(site, "newcomer")
    agent.directory = tmp_path / "newcomer"
    return agent


def enroll_with(site: Site, tmp_path: Path, token: str | bytes) -> Finished:
    path = tmp_path / "token"
    path.write_bytes(token if isinstance(token, bytes) else token.encode())
    done = newcomer(site, tmp_path).enroll(token_file=path)
    assert not (tmp_path / "newcomer" / CREDENTIALS_FILE).exists()
    return done


def test_a_token_with_another_secret_is_refused(replicated: ReplicatedSite, tmp_path: Path) -> None:
    parts = replicated.site.token("agent").read_text().strip().split(".")
    others = replicated.site.token("agent").read_text().strip().split(".")
    done = enroll_with(replicated.site, tmp_path, ".".join([parts[0], others[1], parts[2]]))
    done.expect(ExitCode.NOT_PERMITTED, "is not known here, or its secret is wrong")


def test_a_text_that_is_no_token_is_wrong_usage(replicated: ReplicatedSite, tmp_path: Path) -> None:
    for text in ("let me in", b"\xff\xfe\0", "", "a.b.c"):
        enroll_with(replicated.site, tmp_path, text).expect(ExitCode.USAGE, "this is not a join token")


def test_a_token_file_that_is_not_there_is_not_found(replicated: ReplicatedSite, tmp_path: Path) -> None:
    done = newcomer(replicated.site, tmp_path).enroll(token_file=tmp_path / "nowhere")
    done.expect(ExitCode.NOT_FOUND, "there is no file")


def test_an_expired_token_is_refused(replicated: ReplicatedSite, tmp_path: Path) -> None:
    token = replicated.site.token("agent", expires_in="1 s")
    expired_at = time.time() + 1.0
    replicated.site.wait_until("the token has expired", lambda: time.time() > expired_at)
    done = newcomer(replicated.site, tmp_path).enroll(token_file=token)
    done.expect(ExitCode.NOT_PERMITTED, "has expired", "farpoint token create")


def test_a_token_lets_in_once(replicated: ReplicatedSite, tmp_path: Path) -> None:
    token = replicated.site.token("agent")
    first = newcomer(replicated.site, tmp_path)
    first.enroll(token_file=token).expect(ExitCode.OK)
    first.enroll(token_file=replicated.site.token("agent")).expect(ExitCode.FAILURE, "already")
    again = newcomer(replicated.site, tmp_path)
    again.directory = tmp_path / "again"
    again.enroll(token_file=token).expect(ExitCode.NOT_PERMITTED, "has been used already")


def test_a_token_for_another_role_is_refused(replicated: ReplicatedSite, tmp_path: Path) -> None:
    site = replicated.site
    done = newcomer(site, tmp_path).enroll(token_file=site.token("process-server"))
    done.expect(ExitCode.NOT_PERMITTED, "is for the role process-server, not agent")
    done = site.enroll_process_server(tmp_path / "server", token_file=site.token("agent"))
    done.expect(ExitCode.NOT_PERMITTED, "is for the role agent, not process-server")


def test_a_server_that_is_not_the_tokens_is_not_trusted(replicated: ReplicatedSite, tmp_path: Path) -> None:
    identifier, secret, _ = replicated.site.token("agent").read_text().strip().split(".")
    with Site(_directory(tmp_path / "other")) as other:
        foreign_hash = other.token("agent").read_text().strip().split(".")[2]
    done = enroll_with(replicated.site, tmp_path, f"{identifier}.{secret}.{foreign_hash}")
    done.expect(ExitCode.FAILURE, "is not trusted")


def test_no_server_at_the_address_is_a_failure(replicated: ReplicatedSite, tmp_path: Path) -> None:
    done = newcomer(replicated.site, tmp_path).enroll(server_url="https://127.0.0.1:1")
    done.expect(ExitCode.FAILURE, "cannot be reached")


def test_the_operators_routes_need_the_admin_token(replicated: ReplicatedSite, tmp_path: Path) -> None:
    wrong = tmp_path / "admin-token"
    wrong.write_text("not-the-token\n")
    site = replicated.site
    authority = site.root / "config-server" / "authority.pem"
    for command in (("machines",), ("disks",), ("points",), ("token", "create", "--role", "agent")):
        done = call_command(
            *("farpoint", *command, "--server", site.server_url, "--ca", authority, "--token-file", wrong)
        )
        done.expect(ExitCode.NOT_PERMITTED)
        assert not done.stdout


# the data plane


def forged_leaf(replicated: ReplicatedSite, tmp_path: Path, *, vault: VaultId | None = None) -> tls.IdentityContext:
    """A certificate that names the honest agent, from an authority of our own."""
    own = identity_of(replicated.agent.directory)
    claimed = PeerIdentity(vault=vault or own.vault, role=Role.AGENT, identifier=own.identifier)
    leaf = Authority(tmp_path, "forger").issue(claimed.uri)
    return tls.client_context(leaf.path, leaf.path, replicated.agent.directory / AUTHORITY_FILE)


def identity_of(directory: Path) -> PeerIdentity:
    return member_context(directory).identity


def member_context(directory: Path) -> tls.IdentityContext:
    credentials = directory / CREDENTIALS_FILE
    return tls.client_context(credentials, credentials, directory / AUTHORITY_FILE)


async def ask_for(disk: DiskId, port: int, context: tls.IdentityContext) -> Message:
    """What the process server answers, in the end, to a client with this certificate that wants to send the disk."""
    opened = await channel.connect("127.0.0.1", port, tls=context)
    try:
        async with asyncio.timeout(10):
            # why: who refuses at once may have closed already; what it said is still there to be read
            with suppress(ConnectionLost):
                await opened.send(Hello(wire_version_min=1, wire_version_max=1, agent_version="test", boot_id="test"))
            while True:
                received = await opened.receive()
                received.release()
                match received.message:
                    case Welcome():
                        await opened.send(OpenDisk(channel=1, disk=disk, epoch=1, acknowledged_sequence=0))
                    case CloseDisk() | DiskOpened() | Refusal() as answer:
                        return answer
    finally:
        opened.abort()


def test_a_certificate_of_another_authority_is_refused_on_the_data_port(
    replicated: ReplicatedSite, tmp_path: Path
) -> None:
    with pytest.raises(CertificateRefused):
        asyncio.run(ask_for(replicated.disk, replicated.site.data_port, forged_leaf(replicated, tmp_path)))


def test_a_certificate_of_another_role_is_refused_on_the_data_port(replicated: ReplicatedSite) -> None:
    context = member_context(replicated.site.process_directory)
    answer = asyncio.run(ask_for(replicated.disk, replicated.site.data_port, context))
    assert isinstance(answer, Refusal)
    assert answer.code == NotPermitted.code
    assert "role" in answer.detail


def test_an_agent_that_opens_another_machines_disk_is_refused(replicated: ReplicatedSite, tmp_path: Path) -> None:
    thief = newcomer(replicated.site, tmp_path)
    thief.enroll().expect(ExitCode.OK)
    answer = asyncio.run(ask_for(replicated.disk, replicated.site.data_port, member_context(thief.directory)))
    assert isinstance(answer, CloseDisk)
    assert answer.code == NotPermitted.code
    assert replicated.agent.gauge("epoch", replicated.disk) == 1


# the control plane


def agent_client(replicated: ReplicatedSite, credentials: Path) -> AgentControlClient:
    return AgentControlClient(
        server_url=replicated.site.server_url,
        authority_pem=(replicated.agent.directory / AUTHORITY_FILE).read_bytes(),
        credentials_path=str(credentials),
    )


def registration_of(replicated: ReplicatedSite) -> DiskRegistration:
    status = replicated.site.disk(replicated.disk)
    assert status is not None
    return DiskRegistration(path=status.path, identity=status.identity, disk=replicated.disk)


async def register(client: AgentControlClient, registration: DiskRegistration) -> str:
    async with client:
        return (await client.register_disk(registration)).disk


def test_a_certificate_of_another_authority_is_refused_on_the_control_plane(
    replicated: ReplicatedSite, tmp_path: Path
) -> None:
    leaf = Authority(tmp_path, "forger").issue(identity_of(replicated.agent.directory).uri)
    with pytest.raises(CertificateRefused):
        asyncio.run(register(agent_client(replicated, leaf.path), registration_of(replicated)))


def test_a_certificate_of_another_role_is_refused_on_the_control_plane(replicated: ReplicatedSite) -> None:
    credentials = replicated.site.process_directory / CREDENTIALS_FILE
    with pytest.raises((NotPermitted, CredentialMissing)):
        asyncio.run(register(agent_client(replicated, credentials), registration_of(replicated)))

    async def wait_as_a_process_server() -> None:
        client = ProcessServerControlClient(
            server_url=replicated.site.server_url,
            authority_pem=(replicated.agent.directory / AUTHORITY_FILE).read_bytes(),
            credentials_path=str(replicated.agent.directory / CREDENTIALS_FILE),
        )
        async with client:
            await client.wait_for_orders("", 0.1)

    with pytest.raises((NotPermitted, CredentialMissing)):
        asyncio.run(wait_as_a_process_server())


def test_an_agent_that_claims_another_machines_disk_does_not_get_it(replicated: ReplicatedSite, tmp_path: Path) -> None:
    thief = newcomer(replicated.site, tmp_path)
    thief.enroll().expect(ExitCode.OK)
    client = agent_client(replicated, thief.directory / CREDENTIALS_FILE)
    with suppress(NotPermitted, ResourceNotFound, DiskOfAnotherMachine):
        assert asyncio.run(register(client, registration_of(replicated))) != replicated.disk
    status = replicated.site.disk(replicated.disk)
    assert status is not None
    assert status.machine == identity_of(replicated.agent.directory).identifier


def test_a_server_of_another_authority_is_not_trusted_by_a_member(replicated: ReplicatedSite, tmp_path: Path) -> None:
    client = AgentControlClient(
        server_url=replicated.site.server_url,
        authority_pem=Authority(tmp_path, "forger").path.read_bytes(),
        credentials_path=str(replicated.agent.directory / CREDENTIALS_FILE),
    )
    with pytest.raises(ServerNotTrusted):
        asyncio.run(register(client, registration_of(replicated)))


def test_a_revoked_agent_is_cut_off_and_its_history_stays(tmp_path: Path, replicated: ReplicatedSite) -> None:
    site = replicated.site
    agent = site.agent("revoked")
    source = SourceDisk(tmp_path / "revoked.img", size_bytes=2 * MEBIBYTE, seed=5)
    (disk,) = agent.protect(source)
    point = site.wait_for_point(disk, after_ns=source.changed_ns)
    site.revoke(identity_of(agent.directory).identifier)
    site.wait_until("it is told on the live connection", lambda: not agent.endpoint.is_ready())

    def refused() -> Refusal | None:
        with suppress(ConnectionLost):
            answer = asyncio.run(ask_for(disk, site.data_port, member_context(agent.directory)))
            return answer if isinstance(answer, Refusal) else None
        return None

    refusal = site.wait_until("it is refused on new connections", refused)
    assert refusal.code == CertificateRefused.code
    agent.server.stop()
    site.expect_recovered_equal(disk, point, source.path)


def test_two_agents_of_one_machine_are_both_cut_off_until_it_is_released(
    tmp_path: Path, replicated: ReplicatedSite
) -> None:
    """The copy is what somebody would send who has copied the state directory."""
    site = replicated.site
    agent = site.agent("original")
    source = SourceDisk(tmp_path / "original.img", size_bytes=2 * MEBIBYTE, seed=6)
    (disk,) = agent.protect(source)
    site.wait_for_point(disk, after_ns=source.changed_ns)
    machine = MachineId(identity_of(agent.directory).identifier)
    copied = AgentReport(
        boot_id="the copy's",
        agent_version="0",
        host=HostDescription(name="x", processors=1, memory_bytes=1, firmware="bios"),
    )

    async def report_once() -> None:
        async with agent_client(replicated, agent.directory / CREDENTIALS_FILE) as client:
            await client.report(copied)

    asyncio.run(report_once())
    site.wait_until("it is cut off on the live connection", lambda: not agent.endpoint.is_ready())
    with pytest.raises(MachineQuarantined):
        asyncio.run(report_once())

    def refused() -> Refusal | None:
        with suppress(ConnectionLost):
            answer = asyncio.run(ask_for(disk, site.data_port, member_context(agent.directory)))
            return answer if isinstance(answer, Refusal) else None
        return None

    assert site.wait_until("it is refused on new connections", refused).code == CertificateRefused.code
    source.change()
    site.release(machine)
    point = site.wait_for_point(disk, after_ns=source.changed_ns)
    agent.server.stop()
    site.expect_recovered_equal(disk, point, source.path)


def _directory(path: Path) -> Path:
    path.mkdir()
    return path
