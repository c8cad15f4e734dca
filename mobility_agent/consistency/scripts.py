"""Runs what an operator has put around freezes: executables of one directory, with `freeze` before and `thaw` after.

Only root's are run: nobody else may have been able to write them, their directory, or a way to it. Each has a deadline,
is killed with all that it started when it is over, and whoever was told of a freeze is told of its end, also after a
failure.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import signal
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import structlog

from mobility_agent.errors import ScriptFailed

KILLED_SECONDS_MAX: Final = 10.0
OUTPUT_BYTES_MAX: Final = 2**20
"""A script that writes more meets an error."""
LOGGED_BYTES_MAX: Final = 4096
"""Of what a script that failed has written, so much goes into the log, from its end."""
_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")
"""As run-parts(8): what editors and package managers leave behind has a dot."""
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_OTHERS_MAY_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH

log = structlog.get_logger(__name__)


class FreezeScripts:
    """Those of one directory. Raises ScriptFailed."""

    def __init__(self, directory: Path, *, seconds_max: float) -> None:
        """seconds_max: for one script, once."""
        self._directory = directory
        self._seconds_max = seconds_max

    def found(self) -> list[Path]:
        """In the order in which they run before a freeze; empty where the directory is missing. Blocks shortly."""
        try:
            names = sorted(os.listdir(self._directory))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise ScriptFailed(script=str(self._directory), reason=error.strerror or str(error)) from error
        paths = [self._directory / name for name in names if _NAME.fullmatch(name)]
        return [path for path in paths if os.access(path, os.X_OK) and not os.path.isdir(path)]

    async def before_freeze(self, scripts: Sequence[Path], *, mount_points: Sequence[str]) -> None:
        """mount_points: of what is to be frozen; the scripts find them in FARPOINT_MOUNT_POINTS, a line each. If one
        fails, those that were run are told of the thaw before this raises."""
        for index, script in enumerate(scripts):
            try:
                await self._run(script, "freeze", mount_points)
            except (ScriptFailed, asyncio.CancelledError):
                await self._tell_of_thaw(scripts[: index + 1], mount_points)
                raise

    async def after_thaw(self, scripts: Sequence[Path], *, mount_points: Sequence[str]) -> None:
        """All of them, in reverse; the first failure is raised after the last has ended."""
        failures = await self._tell_of_thaw(scripts, mount_points)
        if failures:
            raise failures[0]

    async def _tell_of_thaw(self, scripts: Sequence[Path], mount_points: Sequence[str]) -> list[ScriptFailed]:
        failures = []
        for script in reversed(scripts):
            try:
                await self._run(script, "thaw", mount_points)
            except ScriptFailed as error:
                failures.append(error)
        return failures

    async def _run(self, script: Path, word: str, mount_points: Sequence[str]) -> None:
        try:
            program = check_only_roots(script)
            output = _output()
        except OSError as error:
            raise ScriptFailed(script=str(script), reason=error.strerror or str(error)) from error
        try:
            status = await self._status(program, word, mount_points, output)
            if status:
                written_bytes = os.lseek(output, 0, os.SEEK_CUR)
                last = os.pread(output, LOGGED_BYTES_MAX, max(0, written_bytes - LOGGED_BYTES_MAX))
                text = last[:written_bytes].decode(errors="replace").strip()
                log.warning("script failed", script=str(script), word=word, status=status, written=text)
                last_line = text.splitlines()[-1] if text else ""
                raise ScriptFailed(script=str(script), reason=f"{word}: exit status {status}: {last_line[:200]}")
        finally:
            os.close(output)

    async def _status(self, script: Path, word: str, mount_points: Sequence[str], output: int) -> int:
        try:
            process = await asyncio.create_subprocess_exec(
                *(str(script), word),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd="/",
                env={"PATH": _PATH, "LANG": "C.UTF-8", "FARPOINT_MOUNT_POINTS": "\n".join(mount_points)},
            )
        except OSError as error:
            raise ScriptFailed(script=str(script), reason=error.strerror or str(error)) from error
        try:
            async with asyncio.timeout(self._seconds_max):
                return await process.wait()
        except TimeoutError as error:
            raise ScriptFailed(script=str(script), reason=f"{word}: not done after {self._seconds_max:g} s") from error
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await _wait_for_killed(process, script)


def _output() -> int:
    """A place for what a script writes."""
    # why not a pipe: what a script leaves running, a session that holds a lock, would keep it open
    descriptor = os.memfd_create("script output", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, OUTPUT_BYTES_MAX)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return descriptor


async def _wait_for_killed(process: asyncio.subprocess.Process, script: Path) -> None:
    """What the kernel holds in the midst of something ends only when that does; nobody waits for it."""
    try:
        async with asyncio.timeout(KILLED_SECONDS_MAX):
            await process.wait()
    except TimeoutError:
        log.error("script does not end", script=str(script), process=process.pid)


def check_only_roots(script: Path) -> Path:
    """Where it really lies, to be run there. Raises ScriptFailed where somebody else than root could have written it,
    or put another one in its place; OSError. Blocks shortly."""
    path, place = Path(os.path.realpath(script)), Path(os.path.realpath(script.parent))
    for part in (path, *path.parents, place, *place.parents):
        status = os.stat(part)
        is_sticky = bool(status.st_mode & stat.S_ISVTX) and stat.S_ISDIR(status.st_mode)
        if status.st_uid != 0 or (status.st_mode & _OTHERS_MAY_WRITE and not is_sticky):
            raise ScriptFailed(script=str(script), reason=f"not run: others than root may write {part}")
    return path
