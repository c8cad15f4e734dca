"""A whole site on loopback, as an operator would set it up: a vault in a local directory, a configuration server, a
process server, agents; each a process of its own with its own state directory, port and log.

Invariants: everything goes through the programs' own command lines and their TLS ports; every wait is for something
that an operator could observe; leaving the context ends every process.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import socket
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prometheus_client.parser import text_string_to_metric_families

from config_server.installation import ADMIN_TOKEN_FILE, AUTHORITY_FILE
from protocol.control import DiskState
from protocol.errors import ReplicationError
from protocol.operator_messages import DiskStatus, ProcessServerStatus, RecoveryPointStatus
from protocol.transport.operator_client import OperatorClient
from protocol.vocabulary import DiskId, MachineId
from runtime.exit_codes import ExitCode
from tests.scenarios.disks import SourceDisk, are_equal
from tests.scenarios.processes import Finished, Result, Server, call_command, wait_until

HEARTBEAT_SECONDS = 0.5
COPY_INTERVAL_SECONDS = 0.3
POINT_INTERVAL_SECONDS = 0.5
RECONNECT_SECONDS_MAX = 1
REPLICATION_SECONDS = 60.0
"""Any wait for replication; on an idle machine all of them end within a few seconds."""

PORTS = range(20000, 32000)
"""Below what the kernel gives to outgoing connections, so that a port stays free while its server is down."""


RESERVED_PORTS_MAX = 400
"""The oldest are given back first: a long torture makes many sites, one after the other."""
_reserved: list[int] = []
"""Descriptors of the locks on this process's ports: given back when it ends."""


def free_port() -> int:
    """One on which nobody listens, and which no other process of tests has drawn: two of them would meet another's
    server there, and take it for their own."""
    place = Path(tempfile.gettempdir()) / f"farpoint-ports-{os.geteuid()}"
    place.mkdir(mode=0o700, exist_ok=True)
    while True:
        port = random.SystemRandom().choice(PORTS)
        lock = os.open(place / str(port), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        _reserved.append(lock)
        if len(_reserved) > RESERVED_PORTS_MAX:
            os.close(_reserved.pop(0))
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def _assignments(settings: Mapping[str, object] | None) -> list[str]:
    return [word for key, value in (settings or {}).items() for word in ("--set", f"{key}={value}")]


class Endpoint:
    """A program's /healthz, /readyz and /metrics."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.address = f"{host}:{free_port()}"

    def answers(self) -> bool:
        return self._get("healthz")[0] == 200

    def is_ready(self) -> bool:
        return self._get("readyz")[0] == 200

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the metric's samples with these labels; 0 while there are none."""
        total = 0.0
        for family in text_string_to_metric_families(self._get("metrics")[1]):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    total += sample.value
        return total

    def metric_names(self) -> set[str]:
        return {
            sample.name
            for family in text_string_to_metric_families(self._get("metrics")[1])
            for sample in family.samples
        }

    def page(self, path: str) -> str:
        """What it says; empty if it does not answer."""
        return self._get(path)[1]

    def _get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{self.address}/{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""


class Agent:
    """One source machine."""

    def __init__(self, site: Site, name: str) -> None:
        self.name = name
        self.directory = site.root / name
        self.endpoint = Endpoint(site.agent_host)
        self.server = Server(
            name,
            "mobility-agent",
            *("run", "--dir", self.directory),
            *("--set", f"observability.address={self.endpoint.address}"),
            *("--set", f"reconnect_seconds_max={RECONNECT_SECONDS_MAX}"),
            *_assignments(site.agent_settings),
            log_path=site.root / f"{name}.log",
            is_up=self.endpoint.answers,
            inside=site.agents_inside,
        )
        self._site = site

    def enroll(self, *, token_file: Path | None = None, server_url: str | None = None) -> Finished:
        return call_command(
            "mobility-agent",
            *("enroll", "--dir", self.directory),
            *("--server", server_url or self._site.members_url),
            *("--token-file", token_file or self._site.token("agent")),
        )

    def command(self, name: str, *arguments: object) -> Finished:
        return call_command("mobility-agent", name, "--dir", self.directory, *arguments)

    def protect(self, *disks: SourceDisk) -> list[DiskId]:
        """Returns the disks' identifiers once the configuration server knows them."""
        paths = [disk.path for disk in disks]
        self.command("protect", *paths).expect(ExitCode.OK)
        return [self._wait_until_registered(path) for path in paths]

    def _wait_until_registered(self, path: Path) -> DiskId:
        def registered() -> DiskId | None:
            identifier = self.disk_at(path).get("disk")
            return None if identifier is None else DiskId(identifier)

        return self._site.wait_until(f"{path} is registered", registered)

    def gauge(self, name: str, disk: DiskId) -> int:
        """Of the metrics `farpoint_agent_disk_…`."""
        return int(self.endpoint.metric(f"farpoint_agent_disk_{name}", disk=disk))

    def is_committed(self, disk: DiskId) -> bool:
        """Nothing has changed that is not in storage."""
        return bool(self.gauge("is_settled", disk)) and not self.gauge("backlog_bytes", disk)

    def disk_at(self, path: Path) -> dict[str, Any]:
        """The disk's row of `mobility-agent status`; empty if there is none."""
        rows = self.command("status", "-o", "json").expect(ExitCode.OK).json
        found = [row for row in rows if row["path"] == str(path)]
        return found[0] if found else {}


class Site(AbstractContextManager["Site"]):
    """The servers and the operator's view of them. `with Site(directory) as site:` makes and starts them."""

    members_url: str
    """By which agents and process servers reach the configuration server; operators take `server_url`."""
    agent_host = "127.0.0.1"
    """Where the endpoints of agents listen."""
    agents_inside: Sequence[str] = ()
    """A command that becomes an agent, in another place."""
    agent_settings: Mapping[str, object] = {}
    """On top of the usual ones, for agents made from now on."""

    def __init__(
        self,
        root: Path,
        *,
        process_server_settings: Mapping[str, object] | None = None,
        config_server_settings: Mapping[str, object] | None = None,
    ) -> None:
        """root: an existing directory that everything goes into. The settings come on top of the usual ones."""
        self.root = root
        self.store_directory = root / "store"
        self.store_url = f"file://{self.store_directory}"
        self.recovery_key = root / "recovery-1.key"
        self.agents: dict[str, Agent] = {}
        self.config_directory = root / "config-server"
        self._tokens = 0
        port, self.data_port = free_port(), free_port()
        self.server_url = self.members_url = f"https://127.0.0.1:{port}"
        self.config_endpoint, self.process_endpoint = Endpoint(), Endpoint()
        self.config_server = Server(
            "config-server",
            "config-server",
            *("run", "--dir", self.config_directory, "--listen", f"127.0.0.1:{port}"),
            *("--set", f"observability.address={self.config_endpoint.address}"),
            *("--set", f"heartbeat_seconds={HEARTBEAT_SECONDS}"),
            *("--set", f"copy_interval_seconds={COPY_INTERVAL_SECONDS}"),
            *("--set", f"point_interval_seconds={POINT_INTERVAL_SECONDS}"),
            *_assignments(config_server_settings),
            log_path=root / "config-server.log",
            is_up=self.config_endpoint.is_ready,
        )
        self.process_directory = root / "process-server"
        self.process_server = Server(
            "process-server",
            "process-server",
            *("run", "--dir", self.process_directory, "--set", f"store={self.store_url}"),
            *("--set", f"listen=127.0.0.1:{self.data_port}", "--set", "host=127.0.0.1"),
            *("--set", "segment_age_seconds_max=0.5"),
            *("--set", f"observability.address={self.process_endpoint.address}"),
            *_assignments(process_server_settings),
            log_path=root / "process-server.log",
            is_up=self.process_endpoint.is_ready,
        )

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self._dispose()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._dispose()

    @property
    def servers(self) -> list[Server]:
        """In the order in which they are stopped."""
        return [*(agent.server for agent in self.agents.values()), self.process_server, self.config_server]

    @property
    def running(self) -> list[Server]:
        return [server for server in self.servers if server.is_running]

    def agent(self, name: str = "agent") -> Agent:
        """A new machine: enrolled and running."""
        agent = self.agents[name] = Agent(self, name)
        agent.enroll().expect(ExitCode.OK)
        agent.server.start()
        return agent

    def stop(self) -> None:
        """An orderly end of everything that runs."""
        for server in self.running:
            server.stop()

    # what the operator asks

    def farpoint(self, *arguments: object) -> Finished:
        """With the options for the configuration server."""
        return call_command(
            "farpoint",
            *arguments,
            *("--server", self.server_url, "--ca", self.config_directory / AUTHORITY_FILE),
            *("--token-file", self.config_directory / ADMIN_TOKEN_FILE),
        )

    def from_storage(self, *arguments: object, store: Path | None = None, key: Path | None = None) -> Finished:
        """With the options for the store and a recovery key, which need no server."""
        url = self.store_url if store is None else f"file://{store}"
        return call_command("farpoint", *arguments, "--store", url, "--recovery-key", key or self.recovery_key)

    def token(self, role: str, *, expires_in: str = "1 h") -> Path:
        """A file with a fresh join token."""
        self._tokens += 1
        path = self.root / f"token-{self._tokens}"
        made = self.farpoint("token", "create", "--role", role, "--expires-in", expires_in, "--output", path)
        made.expect(ExitCode.OK)
        return path

    def revoke(self, identifier: str) -> None:
        """All certificates of a member."""
        asyncio.run(self._revoke(identifier))

    def release(self, machine: MachineId) -> None:
        """From quarantine."""
        asyncio.run(self._release(machine))

    def disk(self, disk: DiskId) -> DiskStatus | None:
        """As the configuration server sees it; None while it cannot be asked."""
        try:
            return asyncio.run(self._ask_disk(disk))
        except ReplicationError:
            return None

    def process_servers(self) -> tuple[ProcessServerStatus, ...]:
        """As the configuration server sees them; none while it cannot be asked."""
        try:
            return asyncio.run(self._ask_process_servers())
        except ReplicationError:
            return ()

    def points(self, disk: DiskId) -> tuple[RecoveryPointStatus, ...]:
        """Those that the configuration server knows, newest first; none while it cannot be asked."""
        try:
            return asyncio.run(self._ask_points(disk))
        except ReplicationError:
            return ()

    def stored_points(self, disk: DiskId) -> list[dict[str, Any]]:
        """Those that storage and the recovery key prove, oldest first."""
        rows: list[dict[str, Any]] = self.from_storage("points", "--disk", disk, "-o", "json").expect(ExitCode.OK).json
        return rows

    def recover(self, disk: DiskId, point: str, target: Path) -> dict[str, Any]:
        """From storage alone. What the command's last line says."""
        done = self.from_storage("recover", "--disk", disk, "--point", point, "--to", target, "--json")
        result: dict[str, Any] = done.expect(ExitCode.OK).last_json_line
        return result

    def expect_recovered_equal(self, disk: DiskId, point: str, source: Path) -> None:
        """Recovers the point and compares it with `source`, byte for byte."""
        target = self.root / f"recovered-{point}-{time.monotonic_ns()}"
        self.recover(disk, point, target)
        assert are_equal(source, target), f"point {point} differs from {source}: {target}"
        target.unlink()

    # what is waited for

    def wait_for_state(self, disk: DiskId, state: DiskState) -> DiskStatus:
        def found() -> DiskStatus | None:
            status = self.disk(disk)
            return status if status is not None and status.state is state else None

        return self.wait_until(f"disk {disk} is {state.value}", found)

    def wait_for_point(self, disk: DiskId, *, after_ns: int) -> str:
        """The oldest recovery point that the configuration server knows with an instant of `after_ns` or later."""

        def found() -> str:
            newer = [point for point in self.points(disk) if point.instant_ns >= after_ns]
            return newer[-1].point if newer else ""

        return self.wait_until(f"disk {disk} has a point of {after_ns} or later", found)

    def wait_until(
        self, what: str, condition: Callable[[], Result | None], *, seconds: float = REPLICATION_SECONDS
    ) -> Result:
        """As processes.wait_until, watching everything that runs."""
        return wait_until(what, condition, seconds=seconds, servers=self.running)

    # making

    def _make(self) -> None:
        keys = ("--recovery-key", self.recovery_key, "--recovery-key", self.root / "recovery-2.key")
        authority = self.root / "vault-authority.key"
        call_command(
            "farpoint", "vault", "init", "--store", self.store_url, *keys, "--authority-key", authority
        ).expect(ExitCode.OK)
        call_command("config-server", "init", "--dir", self.config_directory, "--authority-key", authority).expect(
            ExitCode.OK
        )
        self.config_server.start()
        self.enroll_process_server(self.process_directory).expect(ExitCode.OK)
        self.process_server.start()

    def enroll_process_server(self, directory: Path, *, token_file: Path | None = None) -> Finished:
        return call_command(
            "process-server",
            *("enroll", "--dir", directory, "--server", self.members_url),
            *("--token-file", token_file or self.token("process-server")),
        )

    def _dispose(self) -> None:
        for server in self.servers:
            server.dispose()

    def _operator(self) -> OperatorClient:
        return OperatorClient(
            server_url=self.server_url,
            authority_pem=(self.config_directory / AUTHORITY_FILE).read_bytes(),
            token=(self.config_directory / ADMIN_TOKEN_FILE).read_text().strip(),
        )

    async def _ask_disk(self, disk: DiskId) -> DiskStatus:
        async with self._operator() as operator:
            return await operator.disk(disk)

    async def _ask_process_servers(self) -> tuple[ProcessServerStatus, ...]:
        async with self._operator() as operator:
            return (await operator.process_servers()).process_servers

    async def _ask_points(self, disk: DiskId) -> tuple[RecoveryPointStatus, ...]:
        async with self._operator() as operator:
            return (await operator.points(disk=disk)).points

    async def _release(self, machine: MachineId) -> None:
        async with self._operator() as operator:
            await operator.release_machine(machine)

    async def _revoke(self, identifier: str) -> None:
        async with self._operator() as operator:
            held = [one for one in (await operator.certificates()).certificates if one.identifier == identifier]
            await operator.revoke_certificate(held[0].serial)
