"""The guest's site: configuration server and process server as programs of their own on loopback, and the operator.

Everything goes through the programs' own command lines, as an operator would do it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from farpoint.demo.programs import Program, Programs
from protocol.control_errors import ServerUnreachable, ServerUnwell
from protocol.operator_messages import DiskStatus, RecoveryPointStatus
from protocol.transport.operator_client import OperatorClient
from protocol.vocabulary import DiskId
from tests.guest.guest_image import HOST_ADDRESS

LOOPBACK: Final = "127.0.0.1"
CONTROL_PORT: Final = 8443
DATA_PORT: Final = 9443
POINT_INTERVAL_SECONDS: Final = 1
COPY_INTERVAL_SECONDS: Final = 15
CACHE_BYTES_MAX: Final = 2**29
POLL_SECONDS: Final = 0.5


class GuestSite:
    """Holds everything in a directory."""

    def __init__(self, directory: Path, programs: Programs) -> None:
        self._directory = directory
        self._programs = programs
        self._operator: OperatorClient | None = None
        self._running: list[Program] = []

    @property
    def server_url(self) -> str:
        return f"https://{LOOPBACK}:{CONTROL_PORT}"

    @property
    def machines_url(self) -> str:
        """As the guest reaches the configuration server."""
        return f"https://{HOST_ADDRESS}:{CONTROL_PORT}"

    @property
    def _store(self) -> str:
        return (self._directory / "store").as_uri()

    @property
    def _key(self) -> Path:
        return self._directory / "recovery-1.key"

    def _operator_options(self) -> list[object]:
        state = self._directory / "config-server"
        authority, token = state / "authority.pem", state / "admin-token"
        return ["--server", self.server_url, "--ca", authority, "--token-file", token]

    async def start(self) -> None:
        """Vault, both servers, and the process server enrolled. Raises ProgramEnded."""
        keys = ["--recovery-key", self._key, "--recovery-key", self._directory / "recovery-2.key"]
        authority_key = self._directory / "vault-authority.key"
        vault = ["vault", "init", "--store", self._store, *keys, "--authority-key", authority_key]
        await self._programs.call("farpoint", *vault)
        state = self._directory / "config-server"
        await self._programs.call("config_server", "init", "--dir", state, "--authority-key", authority_key)
        config_server = await self._programs.start(
            "config_server",
            *("run", "--dir", state, "--listen", f"{LOOPBACK}:{CONTROL_PORT}"),
            *("--set", f'server_names=["{HOST_ADDRESS}","{LOOPBACK}"]', "--set", "heartbeat_seconds=2"),
            *("--set", f"copy_interval_seconds={COPY_INTERVAL_SECONDS}"),
            *("--set", f"point_interval_seconds={POINT_INTERVAL_SECONDS}"),
            # why never: the guest is frozen when a story says so
            *("--set", "freeze_interval_seconds=0", "--set", "application_interval_seconds=0"),
        )
        self._running.append(config_server)
        authority, token = (state / "authority.pem").read_bytes(), (state / "admin-token").read_text()
        self._operator = OperatorClient(server_url=self.server_url, authority_pem=authority, token=token)
        await self._wait_for_answers()
        await self._start_process_server()

    async def _start_process_server(self) -> None:
        token, state = self._directory / "process-server.token", self._directory / "process-server"
        role = ["--role", "process-server", "--output", token]
        await self._programs.call("farpoint", "token", "create", *role, *self._operator_options())
        store = ["--set", f"store={self._store}"]
        join = ["--server", self.server_url, "--token-file", token, "--dir", state]
        await self._programs.call("process_server", "enroll", *join, *store)
        process_server = await self._programs.start(
            "process_server",
            *("run", "--dir", state, *store, "--set", f"listen={LOOPBACK}:{DATA_PORT}"),
            *("--set", f"host={HOST_ADDRESS}", "--set", f"cache_bytes_max={CACHE_BYTES_MAX}"),
            *("--set", "segment_age_seconds_max=1"),
        )
        self._running.append(process_server)

    async def stop(self) -> None:
        """Both servers, in order. Raises ProgramEnded."""
        for program in reversed(self._running):
            await self._programs.stop(program)

    async def _wait_for_answers(self) -> None:
        while True:
            self._programs.check()
            try:
                await self._client.machines()
                return
            except (ServerUnreachable, ServerUnwell):
                await asyncio.sleep(POLL_SECONDS)

    async def install(self, host: str, options: Sequence[object]) -> dict[str, Any]:
        """`farpoint machines install` as an operator calls it: its record of the host. Raises ProgramEnded."""
        command = ["machines", "install", host, *options, "--machines-server", self.machines_url, "-o", "json"]
        lines = await self._programs.call("farpoint", *command, *self._operator_options())
        (record,) = json.loads(b"".join(lines))
        return dict(record)

    async def disks(self) -> dict[str, DiskStatus]:
        """By the path that they are protected under."""
        return {disk.path: disk for disk in (await self._client.disks()).disks}

    async def wait_for_disks(self, is_met: Callable[[Mapping[str, DiskStatus]], bool]) -> Mapping[str, DiskStatus]:
        """Waits until what is told of them is as wanted, as long as the caller lets it."""
        while True:
            self._programs.check()
            disks = await self.disks()
            if is_met(disks):
                return disks
            await asyncio.sleep(POLL_SECONDS)

    async def points(self, disk: DiskId | None = None) -> tuple[RecoveryPointStatus, ...]:
        """Of one disk or of all, the newest first."""
        return (await self._client.points(disk=disk)).points

    async def point(
        self, is_wanted: Callable[[RecoveryPointStatus], bool], *, disk: DiskId | None = None
    ) -> RecoveryPointStatus:
        """The oldest of them that is wanted; waits for it as long as the caller lets it."""
        while True:
            self._programs.check()
            found = [point for point in await self.points(disk) if is_wanted(point)]
            if found:
                return found[-1]
            await asyncio.sleep(POLL_SECONDS)

    async def point_after(self, instant_ns: int, *, disk: DiskId | None = None) -> RecoveryPointStatus:
        """The first recovery point whose instant is certainly later."""
        return await self.point(lambda point: point.instant_ns > instant_ns, disk=disk)

    async def state(self) -> str:
        """What the configuration server says of the disks, for a report of a failure."""
        return "; ".join(
            f"{path}: {disk.state}, settled: {disk.is_settled}, backlog {disk.backlog_bytes}, error: {disk.error}"
            for path, disk in (await self.disks()).items()
        )

    async def recover(self, disk: str, point: str, target: Path) -> None:
        """From the store and a key file alone."""
        vault = ["--store", self._store, "--recovery-key", self._key]
        await self._programs.call("farpoint", "recover", *vault, "--disk", disk, "--point", point, "--to", target)

    async def close(self) -> None:
        if self._operator is not None:
            await self._operator.close()

    @property
    def _client(self) -> OperatorClient:
        assert self._operator is not None
        return self._operator


def now_ns() -> int:
    """By the clock that the configuration server has too, a tick ahead of what it may have told an agent."""
    return time.time_ns() + 10**8
