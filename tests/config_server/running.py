"""A configuration server that really runs: TLS on a free loopback port, SQLite in a directory, members that enrol."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from config_server.installation import ADMIN_TOKEN_FILE, AUTHORITY_FILE, MARKER_FILE, initialise
from config_server.service import ConfigServer
from config_server.settings import ConfigServerSettings
from protocol.control import (
    AgentReport,
    DiskIdentity,
    DiskKind,
    DiskPosition,
    DiskRegistration,
    DiskReport,
    DiskState,
    HostDescription,
    ImageFileIdentity,
    ProcessServerReport,
)
from protocol.enrollment import EnrollmentBundle
from protocol.join_token import JoinToken
from protocol.operator_messages import JoinTokenRequest, OperatorRole, OperatorTokenCreated, OperatorTokenRequest
from protocol.signed_records import AuthorityKey
from protocol.transport.control_client import AgentControlClient, ProcessServerControlClient, client_context, enroll
from protocol.transport.operator_client import OperatorClient
from protocol.vocabulary import DiskId, Role, VaultId
from runtime.clock import SystemClock
from runtime.local_directory import LocalDirectory
from runtime.observability import ListenAddress, ObservabilitySettings
from runtime.service import StopSignal

VAULT = VaultId("0123456789abcdef" * 2)
AUTHORITY_KEY = AuthorityKey(vault=VAULT, private_key=Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
HOST = HostDescription(name="db-1", processors=4, memory_bytes=8 * 2**30, firmware="uefi")
GIBIBYTE = 2**30


class AdjustableClock:
    """The machine's clocks, with the wall clock set forward or back by hand."""

    def __init__(self) -> None:
        self._clock = SystemClock()
        self.offset_ns = 0

    def now_ns(self) -> int:
        return self._clock.now_ns() + self.offset_ns

    def monotonic_seconds(self) -> float:
        return self._clock.monotonic_seconds()


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A server that answers."""

    path: Path
    address: ListenAddress

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.address.port}"

    @property
    def authority_pem(self) -> bytes:
        return (self.path / AUTHORITY_FILE).read_bytes()

    @property
    def admin_token(self) -> str:
        return (self.path / ADMIN_TOKEN_FILE).read_text().strip()

    def operator(self, token: str | None = None) -> OperatorClient:
        """With this operator token; with the admin token if none is given."""
        return OperatorClient(server_url=self.url, authority_pem=self.authority_pem, token=token or self.admin_token)

    async def operator_token(
        self, role: OperatorRole, *, name: str = "ada", lifetime_seconds: int = 3600
    ) -> OperatorTokenCreated:
        request = OperatorTokenRequest(name=name, role=role, lifetime_seconds=lifetime_seconds)
        async with self.operator() as operator:
            return await operator.create_operator_token(request)

    async def token(self, role: Any, *, lifetime_seconds: int = 3600) -> JoinToken:
        async with self.operator() as operator:
            created = await operator.create_token(JoinTokenRequest(role=role, lifetime_seconds=lifetime_seconds))
        return JoinToken.parse(created.token)

    async def enroll(self, role: Role, directory: Path, *, name: str = "member") -> EnrollmentBundle:
        """Joins with a fresh token and writes the state directory, as a program does."""
        token = await self.token(role)
        bundle = await enroll(server_url=self.url, token=token, role=role, name=name)
        write_bundle(bundle, directory)
        return bundle

    async def agent(self, directory: Path, *, name: str = "db-1") -> AgentControlClient:
        await self.enroll(Role.AGENT, directory, name=name)
        return self.agent_client(directory)

    def agent_client(self, directory: Path) -> AgentControlClient:
        return AgentControlClient(
            server_url=self.url,
            authority_pem=self.authority_pem,
            credentials_path=str(directory / "credentials.pem"),
        )

    async def process_server(self, directory: Path, *, name: str = "site-1") -> ProcessServerControlClient:
        await self.enroll(Role.PROCESS_SERVER, directory, name=name)
        return self.process_server_client(directory)

    def process_server_client(self, directory: Path) -> ProcessServerControlClient:
        return ProcessServerControlClient(
            server_url=self.url,
            authority_pem=self.authority_pem,
            credentials_path=str(directory / "credentials.pem"),
        )

    @asynccontextmanager
    async def plain_session(
        self, credentials: Path | None = None, *, bearer: str | None = None
    ) -> AsyncIterator[aiohttp.ClientSession]:
        """HTTPS without our client, for requests that it would never send."""
        context = client_context(
            authority_pem=self.authority_pem, credentials_path=None if credentials is None else str(credentials)
        )
        headers = {} if bearer is None else {"Authorization": f"Bearer {bearer}"}
        connector = aiohttp.TCPConnector(ssl=context)
        async with aiohttp.ClientSession(self.url, connector=connector, headers=headers) as session:
            yield session

    def administrator(self) -> AbstractAsyncContextManager[aiohttp.ClientSession]:
        """A plain session with the admin token."""
        return self.plain_session(bearer=self.admin_token)


def write_bundle(bundle: EnrollmentBundle, directory: Path) -> None:
    local = LocalDirectory(directory)
    for name, data in bundle.files():
        local.replace(name, data)


def settings_for(path: Path, **values: Any) -> ConfigServerSettings:
    defaults = {
        "state_directory": path,
        "listen": "127.0.0.1:0",
        "observability": ObservabilitySettings(address=""),
    }
    return ConfigServerSettings(**(defaults | values))


@asynccontextmanager
async def running_server(
    path: Path, *, clock: AdjustableClock | None = None, authority_key: AuthorityKey = AUTHORITY_KEY, **values: Any
) -> AsyncIterator[Running]:
    """Starts on what is in `path`, made first if there is nothing; stopped in order at the end of the block."""
    clock = clock or AdjustableClock()
    if not (path / MARKER_FILE).exists():
        initialise(path, authority_key=authority_key, now_ns=clock.now_ns())
    stop = StopSignal()
    async with asyncio.TaskGroup() as group:
        ready: asyncio.Future[ListenAddress] = asyncio.get_running_loop().create_future()
        server = ConfigServer(settings_for(path, **values), clock=clock)
        group.create_task(server.run(stop, on_ready=ready.set_result))
        address = await ready
        try:
            yield Running(path=path, address=address)
        finally:
            stop.set("the test is over")


def disk_identity(serial: str | None = "S1", *, size_bytes: int = GIBIBYTE, wwn: str | None = None) -> DiskIdentity:
    return DiskIdentity(
        kind=DiskKind.BLOCK_DEVICE, size_bytes=size_bytes, logical_sector_bytes=512, serial=serial, wwn=wwn
    )


def image_identity(inode: int, *, size_bytes: int = GIBIBYTE) -> DiskIdentity:
    return DiskIdentity(
        kind=DiskKind.IMAGE_FILE,
        size_bytes=size_bytes,
        logical_sector_bytes=512,
        image_file=ImageFileIdentity(file_system="f" * 8, inode=inode),
    )


def registration(
    path: str = "/dev/vda", identity: DiskIdentity | None = None, disk: str | None = None
) -> DiskRegistration:
    return DiskRegistration(
        path=path, identity=identity or disk_identity(), disk=None if disk is None else DiskId(disk)
    )


def agent_report(*disks: DiskId, host: HostDescription = HOST, path: str = "/dev/vda") -> AgentReport:
    reports = tuple(
        DiskReport(
            disk=disk,
            path=path,
            state=DiskState.INITIAL_REPLICATION,
            source="scan",
            size_bytes=GIBIBYTE,
            copied_bytes=1024,
            copy_total_bytes=GIBIBYTE,
            backlog_bytes=4096,
        )
        for disk in disks
    )
    return AgentReport(boot_id="b1", agent_version="0.1.0", host=host, disks=reports)


def process_server_report(**values: Any) -> ProcessServerReport:
    defaults: dict[str, Any] = {
        "version": "0.1.0",
        "host": "127.0.0.1",
        "port": 9443,
        "cache_bytes": 0,
        "cache_limit_bytes": GIBIBYTE,
    }
    return ProcessServerReport(**(defaults | values))


def position(disk: DiskId, *, epoch: int = 1, durable: int = 0, committed: int = 0) -> DiskPosition:
    return DiskPosition(
        disk=disk,
        epoch=epoch,
        durable_sequence=durable,
        committed_sequence=committed,
        cached_bytes=0,
        received_bytes=0,
        stored_bytes=0,
    )


def trusting_nothing() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
