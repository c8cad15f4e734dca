"""The agent as a program: enrolment, renewal and replication against servers that really run, and its command line."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mobility_agent.__main__ import main
from mobility_agent.control_socket import Request, ask, control_socket
from mobility_agent.errors import AgentNotRunning, RefusedByAgent
from mobility_agent.program import AgentProgram
from mobility_agent.settings import AgentSettings
from process_server.program import ProcessServerProgram
from process_server.settings import ProcessServerSettings
from protocol.control_errors import JoinTokenUsed
from protocol.enrollment import CREDENTIALS_FILE, IDENTITY_FILE
from protocol.vocabulary import Role
from runtime.clock import SystemClock
from runtime.errors import AlreadyEnrolled, NotEnrolled
from runtime.exit_codes import ExitCode
from runtime.local_directory import LocalDirectory
from runtime.membership import CertificateRenewal, enroll_member, read_identity
from runtime.observability import ObservabilitySettings
from runtime.service import StopSignal
from storage.backends.open_store import open_store
from storage.disk_archive import create_vault_object
from storage.keys import create_vault
from tests.config_server.running import VAULT, running_server
from tests.mobility_agent.conftest import MIB, Bench

NO_ENDPOINT = ObservabilitySettings(address="")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def records(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


# membership


async def test_an_agent_enrols_once_and_renews_its_certificate_with_a_new_key(
    tmp_path: Path, executor: ThreadPoolExecutor
) -> None:
    directory = LocalDirectory(tmp_path / "agent")
    async with running_server(tmp_path / "server") as server:
        with pytest.raises(NotEnrolled):
            read_identity(directory, program="mobility-agent")
        token = await server.token(Role.AGENT)
        identity = await enroll_member(directory, server_url=server.url, token=token, role=Role.AGENT, name="db-1")
        assert identity.peer.role is Role.AGENT
        assert read_identity(directory, program="mobility-agent") == identity
        with pytest.raises(AlreadyEnrolled):
            await enroll_member(directory, server_url=server.url, token=token, role=Role.AGENT, name="db-1")
        other = LocalDirectory(tmp_path / "other")
        with pytest.raises(JoinTokenUsed):
            await enroll_member(other, server_url=server.url, token=token, role=Role.AGENT, name="db-2")
        before = directory.read(CREDENTIALS_FILE)
        async with server.agent_client(tmp_path / "agent") as control:
            renewal = CertificateRenewal(
                directory=directory,
                control=control,
                clock=SystemClock(),
                executor=executor,
                name="db-1",
                renew_after_seconds=86400,
            )
            await renewal.renew()
            after = directory.read(CREDENTIALS_FILE)
            assert after != before
            assert after.split(b"PRIVATE KEY")[1] != before.split(b"PRIVATE KEY")[1]
            orders = await control.wait_for_orders("", 0.1)
            assert orders.disks == ()


# the whole program


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


async def until_status(directory: Path, wanted: Any) -> dict[str, Any]:
    """Asks the running agent again and again, as an operator would."""
    async with asyncio.timeout(40):
        while True:
            try:
                found = await ask(directory, Request(command="status"))
            except AgentNotRunning:
                found = []
            if found and wanted(found[0]):
                return found[0]
            await asyncio.sleep(0.05)


async def test_agent_process_server_and_configuration_server_replicate_a_disk_for_real(
    tmp_path: Path, executor: ThreadPoolExecutor
) -> None:
    store_path, image = tmp_path / "store", tmp_path / "disk.img"
    store_path.mkdir()
    image.write_bytes(os.urandom(3 * MIB) + bytes(2 * MIB) + b"ragged")
    new = create_vault(vault=VAULT, created_ns=1, recovery_labels=("one", "two"))
    await create_vault_object(open_store(f"file://{store_path}", executor=executor), VAULT, new.vault_json)
    async with running_server(tmp_path / "cs", authority_key=new.authority, heartbeat_seconds=0.2) as server:
        await server.enroll(Role.PROCESS_SERVER, tmp_path / "ps", name="site")
        await server.enroll(Role.AGENT, tmp_path / "agent", name="db")
        process_server = ProcessServerProgram(
            ProcessServerSettings(
                state_directory=tmp_path / "ps",
                store=f"file://{store_path}",
                listen=f"127.0.0.1:{free_port()}",
                host="127.0.0.1",
                observability=NO_ENDPOINT,
            )
        )
        agent = AgentProgram(AgentSettings(state_directory=tmp_path / "agent", observability=NO_ENDPOINT))
        stop_agent, stop_server = StopSignal(), StopSignal()
        async with asyncio.TaskGroup() as group:
            group.create_task(process_server.run(stop_server))
            running = group.create_task(agent.run(stop_agent))
            await until_running(tmp_path / "agent")
            await ask(tmp_path / "agent", Request(command="protect", path=str(image)))
            first = await until_status(tmp_path / "agent", lambda one: one["points"] == 1)
            assert first["is_settled"]
            with open(image, "r+b") as file:
                file.write(b"changed")
            os.kill(os.getpid(), signal.SIGUSR1)
            second = await until_status(
                tmp_path / "agent",
                lambda one: one["points"] == 2 and one["committed_sequence"] == one["sent_sequence"],
            )
            assert second["backlog_bytes"] == 0
            stop_agent.set("the test is over")
            await asyncio.wait([running])
            stop_server.set("the test is over")
    with pytest.raises(AgentNotRunning):
        await ask(tmp_path / "agent", Request(command="status"))


async def until_running(directory: Path) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                await ask(directory, Request(command="status"))
            except AgentNotRunning:
                await asyncio.sleep(0.05)
            else:
                return


# the control socket


async def test_the_control_socket_answers_and_names_what_it_refuses(bench: Bench, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    bench.write_image(MIB)
    async with bench.agent() as service, asyncio.TaskGroup() as group, control_socket(deep, service, group):
        answer = await ask(deep, Request(command="protect", path=str(bench.image)))
        assert [one["path"] for one in answer] == [str(bench.image)]
        with pytest.raises(RefusedByAgent) as caught:
            await ask(deep, Request(command="protect", path="/no/such/disk"))
        assert caught.value.fields["peer_code"] == "disk-vanished"
        assert "unprotect" in caught.value.hint
        reader, writer = await asyncio.open_unix_connection(f"/proc/self/fd/{os.open(deep, os.O_PATH)}/agent.socket")
        writer.write(b'{"command": "format"}\n')
        assert b"invalid-value" in await reader.readline()
        writer.close()
    assert not list(deep.iterdir())


# the command line


def test_protection_is_intended_while_no_agent_runs(tmp_path: Path) -> None:
    image, state = tmp_path / "disk.img", str(tmp_path / "state")
    image.write_bytes(bytes(MIB))
    found = records(invoke("protect", "--dir", state, "-o", "json", str(image)))
    assert [(one["path"], one["state"]) for one in found] == [(str(image), "not running")]
    assert len(records(invoke("protect", "--dir", state, "-o", "json", str(image)))) == 1
    assert records(invoke("status", "--dir", state, "-o", "json"))[0]["disk"] is None
    ended = records(invoke("unprotect", "--dir", state, "-o", "json", "--keep", str(image)))
    assert ended[0]["release"] == "keep"


@pytest.mark.parametrize(
    "arguments",
    [
        ["protect"],
        ["protect", "--all", "/dev/vda"],
        ["protect", "--exclude", "/dev/vda", "/dev/vdb"],
        ["unprotect", "/dev/vda"],
        ["unprotect"],
        ["enroll"],
    ],
)
def test_wrong_usage_exits_with_2(tmp_path: Path, arguments: list[str]) -> None:
    assert invoke(*arguments, "--dir", str(tmp_path)).exit_code == ExitCode.USAGE


def test_what_cannot_be_done_is_told_with_a_hint(tmp_path: Path) -> None:
    missing = invoke("protect", "--dir", str(tmp_path), str(tmp_path / "no.img"))
    assert missing.exit_code == ExitCode.NOT_FOUND
    assert "is gone" in missing.stderr
    assert "unprotect" in missing.stderr
    assert "is not protected" in invoke("unprotect", "--dir", str(tmp_path), "--keep", "/dev/none").stderr
    assert "mobility-agent enroll" in invoke("run", "--dir", str(tmp_path)).stderr
    assert "no agent answers" in invoke("scan-now", "--dir", str(tmp_path)).stderr
    token = invoke("enroll", "--dir", str(tmp_path), "--server", "https://x:1", "--token-file", str(tmp_path / "no"))
    assert token.exit_code == ExitCode.NOT_FOUND


def test_a_second_agent_in_one_state_directory_is_refused(tmp_path: Path) -> None:
    from mobility_agent.program import LOCK_FILE
    from runtime.locks import exclusive_lock

    LocalDirectory(tmp_path).replace(IDENTITY_FILE, b"{}")
    with exclusive_lock(tmp_path / LOCK_FILE):
        assert invoke("run", "--dir", str(tmp_path)).exit_code == ExitCode.LOCKED


def test_an_unknown_setting_is_named(tmp_path: Path) -> None:
    settings = tmp_path / "agent.toml"
    settings.write_text("frame_bufers = 3\n")
    result = invoke("config", "check", "--settings", str(settings))
    assert result.exit_code == ExitCode.USAGE
    assert "frame_bufers" in result.stderr
    assert "frame_buffers" in result.stderr
