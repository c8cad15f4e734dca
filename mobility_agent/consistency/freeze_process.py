"""Freezes file systems, and thaws them when it is told to, when the agent is gone, or when the time is up.

A process of its own that shares nothing with the agent: it thaws also when the agent was killed or stopped. Its memory
is locked before anything is frozen, it heeds no signal that can be ignored, and between freeze and thaw it touches no
file. It is run as a file by the bare interpreter, so it imports nothing but the standard library.

It reads lines and answers with JSON lines:
  {seconds_max, record, file_systems: [[[mount, path], …], …]} → {"ready": true}, or {"refused": reason} and its end
  sync → {"synchronized": true}: what was changed until then is on the devices, so that the freeze itself is short
  freeze → {"frozen": bool, "unfrozen": {path: reason}, "reason": why nothing stays frozen}
  thaw, the end of its input, or seconds_max after freeze → {"thawed": cause, "began", "thawing", "ended" (seconds of
    the monotonic clock: before the first freeze, before the first thaw, after the last), "lost": {path: reason}}
The file `record`, which names what may be frozen, is removed when nothing is.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import threading
import time
from typing import Any

FREEZE = 0xC0045877
THAW = 0xC0045878
MEMORY_NOW_AND_LATER = 3
THREAD_STACK_BYTES = 1 << 18
NOT_ABLE = (errno.EOPNOTSUPP, errno.ENOTTY)
"""This kind of file system cannot be frozen; all else that goes wrong may go well another time."""


class Target:
    """One file system, open."""

    def __init__(self, places: list[tuple[int, str]]) -> None:
        """places: (mount, path), by any of which it may be reached. Raises OSError."""
        self.is_frozen = False
        refusal = OSError(errno.EXDEV, "something else is mounted over it")
        for mount, path in places:
            self.path = path
            try:
                self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError as error:
                refusal = error
                continue
            if mount_of(self.descriptor) == mount:
                return
            os.close(self.descriptor)
        raise refusal

    def thaw(self) -> str:
        """Why it was not frozen any more; empty if it was."""
        self.is_frozen = False
        try:
            fcntl.ioctl(self.descriptor, THAW, 0)
        except OSError as error:
            return "somebody else thawed it" if error.errno == errno.EINVAL else str(error.strerror)
        return ""


class Freeze:
    """All targets. The freezing goes on in a thread of its own, because one that lasts must not keep the others."""

    def __init__(self, targets: list[Target], unreachable: dict[str, str]) -> None:
        """unreachable: by path, what is not among the targets, and why."""
        self.reason = ""
        self.unfrozen = dict(unreachable)
        self.lost: dict[str, str] = {}
        self.began = self.thawing = self.ended = 0.0
        self._targets = targets
        self._lock = threading.Lock()
        self._is_over = False
        self._done_reader, self._done_writer = os.pipe()
        self._thread = threading.Thread(target=self._freeze_all)

    @property
    def done_descriptor(self) -> int:
        """Readable when the freezing has ended, well or not."""
        return self._done_reader

    def begin(self) -> None:
        self.began = time.monotonic()
        self._thread.start()

    def end(self) -> None:
        """Nothing is frozen when it returns. No effect the second time."""
        if self.ended:
            return
        self.thawing = time.monotonic()
        with self._lock:
            self._is_over = True
            for target in reversed(self._targets):
                self._thaw(target)
        if self.began:
            self._thread.join()
        self.ended = time.monotonic()

    def _freeze_all(self) -> None:
        for target in self._targets:
            try:
                fcntl.ioctl(target.descriptor, FREEZE, 0)
            except OSError as error:
                self.unfrozen[target.path] = str(error.strerror)
                if error.errno not in NOT_ABLE:
                    self.reason = f"{target.path}: {error.strerror}"
                    break
                continue
            with self._lock:
                target.is_frozen = True
                if self._is_over:
                    self._thaw(target)
                    self.reason = "the time was up"
                    break
        os.write(self._done_writer, b"\0")

    def _thaw(self, target: Target) -> None:
        if target.is_frozen:
            lost = target.thaw()
            if lost:
                self.lost[target.path] = lost


def main() -> None:
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
        # why: also SIGABRT, which systemd's watchdog sends to all of a service
        signal.signal(number, signal.SIG_IGN)
    order = json.loads(read_line())
    targets, unreachable = open_all(order["file_systems"])
    try:
        lock_memory()
    except OSError as error:
        say({"refused": str(error.strerror)})
        return
    say({"ready": True})
    while (line := read_line()) == b"sync":
        for target in targets:
            synchronize(target.descriptor)
        say({"synchronized": True})
    if line == b"freeze":
        freeze = Freeze(targets, unreachable)
        try:
            hold(freeze, float(order["seconds_max"]))
        finally:
            freeze.end()
    with contextlib.suppress(OSError):  # why: the agent's next start finds nothing frozen, and removes it
        os.unlink(order["record"])


def open_all(file_systems: list[list[tuple[int, str]]]) -> tuple[list[Target], dict[str, str]]:
    """What can be opened, and by path why the rest cannot: others' mounts, or a service's own places, may hide it."""
    targets, unreachable = [], {}
    for places in file_systems:
        try:
            targets.append(Target([(mount, path) for mount, path in places]))
        except OSError as error:
            unreachable[places[0][1]] = str(error.strerror)
    return targets, unreachable


def hold(freeze: Freeze, seconds_max: float) -> None:
    """From the first freeze to the last thaw."""
    freeze.begin()
    waiting = [0, freeze.done_descriptor]
    cause = ""
    while not cause:
        left = freeze.began + seconds_max - time.monotonic()
        ready = select.select(waiting, [], [], max(left, 0.0))[0]
        if not ready:
            cause = "deadline"
        elif freeze.done_descriptor in ready:
            waiting.remove(freeze.done_descriptor)
            if freeze.reason:
                cause = "failed"
            else:
                say({"frozen": True, "unfrozen": freeze.unfrozen, "reason": ""})
        else:
            cause = "told" if read_line() == b"thaw" else "agent gone"
    freeze.end()
    if freeze.done_descriptor in waiting or cause == "failed":
        say({"frozen": False, "unfrozen": freeze.unfrozen, "reason": freeze.reason or "the time was up"})
    times = {"began": freeze.began, "thawing": freeze.thawing, "ended": freeze.ended}
    say({"thawed": cause, **times, "lost": freeze.lost})


def lock_memory() -> None:
    """Raises OSError."""
    threading.stack_size(THREAD_STACK_BYTES)
    library = ctypes.CDLL(None, use_errno=True)
    if library.mlockall(MEMORY_NOW_AND_LATER):
        number = ctypes.get_errno()
        raise OSError(number, f"memory cannot be locked ({os.strerror(number)}): RLIMIT_MEMLOCK is too low")


def mount_of(descriptor: int) -> int:
    """The kernel's number of the mount that a file was opened in."""
    with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as file:
        return int(next(line.split()[1] for line in file if line.startswith("mnt_id:")))


def synchronize(descriptor: int) -> None:
    """An error is the freeze's to find again: it synchronizes as well."""
    ctypes.CDLL(None).syncfs(descriptor)


def read_line() -> bytes:
    """Empty at the end of the input. Unbuffered: select() has to see what is left."""
    line = b""
    while not line.endswith(b"\n"):
        found = os.read(0, 1)
        if not found:
            return b""
        line += found
    return line.strip()


def say(message: dict[str, Any]) -> None:
    try:
        os.write(1, json.dumps(message).encode() + b"\n")
    except OSError:
        return  # why: the agent is gone; what is frozen is thawed all the same


if __name__ == "__main__":
    main()
