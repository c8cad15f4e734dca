"""The program as operators meet it: settings, start-up errors, TLS on its port, the endpoint, an orderly stop."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from click.testing import CliRunner

from process_server.__main__ import main
from process_server.cache import FILE_END_BYTES
from process_server.core.backpressure import ConnectionCredit, Load, window_bytes
from process_server.grants import save_grants
from process_server.program import ProcessServerProgram
from process_server.settings import PROGRAM, ProcessServerLimits, ProcessServerSettings
from protocol.enrollment import (
    AUTHORITY_FILE,
    CREDENTIALS_FILE,
    IDENTITY_FILE,
    SIGNING_KEY_FILE,
    EnrolledIdentity,
    signing_key_pem,
)
from protocol.errors import CertificateRefused, ConnectionLost, InvalidValue, PortTaken
from protocol.messages import Goodbye
from protocol.transport.channel import connect
from protocol.transport.tls import client_context
from runtime.errors import SettingInvalid, StateLocked
from runtime.exit_codes import ExitCode
from runtime.local_directory import LocalDirectory
from runtime.service import StopSignal
from runtime.settings import load
from storage.errors import NotAVault, StoreMissing
from tests.process_server.world import DISK_BYTES, ScriptedAgent, World
from tests.protocol.transport.certificates import Authority, Leaf

NOWHERE = "https://127.0.0.1:1"
"""Nobody listens there: the configuration server is away."""


class Installation:
    """What an enrolment leaves behind, and a store with a vault; no configuration server answers."""

    def __init__(self, path: Path) -> None:
        self.world = World(path=path)
        self.authority = Authority(path)
        self.settings = ProcessServerSettings(
            state_directory=path / "state",
            store=f"file://{path}/store",
            listen=f"127.0.0.1:{free_port()}",
            cache_bytes_max=64 * 2**20,
            cache_file_bytes=4 * 2**20,
            segment_age_seconds_max=0.2,
            observability={"address": f"127.0.0.1:{free_port()}"},
        )
        self.agent_leaf = self.authority.issue(self.world.agent_identity.uri, file_name="agent")

    async def enroll(self) -> None:
        await self.world.begin()
        leaf = self.authority.issue(self.world.identity.uri, file_name="server")
        directory = LocalDirectory(self.settings.state_directory)
        identity = EnrolledIdentity(
            peer=self.world.identity,
            name="ps",
            server_url=NOWHERE,
            vault_authority_public_key=self.world.vault.description.authority_key,
        )
        directory.replace(CREDENTIALS_FILE, leaf.path.read_bytes())
        directory.replace(AUTHORITY_FILE, self.authority.path.read_bytes())
        directory.replace(SIGNING_KEY_FILE, signing_key_pem(self.world.signing_key))
        directory.replace(IDENTITY_FILE, identity.encode())
        save_grants(directory, self.world.control.grants)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        stop = StopSignal()
        async with asyncio.TaskGroup() as group:
            group.create_task(ProcessServerProgram(self.settings).run(stop))
            try:
                async with asyncio.timeout(10):
                    while await self.get("/readyz") != 200:
                        await asyncio.sleep(0.01)
                yield
            finally:
                stop.set("test")

    async def get(self, path: str) -> int:
        async with aiohttp.ClientSession() as session:
            try:
                async with session.get(f"http://{self.settings.observability.address}{path}") as answer:
                    self.text = await answer.text()
                    return answer.status
            except aiohttp.ClientConnectionError:
                return 0

    @asynccontextmanager
    async def agent(self, leaf: Leaf | None = None) -> AsyncIterator[ScriptedAgent]:
        leaf = leaf or self.agent_leaf
        address = self.settings.listen_address
        context = client_context(leaf.path, leaf.path, leaf.authority_path)
        channel = await connect(address.host, address.port, tls=context)
        agent = ScriptedAgent(channel)
        async with asyncio.TaskGroup() as group:
            group.create_task(agent.listen())
            await agent.greet()
            try:
                yield agent
            finally:
                await channel.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
async def installation(tmp_path: Path) -> Installation:
    installation = Installation(tmp_path)
    await installation.enroll()
    return installation


async def test_an_agent_over_tls_is_served_and_its_disk_recovered_with_the_configuration_server_away(
    installation: Installation,
) -> None:
    expected = bytearray(DISK_BYTES)
    async with installation.running(), installation.agent() as agent:
        await agent.open()
        for sequence in range(1, 6):
            data = os.urandom(700_000)
            expected[sequence * 2**20 : sequence * 2**20 + len(data)] = data
            await agent.send_change_set(sequence, {sequence * 2**20: data})
        await agent.until_durable(5)
        assert await installation.get("/metrics") == 200
        assert "farpoint_process_server_acknowledged_change_sets_total 5.0" in installation.text
        assert await installation.get("/healthz") == 200
    assert await installation.world.image() == expected


async def test_a_stop_signal_tells_agents_goodbye(installation: Installation) -> None:
    async with AsyncExitStack() as stack:
        async with installation.running():
            agent = await stack.enter_async_context(installation.agent())
            await agent.open()
            await agent.send_change_set(1, {0: b"x" * 512})
            await agent.until_durable(1)
        await agent.until(lambda: agent.is_over)
    assert isinstance(agent.ending, Goodbye)
    assert agent.positions[1].durable_sequence == 1


async def test_an_agent_of_another_authority_gets_no_connection(installation: Installation, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other")
    leaf = other.issue(installation.world.agent_identity.uri, trusts=installation.authority)
    async with installation.running():
        with pytest.raises((CertificateRefused, ConnectionLost, ExceptionGroup)):
            async with installation.agent(leaf):
                pass


async def test_a_taken_port_fails_clearly(installation: Installation) -> None:
    address = installation.settings.listen_address
    taken = await asyncio.start_server(lambda reader, writer: None, address.host, address.port)
    async with taken:
        with pytest.raises(ExceptionGroup) as caught:
            await ProcessServerProgram(installation.settings).run(StopSignal())
    assert caught.group_contains(PortTaken, match=str(address.port))


async def test_two_process_servers_never_share_a_state_directory(installation: Installation) -> None:
    async with installation.running():
        with pytest.raises(StateLocked):
            await ProcessServerProgram(installation.settings).run(StopSignal())


async def test_a_missing_store_fails_at_start(installation: Installation) -> None:
    settings = installation.settings.model_copy(update={"store": "file:///nowhere/at/all"})
    with pytest.raises(StoreMissing):
        await ProcessServerProgram(settings).run(StopSignal())


async def test_a_directory_without_the_vault_fails_at_start_and_stays_empty(
    installation: Installation, tmp_path: Path
) -> None:
    (tmp_path / "not-mounted").mkdir()
    settings = installation.settings.model_copy(update={"store": f"file://{tmp_path}/not-mounted"})
    with pytest.raises(NotAVault):
        await ProcessServerProgram(settings).run(StopSignal())
    assert not list((tmp_path / "not-mounted").iterdir())


def test_run_without_an_enrolment_says_what_to_do(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, ["run", "--dir", str(tmp_path), "--set", "store=file:///tmp"], catch_exceptions=False
    )
    assert result.exit_code == ExitCode.NOT_FOUND
    assert "process-server enroll" in result.stderr


def test_run_without_a_store_says_what_to_set(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["run", "--dir", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == ExitCode.FAILURE
    assert "file:///" in result.stderr


def test_config_check_names_an_unknown_key(tmp_path: Path) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text("cache_bytes = 5\n")
    result = CliRunner().invoke(main, ["config", "check", "--settings", str(settings)])
    assert result.exit_code != 0
    assert "cache_bytes_max" in result.stderr


def test_a_small_cache_limit_makes_smaller_files() -> None:
    loaded = load(ProcessServerSettings, program=PROGRAM, flags={"cache_bytes_max": "64 MiB"}, environment={})
    limits = loaded.settings.limits()
    assert limits.cache_file_bytes == 16 * 2**20
    assert limits.cache_bytes_max == 64 * 2**20


@pytest.mark.parametrize("megabytes", [4, 5, 8, 9, 64])
@pytest.mark.parametrize("file_kibibytes", [64, 256, 1024, 2048, 16384])
def test_a_cache_whose_limits_are_accepted_grants_credit_at_its_worst(megabytes: int, file_kibibytes: int) -> None:
    cache_bytes, file_bytes = megabytes * 2**20, file_kibibytes * 2**10
    try:
        ProcessServerLimits(cache_bytes_max=cache_bytes, cache_file_bytes=file_bytes)
    except InvalidValue:
        return
    # why: as Cache.room_bytes has it, with one file full of what is committed and no successor to remove it for
    room_bytes = (cache_bytes // file_bytes - 2) * max(file_bytes - FILE_END_BYTES, file_bytes // 2)
    load = Load(cache_room_bytes=room_bytes, memory_bytes_max=2**30, connections=1, promised_bytes=0)
    assert window_bytes(load, ConnectionCredit())


def test_a_cache_too_small_for_a_frame_is_refused() -> None:
    with pytest.raises(InvalidValue, match="whole frame"):
        ProcessServerLimits(cache_bytes_max=4 * 2**20, cache_file_bytes=2**20)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cache_bytes_max", "1 KiB"),
        ("cache_bytes_max", "7 MiB"),
        ("compression_level", "99"),
        ("listen", "nowhere"),
        ("segment_age_seconds_max", "9"),
    ],
)
def test_a_setting_out_of_its_range_is_refused_with_its_key(key: str, value: str) -> None:
    with pytest.raises(SettingInvalid) as caught:
        load(ProcessServerSettings, program=PROGRAM, flags={key: value}, environment={})
    assert caught.value.key == key
