"""`farpoint up`: a configuration server and a process server in one process, stopped together.

The process server joins by the same enrolment as any other, over TLS and with a join token; nothing is shared but the
host.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog

from config_server.service import ConfigServer
from config_server.settings import ConfigServerSettings
from farpoint.server_connection import UpDescription
from farpoint.up_directory import UpDirectory, initialise_directory
from process_server.program import ProcessServerProgram
from process_server.settings import ProcessServerSettings
from protocol.enrollment import IDENTITY_FILE
from protocol.join_token import JoinToken
from protocol.operator_messages import JoinTokenRequest
from protocol.transport.operator_client import OperatorClient
from protocol.vocabulary import Role
from runtime.local_directory import LocalDirectory
from runtime.locks import exclusive_lock
from runtime.membership import enroll_member
from runtime.observability import ListenAddress
from runtime.output import notice
from runtime.secrets import read_secret
from runtime.service import StopSignal

TOKEN_SECONDS: Final = 60

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpSettings:
    """Everything that both servers need to know. host: by which agents reach this one."""

    directory: UpDirectory
    store_url: str
    store_credentials_file: Path | None
    host: str
    config_server: ConfigServerSettings = field(repr=False)
    process_server: ProcessServerSettings = field(repr=False)

    @property
    def control_port(self) -> int:
        return ListenAddress.parse(self.config_server.listen).port

    @property
    def server_url(self) -> str:
        """For agents elsewhere."""
        return f"https://{self.host}:{self.control_port}"

    @property
    def own_url(self) -> str:
        """For who is on this host, whatever its name resolves to."""
        return f"https://localhost:{self.control_port}"


class Up:
    """Both servers. `run` does everything."""

    def __init__(self, settings: UpSettings) -> None:
        self._settings = settings

    async def run(self, stop: StopSignal) -> None:
        """Until `stop`; when one server fails, the other is stopped in order too.

        Raises StateLocked, FirstRunCutOff, PortTaken, AddressTaken, StoreFault, and what either server raises.
        """
        directory = self._settings.directory
        with exclusive_lock(directory.lock):
            if not directory.is_initialised:
                await initialise_directory(
                    directory,
                    store_url=self._settings.store_url,
                    credentials_file=self._settings.store_credentials_file,
                )
                _tell_first_run(directory)
            directory.write_description(self._describe())
            await self._serve(stop)

    def _describe(self) -> UpDescription:
        return self._settings.directory.describe(
            server_url=self._settings.own_url,
            store_url=self._settings.store_url,
            store_credentials_file=self._settings.store_credentials_file,
        )

    async def _serve(self, stop: StopSignal) -> None:
        ready = asyncio.Event()
        config_server = ConfigServer(self._settings.config_server)
        process_server = ProcessServerProgram(self._settings.process_server)

        async def run_config_server() -> None:
            # why: it ends last, so that the process server can report what it uploads while it stops
            await config_server.run(config_server_stop, on_ready=lambda address: ready.set())

        async def run_process_server() -> None:
            try:
                await ready.wait()
                await self._enroll_once()
                notice(f"serving: agents enrol at {self._settings.server_url}; Ctrl-C or SIGTERM stops")
                await process_server.run(stop)
            finally:
                config_server_stop.set("the process server has ended")

        config_server_stop = StopSignal()
        async with asyncio.TaskGroup() as group:
            serving = group.create_task(run_process_server())
            group.create_task(run_config_server())
            group.create_task(_cancel_before_ready(stop, ready, serving))

    async def _enroll_once(self) -> None:
        """The real way in: a join token by the operator's API, and its use."""
        path = self._settings.process_server.state_directory
        directory = LocalDirectory(path)
        if IDENTITY_FILE in directory.names():
            return
        description = self._describe()
        async with OperatorClient(
            server_url=description.server_url,
            authority_pem=read_secret(description.authority_file),
            token=read_secret(description.admin_token_file).decode(),
        ) as operator:
            created = await operator.create_token(
                JoinTokenRequest(role=Role.PROCESS_SERVER, lifetime_seconds=TOKEN_SECONDS)
            )
        await enroll_member(
            directory,
            server_url=description.server_url,
            token=JoinToken.parse(created.token),
            role=Role.PROCESS_SERVER,
            name=self._settings.host,
        )


async def _cancel_before_ready(stop: StopSignal, ready: asyncio.Event, serving: asyncio.Task[None]) -> None:
    """A stop that comes before the configuration server is ready has nobody else to end the waiting."""
    await stop.wait()
    if not ready.is_set():
        serving.cancel()


def _tell_first_run(directory: UpDirectory) -> None:
    keys = "\n".join(f"    {path.absolute()}" for path in directory.recovery_keys)
    notice(
        "==============================================================================\n"
        "  A new vault was made. Its recovery keys are\n"
        f"{keys}\n"
        "  MOVE THEM AWAY FROM THIS HOST, to two separate safe places, now:\n"
        "  one of them and the store recover everything; without one, nothing can.\n"
        "=============================================================================="
    )
