"""The program as an operator runs it: init, run, signals, bad settings, a database of another time."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import socket
import sqlite3
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import alembic.command
import alembic.config
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from click.testing import CliRunner
from sqlalchemy import create_engine, text

from config_server import service
from config_server.__main__ import main
from config_server.database.disks import list_disks
from config_server.database.engine import _MIGRATIONS, open_database
from config_server.database.members import list_machines
from config_server.database.schema import metadata
from config_server.errors import (
    AlreadyInitialised,
    DatabaseFault,
    DatabaseTooNew,
    InstallationDamaged,
    NotInitialised,
)
from config_server.installation import (
    ADMIN_TOKEN_FILE,
    ADMIN_TOKEN_HASH_FILE,
    AUTHORITY_FILE,
    AUTHORITY_KEY_FILE,
    DATABASE_FILE,
    LOCK_FILE,
    MARKER_FILE,
    VAULT_AUTHORITY_KEY_FILE,
    initialise,
    read_installation,
)
from config_server.token_hashes import is_hash_of
from protocol.control import NO_REVISION
from protocol.control_errors import ServerUnreachable, ServerUnwell
from protocol.errors import PortTaken, ReplicationError
from protocol.signed_records import serialise_authority_key
from protocol.transport.control_client import AgentControlClient, client_context
from protocol.vocabulary import DiskId
from runtime.errors import SecretMissing, SettingInvalid, SettingUnknown, StateLocked
from runtime.locks import exclusive_lock
from runtime.observability import ListenAddress, ObservabilitySettings
from tests.config_server.running import (
    AUTHORITY_KEY,
    Running,
    agent_report,
    disk_identity,
    registration,
    running_server,
)

NOW_NS = 1_800_000_000 * 10**9


def invoke(*arguments: str) -> str:
    """Runs the command line within this process; its errors are raised. Returns stdout."""
    result = CliRunner().invoke(main, list(arguments), standalone_mode=False, catch_exceptions=False)
    return result.stdout


def key_file(directory: Path) -> Path:
    path = directory / "authority-key.json"
    path.touch(mode=0o600)
    path.write_bytes(serialise_authority_key(AUTHORITY_KEY))
    return path


@asynccontextmanager
async def program(path: Path, *arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, Running]]:
    """`config-server run` as a process of its own, once it serves."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "config_server", "run", "--dir", str(path), "--listen", "127.0.0.1:0",
        "--set", "observability.address=127.0.0.1:0", "--set", "log.format=json", *arguments,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        async with asyncio.timeout(60):
            while line := await process.stderr.readline():
                event = json.loads(line)
                if event.get("event") == "serving":
                    break
            else:
                raise AssertionError("it ended before it served")
        yield process, Running(path=path, address=ListenAddress.parse(event["address"]))
    finally:
        if process.returncode is None:
            process.kill()
        await process.stderr.read()
        await process.wait()


def test_init_makes_what_run_needs_and_keeps_it_private(tmp_path: Path) -> None:
    path = tmp_path / "server"
    output = invoke("init", "--dir", str(path), "--authority-key", str(key_file(tmp_path)), "-o", "json")
    told = json.loads(output)
    assert told["vault"] == AUTHORITY_KEY.vault
    token = Path(told["admin_token_file"]).read_text().strip()
    assert token not in output
    assert is_hash_of(token.encode(), read_installation(path).admin_token_hash)
    assert not any(token.encode() in file.read_bytes() for file in path.iterdir() if file.name != ADMIN_TOKEN_FILE)
    assert (path.stat().st_mode & 0o777) == 0o700
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o600}


def test_the_admin_token_can_be_replaced_while_the_server_is_stopped(tmp_path: Path) -> None:
    path = tmp_path / "server"
    initialise(path, authority_key=AUTHORITY_KEY, now_ns=NOW_NS)
    before = (path / ADMIN_TOKEN_FILE).read_bytes().strip()
    with exclusive_lock(path / LOCK_FILE), pytest.raises(StateLocked):
        invoke("admin-token", "--dir", str(path))
    assert (path / ADMIN_TOKEN_FILE).read_bytes().strip() == before
    (path / ADMIN_TOKEN_FILE).unlink()
    output = invoke("admin-token", "--dir", str(path))
    after = (path / ADMIN_TOKEN_FILE).read_bytes().strip()
    assert after.decode() not in output
    hashed = read_installation(path).admin_token_hash
    assert is_hash_of(after, hashed)
    assert not is_hash_of(before, hashed)
    with pytest.raises(NotInitialised):
        invoke("admin-token", "--dir", str(tmp_path / "nothing"))


def test_a_directory_of_an_older_program_gets_the_hash_of_its_admin_token(tmp_path: Path) -> None:
    path = tmp_path / "server"
    initialise(path, authority_key=AUTHORITY_KEY, now_ns=NOW_NS)
    (path / ADMIN_TOKEN_HASH_FILE).unlink()
    for _ in range(2):
        hashed = read_installation(path).admin_token_hash
        assert is_hash_of((path / ADMIN_TOKEN_FILE).read_bytes().strip(), hashed)


def test_init_never_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "server"
    initialise(path, authority_key=AUTHORITY_KEY, now_ns=NOW_NS)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(AlreadyInitialised):
        invoke("init", "--dir", str(path), "--authority-key", str(key_file(tmp_path)))
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_two_inits_at_once_do_not_mix_their_keys(tmp_path: Path) -> None:
    path = tmp_path / "server"
    with exclusive_lock(path / LOCK_FILE), pytest.raises(StateLocked):
        initialise(path, authority_key=AUTHORITY_KEY, now_ns=NOW_NS)
    assert [file.name for file in path.iterdir()] == [LOCK_FILE]


@pytest.mark.parametrize("written", range(4))
def test_an_init_that_was_cut_off_is_begun_again(tmp_path: Path, written: int) -> None:
    path = tmp_path / "server"
    initialise(path, authority_key=AUTHORITY_KEY, now_ns=NOW_NS)
    names = [VAULT_AUTHORITY_KEY_FILE, AUTHORITY_KEY_FILE, AUTHORITY_FILE, ADMIN_TOKEN_HASH_FILE, MARKER_FILE]
    for name in names[written:]:
        (path / name).unlink()
    with pytest.raises(NotInitialised):
        read_installation(path)
    initialise(path, authority_key=AUTHORITY_KEY, now_ns=NOW_NS)
    assert read_installation(path).vault == AUTHORITY_KEY.vault


@pytest.mark.parametrize(
    "name", [VAULT_AUTHORITY_KEY_FILE, AUTHORITY_KEY_FILE, AUTHORITY_FILE, ADMIN_TOKEN_HASH_FILE, MARKER_FILE]
)
@pytest.mark.parametrize("damage", ["missing", "empty", "garbage"])
def test_a_damaged_installation_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / "server"
    initialise(path, authority_key=AUTHORITY_KEY, now_ns=NOW_NS)
    (path / ADMIN_TOKEN_FILE).unlink()
    if damage == "missing":
        (path / name).unlink()
    else:
        (path / name).write_bytes(b"" if damage == "empty" else b"\xff\x00garbage")
    expected = NotInitialised if (name, damage) == (MARKER_FILE, "missing") else InstallationDamaged
    with pytest.raises(expected, match="server"):
        read_installation(path)


def test_keys_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        initialise(tmp_path / name, authority_key=AUTHORITY_KEY, now_ns=NOW_NS)
    (tmp_path / "one" / AUTHORITY_KEY_FILE).write_bytes((tmp_path / "two" / AUTHORITY_KEY_FILE).read_bytes())
    with pytest.raises(InstallationDamaged, match="belong together"):
        read_installation(tmp_path / "one")


def test_a_missing_or_wrong_authority_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(SecretMissing):
        invoke("init", "--dir", str(tmp_path / "server"), "--authority-key", str(tmp_path / "nothing"))
    (tmp_path / "wrong").write_text("{}")
    with pytest.raises(ReplicationError, match="authority key file"):
        invoke("init", "--dir", str(tmp_path / "server"), "--authority-key", str(tmp_path / "wrong"))
    assert not (tmp_path / "server" / MARKER_FILE).exists()


def test_unknown_and_bad_settings_fail_by_name(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("hartbeat_seconds = 5\n")
    with pytest.raises(SettingUnknown, match="hartbeat_seconds") as caught:
        invoke("config", "check", "--settings", str(file))
    assert "heartbeat_seconds" in caught.value.hint
    for assignment in (
        "listen=nowhere",
        "heartbeat_seconds=0",
        "rpo_threshold_seconds=nan",
        "renew_after_seconds=1209600",
    ):
        with pytest.raises(SettingInvalid, match=assignment.partition("=")[0]):
            invoke("config", "check", "--set", assignment)
    shown = {row["key"]: row for row in json.loads(invoke("config", "show", "--origin", "-o", "json"))}
    assert shown["listen"]["value"] == "0.0.0.0:8443"
    assert shown["observability.address"]["value"] == "127.0.0.1:9466"


async def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.RaisesGroup(pytest.RaisesExc(PortTaken, match=str(port))):
            async with running_server(tmp_path / "server", listen=f"127.0.0.1:{port}"):
                pass


async def test_two_servers_never_share_a_directory(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server"):
        with pytest.RaisesGroup(StateLocked):
            async with running_server(tmp_path / "server"):
                pass


async def test_the_database_is_its_owners_only_whatever_the_umask_and_the_directory_say(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    previous = os.umask(0o022)
    try:
        database = await open_database(tmp_path / DATABASE_FILE)
        async with database.writing() as connection:
            await list_disks(connection)
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
        await database.close()
    finally:
        os.umask(previous)
    assert DATABASE_FILE in modes
    assert set(modes.values()) == {0o600}


async def test_a_database_of_a_newer_program_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / DATABASE_FILE
    await (await open_database(path)).close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(DatabaseTooNew, match="9999"):
        await open_database(path)
    assert path.read_bytes() == before


async def test_what_is_not_a_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / DATABASE_FILE
    path.write_bytes(b"this is not a database, whatever its name says" * 100)
    with pytest.raises(DatabaseFault):
        await open_database(path)


async def test_the_migrations_make_the_schema_that_the_queries_see(tmp_path: Path) -> None:
    path = tmp_path / DATABASE_FILE
    for _ in range(2):
        await (await open_database(path)).close()
    engine = create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    engine.dispose()


async def test_a_database_of_the_first_schema_is_brought_up_to_date_with_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / DATABASE_FILE
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        connection.execute(text("PRAGMA foreign_keys=ON"))
        configuration = alembic.config.Config()
        configuration.set_main_option("script_location", str(_MIGRATIONS))
        configuration.attributes["connection"] = connection
        alembic.command.upgrade(configuration, "0001")
        for statement in (
            "INSERT INTO machines (machine, name, enrolled_ns, agent_version, boot_id, description_version)"
            " VALUES ('m', 'db-1', 1, '', '', 0)",
            "INSERT INTO disks (disk, machine, path, identity, registered_ns, is_protected, keeps_data, is_paused,"
            " newest_used_epoch) VALUES ('d', 'm', '/dev/vda', :identity, 1, 1, 0, 0, 3)",
        ):
            connection.execute(text(statement), {"identity": disk_identity().model_dump_json()})
    engine.dispose()
    database = await open_database(path)
    async with database.reading() as reading:
        (disk,) = await list_disks(reading)
        (machine,) = await list_machines(reading)
    assert (disk.disk, disk.newest_used_epoch, machine.machine, machine.policy) == ("d", 3, "m", None)
    await database.close()


async def test_sigterm_stops_it_in_order_with_a_long_poll_open(tmp_path: Path) -> None:
    initialise(tmp_path / "server", authority_key=AUTHORITY_KEY, now_ns=time.time_ns())
    async with program(tmp_path / "server") as (process, server), await server.agent(tmp_path / "agent") as agent:
        orders = await agent.wait_for_orders(NO_REVISION, 0.0)
        waiting = asyncio.ensure_future(agent.wait_for_orders(orders.revision, 60.0))
        async with server.operator() as operator:
            await operator.machines()
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            assert await process.wait() == 0
        assert (await waiting).revision == orders.revision


async def register_on(agent: AgentControlClient, round_number: int, answered: set[DiskId]) -> None:
    """Registers one disk after the other until the server is gone."""
    for number in itertools.count():
        identity = disk_identity(f"{round_number}-{number}")
        answered.add((await agent.register_disk(registration("/d", identity))).disk)


async def test_what_was_answered_survives_kill_minus_nine_at_any_moment(tmp_path: Path) -> None:
    initialise(tmp_path / "server", authority_key=AUTHORITY_KEY, now_ns=time.time_ns())
    answered: set[DiskId] = set()
    dice = random.Random(7)
    port = 0
    for round_number in range(4):
        async with program(tmp_path / "server", *(["--listen", f"127.0.0.1:{port}"] if port else [])) as (
            process,
            server,
        ):
            port = server.address.port
            if round_number == 0:
                await (await server.agent(tmp_path / "agent")).close()
            async with server.agent_client(tmp_path / "agent") as agent:
                orders = await agent.report(agent_report())
                assert {order.disk for order in orders.disks} >= answered
                asyncio.get_running_loop().call_later(dice.uniform(0.02, 0.25), process.kill)
                with pytest.raises(ServerUnreachable):
                    await register_on(agent, round_number, answered)
    async with (
        program(tmp_path / "server", "--listen", f"127.0.0.1:{port}") as (_, server),
        server.agent_client(tmp_path / "agent") as agent,
    ):
        kept = {order.disk for order in (await agent.report(agent_report())).disks}
    assert answered
    assert kept >= answered


async def test_whoever_never_finishes_a_request_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "IDLE_SECONDS_MAX", 0.2)
    async with running_server(tmp_path / "server") as server:
        context = client_context(authority_pem=server.authority_pem)
        for begun in (b"", b"GET /v1/authority HTTP/1.1\r\nHost: server\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.address.port, ssl=context)
            writer.write(begun)
            async with asyncio.timeout(20):
                assert await reader.read() == b""
            writer.close()


async def test_its_endpoint_tells_metrics_with_bounded_labels_and_readiness(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    observability = ObservabilitySettings(address=f"127.0.0.1:{port}")
    async with running_server(tmp_path / "server", observability=observability) as server:
        async with await server.agent(tmp_path / "agent") as agent, server.plain_session() as session:
            await agent.report(agent_report())
            for number in range(5):
                await (await session.get(f"/nowhere/{number}")).read()
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            metrics = await (await session.get("/metrics")).text()
            assert (await session.get("/readyz")).status == 200
    lines = [line for line in metrics.splitlines() if line.startswith("farpoint_config_server_requests_total")]
    assert any('route="/v1/agent/report",status="200"} 1.0' in line for line in lines)
    assert [line for line in lines if "nowhere" in line or 'route="unknown"' in line] == [
        'farpoint_config_server_requests_total{method="GET",route="unknown",status="404"} 5.0'
    ]
    assert 'farpoint_config_server_disks{rpo="unknown"}' in metrics


async def test_a_failing_database_is_the_servers_trouble_and_its_details_stay_inside(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server, await server.agent(tmp_path / "agent") as agent:
        with sqlite3.connect(tmp_path / "server" / DATABASE_FILE) as connection:
            connection.execute("ALTER TABLE disks RENAME TO elsewhere")
        connection.close()
        with pytest.raises(ServerUnwell) as caught:
            await agent.register_disk(registration())
        assert caught.value.is_retryable
        assert "table" not in str(caught.value)
        with sqlite3.connect(tmp_path / "server" / DATABASE_FILE) as connection:
            connection.execute("ALTER TABLE elsewhere RENAME TO disks")
        connection.close()
        await agent.register_disk(registration())
