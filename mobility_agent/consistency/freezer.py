"""Holds file systems frozen for a moment by a process of its own, which thaws whatever becomes of the agent.

Nothing stays frozen when frozen() is left, however that is. What a process that was killed left frozen is thawed by the
agent, or by its next start.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog

from mobility_agent.consistency import freeze_process as program
from mobility_agent.consistency.mount_table import mounted_file_systems
from mobility_agent.core.freeze_plan import FileSystem
from mobility_agent.errors import FreezeFailed
from runtime.blocking import blocking
from runtime.directory import DurableDirectory
from runtime.local_directory import LocalDirectory

RECORD_FILE: Final = "frozen.json"
"""In the state directory: what may be frozen just now."""
BEGIN_SECONDS_MAX: Final = 10.0
SYNCHRONIZE_SECONDS_MAX: Final = 60.0
OVERDUE_SECONDS: Final = 10.0
"""So much longer than it may hold, a freeze may last that the kernel itself draws out: to freeze is to write back."""
ANSWER_BYTES_MAX: Final = 1 << 20

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Thaw:
    """How a freeze ended.

    cause: told, deadline, agent gone or failed. Times of the monotonic clock: before the first freeze, before the first
    thaw, after the last thaw. lost: by path, why a file system was not frozen any more.
    """

    cause: str
    began_seconds: float
    thawing_seconds: float
    ended_seconds: float
    lost: Mapping[str, str]

    @property
    def seconds(self) -> float:
        return self.ended_seconds - self.began_seconds


class FreezeProcess:
    """One process for one freeze. Raises FreezeFailed."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def begin(self, order: Mapping[str, Any]) -> None:
        """It has everything open on return that can be reached."""
        await self._say(json.dumps(order))
        await self._hear(BEGIN_SECONDS_MAX)

    async def synchronize(self) -> None:
        """On return what was changed before is on the devices."""
        await self._ask("sync", SYNCHRONIZE_SECONDS_MAX)

    async def freeze(self, seconds_max: float) -> Mapping[str, str]:
        """Everything is frozen on return, for seconds_max from the call on; but for what is returned, by path, with the
        reason."""
        answer = await self._ask("freeze", seconds_max + OVERDUE_SECONDS)
        if not answer["frozen"]:
            raise FreezeFailed(reason=answer["reason"])
        unfrozen: Mapping[str, str] = answer["unfrozen"]
        return unfrozen

    async def thaw(self) -> Thaw:
        """Nothing is frozen on return."""
        with suppress(FreezeFailed):  # why: when the time was up it has thawed and ended, and its answer lies there
            await self._say("thaw")
        answer = await self._hear(OVERDUE_SECONDS)
        return Thaw(
            cause=answer["thawed"],
            began_seconds=answer["began"],
            thawing_seconds=answer["thawing"],
            ended_seconds=answer["ended"],
            lost=answer["lost"],
        )

    async def end(self) -> None:
        """Closes its input, upon which it thaws and ends."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(OVERDUE_SECONDS):
                await self._process.wait()
        except TimeoutError:
            # why: not killed: what the kernel has not frozen yet it will freeze, and then somebody has to thaw it
            log.error("freeze process does not end", process=self._process.pid)

    async def _ask(self, command: str, seconds_max: float) -> dict[str, Any]:
        await self._say(command)
        return await self._hear(seconds_max)

    async def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n".encode())
            await self._process.stdin.drain()
        except OSError as error:
            raise FreezeFailed(reason="the freezing process ended") from error

    async def _hear(self, seconds_max: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(seconds_max):
                line = await self._process.stdout.readline()
        except TimeoutError as error:
            raise FreezeFailed(reason=f"the freezing process did not answer within {seconds_max:g} s") from error
        if not line:
            raise FreezeFailed(reason="the freezing process ended")
        answer: dict[str, Any] = json.loads(line)
        if "refused" in answer:
            raise FreezeFailed(reason=answer["refused"])
        return answer


class Freezer:
    """Of one agent. Raises FreezeFailed, OSError (of the state directory)."""

    def __init__(self, *, directory: DurableDirectory, path: Path, boot_id: str, executor: Executor) -> None:
        """path: of the state directory."""
        self._directory = directory
        self._path = path
        self._boot_id = boot_id
        self._executor = executor

    @asynccontextmanager
    async def process(self, file_systems: Sequence[FileSystem], *, seconds_max: float) -> AsyncIterator[FreezeProcess]:
        """A process that has all of them open and its memory locked; nothing is frozen yet. Nothing is frozen any more
        when the block was left."""
        record = {"boot": self._boot_id, "file_systems": [system.identifier for system in file_systems]}
        order = {
            "seconds_max": seconds_max,
            "record": str(self._path / RECORD_FILE),
            "file_systems": [[(place.mount, place.path) for place in system.places] for system in file_systems],
        }
        await blocking(self._executor, lambda: self._directory.replace(RECORD_FILE, json.dumps(record).encode()))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-B", str(program.__file__)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=ANSWER_BYTES_MAX,
            start_new_session=True,
            env={},
        )
        held = FreezeProcess(process)
        try:
            await held.begin(order)
            yield held
        finally:
            await held.end()
            await self.thaw_what_was_left()

    async def thaw_what_was_left(self) -> None:
        """Thaws what a process that was killed has left frozen; no effect if there is nothing."""
        thawed = await blocking(self._executor, lambda: thaw_what_was_left(self._directory, self._boot_id))
        if thawed:
            log.error("file systems had been left frozen", thawed=thawed)


def thaw_what_was_left(directory: DurableDirectory, boot_id: str) -> list[str]:
    """The paths of what had to be thawed. Blocks. Raises OSError."""
    try:
        record = json.loads(directory.read(RECORD_FILE))
        identifiers = list(record["file_systems"]) if record["boot"] == boot_id else []
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError):
        identifiers = []  # why: it was torn by a crash of the machine, which leaves nothing frozen
    mounted = {system.identifier: system for system in mounted_file_systems()}
    # why: what was frozen last holds what was frozen first
    found = [mounted[identifier] for identifier in reversed(identifiers) if identifier in mounted]
    thawed = [system.path for system in found if _thaw(system)]
    directory.remove(RECORD_FILE)
    return thawed


def thaw_before_start(path: Path, lock_file: str, boot_id: str) -> list[str]:
    """Thaws what was left, if no agent runs in the state directory `path`; before anything is written there, for it may
    lie on what is frozen. Blocks. Raises OSError."""
    try:
        descriptor = os.open(path / lock_file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return thaw_what_was_left(LocalDirectory(path), boot_id)
    except BlockingIOError:
        return []  # why: an agent runs, and thaws by itself
    finally:
        os.close(descriptor)


def _thaw(system: FileSystem) -> bool:
    """Whether it had been frozen."""
    for place in system.places:
        try:
            target = program.Target([(place.mount, place.path)])
        except OSError:
            continue  # why: another mount hides this way to it
        try:
            return not target.thaw()
        finally:
            os.close(target.descriptor)
    return False
