"""The running agent's ear: a Unix socket in its state directory, for the command line of whoever owns that directory.

One JSON line asks, one answers. Who may ask: the directory is 0700, the socket 0600, and nothing else decides.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from mobility_agent.core.freeze_point import FreezeKind
from mobility_agent.errors import AgentNotRunning, AgentTooBusy, RefusedByAgent
from mobility_agent.service import AgentService
from mobility_agent.status import freeze_record, status_records
from protocol.control import PATH_LENGTH_MAX
from protocol.errors import InvalidValue, ReplicationError
from runtime.local_directory import FILE_MODE

SOCKET_FILE: Final = "agent.socket"
REQUEST_BYTES_MAX: Final = 4 * PATH_LENGTH_MAX
ANSWER_BYTES_MAX: Final = 4 * 2**20
ANSWER_SECONDS_MAX: Final = 30.0
FREEZE_ANSWER_SECONDS_MAX: Final = 600.0
"""Disks are drained, and scripts run, before one is over."""
REQUEST_SECONDS_MAX: Final = 10.0

log = structlog.get_logger(__name__)


class Request(BaseModel):
    """What may be asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: Literal["status", "protect", "unprotect", "scan-now", "freeze-now"]
    path: str = ""
    keep: bool = True
    kind: FreezeKind = FreezeKind.FILE_SYSTEM


@asynccontextmanager
async def control_socket(directory: Path, service: AgentService, group: asyncio.TaskGroup) -> AsyncIterator[None]:
    """Listens for the length of the block. The caller holds the state directory's lock. Raises OSError."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    with _socket_path(directory) as path:
        if os.path.lexists(path):
            os.unlink(path)
        listening.bind(path)
        # why: bind obeys the umask, and nobody can connect before the socket listens
        os.chmod(path, FILE_MODE)
    handlers: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = group.create_task(_converse(service, reader, writer))
        handlers.add(task)
        task.add_done_callback(handlers.discard)

    server = await asyncio.start_unix_server(accept, sock=listening, limit=REQUEST_BYTES_MAX)
    try:
        yield
    finally:
        server.close()
        for task in handlers:
            task.cancel()
        with _socket_path(directory) as path:
            os.unlink(path)


async def _converse(service: AgentService, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        async with asyncio.timeout(REQUEST_SECONDS_MAX):
            line = await reader.readline()
        async with asyncio.timeout(FREEZE_ANSWER_SECONDS_MAX):
            answer = await _answer(service, line)
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
    except (OSError, TimeoutError, ValueError) as error:
        log.info("control socket", error=str(error) or type(error).__name__)
    finally:
        writer.close()


async def _answer(service: AgentService, line: bytes) -> dict[str, Any]:
    try:
        request = Request.model_validate_json(line)
        return {"result": await _carry_out(service, request)}
    except ValidationError as error:
        reason = error.errors(include_url=False, include_input=False)[0]["msg"]
        return _refusal(InvalidValue(what="request", value="", rule=reason))
    except ReplicationError as error:
        return _refusal(error)


def _refusal(error: ReplicationError) -> dict[str, Any]:
    return {"error": {"code": error.code, "message": str(error), "hint": error.hint}}


async def _carry_out(service: AgentService, request: Request) -> list[dict[str, Any]]:
    match request.command:
        case "freeze-now":
            return [freeze_record(await service.freeze_now(request.kind))]
        case "protect":
            await service.protect(request.path)
        case "unprotect":
            await service.unprotect(request.path, keep=request.keep)
        case "scan-now":
            service.scan_now()
    return status_records(service.protection, service.freezes)


async def ask(directory: Path, request: Request) -> list[dict[str, Any]]:
    """Asks the agent that runs in `directory`; the answer is its status.

    Raises AgentNotRunning, RefusedByAgent (with the agent's own code and hint).
    """
    try:
        is_freeze = request.command == "freeze-now"
        async with asyncio.timeout(FREEZE_ANSWER_SECONDS_MAX if is_freeze else ANSWER_SECONDS_MAX):
            with _socket_path(directory) as path:
                reader, writer = await asyncio.open_unix_connection(path, limit=ANSWER_BYTES_MAX)
            try:
                writer.write(request.model_dump_json().encode() + b"\n")
                line = await reader.readline()
            finally:
                writer.close()
        answer = json.loads(line)
    except TimeoutError as error:
        raise AgentTooBusy(directory=str(directory), command=request.command) from error
    except (OSError, ValueError) as error:
        raise AgentNotRunning(directory=str(directory)) from error
    if "error" in answer:
        refused = answer["error"]
        raise RefusedByAgent(
            peer_code=refused["code"], detail=refused["message"], retryable=False, agent_hint=refused["hint"]
        )
    result: list[dict[str, Any]] = answer["result"]
    return result


@contextmanager
def _socket_path(directory: Path) -> Iterator[str]:
    """A short path to the socket: sockaddr_un holds 108 bytes, and state directories may be longer."""
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET_FILE}"
    finally:
        os.close(descriptor)
