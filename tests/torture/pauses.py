"""SIGSTOP: a program stands still with everything that it holds, and goes on as if nothing had been."""

from __future__ import annotations

import signal
import time
from typing import Final

from tests.torture.torment import Torment
from tests.torture.tortured_site import PROGRAM_NAMES

SECONDS_MIN: Final = 0.3
SECONDS_MAX: Final = 4.0
LONG_SHARE: Final = 0.15
"""Of the pauses that last as long as one may."""


class Pause(Torment):
    """One program, or several that stop and go on apart."""

    kind = "pause"

    def arrange(self) -> str:
        self._names = self.draw.sample(PROGRAM_NAMES, k=self.draw.choice((1, 1, 2)))
        self._seconds = self.draw.uniform(SECONDS_MIN, SECONDS_MAX)
        if self.draw.random() < LONG_SHARE:
            self._seconds = max(self._seconds, self.draw.uniform(self.seconds_max / 2, self.seconds_max))
        return f"{' and '.join(self._names)} for {self._seconds:.1f} s each"

    def run(self) -> None:
        servers = [self.site.programs[name] for name in self._names]
        with self.site.busy(self.draw):
            self.site.look()
            try:
                for server in servers:
                    server.signal(signal.SIGSTOP)
                    time.sleep(self._seconds / len(servers))
            finally:
                for server in servers:
                    if server.is_running:
                        server.signal(signal.SIGCONT)
                        time.sleep(SECONDS_MIN)
        self.counts["pause"] += len(servers)
        if self._seconds > SECONDS_MAX:
            self.counts["long pause"] += 1
