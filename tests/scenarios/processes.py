"""Programs as an operator runs them: commands that end, and servers that are started, stopped and killed by their
process id.

Invariants: a server's output goes to its own log file, which every failure quotes; whoever starts a process ends it;
nothing waits longer than its deadline, and nothing waits for a guessed time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from click.testing import CliRunner

from config_server.__main__ import main as config_server
from farpoint.__main__ import main as farpoint
from mobility_agent.__main__ import main as mobility_agent
from process_server.__main__ import main as process_server
from runtime.exit_codes import ExitCode

PROGRAMS = Path(sys.executable).parent
"""The console scripts lie beside the interpreter that has them installed."""

COMMAND_SECONDS = 60.0
START_SECONDS = 30.0
STOP_SECONDS = 40.0
"""More than any program's own deadline for an orderly stop."""
POLL_SECONDS = 0.05
LOG_LINES_SHOWN = 25

Result = TypeVar("Result")

MAINS = {
    "config-server": config_server,
    "farpoint": farpoint,
    "mobility-agent": mobility_agent,
    "process-server": process_server,
}


def clean_environment() -> dict[str, str]:
    """This process's environment without settings meant for Farpoint."""
    return {name: value for name, value in os.environ.items() if not name.startswith("FARPOINT_")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A command that has ended."""

    command: tuple[str, ...]
    exit_code: int
    stdout: str
    stderr: str

    def expect(self, exit_code: ExitCode, *words: str) -> Finished:
        """Fails unless it ended so, with every one of `words` on stderr, and without a traceback."""
        shown = f"{' '.join(self.command)}\nended with {self.exit_code}\n{self.stdout[-2000:]}\n{self.stderr[-4000:]}"
        assert self.exit_code == exit_code, f"{exit_code!r} was expected: {shown}"
        assert "Traceback" not in self.stderr, f"no traceback was expected: {shown}"
        for word in words:
            assert word in self.stderr, f"{word!r} was expected on stderr: {shown}"
        return self

    @property
    def json(self) -> Any:
        """Of all of stdout."""
        return json.loads(self.stdout)

    @property
    def last_json_line(self) -> Any:
        return json.loads(self.stdout.splitlines()[-1])


def run_command(program: str, *arguments: object, environment: dict[str, str] | None = None) -> Finished:
    """Runs a program to its end, as a process of its own."""
    command = (str(PROGRAMS / program), *map(str, arguments))
    done = subprocess.run(
        command,
        env=clean_environment() | (environment or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        check=False,
    )
    return Finished(command=command, exit_code=done.returncode, stdout=done.stdout, stderr=done.stderr)


def call_command(program: str, *arguments: object) -> Finished:
    """The same within this process, for the many commands that no scenario is about: a start costs a CPU-second."""
    command = (program, *map(str, arguments))
    meant_for_us = {name: None for name in os.environ if name.startswith("FARPOINT_")}
    done = CliRunner(env=meant_for_us).invoke(MAINS[program], command[1:], prog_name=program)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Finished(command=command, exit_code=done.exit_code, stdout=done.stdout, stderr=done.stderr)


class Server:
    """One server process, again and again with the same arguments and the same log file."""

    def __init__(
        self,
        name: str,
        program: str,
        *arguments: object,
        log_path: Path,
        is_up: Callable[[], bool],
        inside: Sequence[str] = (),
    ) -> None:
        """is_up: whether it answers; asked until it does. inside: a command that becomes the program, elsewhere."""
        self.name = name
        self.log_path = log_path
        self._inside = tuple(inside)
        self._command = (str(PROGRAMS / program), *map(str, arguments))
        self._is_up = is_up
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, f"{self.name} was never started"
        return self._process

    @property
    def process_id(self) -> int:
        return self.process.pid

    @property
    def ended_with(self) -> int | None:
        """Its exit status, the negative number of a signal; None while it runs and before its first start."""
        return None if self._process is None else self._process.poll()

    @property
    def log(self) -> str:
        return self.log_path.read_text("utf-8", "replace") if self.log_path.exists() else ""

    def log_tail(self) -> str:
        lines = self.log.splitlines()[-LOG_LINES_SHOWN:]
        return "\n".join([f"--- the end of {self.log_path}:", *lines])

    def start(self, *, wait: bool = True, under: Sequence[str] = ()) -> None:
        """wait: returns when it answers. under: a command that becomes the program, watching it."""
        assert not self.is_running, f"{self.name} is running already"
        with open(self.log_path, "ab") as log:
            self._process = subprocess.Popen(
                (*self._inside, *under, *self._command),
                env=clean_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if wait:
            self.wait_until_up()

    def wait_until_up(self) -> None:
        wait_until(f"{self.name} answers", self._is_up, seconds=START_SECONDS, servers=[self])

    def stop(self) -> None:
        """An orderly stop by SIGTERM, which must end with exit code 0."""
        self.signal(signal.SIGTERM)
        self.expect_end(ExitCode.OK)

    def signal(self, number: signal.Signals) -> None:
        assert self.is_running, f"{self.name} has ended already\n{self.log_tail()}"
        os.kill(self.process_id, number)

    def kill(self) -> None:
        """kill -9, and no trace of it left when this returns."""
        self.signal(signal.SIGKILL)
        assert self._wait() == -signal.SIGKILL

    def restart(self) -> None:
        self.stop()
        self.start()

    def expect_end(self, exit_code: ExitCode) -> None:
        ended_with = self._wait()
        assert ended_with == exit_code, f"{self.name} ended with {ended_with}, not {exit_code!r}\n{self.log_tail()}"
        assert "Traceback" not in self.log, f"{self.name} logged a traceback\n{self.log_tail()}"

    def dispose(self) -> None:
        """However it goes, the process is gone on return."""
        if self._process is not None and self.is_running:
            self._process.kill()
            self._process.wait()

    def _wait(self) -> int:
        assert self._process is not None, f"{self.name} was never started"
        try:
            return self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end in {STOP_SECONDS} s\n{self.log_tail()}") from None


def wait_until(
    what: str, condition: Callable[[], Result | None], *, seconds: float, servers: Sequence[Server] = ()
) -> Result:
    """Asks `condition` until it gives something true, and returns that.

    Fails after `seconds`, or as soon as one of `servers` has ended, and then shows the ends of their logs.
    """
    deadline = time.monotonic() + seconds
    while True:
        result = condition()
        if result:
            return result
        fallen = [server.name for server in servers if not server.is_running]
        if fallen or time.monotonic() > deadline:
            reason = f"{', '.join(fallen)} ended" if fallen else f"not within {seconds} s"
            tails = "\n".join(server.log_tail() for server in servers)
            raise AssertionError(f"{what}: {reason}\n{tails}")
        time.sleep(POLL_SECONDS)
