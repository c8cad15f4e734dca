"""The demo's line: one vault, a configuration server, a process server and a mobility agent, each a process of its own.

Everything goes through the programs' own command lines and the operator's API, as an operator would do it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

from farpoint.demo.measures import Counts, answers, counted
from farpoint.demo.places import Places
from farpoint.demo.programs import HOST, Program, Programs, free_port
from farpoint.demo.stores import DemoStore
from protocol.control_errors import ServerUnreachable
from protocol.operator_messages import DiskStatus, RecoveryPointStatus
from protocol.transport.operator_client import OperatorClient
from protocol.vocabulary import DiskId

Result = TypeVar("Result")

DATA_PORT: Final = 9443
CONTROL_PORT: Final = 8443
OBSERVABILITY_PORT: Final = 9464
START_SECONDS_MAX: Final = 30.0
POINT_SECONDS_MAX: Final = 300.0
POLL_SECONDS: Final = 0.1
COPY_INTERVAL_SECONDS: Final = 20
"""Rounds are asked for; by itself the agent looks again only where one did not settle."""
POINT_INTERVAL_SECONDS: Final = 1
CACHE_BYTES_MAX: Final = 2**30
CLOCK_SLACK_NS: Final = 10**8
"""A tick of the server's clock may be ahead by so much of what this process reads off its own."""


class Line:
    """A context. Raised by `raise_up`, taken down by `stop`; what `stop` did not end, `Programs` does."""

    def __init__(self, places: Places, store: DemoStore, programs: Programs) -> None:
        self._places = places
        self._store = store
        self._programs = programs
        self._operator: OperatorClient | None = None
        self._running: list[Program] = []
        taken: set[int] = set()
        self._control_port = free_port(CONTROL_PORT, taken=taken)
        self._data_port = free_port(DATA_PORT, taken=taken)
        self._agent_port, self._process_server_port, self._config_server_port = (
            free_port(OBSERVABILITY_PORT + number, taken=taken) for number in range(3)
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._operator is not None:
            await self._operator.close()

    @property
    def server_url(self) -> str:
        return f"https://{HOST}:{self._control_port}"

    @property
    def data_port(self) -> int:
        return self._data_port

    async def raise_up(self) -> None:
        """Makes the vault, enrols everybody by join token, starts all three. Raises ProgramEnded, DemoTookTooLong."""
        await self._make_vault()
        await self._start_config_server()
        await self._start_process_server()
        await self._enroll("agent", "mobility_agent")
        await self._start_agent()

    async def protect(self, image: Path) -> DiskId:
        """Tells the running agent to protect this image; the disk's identifier. Initial replication begins."""
        await self._programs.call("mobility_agent", "protect", "--dir", self._state("mobility-agent"), image)
        disks = await self._wait("the disk's registration", START_SECONDS_MAX, lambda: self._disks(), on_poll=None)
        return disks[0].disk

    async def wait_for_point(
        self, disk: DiskId, *, after_ns: int, on_status: Callable[[DiskStatus], None]
    ) -> RecoveryPointStatus:
        """The first recovery point whose instant is certainly after after_ns. Raises DemoTookTooLong, ProgramEnded."""

        async def look() -> RecoveryPointStatus | None:
            listed = await self._client.points(disk=disk)
            good = [point for point in listed.points if point.instant_ns > after_ns + CLOCK_SLACK_NS]
            return good[-1] if good else None

        async def tell() -> None:
            on_status(await self._client.disk(disk))

        return await self._wait("the recovery point", POINT_SECONDS_MAX, look, on_poll=tell)

    async def scan_now(self) -> None:
        """Lets the agent look for changes at once."""
        await self._programs.call("mobility_agent", "scan-now", "--dir", self._state("mobility-agent"))

    async def rpo_seconds(self, disk: DiskId) -> float | None:
        return (await self._client.disk(disk)).rpo.age_seconds

    async def counts(self) -> Counts:
        """As of now."""
        return Counts(
            read_bytes=await counted(self._agent_port, "farpoint_agent_disk_read_bytes_total"),
            sent_bytes=await counted(self._agent_port, "farpoint_agent_disk_sent_bytes_total"),
            stored_bytes=await counted(self._process_server_port, "farpoint_process_server_committed_bytes_total"),
            cpu_seconds=sum(program.cpu_seconds() for program in self._running if program.name != "config-server"),
        )

    async def stop(self) -> None:
        """SIGTERM to all, the agent first; each must end with status 0. Raises ProgramEnded."""
        for program in reversed(self._running):
            await self._programs.stop(program)

    @property
    def _client(self) -> OperatorClient:
        assert self._operator is not None
        return self._operator

    def _state(self, name: str) -> Path:
        return self._places.state / name

    async def _make_vault(self) -> None:
        keys = self._places.keys
        await self._programs.call(
            "farpoint",
            *("vault", "init", "--store", self._store.url),
            *_given("--store-credentials-file", self._store.owner_credentials),
            *("--recovery-key", self._places.recovery_key, "--recovery-key", keys / "recovery-2.key"),
            *("--authority-key", self._places.state / "vault-authority.key"),
        )

    async def _start_config_server(self) -> None:
        state = self._state("config-server")
        authority_key = self._places.state / "vault-authority.key"
        await self._programs.call("config_server", "init", "--dir", state, "--authority-key", authority_key)
        self._running.append(
            await self._programs.start(
                "config_server",
                *("run", "--dir", state, "--listen", f"{HOST}:{self._control_port}"),
                *("--set", f"observability.address={HOST}:{self._config_server_port}"),
                *("--set", f"copy_interval_seconds={COPY_INTERVAL_SECONDS}"),
                *("--set", f"point_interval_seconds={POINT_INTERVAL_SECONDS}"),
                *("--set", "heartbeat_seconds=1"),
            )
        )
        self._operator = OperatorClient(
            server_url=self.server_url,
            authority_pem=(state / "authority.pem").read_bytes(),
            token=(state / "admin-token").read_text(),
        )
        await self._wait("the configuration server", START_SECONDS_MAX, self._answers, on_poll=None)

    async def _start_process_server(self) -> None:
        credentials = self._store.process_server_credentials
        store = ["--set", f"store={self._store.url}"]
        store += [] if credentials is None else ["--set", f"store_credentials_file={credentials}"]
        await self._enroll("process-server", "process_server", *store)
        self._running.append(
            await self._programs.start(
                "process_server",
                *("run", "--dir", self._state("process-server"), *store),
                *("--set", f"listen={HOST}:{self._data_port}", "--set", f"host={HOST}"),
                *("--set", f"cache_bytes_max={CACHE_BYTES_MAX}", "--set", "segment_age_seconds_max=1"),
                *("--set", f"observability.address={HOST}:{self._process_server_port}"),
            )
        )

    async def _start_agent(self) -> None:
        self._running.append(
            await self._programs.start(
                "mobility_agent",
                *("run", "--dir", self._state("mobility-agent")),
                *("--set", f"observability.address={HOST}:{self._agent_port}"),
            )
        )
        await self._wait("the agent", START_SECONDS_MAX, lambda: answers(self._agent_port), on_poll=None)

    async def _enroll(self, role: str, package: str, *more: object) -> None:
        """A join token by the operator's command line, and its use by the newcomer."""
        token = self._places.state / f"{role}.token"
        state = self._state("config-server")
        await self._programs.call(
            "farpoint",
            *("token", "create", "--role", role, "--output", token, "--server", self.server_url),
            *("--ca", state / "authority.pem", "--token-file", state / "admin-token"),
        )
        directory = self._state(package.replace("_", "-"))
        await self._programs.call(
            package, "enroll", "--server", self.server_url, "--token-file", token, "--dir", directory, *more
        )

    async def _answers(self) -> bool:
        try:
            await self._client.machines()
        except ServerUnreachable:
            return False
        return True

    async def _disks(self) -> tuple[DiskStatus, ...]:
        return (await self._client.disks()).disks

    async def _wait(
        self,
        what: str,
        seconds: float,
        look: Callable[[], Awaitable[Result | None]],
        *,
        on_poll: Callable[[], Awaitable[None]] | None,
    ) -> Result:
        """Looks until there is something. Raises DemoTookTooLong, or ProgramEnded as soon as a program is gone."""
        deadline = time.monotonic() + seconds
        while True:
            self._programs.check()
            found = await look()
            if found:
                return found
            if on_poll is not None:
                await on_poll()
            if time.monotonic() > deadline:
                self._programs.give_up(what, seconds)
            await asyncio.sleep(POLL_SECONDS)


def _given(flag: str, path: Path | None) -> tuple[object, ...]:
    return () if path is None else (flag, path)
