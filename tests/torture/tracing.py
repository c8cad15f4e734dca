"""Faults in a program's system calls, by strace: a kill at the N-th call of a kind, or an error instead of it.

Invariants: a program is traced by one strace at a time; strace ends no later than the block or the program that it
watches; an error is given instead of the call, which is not made.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CALLS: Final[dict[str, tuple[str, ...]]] = {
    "write": ("pwrite64", "pwritev", "pwritev2"),
    "synchronize": ("fsync", "fdatasync"),
    "allocate": ("fallocate", "ftruncate"),
    "open": ("openat",),
    "read": ("pread64", "preadv", "preadv2"),
    "rename": ("rename", "renameat", "renameat2"),
    "link": ("link", "linkat"),
    "unlink": ("unlink", "unlinkat"),
    "send": ("write", "writev", "sendto", "sendmsg"),
}
"""The kinds of calls by which a program changes or reads anything outside itself. `send` reaches sockets and logs."""

ATTACH_SECONDS: Final = 10.0
DETACH_SECONDS: Final = 10.0
POLL_SECONDS: Final = 0.01
INJECTED: Final = b"(INJECTED)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Injection:
    """What happens to which calls of a kind; a thread counts its calls of one name for itself.

    error: an errno, or 0 for a kill before the call. when: `N`, `N+STEP` or `N+`, as strace has it.
    """

    kind: str
    when: str
    error: int = 0

    def command(self, output: Path) -> list[str]:
        """strace with all but what it watches."""
        names = ",".join(CALLS[self.kind])
        action = f"error={errno.errorcode[self.error]}" if self.error else "signal=KILL"
        inject = f"inject={names}:{action}:when={self.when}"
        return ["strace", "-f", "-qq", "-o", str(output), "-e", f"trace={names}", "-e", inject]

    def starting(self, output: Path, *, only: Sequence[Path] = ()) -> list[str]:
        """A command that becomes the program which follows, watched from its first call.

        only: the files whose calls count; all of them if there are none.
        """
        return [*self.command(output), *(word for path in only for word in ("-P", str(path))), "-D", "--"]

    def __str__(self) -> str:
        action = errno.errorcode[self.error] if self.error else "kill -9"
        return f"{action} at {self.kind} {self.when}"


def injected_count(output: Path) -> int:
    """How many calls got an error instead."""
    return output.read_bytes().count(INJECTED) if output.exists() else 0


@contextmanager
def attached(process_id: int, injection: Injection, output: Path) -> Iterator[None]:
    """Every thread of a running process is watched for the length of the block; the process may end within it."""
    tracer = subprocess.Popen(
        [*injection.command(output), "-p", str(process_id)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_until_attached(process_id, tracer)
        yield
    finally:
        tracer.terminate()
        try:
            tracer.wait(DETACH_SECONDS)
        except subprocess.TimeoutExpired:
            # why: it can wait for ever for threads of a program that was killed while it was being attached
            tracer.kill()
            tracer.wait()


def _wait_until_attached(process_id: int, tracer: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + ATTACH_SECONDS
    while tracer.poll() is None and time.monotonic() < deadline:
        if all(tracer_of(task) for task in tasks_of(process_id)):
            return
        time.sleep(POLL_SECONDS)


def end_tracers_of(process_id: int) -> None:
    """On return nobody who watches the process keeps it from being gone."""
    for tracer in {tracer_of(task) for task in tasks_of(process_id)} - {0}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(tracer, signal.SIGKILL)


def tasks_of(process_id: int) -> list[Path]:
    """The process's threads in /proc; none once it has ended."""
    try:
        return list(Path(f"/proc/{process_id}/task").iterdir())
    except FileNotFoundError:
        return []


def tracer_of(task: Path) -> int:
    """Who traces a thread; 0 for nobody, or once it has ended."""
    try:
        status = (task / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(status.partition("TracerPid:")[2].split()[0])
