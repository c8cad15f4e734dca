"""kill -9 at the N-th system call of a kind: of a server at its start or at work, of a recovery."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Final

from recovery.image_writer import PARTIAL_SUFFIX
from runtime.exit_codes import ExitCode
from tests.scenarios.disks import digest_of
from tests.scenarios.processes import COMMAND_SECONDS, POLL_SECONDS, PROGRAMS, Finished, Server, clean_environment
from tests.torture.checks import (
    ENDS_IN_ORDER,
    POINT_IS_EXACT,
    InvariantBroken,
    breaks,
    expect_orderly_end,
    fitting_digests,
    require,
)
from tests.torture.torment import Need, Torment
from tests.torture.tortured_site import PROGRAM_NAMES
from tests.torture.tracing import Injection, attached, injected_count

KINDS_AT_WORK: Final = {
    "agent": ("write", "synchronize", "open", "read", "send"),
    "process-server": (
        "write", "write", "synchronize", "synchronize", "link", "unlink", "unlink", "allocate", "open", "read", "send",
    ),
    "config-server": ("write", "synchronize", "send"),
}  # fmt: skip
"""What each does often enough that waiting for it is worth it."""
KINDS_AT_START: Final = {
    "agent": ("write", "synchronize", "rename", "unlink", "send"),
    "process-server": ("write", "synchronize", "rename", "unlink", "allocate", "link", "send"),
    "config-server": ("write", "synchronize", "rename", "unlink", "allocate", "send"),
}
STRIKES_MAX: Final = 3
CALLS_MAX: Final = 12
WAIT_SECONDS: Final = 2.0
START_SECONDS: Final = 5.0
"""For a call at work or at the start; when it does not come, the kill comes at that instant instead."""


class Kill(Torment):
    """Servers, one after the other or the same again and again, while the source changes."""

    kind = "kill"
    needs = frozenset({Need.STRACE})

    def arrange(self) -> str:
        self._strikes = []
        for _ in range(self.draw.randint(1, STRIKES_MAX)):
            name = self.draw.choice((*PROGRAM_NAMES, "process-server"))
            at_start = self.draw.random() < 0.35
            kinds = (KINDS_AT_START if at_start else KINDS_AT_WORK)[name]
            # why: small numbers more often, because the rarer calls come only a few times
            when = str(1 + int(CALLS_MAX * self.draw.random() ** 2))
            self._strikes.append((name, at_start, Injection(kind=self.draw.choice(kinds), when=when)))
        return ", then ".join(
            f"{name} {'starting' if start else 'at work'}: {one}" for name, start, one in self._strikes
        )

    def run(self) -> None:
        with self.site.busy(self.draw):
            for number, (name, at_start, injection) in enumerate(self._strikes):
                self.site.look()
                self._strike(name, at_start, injection, self.site.root / f"strace-{number}")

    def _strike(self, name: str, at_start: bool, injection: Injection, output: Path) -> None:
        server = self.site.programs[name]
        if at_start:
            if server.is_running:
                self.site.kill(name)
                self.counts["kill at an instant"] += 1
            server.start(wait=False, under=injection.starting(output))
            wait_for_end(server, START_SECONDS)
        else:
            self.site.start_what_ended()
            with attached(server.process_id, injection, output):
                wait_for_end(server, WAIT_SECONDS)
        if server.is_running:
            self.site.kill(name)
            self.counts["kill at an instant"] += 1
        elif server.ended_with == -9:
            self.site.abrupt_ends += 1
            self.counts[f"kill at {injection.kind} of {name}"] += 1
        expect_orderly_end(server)


def wait_for_end(server: Server, seconds: float) -> None:
    """Returns when it has ended, or after that time."""
    deadline = time.monotonic() + seconds
    while server.is_running and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def partial_of(target: Path) -> Path:
    """What an unfinished recovery leaves."""
    return target.with_name(f"{target.name}{PARTIAL_SUFFIX}")


RECOVERY_KINDS: Final = ("write", "synchronize", "rename", "read", "allocate", "open")
RECOVERY_CALLS_MAX: Final = 12


class TracedRecovery(Torment):
    """A recovery under strace; what it leaves must be nothing, or the whole disk."""

    needs = frozenset({Need.STRACE})

    def recover(self, injection: Injection, target: Path) -> Finished:
        """What became of it; never half a disk under the target's name."""
        site, output = self.site.site, self.site.root / "strace-recovery"
        output.unlink(missing_ok=True)
        # why: an interpreter that cannot read its own libraries teaches nothing
        read = [path for path in site.store_directory.rglob("*.*") if path.is_file()]
        command = (
            *injection.starting(output, only=read if injection.kind == "read" else ()),
            *(str(PROGRAMS / "farpoint"), "recover", "--disk", self.site.disk, "--to", str(target), "--json"),
            *("--store", site.store_url, "--recovery-key", str(site.recovery_key)),
        )
        done = subprocess.run(
            command,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        finished = Finished(command=command, exit_code=done.returncode, stdout=done.stdout, stderr=done.stderr)
        self.injected = injected_count(output)
        require(ENDS_IN_ORDER, "Traceback" not in done.stderr, f"recovery with {injection}: {done.stderr[-3000:]}")
        if target.exists():
            self.check_exact(target)
            target.unlink()
        return finished

    def check_exact(self, target: Path) -> None:
        require(POINT_IS_EXACT, digest_of(target) in fitting_digests(self.site, 0), f"{target} is no version")

    def recover_undisturbed(self, target: Path) -> None:
        with breaks(POINT_IS_EXACT):
            self.site.site.recover(self.site.disk, "latest", target)
            self.check_exact(target)
            target.unlink()


class KillRecovery(TracedRecovery):
    """Nothing of a killed recovery passes for a disk, and the next one says what to do about what is left."""

    kind = "kill recovery"

    def arrange(self) -> str:
        when = str(1 + int(RECOVERY_CALLS_MAX * self.draw.random() ** 2))
        self._injection = Injection(kind=self.draw.choice(RECOVERY_KINDS), when=when)
        return f"recovery: {self._injection}"

    def run(self) -> None:
        self._target = self.site.root / "recovered-under-kill"
        finished = self.recover(self._injection, self._target)
        if finished.exit_code == -9:
            self.counts[f"kill at {self._injection.kind} of recovery"] += 1
        elif finished.exit_code != ExitCode.OK:
            raise InvariantBroken(ENDS_IN_ORDER, f"recovery ended with {finished.exit_code}: {finished.stderr[-2000:]}")

    def verify(self) -> None:
        partial = partial_of(self._target)
        if partial.exists():
            refused = self.site.site.from_storage("recover", "--disk", self.site.disk, "--to", self._target, "--json")
            with breaks(ENDS_IN_ORDER):
                refused.expect(ExitCode.FAILURE, str(partial))
            partial.unlink()
        self.recover_undisturbed(self._target)
