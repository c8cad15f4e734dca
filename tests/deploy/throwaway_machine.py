"""This machine's Debian as one that may be spoiled: its root below an overlay, in name spaces of its own.

Invariant: nothing that runs in it changes a file of this machine or outlives the call; nor opens a port of it, unless
the machine was made to share its network. What it writes lies in the upper directory and is kept from call to call.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

SHARED: Final = "/mnt"
"""Where the shared directory is seen inside."""

_BEGIN = """
set -e
mount --make-rprivate /
mount -t overlay overlay -o lowerdir=/,upperdir="$UPPER",workdir="$WORK" "$ROOT"
mount -t proc proc "$ROOT/proc"
mount --rbind /dev "$ROOT/dev"
mount --rbind /sys "$ROOT/sys"
mount -t tmpfs tmpfs "$ROOT/tmp"
mount -t tmpfs tmpfs "$ROOT/run"
mount --bind "$SHARED" "$ROOT/mnt"
ip link set lo up
exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 HOME=/root \
  DEBIAN_FRONTEND=noninteractive chroot "$ROOT" /bin/bash -c "$SCRIPT"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ThrowawayMachine:
    """directory: holds it, 1 GiB and more when packages are installed. shared: what is seen under /mnt."""

    directory: Path
    shared: Path
    shares_network: bool = False

    @property
    def upper(self) -> Path:
        """What was changed in it."""
        return self.directory / "upper"

    def __post_init__(self) -> None:
        for name in ("upper", "work", "root"):
            (self.directory / name).mkdir(parents=True)

    def run(self, script: str, *, shared: Path | None = None) -> str:
        """Runs a bash script in it as root, `set -euo pipefail`: what it says. Fails the test if the script fails.

        shared: seen under /mnt instead of the machine's own.
        """
        done = subprocess.run(
            self._command(),
            env=self._environment(script, shared),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, f"{script}\n--- said:\n{done.stdout}"
        return done.stdout

    @contextmanager
    def running(self, script: str, *, log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """Runs a bash script as `run` does, for the length of the `with` block; all that it started is killed then.

        log: takes what it says.
        """
        with log.open("wb") as file:
            # why setpriv: it shall not outlive a test run that is killed either
            command, environment = ["setpriv", "--pdeathsig=KILL", *self._command()], self._environment(script, None)
            process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
            try:
                yield process
            finally:
                process.kill()
                process.wait()

    def _command(self) -> list[str]:
        name_spaces = ["--mount", "--ipc", "--uts", "--pid", *([] if self.shares_network else ["--net"])]
        return ["unshare", *name_spaces, "--fork", "--kill-child", "bash", "-c", _BEGIN]

    def _environment(self, script: str, shared: Path | None) -> dict[str, str]:
        return os.environ | {
            "UPPER": str(self.upper),
            "WORK": str(self.directory / "work"),
            "ROOT": str(self.directory / "root"),
            "SHARED": str(shared or self.shared),
            "SCRIPT": f"set -euo pipefail\n{script}",
        }

    def changed(self, *, apart_from: tuple[str, ...] = ()) -> Iterator[str]:
        """Every path that differs from this machine's (made, altered or removed), apart from those below the given."""
        for folder, _, files in os.walk(self.upper):
            for name in files:
                path = "/" + os.path.relpath(os.path.join(folder, name), self.upper)
                if not path.startswith(apart_from):
                    yield path

    def folders(self) -> Iterator[str]:
        """Every directory that this machine does not have."""
        for folder, _, _ in os.walk(self.upper):
            path = "/" + os.path.relpath(folder, self.upper)
            if not os.path.isdir(path):
                yield path


def need_throwaway_machine(directory: Path) -> None:
    """Goes on only where one can be made: root, name spaces, overlay; no package brings them, so CI skips too."""
    if os.geteuid() != 0:
        pytest.skip("must be root to install packages into a throwaway machine")
    probe = ThrowawayMachine(directory=directory, shared=directory)
    try:
        probe.run("true")
    except AssertionError as error:
        pytest.skip(f"no throwaway machine can be made here: {error}")
