"""EIO and ENOSPC instead of system calls: once, again and again, or for a while; then perhaps a kill or a power cut at
once, which shows whether anything was acknowledged in spite of an error.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from runtime.exit_codes import ExitCode
from tests.torture.checks import ENDS_IN_ORDER, expect_orderly_end, require
from tests.torture.kills import RECOVERY_CALLS_MAX, TracedRecovery, partial_of, wait_for_end
from tests.torture.torment import Need, Torment
from tests.torture.tortured_site import PROGRAM_NAMES
from tests.torture.tracing import Injection, attached, injected_count

ERRORS_OF_KIND: Final = {
    "write": (errno.EIO, errno.ENOSPC),
    "synchronize": (errno.EIO, errno.ENOSPC),
    "allocate": (errno.EIO, errno.ENOSPC),
    "open": (errno.EIO, errno.ENOSPC),
    "rename": (errno.EIO, errno.ENOSPC),
    "link": (errno.EIO, errno.ENOSPC),
    "unlink": (errno.EIO,),
    "read": (errno.EIO,),
}
KINDS: Final = {
    "agent": ("write", "write", "synchronize", "synchronize", "open", "read", "read"),
    "process-server": ("write", "write", "synchronize", "synchronize", "link", "unlink", "allocate", "open", "read"),
    "config-server": ("write", "synchronize", "synchronize", "read", "unlink", "allocate"),
}
NOT_AT_START: Final = ("open", "read")
"""Of an interpreter that cannot read itself nothing is to be learned."""
CALLS_MAX: Final = 6
STEP_MAX: Final = 3
SECONDS_MIN: Final = 0.8
SECONDS_MAX: Final = 2.5
START_SECONDS: Final = 4.0


class DiskErrors(Torment):
    """Of one program, at its start or at work, while the source changes."""

    kind = "I/O errors"
    needs = frozenset({Need.STRACE})

    def arrange(self) -> str:
        self._name = self.draw.choice((*PROGRAM_NAMES, "agent", "process-server", "process-server"))
        self._at_start = self.draw.random() < 0.25
        kinds = [kind for kind in KINDS[self._name] if not (self._at_start and kind in NOT_AT_START)]
        kind = self.draw.choice(kinds)
        first = 1 + int(CALLS_MAX * self.draw.random() ** 2)
        step = self.draw.randint(1, STEP_MAX)
        when = self.draw.choice((f"{first}", f"{first}+{step}", f"{first}+{step}", f"{first}+", "1+"))
        self._injection = Injection(kind=kind, when=when, error=self.draw.choice(ERRORS_OF_KIND[kind]))
        self._seconds = self.draw.uniform(SECONDS_MIN, SECONDS_MAX)
        endings = ["nothing", "nothing", "kill"]
        if self.site.disks:
            endings += ["power cut", "power cut"]
        self._ending = self.draw.choice(endings)
        start = "starting" if self._at_start else "at work"
        return f"{self._name} {start}: {self._injection} for {self._seconds:.1f} s, then {self._ending}"

    def run(self) -> None:
        output = self.site.root / "strace-errors"
        output.unlink(missing_ok=True)
        server = self.site.programs[self._name]
        with self.site.busy(self.draw):
            self.site.look()
            with self._injected(output):
                wait_for_end(server, self._seconds)
                if self._ending == "power cut":
                    self.site.cut_power([self._name])
                    self.counts["power cut after an error"] += 1
            expect_orderly_end(server)
            if self._ending == "kill" or (self._at_start and server.is_running):
                self.site.kill(self._name)
                self.counts["kill at an instant"] += 1
        self.counts[f"{errno.errorcode[self._injection.error]} at {self._injection.kind} of {self._name}"] += (
            injected_count(output)
        )
        if server.ended_with not in (None, -9):
            self.counts[f"orderly end of {self._name}"] += 1

    @contextmanager
    def _injected(self, output: Path) -> Iterator[None]:
        server = self.site.programs[self._name]
        if not self._at_start:
            with attached(server.process_id, self._injection, output):
                yield
            return
        server.stop()
        server.start(wait=False, under=self._injection.starting(output))
        deadline = time.monotonic() + START_SECONDS
        wait_for_end(server, max(0.0, deadline - time.monotonic() - self._seconds))
        yield


class RecoveryErrors(TracedRecovery):
    """A recovery that cannot write, synchronize or read ends with an error and leaves nothing."""

    kind = "recovery I/O errors"

    def arrange(self) -> str:
        kind = self.draw.choice(("write", "synchronize", "read", "rename", "allocate"))
        first = 1 + int(RECOVERY_CALLS_MAX * self.draw.random() ** 2)
        when = self.draw.choice((f"{first}", f"{first}+", "1+"))
        self._injection = Injection(kind=kind, when=when, error=self.draw.choice(ERRORS_OF_KIND[kind]))
        return f"recovery: {self._injection}"

    def run(self) -> None:
        self._target = self.site.root / "recovered-under-errors"
        finished = self.recover(self._injection, self._target)
        label = f"{errno.errorcode[self._injection.error]} at {self._injection.kind} of recovery"
        self.counts[label] += self.injected
        documented = finished.exit_code in ExitCode.__members__.values()
        require(ENDS_IN_ORDER, documented, f"recovery ended with {finished.exit_code}: {finished.stderr[-2000:]}")
        is_told = self.injected > 0 or finished.exit_code == ExitCode.OK
        require(ENDS_IN_ORDER, is_told, f"recovery ended with {finished.exit_code} unhurt: {finished.stderr[-2000:]}")

    def verify(self) -> None:
        left = partial_of(self._target)
        require(ENDS_IN_ORDER, not left.exists(), f"a failed recovery left {left}")
        self.recover_undisturbed(self._target)
