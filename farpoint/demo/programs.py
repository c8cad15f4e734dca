"""Starts the demo's programs as processes of their own, watches them, and ends all of them, however the demo ends.

Each writes its log to a file; when one ends unasked, its last lines say why.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, NoReturn, Self

from farpoint.demo.errors import DemoTookTooLong, NoFreePort, ProgramEnded
from runtime.exit_codes import ExitCode

STOP_SECONDS_MAX: Final = 20.0
LAST_LINES: Final = 15
PORTS_TRIED_MAX: Final = 200
HOST: Final = "127.0.0.1"


def free_port(first: int, *, taken: set[int]) -> int:
    """The first port from `first` on which nobody listens; noted in `taken`. Raises NoFreePort."""
    for port in range(first, first + PORTS_TRIED_MAX):
        if port in taken:
            continue
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
        taken.add(port)
        return port
    raise NoFreePort(first=first, end=first + PORTS_TRIED_MAX)


class Program:
    """One running program."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log_path: Path) -> None:
        self.name = name
        self.process = process
        self.log_path = log_path
        self.is_stopping = False

    def last_lines(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()
        return "\n".join(f"  {self.name}: {line}" for line in lines[-LAST_LINES:])

    def cpu_seconds(self) -> float:
        """User and system time so far; 0 once it has ended."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def stop(self) -> int:
        """SIGTERM, and SIGKILL after STOP_SECONDS_MAX; its exit status."""
        self.is_stopping = True
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_SECONDS_MAX):
                return await self.process.wait()
        except TimeoutError:
            self.process.kill()
            return await self.process.wait()


class Programs:
    """A context that starts programs; on leaving it, none of them runs any more."""

    def __init__(self, log_directory: Path) -> None:
        self._log_directory = log_directory
        self._running: list[Program] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for program in reversed(self._running):
            if program.process.returncode is None:
                program.process.kill()
                await program.process.wait()

    async def start(self, package: str, *arguments: object) -> Program:
        """Starts `python -m package arguments…`."""
        return await self.start_command(package.replace("_", "-"), _command(package, arguments))

    async def start_command(self, name: str, command: Sequence[str]) -> Program:
        """Starts any program; what it says goes to its log."""
        log_path = self._log_directory / f"{name}.log"
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # why: Ctrl-C goes to the demo alone, which ends the others in order
                start_new_session=True,
            )
        finally:
            os.close(log)
        program = Program(name, process, log_path)
        self._running.append(program)
        return program

    async def call(
        self, package: str, *arguments: object, on_line: Callable[[bytes], None] | None = None
    ) -> list[bytes]:
        """Runs `python -m package arguments…` to its end; the lines of its stdout, each told as it comes.

        Raises ProgramEnded, with its last words, unless it ended well.
        """
        process = await asyncio.create_subprocess_exec(
            *_command(package, arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        lines: list[bytes] = []
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            async with asyncio.TaskGroup() as group:
                reading = group.create_task(process.stderr.read())
                async for line in process.stdout:
                    lines.append(line)
                    if on_line is not None:
                        on_line(line)
            await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        errors = reading.result()
        if process.returncode != ExitCode.OK:
            name = f"{package.replace('_', '-')} {arguments[0]}"
            log = "\n".join(f"  {line}" for line in errors.decode(errors="replace").splitlines()[-LAST_LINES:])
            raise ProgramEnded(program=name, status=process.returncode, log=log)
        return lines

    async def stop(self, program: Program) -> None:
        """Ends it in order. Raises ProgramEnded unless that took less than STOP_SECONDS_MAX and went well."""
        self.check()
        status = await program.stop()
        if status != ExitCode.OK:
            raise ProgramEnded(program=program.name, status=status, log=program.last_lines())

    def check(self) -> None:
        """Raises ProgramEnded if a program has ended that was not asked to."""
        for program in self._running:
            if program.process.returncode is not None and not program.is_stopping:
                raise ProgramEnded(program=program.name, status=program.process.returncode, log=program.last_lines())

    def give_up(self, what: str, seconds: float) -> NoReturn:
        """Raises DemoTookTooLong with what all programs said last."""
        log = "\n".join(program.last_lines() for program in self._running)
        raise DemoTookTooLong(what=what, seconds=seconds, log=log)


def _command(package: str, arguments: Sequence[object]) -> list[str]:
    return [sys.executable, "-m", package, *(str(argument) for argument in arguments)]
